"""Fit the classifier of a weights file to a model's classes: keep it, reorder its rows or initialize a new one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fat.model import FAT
from fat.weights.classes import ClassList
from fat.weights.entries import NAME_SHOWN, listed
from fat.weights.safe_pickle import printable

HEAD = "head."
_NEW = "classifier: newly initialized"


def match_classifier(
    found: Mapping[str, Tensor],
    model: FAT,
    replace: bool,
    *,
    file_classes: ClassList | None,
    model_classes: ClassList | None,
) -> tuple[dict[str, Tensor], str]:
    """Return a file's tensors with the classifier to load into the model, and a line that describes the decision.

    Args:
        found: the file's tensors.
        replace: keep the model's own classifier if the file's has another number of classes.
        file_classes: classes of the file's outputs, if it stores them.
        model_classes: classes of the model's outputs. None: compare only the numbers of classes, and return "" instead
            of a description.

    Raises:
        ValueError: the numbers of classes differ, and `replace` is False.
    """
    weight = found.get(f"{HEAD}weight")
    rows = len(weight) if weight is not None and weight.ndim else 0
    outputs, note = model.num_classes, ""
    if model_classes is not None and outputs:
        order, note = choose_rows(rows, outputs, file_classes, model_classes)
        if order is not None:
            return {n: t[order] if n.startswith(HEAD) and t.shape[:1] == (rows,) else t for n, t in found.items()}, note
    elif rows == outputs:
        return dict(found), ""
    elif outputs and not replace:
        if not rows:
            return dict(found), ""  # strict loading reports it together with all other missing tensors
        raise ValueError(
            f"the weights have {rows} classes, but the model has {outputs}; create the model with num_classes={rows}, "
            "or initialize a new classifier with replace_head=True"
        )
    body = {name: t for name, t in found.items() if not name.startswith(HEAD)}
    return body | {f"{HEAD}{name}": t for name, t in model.head.state_dict().items()}, note


def is_new_classifier(note: str) -> bool:
    """Return whether a message of `load_weights` says that the file's classifier was not loaded."""
    return note.startswith(_NEW)


def difference(before: ClassList, now: ClassList) -> str:
    """Describe in a few words how two class lists differ.

    before: classes of weights or of a checkpoint. now: classes of the data set.
    """
    if before.folders is None or now.folders is None:
        return f"{before.count:,} before, {now.count:,} now; the names of the former are not stored, only their digest"
    known, wanted = set(before.folders), set(now.folders)
    removed = [folder for folder in before.folders if folder not in wanted]
    added = [folder for folder in now.folders if folder not in known]
    if removed or added:
        changes = (("removed", removed), ("added", added))
        return "; ".join(f"{len(names):,} {change}: {listed(names)}" for change, names in changes if names)
    for number, (old, new) in enumerate(zip(before.folders, now.folders, strict=False)):
        if old != new:
            change = f"was {printable(old, NAME_SHOWN)} and is now {printable(new, NAME_SHOWN)}"
            return f"in another order: class {number} {change}"
    return f"{before.count:,} before, {now.count:,} now"


def choose_rows(
    rows: int, outputs: int, file_classes: ClassList | None, model_classes: ClassList
) -> tuple[Tensor | None, str]:
    """Return the file's classifier row of each output (None: initialize a new classifier), and a description.

    Args:
        rows, outputs: outputs of the file's classifier (0: it has none), and of the model's.
        file_classes: classes of the file's outputs, if it stores them.
        model_classes: classes of the model's outputs.
    """
    same = file_classes is None or file_classes.digest == model_classes.digest
    if not rows:
        reason = "have no classifier"
    elif file_classes is not None and not same and not file_classes.has_same_classes(model_classes):
        reason = f"have other classes ({difference(file_classes, model_classes)})"
    elif rows != outputs:
        reason = f"have {rows:,} outputs and the model has {outputs:,}"
    else:
        reason = ""
    if reason:
        return None, f"{_NEW}, because the weights {reason}"
    if file_classes is None:
        return torch.arange(rows), (
            f"classifier: kept, because it has the same number of outputs ({rows:,}); the weights contain no class "
            "names, so it could not be checked that the classes are the same"
        )
    if same:
        return torch.arange(rows), f"classifier: kept; the {model_classes.count:,} classes are the same"
    row_of = {folder: row for row, folder in enumerate(file_classes.folders or ())}
    order = [row_of[folder] for folder in model_classes.folders or ()]
    return torch.tensor([*order, *range(model_classes.count, rows)]), (
        f"classifier: kept, with reordered rows; the {model_classes.count:,} classes are the same in another order"
    )

"""The classifier of a weights file in a model of other outputs: kept, reordered or initialised afresh."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fat.model import FAT
from fat.weights.classes import ClassList
from fat.weights.entries import NAME_SHOWN, listed
from fat.weights.safe_pickle import printable

HEAD = "head."


def match_classifier(
    found: Mapping[str, Tensor], model: FAT, replace: bool, *, known: ClassList | None, wanted: ClassList | None
) -> tuple[dict[str, Tensor], str]:
    """Return a file's tensors with the classifier that the model is to have, and a line that says what was decided.

    replace: whether the model's own may stand in for one of another number of classes. known: classes of the file, if
    it says so. wanted: those of the model; None = only the number of classes is compared, and nothing is said.
    Raises ValueError.
    """
    weight = found.get(f"{HEAD}weight")
    rows = len(weight) if weight is not None and weight.ndim else 0
    outputs, note = model.num_classes, ""
    if wanted is not None and outputs:
        order, note = _decide(rows, outputs, known, wanted)
        if order is not None:
            return {n: t[order] if n.startswith(HEAD) and t.shape[:1] == (rows,) else t for n, t in found.items()}, note
    elif rows == outputs:
        return dict(found), ""
    elif outputs and not replace:
        if not rows:
            return dict(found), ""  # strict loading names it, and what else is missing
        raise ValueError(
            f"weights of {rows} classes, and the model has {outputs}: ask for num_classes={rows}, or for a fresh head "
            "by replace_head=True"
        )
    body = {name: t for name, t in found.items() if not name.startswith(HEAD)}
    return body | {f"{HEAD}{name}": t for name, t in model.head.state_dict().items()}, note


def difference(known: ClassList, wanted: ClassList) -> str:
    """Say in a few words how the classes of a model and of a data set differ."""
    if known.folders is None or wanted.folders is None:
        return f"{known.count:,} before, {wanted.count:,} now, and the former are known by a digest alone"
    before, now = set(known.folders), set(wanted.folders)
    gone = [folder for folder in known.folders if folder not in now]
    new = [folder for folder in wanted.folders if folder not in before]
    if gone or new:
        facts = [f"{len(names):,} {word}: {listed(names)}" for word, names in (("gone", gone), ("new", new)) if names]
        return "; ".join(facts)
    for number, (old, folder) in enumerate(zip(known.folders, wanted.folders, strict=False)):
        if old != folder:
            return f"another order: class {number} was {printable(old, NAME_SHOWN)}, is {printable(folder, NAME_SHOWN)}"
    return f"{known.count:,} before, {wanted.count:,} now"


def _decide(rows: int, outputs: int, known: ClassList | None, wanted: ClassList) -> tuple[Tensor | None, str]:
    """Return which row of the file's classifier each output takes (None = none of them), and a line that says so."""
    same = known is None or known.digest == wanted.digest
    if not rows:
        fault = "have no classifier"
    elif known is not None and not same and not known.has_same_classes(wanted):
        fault = f"are of other classes ({difference(known, wanted)})"
    elif rows != outputs:
        fault = f"have {rows:,} outputs, and {outputs:,} are wanted"
    else:
        fault = ""
    if fault:
        return None, f"classifier: initialised afresh, because the weights {fault}"
    if known is None:
        return torch.arange(rows), (
            f"classifier: kept, because its number of outputs, {rows:,}, is the same; the weights hold no class names, "
            "so nothing shows that they are the same classes"
        )
    if same:
        return torch.arange(rows), f"classifier: kept, of the same {wanted.count:,} classes"
    row_of = {folder: row for row, folder in enumerate(known.folders or ())}
    order = [row_of[folder] for folder in wanted.folders or ()]
    return torch.tensor([*order, *range(wanted.count, rows)]), (
        f"classifier: kept, its rows reordered: the same {wanted.count:,} classes come in another order"
    )

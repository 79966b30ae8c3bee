"""The classes of a data set among the outputs of a model, by folder name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import fat
from fat.weights.entries import listed
from shards.errors import UserError


def map_classes(
    known: fat.ClassList | None, outputs: int, wanted: fat.ClassList, *, model: Path, data: Path
) -> tuple[list[int] | None, list[str]]:
    """Find the output of each class of a data set.

    Args:
        known: classes of the model; None = its weights hold no class names.
        outputs: of the model.
        wanted: classes of the data set.
        model, data: for messages.

    Returns:
        The output of each class, None = output i is class i, and further outputs take part as in training; and what a
        person must know to read the figures, nothing where model and set have the same classes in one order.

    Raises:
        UserError: the set has classes that the model does not know, or that cannot be compared.
    """
    _check_unique(wanted, data)
    if known is None:
        if outputs != wanted.count:
            raise UserError(
                f"{model}: a model of {outputs:,} classes without class names, and {data} has {wanted.count:,} "
                "classes; give the data set that it was trained on"
            )
        return None, [
            f"{model} holds no class names: nothing shows that its {outputs:,} outputs are the classes of {data}, "
            "in their order; if they are not, the accuracy means nothing"
        ]
    if known.count > outputs:
        raise UserError(f"{model}: {known.count:,} class names for {outputs:,} outputs; export the weights again")
    if known.digest == wanted.digest:
        return None, []
    if known.folders is None or wanted.folders is None:
        raise UserError(
            f"{model}: not trained on the classes of {data}, or on these in another order: it holds only a digest of "
            f"its {known.count:,} class names, which differs; evaluate the run folder, whose classes.json has the names"
        )
    _check_unique(known, model)
    output_of = {folder: output for output, folder in enumerate(known.folders)}
    unknown = [folder for folder in wanted.folders if folder not in output_of]
    if unknown:
        raise UserError(
            f"{model}: does not know {len(unknown):,} of the {wanted.count:,} classes of {data}: {listed(unknown)}; "
            f"its own {known.count:,} are {listed(known.folders)}; give a data set whose class folders have these names"
        )
    mapped = [output_of[folder] for folder in wanted.folders]
    if wanted.count == known.count:
        return mapped, [f"{data} has the model's classes in another order; mapped by folder name"]
    return mapped, [
        f"{data} has {wanted.count:,} of the model's {known.count:,} classes: only their outputs are compared, so the "
        "accuracy is higher than among all classes"
    ]


def _check_unique(classes: fat.ClassList, where: Path) -> None:
    repeated = [folder for folder, count in Counter(classes.folders or ()).items() if count > 1]
    if repeated:
        raise UserError(f"{where}: several classes of one folder name ({listed(repeated)}); shard the source again")

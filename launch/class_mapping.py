"""Map the classes of a data set to the outputs of a model, by folder name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import fat
from fat.weights.entries import listed
from shards.errors import UserError


def map_classes(
    trained: fat.ClassList | None, outputs: int, evaluated: fat.ClassList, *, model: Path, data: Path
) -> tuple[list[int] | None, list[str]]:
    """Find the model output of each class of a data set.

    Args:
        trained: classes of the model; None: its weights have no class names.
        outputs: number of outputs of the model.
        evaluated: classes of the data set.
        model, data: paths to show in messages.

    Returns:
        The output of each class (None: output i is class i, and all outputs are compared), and notes that the reader of
        the results must know. The notes are empty if model and set have the same classes in the same order.

    Raises:
        UserError: the set has classes that the model was not trained on, or the classes cannot be compared.
    """
    _check_unique(evaluated, data)
    if trained is None:
        if outputs != evaluated.count:
            raise UserError(
                f"{model}: has {outputs:,} outputs and no class names, but {data} has {evaluated.count:,} classes; use "
                "the data set that the model was trained on"
            )
        return None, [
            f"{model} has no class names: its {outputs:,} outputs are assumed to be the classes of {data}, in the same "
            "order; otherwise the accuracy is meaningless"
        ]
    if trained.count > outputs:
        raise UserError(f"{model}: {trained.count:,} class names for {outputs:,} outputs; export the weights again")
    if trained.digest == evaluated.digest:
        return None, []
    if trained.folders is None or evaluated.folders is None:
        raise UserError(
            f"{model}: its classes differ from those of {data}, or have another order; it contains only a digest of "
            f"its {trained.count:,} class names; evaluate the run folder, whose classes.json has the names"
        )
    _check_unique(trained, model)
    output_of = {folder: output for output, folder in enumerate(trained.folders)}
    unknown = [folder for folder in evaluated.folders if folder not in output_of]
    if unknown:
        raise UserError(
            f"{model}: was not trained on {len(unknown):,} of the {evaluated.count:,} classes of {data}: "
            f"{listed(unknown)}; its {trained.count:,} classes are {listed(trained.folders)}; use a data set whose "
            "class folders have these names, or evaluate some of them with --classes-subset"
        )
    mapped = [output_of[folder] for folder in evaluated.folders]
    if evaluated.count == trained.count:
        return mapped, [f"{data} has the model's classes in another order; mapped by folder name"]
    return mapped, [
        f"{data} has {evaluated.count:,} of the model's {trained.count:,} classes: only their outputs are compared, so "
        "the accuracy is higher than with all classes"
    ]


def _check_unique(classes: fat.ClassList, where: Path) -> None:
    repeated = [folder for folder, count in Counter(classes.folders or ()).items() if count > 1]
    if repeated:
        raise UserError(
            f"{where}: several classes have the same folder name ({listed(repeated)}); convert the source again"
        )

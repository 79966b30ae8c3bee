"""Results of an evaluation: accuracy in total and per class, and the most frequent confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.engine.loss import MAX_TOP5
from launch.monitor.confusion import confusions
from launch.run.evaluation_record import EvaluationRecord
from shards.format.manifest_fields import ClassEntry
from shards.redact import printable

WORST_CLASSES = WORST_CONFUSIONS = 5  # rows that are printed
MAX_CONFUSIONS = 1000  # pairs of classes in the JSON file


def summarize(counts: torch.Tensor, record: EvaluationRecord, entries: Sequence[ClassEntry]) -> dict[str, Any]:
    """Return the results in total and per class, and the confusions.

    Args:
        counts: sums of `BatchResult.counts` per class, [classes, 4].
    """
    seen, top1, top5, loss = counts.sum(dim=0).tolist()
    # Outputs of the model without a class can be predicted, too.
    folders = [entry.folder for entry in entries] + [f"output {i}" for i in range(len(entries), record.info.outputs)]
    by_folder = {
        entry.folder: {
            "name": entry.name,
            "samples": int(row[0]),
            "top1": row[1] / row[0] if row[0] else None,
        }
        for entry, row in zip(entries, counts.tolist(), strict=True)
    }
    return {
        "samples": int(seen),
        "top1": top1 / seen,
        "top5": top5 / seen,
        "loss": loss / seen,
        "classes": by_folder,
        "confusions": [
            {"label": folders[pair.label], "prediction": folders[pair.prediction], "count": pair.count}
            for pair in confusions(record.labels, record.predictions, MAX_CONFUSIONS)
        ],
    }


def show(result: dict[str, Any]) -> None:
    """Print the results, the classes with the lowest accuracy and the most frequent confusions."""
    console = Console(highlight=False)
    classes = result["classes"]
    top5 = f", top-5 {result['top5']:.2%}" if len(classes) > MAX_TOP5 else ""
    console.print(f"top-1 {result['top1']:.2%}{top5}, loss {result['loss']:.4f} over {result['samples']} images")
    wrong = sorted((c["top1"], folder) for folder, c in classes.items() if c["samples"] and c["top1"] < 1)
    worst = wrong[:WORST_CLASSES]
    named = any(classes[folder]["name"] for _, folder in worst)
    columns = ("class", "name", "top-1", "images") if named else ("class", "top-1", "images")
    hardest = Table(*columns, title="hardest classes", title_justify="left")
    for top1, folder in worst:
        name = [Text(printable(classes[folder]["name"] or ""))] if named else []
        hardest.add_row(Text(printable(folder)), *name, f"{top1:.2%}", str(classes[folder]["samples"]))

    def title(folder: str) -> Text:
        name = classes[folder]["name"] if folder in classes else None
        return Text(printable(f"{name} ({folder})" if name else folder))

    pairs = Table("class", "predicted as", "images", title="most frequent confusions", title_justify="left")
    for pair in result["confusions"][:WORST_CONFUSIONS]:
        pairs.add_row(title(pair["label"]), title(pair["prediction"]), str(pair["count"]))
    for table in (hardest, pairs):
        if table.rows:
            console.print(table)

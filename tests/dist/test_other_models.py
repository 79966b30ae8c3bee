"""Training of another model than FAT, from a teacher, on two ranks with every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.trainings import Trainer
from tests.support.launching import lines

MODEL = "tests.support.models:with_classifier"
FEW_STEPS = (
    *("--size", "32", "--augment", "light", "--global-batch", "32", "--epochs", "1", "--warmup-epochs", "0"),
    *("--stop-after", "4", "--log-every", "1", "--ema", "0.9", "--model", MODEL),
)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run, "train")]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["1", "2", "3"])
def test_zero_distils_as_ddp_does(tmp_path: Path, digits: Path, zero: str, train: Trainer) -> None:
    def run(name: str, *options: str, ranks: int = 2) -> Path:
        done = train("--data", digits, "--out", tmp_path / name, *FEW_STEPS, *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    teacher = ("--teacher", MODEL, "--teacher-weights", str(run("teacher", ranks=1)))
    soft = (*teacher, "--distillation", "soft", "--distillation-alpha", "0.9")
    ddp, sharded = run("ddp", "--zero", "0", *soft), run("zero", "--zero", zero, *soft)
    assert losses(sharded) == pytest.approx(losses(ddp), rel=1e-4)
    average, expected = (load_file(path / "weights-ema-last.safetensors") for path in (sharded, ddp))
    assert average.keys() == expected.keys()
    assert all(torch.allclose(average[name], expected[name], atol=1e-3) for name in expected)
    run("zero", "--zero", "0", *soft, "--stop-after", "5")  # the checkpoint does not depend on the stage
    assert len(losses(sharded)) == 5

"""What is chosen on several ranks is chosen by one."""

from __future__ import annotations

import json

from pathlib import Path

import pytest

from tests.dist.launching import free_port, python

SMALL = ("--size", "32", "--global-batch", "32", "--epochs", "1", "--warmup-epochs", "0", "--augment", "light")


@pytest.mark.slow
def test_rank_0_measures_and_all_ranks_take_its_answer(tmp_path: Path, digits: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    script = ["tests/dist/choices_run.py", tmp_path, *SMALL, "--data", digits]
    done = python(tmp_path, *launcher, *script, "--tune")
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    values, sources, figures = first
    assert sources["memory_format"] == "measured now"
    assert "images/s" in figures["memory_format"]
    assert sources["decode_threads"] == "measured now"
    assert [(tmp_path / f"tuned-{rank}.json").exists() for rank in (0, 1)] == [True, False]

    # What rank 1 alone has measured counts for nobody.
    (tmp_path / "tuned-0.json").rename(tmp_path / "tuned-1.json")
    done = python(tmp_path, *launcher, *script)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        values, sources, _ = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert values == {}
        assert set(sources.values()) == {"by default"}

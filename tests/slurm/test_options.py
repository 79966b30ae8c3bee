"""SLURM's own sbatch reads the options of a rendered script; no cluster is needed for that."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from launch.config.data import DataConfig
from launch.config.recipe import Recipe
from launch.config.run import RunConfig
from launch.slurm.job import Submit
from launch.slurm.script import render
from tests.slurm.conftest import need

CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=1
AuthType=auth/munge
"""


def test_sbatch_reads_every_option_unchanged(tmp_path: Path) -> None:
    need("sbatch")
    run = tmp_path / 'it\'s a "run" #1 of 100% $(touch x) `touch x`'
    name, account = "n'a\"m\\e #2 $x", "-a\\"
    recipe = Recipe(run=RunConfig(out=run), data=DataConfig(data="/sets/x"))
    script = tmp_path / "train.sbatch"
    job = Submit(name=name, account=account, nodes="2-3", sbatch=("--comment=a\\ 'b'",))
    script.write_text(render(job, recipe, ["--data", "/sets/x\n#SBATCH --comment=none"]))
    config = tmp_path / "slurm.conf"
    config.write_text(CONFIG)
    # Nobody answers at that port: sbatch says what it has read, and then that it cannot submit it.
    done = subprocess.run(
        ["sbatch", "-vv", str(script)],
        env=os.environ | {"SLURM_CONF": str(config)},
        capture_output=True,
        text=True,
        check=False,
    )
    read = dict(re.findall(r"^sbatch: ([\w-]+) *: (.*)$", done.stderr, re.MULTILINE))
    assert read["job-name"] == name
    assert read["account"] == account
    assert read["comment"] == "a\\ 'b'"
    assert read["nodes"] == "2-3"
    assert read["output"] == f"{str(run).replace('%', '%%')}/slurm/job-%j.out"
    assert not (tmp_path / "x").exists()

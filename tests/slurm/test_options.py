"""The options of a rendered script as SLURM's sbatch parses them, which requires no cluster."""

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


def test_sbatch_parses_every_option_unchanged(tmp_path: Path) -> None:
    need("sbatch")
    run = tmp_path / 'it\'s a "run" #1 of 100% $(touch x) `touch x`'
    name, account = "n'a\"m\\e #2 $x", "-a\\"
    recipe = Recipe(run=RunConfig(out=run), data=DataConfig(data="/sets/x"))
    script = tmp_path / "train.sbatch"
    job = Submit(name=name, account=account, nodes="2-3", sbatch=("--comment=a\\ 'b'",))
    script.write_text(render(job, recipe, ["--data", "/sets/x\n#SBATCH --comment=none"]))
    config = tmp_path / "slurm.conf"
    config.write_text(CONFIG)
    # Nothing listens on that port: sbatch prints the options that it has parsed, then fails to submit.
    done = subprocess.run(
        ["sbatch", "-vv", str(script)],
        env=os.environ | {"SLURM_CONF": str(config)},
        capture_output=True,
        text=True,
        check=False,
    )
    parsed = dict(re.findall(r"^sbatch: ([\w-]+) *: (.*)$", done.stderr, re.MULTILINE))
    assert parsed["job-name"] == name
    assert parsed["account"] == account
    assert parsed["comment"] == "a\\ 'b'"
    assert parsed["nodes"] == "2-3"
    assert parsed["output"] == f"{str(run).replace('%', '%%')}/slurm/job-%j.out"
    assert not (tmp_path / "x").exists()

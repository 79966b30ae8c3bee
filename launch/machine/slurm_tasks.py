"""Let `srun` be the launcher: derive the ranks' environment variables from those of SLURM's tasks."""

from __future__ import annotations

import re
import subprocess
from collections.abc import MutableMapping

from shards.errors import UserError

_FIRST_PORT, _PORTS = 10000, 20000  # as in launch/slurm/train.sbatch


def adopt_slurm_task(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of several.

    Nothing is changed if a launcher has set WORLD_SIZE, or if srun has started only this task. SLURM_STEP_NUM_TASKS is
    missing in a batch script, which is not a task. MASTER_ADDR and MASTER_PORT are kept if they are set.

    Raises:
        UserError: a variable of SLURM is missing or has an unknown form.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if "WORLD_SIZE" in environment or not tasks.isdecimal() or int(tasks) < 2:
        return
    node = _number(environment, "SLURM_NODEID")
    per_node = tasks_per_node(_variable(environment, "SLURM_STEP_TASKS_PER_NODE"))
    if node >= len(per_node):
        raise UserError(f"SLURM_NODEID={node}: expected less than the {len(per_node)} nodes of SLURM's step")
    if "MASTER_ADDR" not in environment:
        first = first_host(_variable(environment, "SLURM_STEP_NODELIST"))
        environment["MASTER_ADDR"] = _address(first) or first
    job = _number(environment, "SLURM_JOB_ID")
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + job % _PORTS))
    environment["RANK"] = str(_number(environment, "SLURM_PROCID"))
    environment["LOCAL_RANK"] = str(_number(environment, "SLURM_LOCALID"))
    environment["LOCAL_WORLD_SIZE"] = str(per_node[node])
    environment["WORLD_SIZE"] = tasks


def tasks_per_node(text: str) -> list[int]:
    """Parse SLURM's list of the tasks on each node: '8(x2),4' -> [8, 8, 4].

    Raises:
        UserError: the text has another form.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected a list such as 8(x2),4")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's node list: 'gpu[07-09,12],x3' -> 'gpu07'."""
    depth, end = 0, len(nodes)
    for at, character in enumerate(nodes):
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            end = at
            break
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes[:end])


def _address(host: str) -> str | None:
    """Return the address that SLURM itself uses for a host; None if scontrol is missing, as in containers."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", host], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"NodeAddr=(\S+)", done.stdout)
    return found[1] if found else None


def _variable(environment: MutableMapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise UserError(
            f"{name}: not set, although srun started several tasks; start the command with srun, or torchrun"
        )
    return environment[name]


def _number(environment: MutableMapping[str, str], name: str) -> int:
    value = _variable(environment, name)
    if not value.isdecimal():
        raise UserError(f"{name}={value}: expected a number")
    return int(value)

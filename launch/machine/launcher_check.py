"""Refuse several processes that srun or mpirun started without a launcher: each would take itself for the only one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shards.errors import UserError

# What starts processes, and the variable in which it says how many. srun's are of the step: SLURM_NTASKS is that of the
# job in a batch script, which is one process (SLURM_PROCID 0). Sources: srun(1), sbatch(1), Open MPI's and MPICH's
# manuals.
_COUNTS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Compare the number of processes with what a launcher says of them; nothing to compare where none was needed.

    Raises:
        UserError: this is one of several processes, and WORLD_SIZE is not set.
    """
    if "WORLD_SIZE" in environment:
        return
    for program, name in _COUNTS.items():
        if _number(environment, name) > 1:
            raise _refusal(program, f"{name}={environment[name]}")
    # Some other tool hands on what only tasks after the first can have.
    if "SLURM_STEP_NUM_TASKS" not in environment and _number(environment, "SLURM_PROCID") > 0:
        raise _refusal("srun", f"SLURM_PROCID={environment['SLURM_PROCID']}")


def _refusal(program: str, fact: str) -> UserError:
    return UserError(
        f"{program} started several tasks ({fact}) and no launcher, which sets RANK and WORLD_SIZE: each would work "
        "alone, on all of the data; use 'python -m launch.submit', or one task per node (srun "
        "--ntasks-per-node=1) that runs 'accelerate launch' (docs/cluster.md); for tasks with runs of their own, set "
        "WORLD_SIZE=1"
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0

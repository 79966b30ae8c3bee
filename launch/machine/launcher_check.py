"""Detect processes started by srun or mpirun without a launcher: each would train alone on all of the data."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shards.errors import UserError

# Variable of a launched process -> (program that sets it, largest value that a single process can have).
# SLURM_STEP_NUM_TASKS counts the tasks of the step; SLURM_NTASKS cannot be used, because a batch script, which is one
# process, has it too. SLURM_PROCID catches tools that pass on only some variables.
# Sources: srun(1), sbatch(1), and the manuals of Open MPI and MPICH.
_LARGEST_ALONE = {
    "SLURM_STEP_NUM_TASKS": ("srun", 1),
    "SLURM_PROCID": ("srun", 0),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", 1),
    "PMI_SIZE": ("mpiexec", 1),
}


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if this is one of several processes and no launcher has set WORLD_SIZE."""
    if "WORLD_SIZE" in environment:
        return
    for name, (program, most) in _LARGEST_ALONE.items():
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > most:
            raise UserError(
                f"{program} started several tasks ({name}={value}) without a launcher that sets RANK and WORLD_SIZE, "
                "so each task would train alone on all of the data; use 'python -m launch.submit', or start one task "
                "per node (srun --ntasks-per-node=1) that runs 'accelerate launch' (docs/slurm.md); if each task is a "
                "separate run, set WORLD_SIZE=1"
            )

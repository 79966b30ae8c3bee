"""Refuse several processes that srun or mpirun started without a launcher: each would take itself for the only one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from shards.errors import UserError

# Variable of a launched process -> what sets it, and the largest value that a process alone can have. srun's number is
# of the step: SLURM_NTASKS is that of the job in a batch script, which is one process. SLURM_PROCID is there where some
# other tool hands variables on. Sources: srun(1), sbatch(1), Open MPI's and MPICH's manuals.
_ALONE = {
    "SLURM_STEP_NUM_TASKS": ("srun", 1),
    "SLURM_PROCID": ("srun", 0),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", 1),
    "PMI_SIZE": ("mpiexec", 1),
}


def check_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Compare the number of processes with what a launcher says of them; nothing to compare where none was needed.

    Raises:
        UserError: this is one of several processes, and WORLD_SIZE is not set.
    """
    if "WORLD_SIZE" in environment:
        return
    for name, (program, most) in _ALONE.items():
        value = environment.get(name, "")
        if value.isdecimal() and int(value) > most:
            raise UserError(
                f"{program} started several tasks ({name}={value}) and no launcher, which sets RANK and WORLD_SIZE: "
                "each would work alone, on all of the data; use 'python -m launch.submit', or one task per node (srun "
                "--ntasks-per-node=1) that runs 'accelerate launch' (docs/cluster.md); for tasks with runs of their "
                "own, set WORLD_SIZE=1"
            )

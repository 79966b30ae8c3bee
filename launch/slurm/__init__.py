"""SLURM jobs: options, batch scripts and their templates."""

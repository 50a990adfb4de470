"""The ranks of a job: rank, size and master address from the launcher's variables.

`python -m dist_looksam.world`, started like a run, prints these on each rank and tries an
all-reduce.
"""

from .launchers import World, slurm_job

__all__ = ["World", "slurm_job"]

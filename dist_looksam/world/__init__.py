"""Which rank this process is, of how many, and where they meet.

`python -m dist_looksam.world`, started as a run would be, prints what each rank sees and tries an
all-reduce.
"""

from dist_looksam.world.launchers import World, slurm_job

__all__ = ["World", "slurm_job"]

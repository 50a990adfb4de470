"""A rank of the tests of train.py: runs the program once for every line of flags.

torchrun --nproc_per_node N train_worker.py cases.json
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dist_looksam import config, fit
from dist_looksam.leave import leave
from dist_looksam.world import World


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # the program takes the group that is there
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        fit.run(config.parse(flags), World.from_env())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)

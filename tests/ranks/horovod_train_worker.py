"""Ranks of Horovod that run train.py once for every line of flags.

horovod_forked.py RANKS horovod_train_worker.py CASES.json
"""

import json
import sys
from pathlib import Path

import torch

from dist_looksam.cli.leave import leave
from dist_looksam.run import train
from dist_looksam.settings import config
from dist_looksam.world import World

torch.set_num_threads(1)
for flags in json.loads(Path(sys.argv[1]).read_text()):
    train.run(config.parse(flags), World.from_env())
leave(0)

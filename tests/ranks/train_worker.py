"""Ranks of the tests of train.py: they run the program once for every line of flags.

python train_worker.py CASES.json     [[ranks, [flags, flags, ...]], ...]
"""

import json
import sys
from pathlib import Path

import forks
import torch

from dist_looksam.run import train
from dist_looksam.settings import config
from dist_looksam.world import World


def run(flags: list[str]) -> None:
    train.run(config.parse(flags), World.from_env())  # the program takes the group that is there


if __name__ == "__main__":
    file = Path(sys.argv[1])
    torch.set_num_threads(1)
    every = json.loads(file.read_text())
    if any("zero" in flags for _, cases in every for flags in cases):
        forks.load_deepspeed()
    for ranks, cases in every:
        forks.play(file.parent, ranks, run, cases)

"""Ranks of the tests of --compile: runs of train.py in which torch.compile makes the same graphs
and no C++ code; each writes counts.json of its graphs.

python compiled_worker.py CASES.json   # {ranks: [flags]}, or [flags] where ranks are started
"""

import json
import sys
from pathlib import Path

import forks
import torch
from torch._dynamo.utils import counters

from dist_looksam.backends import compiled
from dist_looksam.run import train
from dist_looksam.settings import config
from dist_looksam.world import World


def run(flags: list[str]) -> None:
    counters.clear()
    torch._dynamo.reset()
    settings = config.parse(flags)
    train.run(settings, World.from_env())
    if World.from_env().rank == 0:
        found = {name: dict(counters[name]) for name in ("stats", "recompiles", "graph_break")}
        (Path(settings.out) / "counts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    compiled.compile_blocks.__kwdefaults__["backend"] = "aot_eager"
    file = Path(sys.argv[1])
    torch.set_num_threads(1)
    cases = json.loads(file.read_text())
    if isinstance(cases, list):
        for case in cases:
            run(case)
    else:
        forks.load_deepspeed()
        for ranks, of_ranks in cases.items():
            forks.play(file.parent, int(ranks), run, of_ranks)

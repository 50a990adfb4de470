"""A rank of the tests of broken-off steps under Horovod.

horovod_forked.py N abandoned_horovod_worker.py cases.json FOLDER
"""

import json
import sys
from pathlib import Path

import abandoned
import horovod.torch as hvd
import task
import torch
from horovod_worker import open_engine

from dist_looksam import Engine


def run(case: dict) -> list:
    def make(loss: abandoned.Breaking) -> Engine:
        engine = open_engine(case, task.net())
        engine.loss = loss
        return engine

    def part(step: int) -> list:
        return task.part(step, hvd.rank(), hvd.size(), case.get("accumulation", 2))

    return hvd.allgather_object(abandoned.compare(case, make, part), name="ends")


if __name__ == "__main__":
    torch.set_num_threads(1)
    hvd.init()
    for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        result = run(case)
        if hvd.rank() == 0:
            torch.save(result, task.result_file(Path(sys.argv[2]), number))
    hvd.shutdown()

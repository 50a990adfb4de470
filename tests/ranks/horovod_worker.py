"""A rank of the Horovod tests: runs every case of a JSON list, writes what came out.

horovod_forked.py N horovod_worker.py cases.json FOLDER
"""

import json
import sys
from pathlib import Path

import horovod.torch as hvd
import task
import torch
from zero_worker import optimizer_of

from dist_looksam.backends.horovod.sharded import HorovodSharded
from dist_looksam.backends.horovod.whole import Horovod
from dist_looksam.engine import Engine

COUNTED = ("allreduce_async_", "reducescatter_async", "allgather_async")


class Counts:
    """How often each collective of gradients or weights was begun: those with a name of theirs."""

    def __init__(self) -> None:
        self.of = dict.fromkeys(COUNTED, 0)
        for function in COUNTED:
            setattr(hvd, function, self._counting(function, getattr(hvd, function)))

    def _counting(self, function: str, real):
        def counted(*args, **kwargs):
            if str(kwargs.get("name")).startswith(("grad.", "weight.")):
                self.of[function] += 1
            return real(*args, **kwargs)

        return counted

    def take(self) -> list[int]:
        taken = list(self.of.values())
        self.of = dict.fromkeys(COUNTED, 0)
        return taken


def open_engine(case: dict, model: torch.nn.Module) -> Engine:
    optimizer = optimizer_of(case, model)
    how = {"precision": case.get("precision", "fp32")}
    rules = {"loss": task.loss, "clip": case.get("clip"), "ascent": case.get("ascent", "global")}
    rules |= {"m": case.get("m"), "ema": case.get("ema")}
    if case.get("theirs"):  # a script that had Horovod before it had us
        base = hvd.DistributedOptimizer(
            optimizer.base_optimizer, named_parameters=model.named_parameters()
        )
        optimizer.base_optimizer = base
        optimizer._follow_base()
        return Engine(model, optimizer, **rules, **how)
    how["compression"] = case.get("compression", "none")
    kind = HorovodSharded if case["stage"] else Horovod
    return Engine(kind(model, optimizer, **how), **rules)


def run(case: dict, counts: Counts) -> dict:
    model = task.net()
    if hvd.rank():  # rank 0's weights are everybody's
        torch.nn.init.ones_(model.first.weight)
    engine = open_engine(case, model)
    counts.take()
    rows, made = [], []
    for step in range(task.STEPS):
        parts = task.part(step, hvd.rank(), hvd.size(), case.get("accumulation", 2))
        done = engine.step(parts)
        numbers = (done.loss, done.seen.grad_norm, done.seen.update_norm)
        rows.append([done.look, *map(float, numbers)])
        made.append(counts.take())
    state = engine.optimizer.state.values()
    kept = sum(s["g_v"].numel() * s["g_v"].element_size() for s in state if "g_v" in s)
    flat = torch.cat([p.detach().view(-1) for p in model.parameters()])
    spread = hvd.allgather(flat.view(1, -1), name="spread")
    result = {"weights": engine.backend.full_weights()}
    if "ema" in case:
        with engine.averaged():
            result["ema"] = engine.backend.full_weights()
        again = engine.backend.full_weights() or {}
        result["same"] = all(torch.equal(w, result["weights"][n]) for n, w in again.items())
    return {
        **result,
        "rows": rows,
        "made": made,
        "gv_bytes": hvd.allgather_object(kept, name="kept"),
        "alike": bool((spread == spread[0]).all()),
    }


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    hvd.init()
    counts = Counts()
    for number, case in enumerate(cases):
        result = run(case, counts)
        if hvd.rank() == 0:
            torch.save(result, task.result_file(folder, number))
    hvd.shutdown()


if __name__ == "__main__":
    main()

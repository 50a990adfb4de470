"""A rank of the FSDP2 tests: runs every case of a JSON list, writes what came out.

python fsdp_worker.py RANKS FOLDER     the cases: FOLDER/cases.json
"""

from datetime import timedelta

import cases
import fsdp_disturbed
import fsdp_mistakes
import task
import torch
import torch.distributed as dist
from ddp_worker import Spoilt
from fsdp_disturbed import Stop
from fsdp_nets import twin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from zero_worker import optimizer_of

from dist_looksam import Engine
from dist_looksam.measure.traffic import counted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sharded(case: dict) -> torch.nn.Module:
    """As a user does it: own units, own policy, own mesh."""
    model, ranks = task.net(), dist.get_world_size()
    copies = case.get("copies", 1)  # ranks that hold the same rows
    shape = (ranks,) if copies == 1 else (copies, ranks // copies)
    policy = MixedPrecisionPolicy()
    if "precision" in case:
        low = DTYPES[case["precision"]]
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    names = ("copies", "rows")[-len(shape) :]
    mesh = init_device_mesh(task.DEVICE, shape, mesh_dim_names=names)
    if case.get("blocks"):  # Engine averages over copies
        mesh = mesh["rows"]
    how = {"mesh": mesh, "mp_policy": policy}
    for unit in (model.first, model.second) if case.get("units", True) else ():
        fully_shard(unit, **how)
    return fully_shard(model, **how)


def engine_of(case: dict, loss=task.loss, before=None) -> Engine:
    model = sharded(case)
    if before is not None:
        before(model)
    how = {x: case[x] for x in ("clip", "precision", "m") if x in case}
    optimizer = optimizer_of(case, model)
    for group in optimizer.param_groups:
        group["rho"] = case.get("rho", group["rho"])
    return Engine(model, optimizer, loss, **how)


def part(step: int, accumulation: int = 2) -> list:
    return task.part(step, dist.get_rank(), dist.get_world_size(), accumulation)


def held(engine: Engine) -> list[torch.Tensor]:
    """Copies of all that this rank keeps between steps."""
    backend = engine.backend
    found = [x for slots in backend.slots() for _, x in sorted(slots.items())]
    counts = [s["step"] for s in engine.optimizer.state.values() if "step" in s]
    return [x.clone() for x in [*found, *counts]]


def same(before: list, after: list) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


def compare(case: dict) -> dict:
    """Train; weights, what each step reported, bytes of g_v."""
    engine = engine_of(case)
    rows = []
    for step in range(task.STEPS):
        done = engine.step(part(step, case.get("accumulation", 2)))
        numbers = (done.loss, done.seen.grad_norm, done.seen.update_norm)
        rows.append([done.look, *map(float, numbers)])
    memory = engine.backend.gather(engine.backend.memory())
    return {"weights": engine.backend.full_weights(), "rows": rows, "memory": memory}


def count(case: dict) -> dict:
    """Per kind of step, what this rank puts into collectives; small calls apart."""
    base = {**case, "optimizer": case["base_name"]}
    found = {}
    for name, asked in (("base", base), ("own", case)):
        engine = engine_of(asked)
        for step in range(3):
            engine.step(part(step))
        for step in (3, 4):  # a look, and none
            with counted() as traffic:
                look = engine.step(part(step)).look
            row = name if name == "base" else "look" if look else "reuse"
            bulk = 3 * len(engine.backend.pieces())
            found[row] = {"total": traffic.total(), "bulk": traffic.elements(above=bulk)}
    return found


def overflow(case: dict) -> dict:
    """Step 0 looks; in step 3, also a look, one rank overflows in the given pass."""
    # Passes of steps 0, 1, 2, each of one micro-batch.
    before_it = (1 if case["optimizer"] == "msam" else 2) + 1 + 1
    loss = Spoilt(before_it + case["overflow"])
    engine = engine_of(case, loss)
    for step in range(3):
        engine.step(part(step, 1))
    before = held(engine)
    done = engine.step(part(3, 1))
    kept, skipped = same(before, held(engine)), not bool(done.seen.finite)
    again = engine.step(part(4, 1))
    scaler = engine.backend.scaler
    own = [kept, skipped, again.look, bool(again.seen.finite), scaler.scale if scaler else None]
    return {"everyone": engine.backend.gather(own)}


def interrupted(case: dict) -> dict:
    """A pass that raises, in forward, in backward or after this unit's forward, at the first step
    or at a later look; then the step anew."""
    ends, calls = [], 0
    where, first = case["where"], case.get("first", False)

    def loss(model, samples):
        nonlocal calls
        calls += 1
        if calls != fails or where == "loss":
            value = task.loss(model, samples)
            if calls == fails:
                raise Stop
            return value
        unit = model.first if where == "backward" else model.norm
        hook = fsdp_disturbed.raises_after(unit, backward=where == "backward")
        try:
            return task.loss(model, samples)
        finally:
            hook.remove()

    at = 0 if first else 3
    for fails in (0, (0 if first else 2 + 1 + 1) + case["pass"]):
        calls = 0
        engine = engine_of(case, loss)
        for step in range(at):
            engine.step(part(step, 1))
        before = held(engine)
        if fails:
            try:
                engine.step(part(at, 1))
            except Stop:
                pass
            else:
                raise AssertionError("the pass did not raise")
            ends.append(same(before, held(engine)))
        for step in range(at, at + 3):
            engine.step(part(step, 1))
        ends.append(held(engine))
    return {"back": ends[1], "same": same(ends[0], ends[2])}


def disturbed(case: dict) -> dict:
    """Whether some steps end as they do where the caller does nothing in between."""
    name, ends = case["how"], []
    for does in (False, True):
        engine = engine_of(case, before=fsdp_disturbed.BEFORE.get(name) if does else None)
        for step in range(6):
            engine.step(part(step))
            if does and name in fsdp_disturbed.BETWEEN:
                fsdp_disturbed.BETWEEN[name](engine)
        ends.append(held(engine))
    return {"everyone": engine.backend.gather(same(*ends))}


def evaluation(case: dict) -> dict:
    """Logits between steps are those of the weights, leave no trace in the steps after, and nothing
    gathered."""
    whole, ends, near, gathered = task.net(), [], [], 0
    for evaluates in (False, True):
        engine = engine_of(case)
        for step in range(4):
            engine.step(part(step))
            if evaluates:
                x, _ = task.batch(100)
                logits = engine.backend.evaluate(lambda model, x=x: model(x))
                gathered += sum(not isinstance(p, DTensor) for p in engine.module.parameters())
                box = [engine.backend.full_weights()]
                dist.broadcast_object_list(box, 0)
                whole.load_state_dict(box[0])
                near.append(float((whole(x) - logits).detach().abs().max()))
        ends.append(held(engine))
    return {"same": same(*ends), "near": max(near), "gathered": gathered}


def twins(case: dict) -> dict:
    """Awkward networks, by the program's own way of sharding, against another backend."""
    return twin(case["net"], case.get("precision", "fp32"))


def draws(case: dict) -> dict:
    """Random numbers of both passes: the same, whatever the network draws."""
    seen: list = []

    def loss(model, samples):
        seen.append(float(torch.rand(())))
        return task.loss(model, samples)

    torch.manual_seed(dist.get_rank())
    engine = engine_of(case, loss)
    assert engine.step(part(0)).look
    engine.step(part(1))
    return {"first": seen[:2], "second": seen[2:4], "next": seen[4:]}


def mistakes(case: dict) -> dict:
    """Every rank's sentences."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fsdp_mistakes.said())
    return {"everyone": everyone}


KINDS = {
    "compare": compare, "count": count, "overflow": overflow, "interrupted": interrupted,
    "evaluation": evaluation, "twins": twins, "draws": draws,
    "mistakes": mistakes, "disturbed": disturbed,
}  # fmt: skip


if __name__ == "__main__":
    cases.play(
        lambda case: KINDS[case.get("kind", "compare")](case), timeout=timedelta(seconds=120)
    )

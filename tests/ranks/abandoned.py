"""A step that is broken off by an exception, and what the steps after it make of it."""

import json
from collections.abc import Callable, Iterator

import task
import torch
from fsdp_disturbed import Stop, raises_after
from torch import nn

from dist_looksam import Engine

AT = 3  # a look at k = 3
BROKEN = ("place", "pass", "micro")  # of a case: where its step is broken off
WHOLE: dict[str, list[torch.Tensor]] = {}  # what training without that ends in


class Torn(list):
    """Micro-batches whose reader stops before the given one."""

    stop = 0

    def __iter__(self) -> Iterator:
        yield from self[: self.stop]
        raise Stop


class Breaking:
    """A loss that draws random numbers, and at one call breaks the step off at `place`."""

    def __init__(self, module: Callable[[], nn.Module]) -> None:
        self.module, self.place, self.left = module, "", 0

    def arm(self, place: str, calls: int) -> None:
        self.place, self.left = place, calls

    def __call__(self, model: nn.Module, samples: tuple) -> torch.Tensor:
        self.left -= 1
        place = self.place if self.left == 0 else ""
        factor = 1 + 0.1 * torch.rand(())
        if place == "loss":
            raise Stop
        if place not in ("forward", "backward"):
            value = task.loss(model, samples) * factor
            if place == "end":
                raise Stop
            return value
        inside = self.module().norm if place == "forward" else self.module().first
        hook = raises_after(inside, backward=place == "backward")
        try:
            return task.loss(model, samples) * factor
        finally:
            hook.remove()


def held(engine: Engine) -> list[torch.Tensor]:
    """Weights and state of this rank, and of its random numbers."""
    found = [x for slots in engine.backend.slots() for _, x in sorted(slots.items())]
    return [*(x.detach().clone() for x in found), torch.get_rng_state()]


def shown(engine: Engine) -> list[torch.Tensor]:
    """Bits of the weights that forward sees."""
    local = [task.own_part(p) for p in engine.module.parameters()]
    return [t.contiguous().view(-1).view(torch.uint8).clone() for t in local]


def broken_off(engine: Engine, loss: Breaking, case: dict, batches: list) -> None:
    """A step of which nothing must be left."""
    if case["place"] == "perturb":  # as where there is no memory for copies of w and g
        keep = engine.optimizer.keep

        def broken(params: list, grads: list) -> None:
            keep(params, grads)
            raise Stop

        engine.optimizer.keep = broken
    number = (case["pass"] - 1) * len(batches) + case["micro"]
    if case["place"] == "data":
        assert case["pass"] == 1
        batches = Torn(batches)
        batches.stop = case["micro"]
    elif case["place"] != "perturb":
        loss.arm(case["place"], number + 1)
    try:
        engine.step(batches)
    except Stop:
        vars(engine.optimizer).pop("keep", None)
        return
    raise AssertionError("the step was not broken off")


def compare(
    case: dict, make: Callable[[Breaking], Engine], part: Callable[[int], list]
) -> dict[str, bool]:
    """Whether a step of other samples that was broken off leaves this rank as it was, and whether
    training ends as without it. case["next"]: number of the next step, as after a recovery."""
    back, end = trained(case, make, part, breaks=True)
    whole = json.dumps({name: value for name, value in case.items() if name not in BROKEN})
    if whole not in WHOLE:  # once for all places at which this training is broken off
        WHOLE[whole] = trained(case, make, part, breaks=False)[1]
    return {"back": back, "same": same(WHOLE[whole], end)}


def trained(
    case: dict, make: Callable[[Breaking], Engine], part: Callable[[int], list], *, breaks: bool
) -> tuple[bool, list[torch.Tensor]]:
    """Whether the broken-off step left this rank as it was; what all steps ended in."""
    engines: list[Engine] = []
    loss = Breaking(lambda: engines[0].module)
    engines.append(make(loss))
    engine, back, at = engines[0], True, case.get("at", AT)
    torch.manual_seed(7)
    for step in range(at):
        engine.step(part(step))
    if breaks:
        before = held(engine) + shown(engine)
        broken_off(engine, loss, case, part(50))
        back = same(before, held(engine) + shown(engine))
    engine.optimizer.steps = case.get("next", at)
    rows = []
    for step in range(at, at + 3):
        done = engine.step(part(step))
        rows += [done.loss, done.seen.grad_norm, done.seen.update_norm]
    return back, [*held(engine), *rows, torch.tensor(engine.optimizer.steps)]


def same(before: list, after: list) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )

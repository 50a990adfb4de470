"""DDP against the truth: every optimizer at 2 and 3 ranks; what it sends; overflow on one rank."""

from functools import partial

import cases
import pytest
import task

ACCUMULATED = [{"optimizer": o, "accumulation": a} for o in task.OPTIMIZERS for a in (1, 2, 4)]
VARIED = [
    {"optimizer": "look_sam", "base": "sgd"},
    {"optimizer": "look_layer_sam", "base": "sgd", "clip": 0.3},
    {"optimizer": "look_layer_sam", "perturb": "norms"},
    {"optimizer": "gsam", "base": "sgd", "perturb": "first|last", "clip": 0.3},
    {"optimizer": "msam", "base": "sgd", "perturb": "norms", "clip": 0.3},
    {"optimizer": "look_sam", "wrapped": True},
    {"optimizer": "look_sam", "wrapped": "compiled"},
]
LOCAL = [
    {"optimizer": o, "base": b, "ascent": "rank", "accumulation": 1}
    for o in ("sam", "sam_k", "look_sam", "layer_sam", "look_layer_sam")
    for b in ("sgd", "lamb")
]
LOCAL += [{**LOCAL[0], "wrapped": "compiled"}]
COUNTED = [
    {"kind": "count", "optimizer": o, "ascent": a, "accumulation": n}
    for o in task.OPTIMIZERS
    for a, n in (("global", 2), ("rank", 1))  # with 2, m would be a micro-batch of every rank
    if (o, a) != ("msam", "rank")  # refused
]
OVERFLOWS = [
    {"kind": "overflow", "optimizer": "look_sam", "precision": p, "ascent": a, "overflow": n}
    for p in ("fp32", "fp16")
    for a in ("global", "rank")
    for n in (1, 2)
]
OVERFLOWS += [
    {"kind": "overflow", "optimizer": "msam", "precision": p, "overflow": 1}
    for p in ("fp32", "fp16")
]
DRAWS = [{"kind": "draws", "optimizer": "sgd"}]
CASES = {
    2: [*ACCUMULATED, *VARIED, *LOCAL, *COUNTED, *OVERFLOWS, *DRAWS],
    3: [*ACCUMULATED, *LOCAL],
}


everywhere = partial(cases.everywhere, CASES)


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """(ranks, number) -> what came out."""
    return cases.results(tmp_path_factory.mktemp, "ddp_worker.py", CASES)


@pytest.mark.parametrize("ranks, number", everywhere([*ACCUMULATED, *VARIED, *LOCAL]))
def test_ddp_trains_to_the_weights_of_the_reference(result, ranks, number):
    case, got = CASES[ranks][number], result(ranks, number)
    name, base = case["optimizer"], case.get("base")
    own = task.BATCH // ranks if case.get("ascent") == "rank" else None
    changed = {x: case[x] for x in ("clip", "perturb") if x in case}
    want = task.truth(name, base, m=own, **changed)
    assert task.worst(got["weights"], want) < task.tolerance(name, base)
    cases.assert_course(got["rows"], want.records)


@pytest.mark.parametrize("ranks, number", everywhere([*ACCUMULATED, *LOCAL]))
def test_all_ranks_hold_the_same_bits(result, ranks, number):
    """Weights and g_v; each rank adds its own eps and must come back from it."""
    assert result(ranks, number)["same"]


@pytest.mark.parametrize("name", ["sam", "look_sam"])
def test_perturbing_along_ones_own_gradient_is_another_method(name):
    """So that the cases above could not pass if --ascent rank did nothing."""
    apart = task.truth(name, "sgd", m=task.BATCH // 2).weights[-1]
    together = task.truth(name, "sgd").weights[-1]
    assert max(abs(a - b).max() for a, b in zip(apart, together, strict=True)) > 1e-4


@pytest.mark.parametrize("ranks, number", everywhere(COUNTED))
def test_what_is_sent(result, ranks, number):
    """A reuse step sends what the base does: the gradient once, and the loss to be logged. A look
    sends the gradient once more. So does a look of one's own gradient: eps costs nothing."""
    case, got = CASES[ranks][number], result(ranks, number)
    looks = [look for look, *_ in got["rows"]]
    assert any(looks) == (case["optimizer"] not in ("sgd", "adamw", "lamb", "lars", "msam"))
    for look, *sizes in got["rows"]:
        whole = [n for n in sizes if n > 1]
        assert sum(whole) == got["numel"] * (2 if look else 1)
        assert sizes.count(1) == 1  # the mean loss


@pytest.mark.parametrize("ranks, number", everywhere(OVERFLOWS))
def test_an_overflow_on_one_rank_costs_all_ranks_the_step(result, ranks, number):
    got = result(ranks, number)
    for kept, skipped, looks_again, finite, scale in got["everyone"]:
        assert kept and skipped and finite
        assert looks_again == (CASES[ranks][number]["optimizer"] != "msam")
        assert scale in (None, 2.0**15)
    assert got["same"]


@pytest.mark.parametrize("ranks, number", everywhere(DRAWS))
def test_the_pass_that_sorts_buckets_takes_no_random_numbers(result, ranks, number):
    """It put back torch's alone: augmentation in Python or NumPy then drew others after a resume
    than in the run that was not interrupted."""
    got = result(ranks, number)
    assert got["seen"] == [got["want"]] * 2  # the warm-up pass, and the step's own

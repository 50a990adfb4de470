"""m on several ranks: DDP, FSDP2 and blocks of FSDP2 against the truth; what a look sends."""

from functools import partial
from itertools import pairwise

import cases
import pytest
import task

METHODS = ("sam", "look_sam", "layer_sam", "look_layer_sam", "gsam")


def of_ddp(ranks: int, accumulation: int, *ms: int) -> list[dict]:
    return [{"optimizer": o, "accumulation": accumulation, "m": m} for m in ms for o in METHODS]


def of_fsdp(accumulation: int, *ms: int, **how) -> list[dict]:
    return [{**case, **how} for case in of_ddp(0, accumulation, *ms)]


# Of 24 samples. On 2 ranks x 4 micro-batches of 3: each alone, one of both, two of both.
DDP = {
    1: of_ddp(1, 4, 6)[:2],
    2: [*of_ddp(2, 4, 3, 6, 12), *of_ddp(2, 2, 6, 12)],
    4: [*of_ddp(4, 2, 3, 6, 12)],
}
OVERFLOWS = [
    {"kind": "overflow", "optimizer": "look_sam", "precision": p, "m": 12, "overflow": n}
    for p in ("fp32", "fp16")
    for n in (1, 2)
]
COUNTED = [
    {"kind": "count", "optimizer": "look_sam", "accumulation": 4, "m": m} for m in (3, 6, 12, 24)
]
DDP[2] += [*OVERFLOWS, *COUNTED]
BLOCKS = {"copies": 2, "blocks": True}
FSDP = {
    2: [*of_fsdp(4, 6, 12)],
    4: [*of_fsdp(2, 6, 12, **BLOCKS), {**of_fsdp(2, 24, **BLOCKS)[1]}],
}
FSDP[4] += [
    {"kind": "overflow", "optimizer": "look_sam", "overflow": n, "m": 12, **BLOCKS} for n in (1, 2)
]
COUNTED_FSDP = {"kind": "count", "optimizer": "look_sam", "base_name": "adamw"}
FSDP[2] += [{**COUNTED_FSDP, "m": 12}]
FSDP[4] += [{**COUNTED_FSDP, "m": 6, **BLOCKS}]
NAMES = ("ddp", "fsdp")
ALL = {"ddp": DDP, "fsdp": FSDP}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(backend, ranks, number) -> what came out."""
    of = {
        name: cases.results(tmp_path_factory.mktemp, f"{name}_worker.py", ALL[name], timeout=500)
        for name in NAMES
    }
    return lambda name, ranks, number: of[name](ranks, number)


def parameters(kind: str) -> list:
    """(backend, ranks, number) of the cases of a kind."""
    found = []
    for name in NAMES:
        some = [c for of in ALL[name].values() for c in of if c.get("kind", "compare") == kind]
        for p in partial(cases.everywhere, ALL[name])(some):
            found.append(pytest.param(name, *p.values, id=f"{name}-{p.id}"))
    return found


@pytest.mark.parametrize("name, ranks, number", parameters("compare"))
def test_every_m_trains_to_the_weights_of_the_reference(result, name, ranks, number):
    """The same m on 1, 2 and 4 ranks, however many micro-batches: one reference for all."""
    case, got = ALL[name][ranks][number], result(name, ranks, number)
    want = task.truth(case["optimizer"], m=case["m"])
    assert task.worst(got["weights"], want) < task.tolerance(case["optimizer"], None)
    cases.assert_course(got["rows"], want.records)
    assert got.get("same", True)


@pytest.mark.parametrize("method", METHODS)
def test_each_m_is_another_method(method):
    """So that the cases above could not pass if m did nothing."""
    ends = [task.truth(method, m=m).weights[-1] for m in (3, 6, 12, 24)]
    for some, others in pairwise(ends):
        assert max(abs(a - b).max() for a, b in zip(some, others, strict=True)) > 1e-4


@pytest.mark.parametrize("name, ranks, number", parameters("overflow"))
def test_an_overflow_in_one_group_of_one_rank_skips_the_step_on_all(result, name, ranks, number):
    for kept, skipped, looks_again, finite, scale in result(name, ranks, number)["everyone"]:
        assert kept and skipped and looks_again and finite
        assert scale in (None, 2.0**15)


@pytest.mark.parametrize("number", [DDP[2].index(c) for c in COUNTED])
def test_what_a_look_of_ddp_sends(result, number):
    """Each of 2 ranks has 4 micro-batches of 3. m = 3: each alone, g and g_s once, nothing for eps:
    2.000 times a base step. m = 6: one of both ranks, 4 times g for eps, g_s once."""
    m, got = DDP[2][number]["m"], result("ddp", 2, number)
    times = {3: 2, 6: 4 + 1, 12: 2 + 1, 24: 2}[m]
    looks = 0
    for look, *sizes in got["rows"]:
        assert sum(n for n in sizes if n > 1) == got["numel"] * (times if look else 1)
        assert sizes.count(1) == 1  # the mean loss
        looks += look
    assert looks == 1


@pytest.mark.parametrize("name, ranks, number", parameters("count")[len(COUNTED) :])
def test_what_a_look_of_fsdp2_sends(result, name, ranks, number):
    """Twice what a base step does: gathers, reduce-scatters, and over blocks one all-reduce of the
    shards for g and one for g_s."""
    sent = result(name, ranks, number)
    assert sent["look"]["bulk"] == {k: 2 * n for k, n in sent["base"]["bulk"].items()}
    kinds = {"all_gather", "reduce_scatter"} | ({"all_reduce"} if ranks == 4 else set())
    assert set(sent["base"]["bulk"]) == kinds

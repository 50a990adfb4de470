"""FSDP2 against the truth: every optimizer and number of ranks; what it sends; overflow."""

from functools import partial

import cases
import pytest
import task
from fsdp_disturbed import DISTURBED
from fsdp_mistakes import MISTAKES
from fsdp_nets import TWINS

BY_LAYER = {"decompose": "layer", "reuse": "natural"}
TABLE = [{"optimizer": o} for o in task.OPTIMIZERS]
VARIED = [
    *({"optimizer": "look_sam", "base": "sgd", "accumulation": a} for a in (1, 4)),
    {"optimizer": "look_layer_sam", "base": "sgd", "clip": 0.3},
    {"optimizer": "look_sam", "clip": 0.3, "units": False},
    # Natural, since the paper's reuse divides by ||g_v||, which is rounding in a one-entry layer.
    {"optimizer": "look_sam", "rule": BY_LAYER},
    {"optimizer": "look_sam", "base": "sgd", "rule": {"reuse": "natural"}},
    {"optimizer": "sam", "base": "sgd", "rule": {"p": 3.0}},
    {"optimizer": "look_layer_sam", "perturb": "norms"},
    {"optimizer": "gsam", "base": "sgd", "perturb": "first|last", "clip": 0.3},
    {"optimizer": "msam", "base": "lamb", "perturb": "norms", "accumulation": 4},
    {"optimizer": "msam", "base": "sgd", "clip": 0.3},
    # Less rho: as printed, eps grows as the gradient shrinks, and a net that jumps shows rounding.
    {"optimizer": "layer_sam", "base": "sgd", "rule": {"layer_ascent": "literal"}, "rho": 1e-4},
]
COPIES = [{"optimizer": o, "copies": 2} for o in ("look_sam", "look_layer_sam", "lars")]
COUNTED = [{"kind": "count", "optimizer": "look_layer_sam", "base_name": "lamb"}]
OVERFLOWS = [
    {"kind": "overflow", "optimizer": o, "overflow": n, **p}
    for o in ("look_sam", "look_layer_sam")
    for p in ({}, {"precision": "bf16"}, {"precision": "fp16"})
    for n in (1, 2)
]
OVERFLOWS += [{"kind": "overflow", "optimizer": "msam", "overflow": 1, "precision": "fp16"}]
INTERRUPTED = [
    {"kind": "interrupted", "optimizer": "look_layer_sam", "pass": n, "where": w, **first}
    for first in ({}, {"first": True})
    for w in ("loss", "forward", "backward")
    for n in (1, 2)
]
AROUND = [{"kind": "disturbed", "optimizer": "look_sam", "how": how} for how in DISTURBED]
EVALUATED = [{"kind": "evaluation", "optimizer": "look_sam"}]
AWKWARD = [{"kind": "twins", "net": n} for n in TWINS]
AWKWARD += [{"kind": "twins", "net": "batch norm", "precision": "bf16"}]
DRAWS = [{"kind": "draws", "optimizer": "look_sam"}]
WRONG = [{"kind": "mistakes"}]
CASES = {
    1: [*TABLE],
    2: [
        *(*TABLE, *VARIED, *COUNTED, *OVERFLOWS, *INTERRUPTED, *AROUND, *EVALUATED, *AWKWARD),
        *(*DRAWS, *WRONG),
    ],
    3: [*TABLE],
    4: [*COPIES],
}


everywhere = partial(cases.everywhere, CASES)


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    """(ranks, number) -> what came out."""
    return cases.results(tmp_path_factory.mktemp, "fsdp_worker.py", CASES, timeout=500)


@pytest.mark.parametrize("ranks, number", everywhere([*TABLE, *VARIED, *COPIES]))
def test_fsdp2_trains_to_the_weights_of_the_reference(result, ranks, number):
    case, got = CASES[ranks][number], result(ranks, number)
    name, base = case["optimizer"], case.get("base")
    changed = {
        **case.get("rule", {}),
        **{x: case[x] for x in ("clip", "rho", "perturb") if x in case},
    }
    want = task.truth(name, base, **changed)
    assert task.worst(got["weights"], want) < task.tolerance(name, base)
    cases.assert_course(got["rows"], want.records)


@pytest.mark.parametrize("ranks, copies", [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_all_that_a_rank_holds_is_that_of_its_own_rows(result, ranks, copies):
    """4 bytes an entry over ranks for weights and for g_v, twice that for the base; a rank without
    a row of some layer holds nothing of it."""
    case = {"optimizer": "look_layer_sam", **({"copies": copies} if copies > 1 else {})}
    shares = result(ranks, CASES[ranks].index(case))["memory"]
    layers = [p.shape for p in task.net().parameters()]
    for rank, memory in enumerate(shares):
        parts, part = ranks // copies, rank % (ranks // copies)
        heights = [max(0, min(-(-s[0] // parts), s[0] - part * -(-s[0] // parts))) for s in layers]
        own = sum(h * s[1:].numel() for h, s in zip(heights, layers, strict=True))
        assert memory["g_v"] == memory["weights"] == 4 * own
        assert memory["masters"] == 0 and memory["look"] == 8 * own
        assert memory["base_state"] == 2 * 4 * own + 8 * len(layers)  # and the step counters
    assert sum(m["g_v"] for m in shares) == copies * 4 * sum(s.numel() for s in layers)


@pytest.mark.parametrize("ranks, number", everywhere(COUNTED))
def test_a_look_sends_what_its_passes_send_and_a_reuse_step_a_few_numbers(result, ranks, number):
    sent, layers = result(ranks, number), len(list(task.net().parameters()))
    assert set(sent["base"]["bulk"]) == {"all_gather", "reduce_scatter"}
    assert sent["look"]["bulk"] == {k: 2 * n for k, n in sent["base"]["bulk"].items()}
    assert 0 <= sent["look"]["total"] - 2 * sent["base"]["total"] <= 4 * layers + 16
    assert sent["reuse"]["bulk"] == sent["base"]["bulk"]
    assert 0 <= sent["reuse"]["total"] - sent["base"]["total"] <= 4 * layers + 16


@pytest.mark.parametrize("ranks, number", everywhere(OVERFLOWS))
def test_an_overflow_on_one_rank_changes_no_bit_on_any(result, ranks, number):
    """Weights, the base's state and counters, g_v."""
    for kept, skipped, looks_again, finite, scale in result(ranks, number)["everyone"]:
        assert kept and skipped and finite
        assert looks_again == (CASES[ranks][number]["optimizer"] != "msam")
        half = CASES[ranks][number].get("precision") == "fp16"
        assert scale == (2.0**15 if half else None)


@pytest.mark.parametrize("ranks, number", everywhere(INTERRUPTED))
def test_a_pass_that_raises_leaves_the_weights_and_the_step_can_be_repeated(result, ranks, number):
    """In backward some layers have their gradients by then: these must not be added to."""
    got = result(ranks, number)
    assert got["back"] and got["same"]


@pytest.mark.parametrize("ranks, number", everywhere(AROUND))
def test_what_a_caller_does_around_the_steps_does_not_change_them(result, ranks, number):
    assert all(result(ranks, number)["everyone"])


@pytest.mark.parametrize("ranks, number", everywhere(EVALUATED))
def test_evaluating_sees_the_weights_and_leaves_no_trace(result, ranks, number):
    """By itself torch leaves the root gathered after a forward without a backward."""
    got = result(ranks, number)
    assert got["same"] and got["near"] < 1e-6 and got["gathered"] == 0


@pytest.mark.parametrize("ranks, number", everywhere(AWKWARD))
def test_awkward_networks_train_as_on_other_backends(result, ranks, number):
    case, got = CASES[ranks][number], result(ranks, number)
    assert set(got["got"]) == set(got["want"])
    for name, want in got["want"].items():
        assert float((got["got"][name] - want).abs().max()) < 1e-6, name
    layers = [n for n in got["want"] if not n.startswith("norms")]
    moved = max(float((got["start"][n] - got["want"][n]).abs().max()) for n in layers)
    assert moved > 0.03
    counts = {"tied in the list": 2, "tied to the rest": 3}
    wanted = 7 if case["net"] == "batch norm" else counts.get(case["net"], 4)
    assert got["units"] == wanted


@pytest.mark.parametrize("ranks, number", everywhere(DRAWS))
def test_both_passes_of_a_look_draw_the_same_numbers(result, ranks, number):
    got = result(ranks, number)
    assert got["first"] == got["second"]
    assert not {*got["first"]} & {*got["next"]}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_around_fully_shard_is_one_sentence(result, name):
    """On every rank, before any training."""
    for told in result(2, CASES[2].index(WRONG[0]))["everyone"]:
        assert MISTAKES[name][1] in told[name]
        ends = told[name].endswith(".") or MISTAKES[name][1] == told[name] == "it trains"
        assert ends and "\n" not in told[name]

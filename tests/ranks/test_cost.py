"""The table of costs in the README: what a look and a reuse step send beyond the base's step."""

import json

import cases
import pytest
import task

pytestmark = pytest.mark.needs("deepspeed")

CASES = [
    {"optimizer": "look_layer_sam", "base_name": "lamb", "stage": s} for s in ("ddp", 0, 1, 2, 3)
] + [
    # Every rank perturbs along its own gradient: nothing is sent for eps, and the mean of g once.
    {"optimizer": "sam", "base_name": "adamw", "stage": "ddp", "ascent": "rank", "accumulation": 1},
]
# Groups of m samples: of one rank at stages 0 and 1, of all ranks, two in a look, at 2 and 3.
GROUPED = [
    {"optimizer": "look_sam", "base_name": "adamw", "stage": s, "m": m}
    for s, m in ((0, 6), (1, 6), (2, 12), (3, 12))
]
LAYERS = len(list(task.net().parameters()))
SIZE = sum(p.numel() for p in task.net().parameters())


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(ranks, number) -> what came out on each rank."""
    held = [{**case, "memory_only": True} for case in CASES[:5]]
    every = {1: held, 2: CASES + GROUPED, 4: held}
    return cases.results(tmp_path_factory.mktemp, "cost_worker.py", every)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: json.dumps(CASES[n]))
def test_a_look_sends_twice_what_the_base_sends_and_nothing_to_restore(result, number):
    for rank in result(2, number):
        sent = rank["sent"]
        assert sent["base"]["bulk"], "the base must send something"
        assert sent["look"]["bulk"] == {k: 2 * n for k, n in sent["base"]["bulk"].items()}
        assert sent["look"]["total"] - 2 * sent["base"]["total"] <= 4 * LAYERS + 16


@pytest.mark.parametrize("number", range(5), ids=lambda n: json.dumps(CASES[n]))
def test_a_reuse_step_adds_a_few_numbers_per_layer(result, number):
    for rank in result(2, number):
        sent = rank["sent"]
        assert sent["reuse"]["bulk"] == sent["base"]["bulk"]
        assert 0 <= sent["reuse"]["total"] - sent["base"]["total"] <= 4 * LAYERS + 16


@pytest.mark.parametrize("number", range(len(GROUPED)), ids=lambda n: json.dumps(GROUPED[n]))
def test_groups_send_each_gradient_twice_and_nothing_for_eps_of_a_group_of_one_rank(result, number):
    """g and g_s are reduced once each. Where DeepSpeed splits gradients, w + eps of every group is
    gathered, and w between groups."""
    stage = GROUPED[number]["stage"]
    for rank in result(2, len(CASES) + number):
        base, look = rank["sent"]["base"]["bulk"], rank["sent"]["look"]["bulk"]
        gathers = 1 if stage < 2 else 2 * 2
        times = {"all_reduce": 2, "reduce_scatter": 2, "all_gather": gathers}
        assert look == {kind: times[kind] * n for kind, n in base.items()}
        small = rank["sent"]["look"]["total"] - sum(look.values())
        if stage < 2:  # small layers are gathered by small calls there
            assert small <= 2 * (4 * LAYERS + 16) + 2 * 2 * LAYERS


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", ["ddp", 0, 1, 2, 3])
def test_gv_is_sharded_as_the_base_state_is(result, ranks, stage):
    """g_v is 4 bytes an entry over ranks at stages 1 to 3, whole elsewhere; the base has twice it.

    Padding: stages 1, 2 round each of two groups up to 2 x ranks, stage 3 every layer to ranks.
    """
    number = [c["stage"] for c in CASES].index(stage)
    share = SIZE if stage in ("ddp", 0) else SIZE / ranks
    padding = 0 if stage in ("ddp", 0) else LAYERS if stage == 3 else 4
    for rank in result(ranks, number):
        memory = rank["memory"]
        assert 4 * share <= memory["g_v"] + 4 * padding
        assert memory["g_v"] <= 4 * (share + padding)
        assert memory["base_state"] - 2 * memory["g_v"] <= 8 * LAYERS  # the step counters

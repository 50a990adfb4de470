"""The table of costs in the README: what a look and a reuse step send beyond the base's step."""

import json

import pytest
import task
import torch

from launch import torchrun

pytestmark = pytest.mark.needs("deepspeed")

CASES = [
    {"optimizer": "look_layer_sam", "base_name": "lamb", "stage": s} for s in ("ddp", 0, 1, 2, 3)
] + [
    # Every rank climbs its own gradient: nothing is sent for eps, and the mean of g once.
    {"optimizer": "sam", "base_name": "adamw", "stage": "ddp", "ascent": "rank"},
]
LAYERS = len(list(task.net().parameters()))
SIZE = sum(p.numel() for p in task.net().parameters())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    done = {}

    def of(ranks: int):
        if ranks not in done:
            folder = tmp_path_factory.mktemp(f"cost-{ranks}")
            cases = CASES if ranks == 2 else [{**c, "memory_only": True} for c in CASES[:5]]
            (folder / "cases.json").write_text(json.dumps(cases))
            torchrun(ranks, "cost_worker.py", folder / "cases.json", folder)
            done[ranks] = folder
        return done[ranks]

    return of


def read(folder, number: int) -> list:
    return torch.load(task.result_file(folder, number), weights_only=True)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: json.dumps(CASES[n]))
def test_a_look_sends_twice_what_the_base_sends_and_nothing_to_restore(results, number):
    for rank in read(results(2), number):
        sent = rank["sent"]
        assert sent["base"]["bulk"], "the base must send something"
        assert sent["look"]["bulk"] == {k: 2 * n for k, n in sent["base"]["bulk"].items()}
        assert sent["look"]["total"] - 2 * sent["base"]["total"] <= 4 * LAYERS + 16


@pytest.mark.parametrize("number", range(5), ids=lambda n: json.dumps(CASES[n]))
def test_a_reuse_step_adds_a_few_numbers_per_layer(results, number):
    for rank in read(results(2), number):
        sent = rank["sent"]
        assert sent["reuse"]["bulk"] == sent["base"]["bulk"]
        assert 0 <= sent["reuse"]["total"] - sent["base"]["total"] <= 4 * LAYERS + 16


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", ["ddp", 0, 1, 2, 3])
def test_gv_is_sharded_as_the_base_state_is(results, ranks, stage):
    """g_v is 4 bytes an entry over ranks at stages 1 to 3, whole elsewhere; the base has twice it.

    Padding: stages 1, 2 round each of two groups up to 2 x ranks, stage 3 every layer to ranks.
    """
    number = [c["stage"] for c in CASES].index(stage)
    share = SIZE if stage in ("ddp", 0) else SIZE / ranks
    padding = 0 if stage in ("ddp", 0) else LAYERS if stage == 3 else 4
    for rank in read(results(ranks), number):
        memory = rank["memory"]
        assert 4 * share <= memory["g_v"] + 4 * padding
        assert memory["g_v"] <= 4 * (share + padding)
        assert memory["base_state"] - 2 * memory["g_v"] <= 8 * LAYERS  # the step counters

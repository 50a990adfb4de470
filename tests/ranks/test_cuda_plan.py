"""`dist-looksam plan` against a GPU: the memory that torch has given out."""

import pytest
import task
import torch
from cases import ON_GPU, start
from test_plan_memory import WAYS, buckets

from dist_looksam.plan import machine, plan
from dist_looksam.plan.machines import Device
from dist_looksam.settings import config

pytestmark = pytest.mark.needs("cuda", "deepspeed")

CLASSES, SIZE = 1000, 224
MODELS = {"vit_s16": 128, "vit_b16": 128}  # images of a micro-batch
CASES = [(model, way) for model in MODELS for way in ("ddp", "1", "2", "3", "fsdp2")]
SPEEDS = [(model, "calibrate") for model in MODELS]


def case(folder, model: str, way: str) -> dict:
    images = MODELS[model]
    argv = ["--model", model, "--optimizer", "look_layer_sam", "--k", "5", "--precision", "bf16"]
    argv += ["--batch_size", str(2 * images), "--micro_batch", str(images)]
    found = {"argv": argv, "shape": [3, SIZE, SIZE], "classes": CLASSES}
    if way == "calibrate":
        return {**found, "calibrate": True}
    argv += [*WAYS[way], *buckets(folder / "zero.json", way, 10**7)]  # of a GB they hide the rest
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(model, way) -> (what was measured, the plan at the speed that was measured)."""
    folder = tmp_path_factory.mktemp("cuda-plan")
    every = [*SPEEDS, *CASES]
    cases = [case(folder, *names) for names in every]
    start(folder, 1, "cuda_plan_worker.py", cases, timeout=400, **ON_GPU)
    found = {
        names: torch.load(task.result_file(folder, i), weights_only=True)
        for i, names in enumerate(every)
    }

    def planned(names: tuple):
        argv = cases[every.index(names)]["argv"]
        data = ["--data", "folder", "--data_dir", "x", "--image_size", str(SIZE)]
        speeds = Device(**found[names[0], "calibrate"])
        return plan(config.parse([*argv, *data]), gpus=1, machine=machine(speeds))

    return {names: (found[names], planned(names)) for names in CASES}


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_memory_of_a_gpu_is_what_was_planned(results, names):
    """Printed beside it (-s): the time of a step, which on a GPU is often the host's."""
    got, plan = results[names]
    for row, size in got["memory"].items():
        assert getattr(plan.memory, row) == pytest.approx(size, rel=0.01, abs=200), row
    print(names, "peak", got["peak"], plan.memory.peak, plan.memory.peak / got["peak"] - 1)
    print(names, "step", got["seconds"], plan.step_seconds, plan.step_seconds / got["seconds"] - 1)
    assert plan.memory.peak == pytest.approx(got["peak"], rel=0.10)

"""`dist-looksam plan` against a GPU: memory that torch has allocated, and seconds a step."""

import json

import pytest
import task
import torch

from dist_looksam import config
from dist_looksam.plan import machine, plan
from dist_looksam.plan.machines import Device
from launch import torchrun

pytestmark = pytest.mark.needs("cuda", "deepspeed")

CLASSES, SIZE = 1000, 224
MODELS = {"vit_s16": 128, "vit_b16": 128}  # images of a micro-batch
WAYS = {
    "ddp": ["--backend", "ddp"],
    "1": ["--zero_stage", "1"],
    "2": ["--zero_stage", "2"],
    "3": ["--zero_stage", "3"],
    "fsdp2": ["--backend", "fsdp2"],
}
CASES = [(model, way, "bf16") for model in MODELS for way in WAYS]
CASES += [("vit_s16", "ddp", "fp32")]
SPEEDS = [(model, "calibrate", p) for model, p in dict.fromkeys((m, p) for m, _, p in CASES)]


def case(folder, model: str, way: str, precision: str) -> dict:
    images = MODELS[model]
    argv = ["--model", model, "--optimizer", "look_layer_sam", "--k", "5", *WAYS.get(way, [])]
    argv += ["--batch_size", str(2 * images), "--micro_batch", str(images)]
    argv += ["--precision", precision]
    if "--zero_stage" in argv:  # buckets of a GB would hide the rest
        zero = {"reduce_bucket_size": 10**7, "stage3_prefetch_bucket_size": 10**7}
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
        argv += ["--deepspeed_config", str(folder / "zero.json")]
    found = {"argv": argv, "shape": [3, SIZE, SIZE], "classes": CLASSES}
    return {**found, "calibrate": True} if way == "calibrate" else found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(model, way, precision) -> (what was measured, the plan at the speed that was measured)."""
    folder = tmp_path_factory.mktemp("cuda-plan")
    every = [*SPEEDS, *CASES]
    cases = [case(folder, *names) for names in every]
    (folder / "cases.json").write_text(json.dumps(cases))
    on_gpu = {"TASK_DEVICE": "cuda", "DS_ACCELERATOR": "cuda"}
    torchrun(1, "cuda_plan_worker.py", folder / "cases.json", folder, timeout=400, **on_gpu)
    found = {
        names: torch.load(task.result_file(folder, i), weights_only=True)
        for i, names in enumerate(every)
    }

    def planned(names: tuple):
        model, _, precision = names
        argv = cases[every.index(names)]["argv"]
        data = ["--data", "folder", "--data_dir", "x", "--image_size", str(SIZE)]
        speeds = Device(**found[model, "calibrate", precision])
        return plan(config.parse([*argv, *data]), gpus=1, machine=machine(speeds))

    return {names: (found[names], planned(names)) for names in CASES}


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_memory_of_a_gpu_is_what_was_planned(results, names):
    got, plan = results[names]
    for row, size in got["memory"].items():
        assert getattr(plan.memory, row) == pytest.approx(size, rel=0.01, abs=200), row
    print(names, "peak", got["peak"], plan.memory.peak, plan.memory.peak / got["peak"] - 1)
    assert plan.memory.peak == pytest.approx(got["peak"], rel=0.10)


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_step_time_of_a_gpu_is_what_was_planned(results, names):
    got, plan = results[names]
    mean, speed = plan.times["mean"], plan.machine.device.flops
    print(names, "step", got["seconds"], mean.total, mean.total / got["seconds"] - 1, speed)
    assert mean.total == pytest.approx(got["seconds"], rel=0.25)

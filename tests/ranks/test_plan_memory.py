"""`dist-looksam plan` knows what real ranks hold and send: backends' own counters, what malloc has
given out, torch's profiler, and the kernel's counter of a network interface."""

import json
from dataclasses import replace

import pytest
import task
import torch
from cases import start

from dist_looksam.plan import machine, plan
from dist_looksam.plan.network import Call, wire_bytes
from dist_looksam.settings import config

pytestmark = pytest.mark.needs("deepspeed", "slurm")  # the latter: may make a network of its own

RANKS, CLASSES, WITHIN = 2, 100, 0.10
MODELS = {"vit_28": ([1, 28, 28], 32, 1e5), "vit_ti16": ([3, 64, 64], 2, 1e6)}  # shape, images,
WAYS = {  # and a bucket of DeepSpeed's that is smaller than the model, or it would hide the rest
    "ddp": ["--backend", "ddp"],
    "1": ["--zero_stage", "1"],
    "2": ["--zero_stage", "2"],
    "3": ["--zero_stage", "3"],
    "2-bf16": ["--zero_stage", "2", "--precision", "bf16"],
    "fsdp2": ["--backend", "fsdp2"],
    "fsdp2-bf16": ["--backend", "fsdp2", "--precision", "bf16"],
}
CASES = [("vit_28", "ddp"), *((m, w) for m in MODELS for w in "123"), ("vit_28", "2-bf16")]
GROUPS = {"1-m": ["--zero_stage", "1", "--m", "32"], "2-m": ["--zero_stage", "2", "--m", "64"]}
WAYS |= GROUPS  # of one micro-batch of one rank, and of both ranks
CASES += [("vit_28", way) for way in GROUPS]
CASES += [("vit_28", "fsdp2"), ("vit_ti16", "fsdp2"), ("vit_28", "fsdp2-bf16")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(model, way) -> (what every rank measured, the plan)."""
    folder = tmp_path_factory.mktemp("plan-memory")
    # The last play of a case counts. In the first of all libraries are loaded; in the first of a
    # bf16 case oneDNN makes kernels for its shapes, and keeps 12 MB if the processor has bf16.
    plays = [("vit_28", "1")]
    for names in CASES:
        plays += [names] * (2 if names[1].endswith("bf16") else 1)
    cases = [case(folder, *names) for names in plays]
    own_network = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    start(folder, RANKS, "plan_worker.py", cases, under=own_network, timeout=900)
    return {
        names: (torch.load(task.result_file(folder, i), weights_only=True), planned(c))
        for i, (names, c) in enumerate(zip(plays, cases, strict=True))
    }


def case(folder, model: str, way: str) -> dict:
    shape, images, bucket = MODELS[model]
    argv = ["--model", model, "--optimizer", "look_layer_sam", "--k", "2", *WAYS[way]]
    argv += ["--batch_size", str(RANKS * 2 * images), "--micro_batch", str(images)]
    argv += buckets(folder / f"{model}.json", way, int(bucket))
    return {"argv": argv, "shape": shape, "classes": CLASSES}


def buckets(file, way: str, size: int) -> list[str]:
    """Flags that make DeepSpeed's buckets of `size` numbers, where it has any."""
    if "--zero_stage" not in WAYS[way]:
        return []
    zero = {"reduce_bucket_size": size, "stage3_prefetch_bucket_size": size}
    file.write_text(json.dumps({"zero_optimization": zero}))
    return ["--deepspeed_config", str(file)]


def planned(case: dict):
    channels, size, _ = case["shape"]
    data = ["--data", "folder", "--data_dir", "x", "--image_size", str(size)]
    settings = config.parse([*case["argv"], *(data if channels == 3 else [])])
    gpus = machine("h200")
    on_gloo = replace(gpus, network=replace(gpus.network, gloo=True))
    found = plan(settings, gpus=RANKS, classes=CLASSES, machine=on_gloo)
    assert found.micro_batch == settings.micro_batch
    return found


@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_memory_is_what_was_planned(results, names):
    ranks, plan = results[names]
    for rank in ranks:
        for row, size in rank["memory"].items():
            assert getattr(plan.memory, row) == pytest.approx(size, rel=0.01, abs=200), row
        print(names, "peak", rank["peak"], plan.memory.peak, plan.memory.peak / rank["peak"] - 1)
        within = 0.03 if names[1] in GROUPS else WITHIN
        assert plan.memory.peak == pytest.approx(rank["peak"], rel=within)


@pytest.mark.parametrize("kind", ["reuse", "look"])
@pytest.mark.parametrize("names", CASES, ids="-".join)
def test_wire_bytes_are_what_was_planned(results, names, kind):
    """Among them stage 3's reduce-scatter, of which gloo makes an all-reduce."""
    ranks, plan = results[names]
    wanted = plan.wire[kind]
    low = 2 if plan.settings.precision == "bf16" else 4
    sizes = {"reduce_scatter": 4} if plan.settings.backend == "fsdp2" else {}
    for rank in ranks:
        calls = [
            Call(kind=k, elements=n, size=sizes.get(k, low), times=t)
            for k, n, t in rank["sent"][kind]
        ]
        counted = sum(wire_bytes(c, RANKS, gloo=True) for c in calls)
        assert wanted == pytest.approx(counted, rel=WITHIN)
        print(names, kind, "wire", rank["wire"][kind] / RANKS, wanted)
        assert wanted == pytest.approx(rank["wire"][kind] / RANKS, rel=WITHIN)

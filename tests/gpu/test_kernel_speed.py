"""Bandwidth of each kernel and time of a step, over ViT-B/16's layers: `pytest -s` prints them, and
all.sh writes lines of them."""

import os
import time

import lines
import pytest
import torch

from dist_looksam import Lamb, LookLayerSAM, LookSAM, kernels
from dist_looksam.maths import ascent, shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def vit_b(width=768, classes=1000):
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    ends = [(1, width), (197, width), (width, 3, 16, 16), (width,), (width,), (width,)]
    return [*ends, (classes, width), (classes,), *(12 * block)]


def milliseconds(function, repeats=20):
    """(on the device, on the host alone): medians."""
    device, host = [], []
    for n in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)  # so that the device never waits for the host
        start.record()
        begun = time.perf_counter()
        function()
        host.append(1e3 * (time.perf_counter() - begun))
        end.record()
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end))
        if n == 2:
            device, host = [], []
    return sorted(device)[len(device) // 2], sorted(host)[len(host) // 2]


def tensors():
    return [torch.randn(s, device="cuda") for s in vit_b()]


def report(name, times, bytes_moved):
    device, host = times
    rate = bytes_moved / device / 1e6
    print(f"{name:44} {device:7.3f} ms device {host:7.3f} ms host {rate:8.0f} GB/s")
    if "PART_END" in os.environ:
        found = {"ms": round(device, 4), "host_ms": round(host, 4), "gb_per_s": round(rate)}
        lines.write("optimizer", work=name.strip(), **found)


def test_bandwidth_of_each_kernel():
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}")
    xs, ys = tensors(), tensors()
    size = 4 * sum(x.numel() for x in xs)
    column = torch.full((len(xs),), 1e-6, dtype=torch.float64, device="cuda")
    plan = ascent.Perturbation(size=column, grad_sq_norms=column)
    launch = kernels.fit(xs, ys)
    assert launch is not None
    report("sums of one list", milliseconds(lambda: launch.sums(xs)), size)
    report("sums of two lists", milliseconds(lambda: launch.sums(xs, ys)), 2 * size)
    for dtype in (None, torch.bfloat16):
        work = milliseconds(lambda d=dtype: ascent.perturb_(xs, ys, plan, visible_dtype=d))
        report(f"perturb, measured in {dtype}", work, 3 * size)
    report("copies", milliseconds(lambda: shards.clones(xs)), 2 * size)


def optimizer_of(base, method):
    params = [torch.nn.Parameter(x) for x in tensors()]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    inner = Lamb(groups, lr=1e-3) if base == "lamb" else torch.optim.AdamW(groups, fused=True)
    return method(params, inner, rho=0.05, alpha=0.7, k=10**6), params, inner


@pytest.mark.parametrize("on", ["on", "off"])
@pytest.mark.parametrize("base, method", [("lamb", LookLayerSAM), ("adamw", LookSAM)])
def test_time_of_a_step(base, method, on, monkeypatch):
    monkeypatch.setenv("DIST_LOOKSAM_KERNELS", on)
    optimizer, params, inner = optimizer_of(base, method)
    grads = tensors()
    size = 4 * sum(x.numel() for x in grads)

    def give():
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def look():
        optimizer.steps = 0
        give()
        optimizer.perturb()
        give()
        optimizer.update()

    def other():
        optimizer.steps = 1
        give()
        optimizer.update()

    def bare():
        give()
        inner.step()

    moved = {"lamb": (25, 13, 10), "adamw": (21, 10, 7)}[base]
    for name, work, tensors_moved in zip(
        ("look", "step between looks", "base alone"), (look, other, bare), moved, strict=True
    ):
        report(f"kernels {on}: {base} {name}", milliseconds(work), tensors_moved * size)


@pytest.mark.parametrize("block, warps", [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8)])
def test_time_of_a_step_by_size_of_blocks(block, warps, monkeypatch):
    launch = kernels.fit(tensors()[:1])
    lists = __import__("dist_looksam.kernels.lists", fromlist=["lists"])
    for module in (launch, lists):
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setitem(launch._FUSED, "num_warps", warps)
    lists.blocks_of.cache_clear()
    optimizer, params, _ = optimizer_of("lamb", LookLayerSAM)
    grads = tensors()

    def work():
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.update()

    optimizer.steps = 0
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.perturb()
    work()
    size = 4 * sum(x.numel() for x in grads)
    report(f"\nblocks of {block}, {warps} warps: lamb", milliseconds(work), 13 * size)
    lists.blocks_of.cache_clear()


def test_a_step_between_looks_does_not_wait_for_the_device():
    """Not even for a learning rate that changes at every step."""
    optimizer, params, inner = optimizer_of("lamb", LookLayerSAM)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        if optimizer.looks():
            optimizer.perturb()
        inner.param_groups[0]["lr"] = 1e-3 / (step + 1)
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            optimizer.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")

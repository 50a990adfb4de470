"""--compile blocks and --checkpoint_activations on a GPU, with inductor's kernels.

With DEVICE=cpu the same tests run on a CPU: a tiny network, and the same graphs without generated
code. More is in tests/models/test_compiled.py and tests/ranks/test_compiled_ranks.py.
"""

import copy
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from dist_looksam import Engine, LookSAM, models
from dist_looksam.backends.compiled import compile_blocks
from dist_looksam.run.train import main

ON_GPU = os.environ.get("DEVICE") != "cpu"
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.needs("cuda")] if ON_GPU else []
gpu_alone = pytest.mark.skipif(not ON_GPU, reason="is about a GPU's memory or kernels")
LARGE = ("vit_s16", (3, 224, 224)) if ON_GPU else ("vit_8", (1, 8, 8))
SMALL = ("vit_ti16", (3, 64, 64)) if ON_GPU else ("vit_8", (1, 8, 8))
SIXTEEN_BITS = [torch.bfloat16, torch.float16] if ON_GPU else [torch.bfloat16]
CLASSES = 10


@pytest.fixture(autouse=True)
def fresh():
    if not ON_GPU:
        torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()


def vit(size, *, compiled=False, checkpointed=False):
    torch.manual_seed(0)
    name, image = size
    how = {"num_classes": CLASSES, "image_shape": image, "drop_path": 0.3}
    model = models.create(name, **how).to(DEVICE).train()
    if checkpointed:
        models.checkpoint_activations(model)
    if compiled:
        compile_blocks(model, backend="inductor" if ON_GPU else "aot_eager")
    return model


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0], batch[2]).float(), batch[1])


def micro_batches(step, image, images=8):
    """(images, labels, keys of drop-path) of two micro-batches."""
    draw = torch.Generator().manual_seed(step)
    return [
        (
            torch.randn(images, *image, generator=draw).to(DEVICE),
            torch.randint(CLASSES, (images,), generator=draw).to(DEVICE),
            (torch.arange(images) + 100 * step + images * i).to(DEVICE),
        )
        for i in range(2)
    ]


def engine_of(precision, **how):
    model = vit(SMALL, **how)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = LookSAM(model.parameters(), base, rho=0.05, k=3)
    return Engine(model, optimizer, loss, precision=precision)


def train(engine, first=0, last=7):
    for step in range(first, last):
        engine.step(micro_batches(step, SMALL[1]))
    return [p.detach().clone() for p in engine.module.parameters()]


def gradients(size, dtype=None, images=8, **how):
    model = vit(size, **how)
    for batch in micro_batches(0, size[1], images):
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            value = loss(model, batch)
        value.backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"] if ON_GPU else ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_looks_micro_batches_blocks_and_steps_share_one_graph(precision, checkpointed):
    engine = engine_of(precision, compiled=True, checkpointed=checkpointed)
    train(engine, 0, 4)
    engine.module.eval()
    with torch.no_grad():
        engine.module(micro_batches(9, SMALL[1])[0][0])
    engine.module.train()
    train(engine, 4, 6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"] and not counters["graph_break"]


def test_a_compiled_run_in_fp32_ends_in_the_weights_of_an_eager_one():
    want, got = (train(engine_of("fp32", compiled=compiled)) for compiled in (False, True))
    for a, b, start in zip(want, got, vit(SMALL).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert not torch.equal(a, start)


def apart(grads, truth):
    """||grads - truth|| / ||truth|| over all layers."""
    squares = [
        sum(float(t.double().square().sum()) for t in tensors)
        for tensors in (torch._foreach_sub(grads, truth), truth)
    ]
    return (squares[0] / squares[1]) ** 0.5


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_compiled_blocks_round_no_more_in_16_bits_than_eager_ones(dtype):
    """Kernels keep in fp32 what eager operators round in between; 10 % are left to chance."""
    truth = gradients(LARGE)
    eager, compiled = (
        apart(gradients(LARGE, dtype, compiled=compiled), truth) for compiled in (False, True)
    )
    assert 1e-5 < eager < 0.1
    assert compiled < 1.1 * eager


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointed_activations_change_no_bit(dtype, compiled):
    without, with_ = (
        gradients(LARGE, dtype, compiled=compiled, checkpointed=checkpointed)
        for checkpointed in (False, True)
    )
    assert all(map(torch.equal, without, with_))


@gpu_alone
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_activations_take_under_a_third_of_the_memory(compiled):
    def peak(checkpointed):
        how = {"images": 64, "compiled": compiled, "checkpointed": checkpointed}
        gradients(LARGE, torch.bfloat16, **how)  # compiles
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        grads = gradients(LARGE, torch.bfloat16, **how)
        weights = 2 * sum(g.numel() * g.element_size() for g in grads)  # and gradients
        return torch.cuda.max_memory_allocated() - resident - weights

    assert peak(True) < peak(False) / 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_that_goes_on_in_mid_cycle_ends_in_the_same_bits(precision):
    engine = engine_of(precision, compiled=True)
    train(engine, 0, 4)
    state = copy.deepcopy((engine.module.state_dict(), engine.optimizer.state_dict()))
    whole = train(engine, 4, 7)
    again = engine_of(precision, compiled=True)
    again.module.load_state_dict(state[0])
    again.optimizer.load_state_dict(state[1])
    assert all(map(torch.equal, whole, train(again, 4, 7)))


@gpu_alone
def test_train_py_resumes_a_compiled_run_to_the_same_bits(tmp_path):
    flags = "--data digits --steps 8 --batch_size 32 --k 3 --save_every 4 --optimizer look_sam"
    flags += f" --precision bf16 --compile blocks --device {DEVICE}"
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main([*flags.split(), "--out", str(whole)]) == 0
    from_4 = ["--resume", str(whole / "checkpoints/step-4")]
    assert main([*flags.split(), *from_4, "--out", str(again)]) == 0
    a, b = (load_file(out / "model.safetensors") for out in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)

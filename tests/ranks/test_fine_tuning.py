"""--init, --freeze, --layer_decay and --head_lr on every backend: the reference's steps, a group's
lr being a number there, and a frozen layer one whose gradient is 0."""

from functools import cache
from types import SimpleNamespace

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from torch.nn import functional as F

from dist_looksam import models
from dist_looksam.models.named import SIZES
from dist_looksam.models.timm_form import as_timm
from dist_looksam.settings import assemble, config
from launch import play_train_by_horovod, play_trains

STEPS, BATCH, LR, DECAY, HEAD = 8, 24, 0.003, 0.6, 3.0
FLAGS = ["--data", "digits", "--device", "cpu", "--workers", "0", "--steps", str(STEPS)]
FLAGS += ["--batch_size", str(BATCH), "--k", "3", "--eps", "1e-4", "--lr", str(LR), "--schedule"]
FLAGS += ["constant", "--warmup_steps", "0", "--augment", "none", "--weight_decay", "0.1"]
FLAGS += ["--freeze", r"patch_embed|blocks\.0\.fc1", "--layer_decay", str(DECAY)]
FLAGS += ["--head_lr", str(HEAD)]
METHODS = {"look_sam": {"rho": 0.05}, "look_layer_sam": {"rho": 0.02}}
ON = {
    "plain": (1, []),
    "ddp": (2, ["--backend", "ddp"]),
    "zero2": (2, ["--backend", "zero", "--zero_stage", "2"]),
    "zero3": (2, ["--backend", "zero", "--zero_stage", "3"]),
    "fsdp2": (2, ["--backend", "fsdp2"]),
}
SHAPE = (1, 8, 8)


def frozen(name):
    return name.startswith(("patch_embed.", "blocks.0.fc1."))


def lr_of(name):
    """vit_8 has 4 blocks."""
    if name == "pos_embed":
        return LR * DECAY**5
    if name.startswith("blocks."):
        return LR * DECAY ** (4 - int(name.split(".")[1]))
    return LR * HEAD if name.startswith("head.") else LR


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(start, folder of a run of each method on each backend): one start of all."""
    folder = tmp_path_factory.mktemp("fine")
    torch.manual_seed(5)
    other = models.create("vit_8", num_classes=7, image_shape=SHAPE).state_dict()
    file = folder / "timm.safetensors"
    save_file(as_timm(other, SIZES["vit_8"])[0], file)
    torch.manual_seed(0)  # the run's seed, of its new head
    start = models.create("vit_8", num_classes=10, image_shape=SHAPE).state_dict()
    start |= {name: w for name, w in other.items() if not name.startswith("head.")}
    cases = {1: [], 2: []}
    for method, how in METHODS.items():
        for on, (ranks, flags) in ON.items():
            out = ["--out", str(folder / f"{method}-{on}"), "--save_every", "5"]
            own = ["--optimizer", method, "--rho", str(how["rho"]), *flags]
            cases[ranks].append([*FLAGS, *own, *out, "--init", str(file)])
    for on in ("zero2", "fsdp2"):
        saved = folder / f"look_sam-{on}" / "checkpoints" / "step-5"
        rest = ["--resume", str(saved), "--out", str(folder / f"again-{on}"), *ON[on][1]]
        own = ["--optimizer", "look_sam", "--rho", "0.05", "--init", str(folder / "gone")]
        cases[2].append([*FLAGS, *own, *rest])
    play_trains(folder, cases, 600)
    return start, folder


@cache
def batches():
    settings = config.parse([*FLAGS, "--optimizer", "sgd"])
    settings = settings.resolved(ranks=1, launcher="", samples=1437)
    data = assemble.data_of(settings)
    loader = assemble.train_loader(settings, data, SimpleNamespace(rank=0, size=1))
    made = []
    for t in range(STEPS):  # a loader uses its memory again
        (batch,) = [each.to(torch.device("cpu")) for each in loader.step(t)]
        made.append((batch.images.double(), batch.labels.clone()))
    loader.close()
    return made


def truth(start, method):
    model = models.create("vit_8", num_classes=10, image_shape=SHAPE).double()
    names = [name for name, _ in model.named_parameters()]

    def gradient(weights, t):
        params = [torch.tensor(w, requires_grad=True) for w in weights]
        images, labels = batches()[t]
        out = functional_call(model, dict(zip(names, params, strict=True)), (images,))
        loss = F.cross_entropy(out, labels)
        grads = torch.autograd.grad(loss, params)
        grads = [0 * g if frozen(n) else g for n, g in zip(names, grads, strict=True)]
        return float(loss.detach()), [g.numpy() for g in grads]

    groups = [
        {
            "layers": [i],
            "lr": 0.0 if frozen(name) else lr_of(name),
            "weight_decay": 0.1 if start[name].ndim > 1 else 0.0,
        }
        for i, name in enumerate(names)
    ]
    result = reference.train(
        [start[name].double().numpy() for name in names], gradient, optimizer=method, steps=STEPS,
        lr=LR, groups=groups, eps=1e-4, k=3, reuse="natural", **METHODS[method],
    )  # fmt: skip
    return {n: torch.from_numpy(w) for n, w in zip(names, result.weights[-1], strict=True)}


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("method", METHODS)
def test_every_backend_takes_the_references_steps_with_frozen_layers_and_lrs_by_layer(
    trained, method
):
    start, folder = trained
    want = truth(start, method)
    moved = [n for n in want if float((want[n] - start[n]).abs().max()) > 1e-3]
    assert {n for n in want if frozen(n)}.isdisjoint(moved) and len(moved) > 40
    for on in ON:
        got = load_file(folder / f"{method}-{on}" / "model.safetensors")
        for name, w in want.items():
            apart = float((got[name].double() - w).abs().max())
            assert apart < (2e-5 if not frozen(name) else 1e-12), (on, name, apart)


@pytest.fixture(scope="module")
def by_horovod(trained):
    """The methods of METHODS, whole and sharded."""
    folder, cases = trained[1], []
    for (method, how), stage in zip(METHODS.items(), ([], ["--zero_stage", "1"]), strict=True):
        own = ["--optimizer", method, "--rho", str(how["rho"]), "--backend", "horovod", *stage]
        own += ["--out", str(folder / f"{method}-horovod")]
        cases.append([*FLAGS, *own, "--init", str(folder / "timm.safetensors")])
    play_train_by_horovod(folder, 2, cases)


@pytest.mark.needs("deepspeed", "horovod")
@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_horovod_end_in_one_processs_weights(trained, by_horovod, method):
    start, folder = trained
    out = folder / f"{method}-horovod"
    want, got = (load_file(p / "model.safetensors") for p in (folder / f"{method}-plain", out))
    assert want.keys() == got.keys()
    for name, weight in got.items():
        if frozen(name):
            assert torch.equal(weight, start[name]), name
        assert float((weight - want[name]).abs().max()) < 2e-5, name
    assert "init: 53 of 55 entries are from" in (out / "log.txt").read_text()


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("on", ["zero2", "fsdp2"])
def test_a_resumed_run_goes_on_to_the_bit_and_does_not_need_the_file(trained, on):
    """zero2's differed by 1.2e-7: zero3's run, earlier in this process and after the first start of
    zero2, had left DeepSpeed's own torch.nn.functional.linear in place."""
    _, folder = trained
    want, got = (
        load_file(folder / f"{n}-{on}" / "model.safetensors") for n in ("look_sam", "again")
    )
    assert want.keys() == got.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert "init:" not in (folder / f"again-{on}" / "log.txt").read_text()


@pytest.mark.needs("deepspeed")
def test_the_log_says_what_the_file_gave(trained):
    for on in ON:
        log = (trained[1] / f"look_sam-{on}" / "log.txt").read_text()
        assert "timm.safetensors; made anew for 10 classes: head.weight, head.bias" in log
        assert "init: 53 of 55 entries are from" in log and "warning: init" not in log

"""examples/gpt.py as it is written, on one and two ranks, against the float64 reference."""

import argparse
import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from torch.nn import functional as F

from dist_looksam import restore

pytestmark = [pytest.mark.slow, pytest.mark.needs("deepspeed", "transformers")]

HERE = Path(__file__).parent
GPT = HERE.parents[1] / "examples" / "gpt.py"
STEPS, LOOK_FROM, STOPPED = 14, 7, 9  # looks at 7, 10 and 13; stopped between two of them
EPS, LR = 1e-4, 0.003
FLAGS = ["--look_from", str(LOOK_FROM), "--eps", str(EPS), "--lr", str(LR)]
RUNS = {  # folder: how often main is called, each time with (ranks, backend, steps). The model
    # is `gpt`, or the one of transformers that the name begins with.
    "plain": [(1, "plain", STEPS)],
    "ddp": [(2, "ddp", STEPS)],
    "fsdp2": [(2, "fsdp2", STEPS)],
    "zero1": [(2, "zero1", STEPS)],
    "zero3": [(2, "zero3", STEPS)],
    "fsdp2, then zero2": [(2, "fsdp2", STOPPED), (2, "zero2", STEPS)],
    "gpt2, zero3, then fsdp2": [(2, "zero3", STOPPED), (2, "fsdp2", STEPS)],
    "llama, fsdp2": [(2, "fsdp2", STEPS)],
    "llama, zero2, then zero3": [(2, "zero2", STOPPED), (2, "zero3", STEPS)],
}
DROPOUT = [("fsdp2", "gpt2"), ("zero2", "llama"), ("zero3", "gpt2")]


def model_of(name: str) -> str:
    first = name.partition(",")[0]
    return first if first in ("gpt2", "llama") else "gpt"


@pytest.fixture(scope="module")
def gpt():
    return argparse.Namespace(**runpy.run_path(str(GPT)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FOLDER/NAME of RUNS: the checkpoints."""
    made = tmp_path_factory.mktemp("gpt")
    cases = [
        [ranks, ["--backend", backend, "--steps", str(steps), "--out", str(made / name), *flags]]
        for name, calls in RUNS.items()
        for flags in [[*FLAGS, "--model", model_of(name)]]
        for ranks, backend, steps in calls
    ]
    (made / "cases.json").write_text(json.dumps(cases))
    (made / "dropout.json").write_text(json.dumps(DROPOUT))
    paths = [HERE.parent / "ranks", HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "gpt_worker.py"), str(made)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    log = (made / "log").read_text() if (made / "log").exists() else ""
    assert done.returncode == 0, done.stderr[-3000:] + log[-3000:]
    return made


@pytest.fixture(scope="module")
def truth(gpt):
    return functools.cache(functools.partial(trained, gpt))


def trained(gpt, name: str):
    torch.manual_seed(0)
    model = (gpt.GPT() if name == "gpt" else gpt.of_transformers(name, 0.0)).double()
    text = torch.frombuffer(bytearray(GPT.read_bytes()), dtype=torch.uint8)

    def gradient(weights, step):
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights, strict=True):
                p.copy_(torch.from_numpy(w))
        model.zero_grad()
        batch = gpt.sequences(text, step)
        logits = model(batch[:, :-1])
        logits = logits if name == "gpt" else logits.logits
        value = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        value.backward()
        return float(value.detach()), [p.grad.numpy().copy() for p in model.parameters()]

    start = list(model.parameters())
    matrices = [i for i, p in enumerate(start) if p.ndim > 1]
    return reference.train(
        [p.detach().numpy().copy() for p in start],
        gradient,
        optimizer="look_sam",
        groups=[
            {"layers": matrices, "weight_decay": 0.1},
            {"layers": [i for i in range(len(start)) if i not in matrices], "weight_decay": 0.0},
        ],
        **{"steps": STEPS, "lr": LR, "eps": EPS, "rho": 0.05, "alpha": 0.5, "k": 3},
        **{"reuse": "natural", "clip": 1.0, "look_from": LOOK_FROM},
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_language_model_with_a_tied_matrix_is_trained_as_the_reference_says(
    name, folder, truth, gpt
):
    """Also where FSDP2 stops between two looks, and ZeRO 2 continues from its checkpoint; and
    transformers' GPT-2 and Llama."""
    truth = truth(model_of(name))
    assert [i for i, r in enumerate(truth.records) if r["look"]] == [7, 10, 13]
    how = {"model": model_of(name), "dropout": 0.0, "lr": LR, "eps": EPS}
    asked = argparse.Namespace(**how, look_from=LOOK_FROM)
    engine = gpt.engine_of("plain", asked, torch.device("cpu"))
    assert restore(engine, folder / name).step == STEPS
    got = list(engine.module.parameters())
    names = [n for n, _ in engine.module.named_parameters(remove_duplicate=False)]
    assert len(names) == len(got) + 1  # the tied matrix has two names
    assert len(got) == len(truth.weights[-1])
    worst = max(
        float((p.detach().double() - torch.from_numpy(w)).abs().max())
        for p, w in zip(got, truth.weights[-1], strict=True)
    )
    assert worst < 2e-5


@pytest.mark.parametrize(("backend", "model"), DROPOUT)
def test_both_passes_of_a_look_drop_the_same_activations(backend, model, folder):
    """With almost no perturbation g_s is then g.."""
    for rank in range(2):
        assert float((folder / f"{backend} {model} {rank}").read_text()) < 1e-3

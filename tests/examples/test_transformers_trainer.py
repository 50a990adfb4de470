"""examples/transformers_trainer.py as it is written, against Engine, and what it cannot do."""

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_looksam import ConfigError, Engine, LookSAM

pytestmark = [pytest.mark.slow, pytest.mark.needs("transformers")]

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "transformers_trainer.py"
STEPS, STOPPED = 11, 5  # looks at 0, 3, 6, 9; stopped between two of them; an epoch has 10 or more
HOW = {"use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def example():
    return argparse.Namespace(**runpy.run_path(str(EXAMPLE)))


@pytest.fixture(autouse=True)
def accelerate_is_new():
    """Accelerate's state is of the process."""
    import accelerate.state

    yield
    for kind in ("AcceleratorState", "GradientState", "PartialState"):
        getattr(accelerate.state, kind)._reset_state()


def noting(example, monkeypatch, begin=lambda step: None) -> dict[int, list]:
    """Step -> its micro-batches, (inputs, num_items_in_batch). `begin(step)` comes before it."""
    seen: dict[int, list] = {}

    def noted(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step
        if step not in seen:
            begin(step)
        seen.setdefault(step, []).append((inputs, num_items_in_batch))
        return example.TrainerMixin.training_step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(example.LookSAMTrainer, "training_step", noted, raising=False)
    return seen


def of_engine(example, out, steps: dict[int, list], precision: str) -> dict[str, torch.Tensor]:
    """The weights that Engine trains on the same micro-batches."""
    trainer = example.trainer_of(str(out), **HOW)
    model, count = trainer.model.train(), 0

    def loss(net, batch):
        return net(**batch, num_items_in_batch=items).loss * count  # Engine takes the mean

    optimizer = trainer.create_optimizer()
    engine = Engine(model, optimizer, loss=loss, clip=1.0, precision=precision)
    looks = []
    for step in sorted(steps):
        torch.manual_seed(step)
        count, items = len(steps[step]), steps[step][0][1]
        if engine.step([inputs for inputs, _ in steps[step]]).look:
            looks.append(step)
    assert looks == [0, 3, 6, 9]
    return weights(model)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(got: dict, want: dict) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer_trains_to_engines_weights(precision, example, tmp_path, monkeypatch):
    """With two micro-batches a step, max_grad_norm 1, dropout, and a tied matrix."""
    seen = noting(example, monkeypatch, begin=torch.manual_seed)
    settings = {"max_steps": STEPS, "save_strategy": "no", "bf16": precision == "bf16"}
    trainer = example.trainer_of(str(tmp_path), **HOW, **settings)
    start = weights(trainer.model)
    trainer.train()
    assert {len(batches) for batches in seen.values()} == {example.ACCUMULATION}
    assert trainer.model.lm_head.weight is trainer.model.transformer.wte.weight
    assert not same(weights(trainer.model), start)
    assert same(weights(trainer.model), of_engine(example, tmp_path, seen, precision))


def test_a_run_resumed_between_two_looks_gives_the_same_weights(example, tmp_path):
    settings = {"max_steps": STEPS, "save_steps": STOPPED}
    whole = example.trainer_of(str(tmp_path), **HOW, **settings)
    whole.train()
    resumed = example.trainer_of(str(tmp_path), **HOW, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOPPED}"))
    assert resumed.optimizer.optimizer.steps == STEPS
    assert same(weights(resumed.model), weights(whole.model))


def test_two_ranks_train_to_the_weights_of_one(tmp_path):
    import trainer_worker

    paths = [HERE.parent / "ranks", HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "trainer_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stderr[-3000:] + log[-3000:]
    one = trainer_worker.train(trainer_worker.load(), tmp_path / "1")
    two = load_file(tmp_path / "2" / f"checkpoint-{trainer_worker.STEPS}" / "model.safetensors")
    for name, p in one.model.named_parameters():
        assert torch.allclose(p.detach(), two[name], rtol=0, atol=2e-5), name


def test_what_the_trainer_would_do_wrong_is_refused_before_the_first_step(example, tmp_path):
    trainer = example.trainer_of(str(tmp_path), **HOW)
    for name, value, sentence in (
        ("is_deepspeed_enabled", True, "in fp32 or bf16, got DeepSpeed; Engine trains"),
        ("is_fsdp_enabled", True, "got FSDP"),
        ("optimizer", torch.optim.SGD(trainer.model.parameters()), "LookLayerSAM, got SGD"),
    ):
        before = getattr(trainer, name)
        setattr(trainer, name, value)
        with pytest.raises(ConfigError, match=sentence):
            trainer.train()
        setattr(trainer, name, before)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # fp16=True wants a GPU
    with pytest.raises(ConfigError, match="got a loss scale"):
        trainer.train()
    trainer.accelerator.scaler = None
    trainer.create_optimizer().clip = 0.5
    with pytest.raises(ConfigError, match=r"max_grad_norm must be optimizer.clip.*got 1.0 and 0.5"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_training_step_that_leaves_the_mixins_out_is_refused(example, tmp_path, monkeypatch):
    own = example.Trainer.training_step
    monkeypatch.setattr(example.LookSAMTrainer, "training_step", own, raising=False)
    trainer = example.trainer_of(str(tmp_path), **HOW)
    start = weights(trainer.model)
    with pytest.raises(ConfigError, match=r"needs a closure.*TrainerMixin"):
        trainer.train()
    assert same(weights(trainer.model), start)


def test_an_exception_in_the_second_pass_leaves_the_weights_of_before(
    example, tmp_path, monkeypatch
):
    def fails(self):
        raise RuntimeError("in the second pass")

    monkeypatch.setattr(example.TrainerMixin, "_second_pass", fails)
    trainer = example.trainer_of(str(tmp_path), **HOW)
    start = weights(trainer.model)
    with pytest.raises(RuntimeError, match="in the second pass"):
        trainer.train()
    assert same(weights(trainer.model), start)


def test_the_trainer_without_the_mixin_is_refused_with_its_name(example, tmp_path):
    """It calls step without a closure."""
    trainer = example.trainer_of(str(tmp_path), **HOW)
    plain = LookSAM(trainer.model.parameters(), torch.optim.SGD(trainer.model.parameters(), lr=0.1))
    alone = example.Trainer(
        trainer.model, trainer.args, train_dataset=trainer.train_dataset, optimizers=(plain, None)
    )
    with pytest.raises(ConfigError, match=r"needs a closure, got none; .*TrainerMixin"):
        alone.train()

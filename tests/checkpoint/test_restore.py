"""restore(engine, path): everything comes back, or one sentence and nothing has changed."""

import json
import re
import warnings
from pathlib import Path

import pytest
import small
import torch
from damage import flip
from torch import nn

from dist_looksam import SAM, Engine, LookSAM, restore
from dist_looksam.checkpoint import MANIFEST, Reader, Writer, form, save
from dist_looksam.errors import ConfigError, RunError
from dist_looksam.run import train


def normed(frozen=0.5):
    """A network with running statistics and a frozen layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.fill_(frozen)
    net[0].weight.requires_grad_(False)
    return net


def engine_of(net, base=torch.optim.AdamW, precision="fp32", **how):
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    optimizer = LookSAM(params, base(groups, **{"lr": 0.1, **how}), rho=0.05, k=3)
    return Engine(net, optimizer, small_loss, precision=precision)


def small_loss(model, pair):
    return nn.functional.cross_entropy(model(pair[0]), pair[1])


def batches(t):
    draw = torch.Generator().manual_seed(t)
    return [(torch.randn(16, 6, generator=draw), torch.randint(0, 3, (16,), generator=draw))]


def steps(engine, begin, end):
    for t in range(begin, end):
        engine.step(batches(t))
    return engine


def held(engine):
    """All that an engine holds, as it is compared."""
    found = {f"module {n}": x.detach().clone() for n, x in engine.module.state_dict().items()}
    for n, p in engine.module.named_parameters():
        for key, value in engine.optimizer.state.get(p, {}).items():
            found[f"{key} of {n}"] = value.clone() if torch.is_tensor(value) else value
    return found


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if torch.is_tensor(value):
            assert value.dtype == theirs[name].dtype, name
            assert torch.equal(value, theirs[name]), name
        else:
            assert type(value) is type(theirs[name]) and value == theirs[name], name


def test_an_own_loop_goes_on_with_statistics_frozen_layers_groups_and_counts(tmp_path):
    """The documented Reader and backend.load left all of these as they were made: logits were off
    by 6.5 after a resume."""
    first = steps(engine_of(normed()), 0, 5)
    for group, lr in zip(first.optimizer.param_groups, (0.03, 0.04), strict=True):
        group.update(lr=lr, initial_lr=0.1, rho=0.2, alpha=0.3)
    assert save(first, tmp_path, {"epoch": 2}) == tmp_path / "step-5"
    second = engine_of(normed(frozen=0.0))
    found = restore(second, tmp_path)
    assert (found.step, found.extra, second.passes) == (5, {"epoch": 2}, first.passes)
    assert_same(held(first), held(second))
    for mine, theirs in zip(first.optimizer.param_groups, second.optimizer.param_groups,
                            strict=True):  # fmt: skip
        assert {k: v for k, v in mine.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"}  # fmt: skip
    assert second.optimizer.base_optimizer.param_groups is second.optimizer.param_groups
    schedule = torch.optim.lr_scheduler.LambdaLR(second.optimizer, lambda t: 1 / (t + 1), 4)
    assert schedule.get_last_lr() == pytest.approx([0.1 / 6, 0.1 / 6])
    assert_same(held(steps(first, 5, 6)), held(steps(restored(first, tmp_path), 5, 6)))


def restored(like, folder):
    """A new engine that has read the newest checkpoint of a folder."""
    engine = engine_of(normed(frozen=0.0))
    restore(engine, folder)
    return engine


def deeper():
    return nn.Sequential(*normed(), nn.Linear(3, 3))


def wider():
    net = normed()
    net[3] = nn.Linear(8, 4)
    return net


def without_buffers():
    net = normed()
    net[1] = nn.LayerNorm(8)
    return net


WRONG = {
    "deeper": (deeper, {}, "no 4.bias"),
    "wider": (wider, {}, r"3.bias of shape \[3\] instead of shape \[4\]"),
    "without buffers": (without_buffers, {}, "which the model has not"),
    "another base": (normed, {"base": torch.optim.SGD}, "base optimizer must be AdamW"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_models_checkpoint_is_one_sentence_and_changes_nothing(name, tmp_path):
    """Another model's layers were once taken as flat slices."""
    net, how, says = WRONG[name]
    save(steps(engine_of(normed()), 0, 2), tmp_path)
    engine = steps(engine_of(net(), **how), 0, 1)
    before = held(engine)
    with pytest.raises(ConfigError, match=says) as error:
        restore(engine, tmp_path)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert_same(before, held(engine))
    assert engine.optimizer.steps == 1


def test_other_param_groups_are_refused(tmp_path):
    save(steps(engine_of(normed()), 0, 2), tmp_path)
    net = normed()
    params = [p for p in net.parameters() if p.requires_grad]
    base = torch.optim.AdamW(params)
    engine = Engine(net, LookSAM(params, base), small_loss)
    with pytest.raises(ConfigError, match="param groups must hold the same layers"):
        restore(engine, tmp_path)


def test_a_flipped_byte_is_refused_and_in_a_folder_the_one_before_it_is_taken(tmp_path):
    engine = engine_of(normed())
    for t in range(3):
        save(steps(engine, t, t + 1), tmp_path)
    flip(tmp_path / "step-3")
    other = engine_of(normed(frozen=0.0))
    before = held(other)
    with pytest.raises(RunError, match="its checksum differs"):
        restore(other, tmp_path / "step-3")
    assert_same(before, held(other))
    with pytest.warns(UserWarning, match="step-2 is taken instead"):
        assert restore(other, tmp_path).step == 2


def test_a_method_that_reuses_nothing_takes_no_g_v_from_another(tmp_path):
    """It stayed in the state of SAM, and in its checkpoints, as old as the run before."""
    saved = save(steps(engine_of(normed()), 0, 4), tmp_path)
    net = normed()
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]
    engine = Engine(net, SAM(params, torch.optim.AdamW(groups, lr=0.1), rho=0.05), small_loss)
    restore(engine, saved)
    assert {"exp_avg", "exp_avg_sq"} <= engine.backend.slots()[0].keys()
    assert not any("g_v" in slots for slots in engine.backend.slots())


def test_a_folder_without_checkpoints_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="which holds none"):
        restore(engine_of(normed()), tmp_path)


def test_a_slot_that_lacks_entries_is_found_before_anything_is_loaded(tmp_path):
    path = save(steps(engine_of(normed()), 0, 2), tmp_path)
    content = form.read_json(path / MANIFEST)
    content["parts"][0]["pieces"][-1][3] -= 1
    form.write_json(path / MANIFEST, content)
    engine = engine_of(normed())
    before = held(engine)
    with pytest.raises(RunError, match="lacks entries"):
        restore(engine, path)
    assert_same(before, held(engine))


def as_written_by_format_2(path):
    """The same checkpoint as versions before format 3 wrote it."""
    content = form.read_json(path / MANIFEST)
    counters = content["counters"]
    layers = {
        name: {k: float(v["value"] if isinstance(v, dict) else v) for k, v in state.items()}
        for name, state in counters["layers"].items()
    }
    kept = {k: counters[k] for k in ("steps", "owed", "keys", "loss_scale")}
    content.update(format=2, counters={**kept, "layers": layers})
    del content["passes"], content["extra_states"]
    form.write_json(path / MANIFEST, content)


@pytest.mark.parametrize("base", ["adamw", "lamb"])
def test_a_checkpoint_of_an_older_version_goes_on_bit_for_bit(base, tmp_path):
    whole, first, second = (small.engine(small.net(), "look_sam", base, k=5) for _ in range(3))
    for t in range(8):
        whole.step(small.micro_batches(t))
    for t in range(5):
        first.step(small.micro_batches(t))
    as_written_by_format_2(save(first, tmp_path))
    restore(second, tmp_path)
    for t in range(5, 8):
        second.step(small.micro_batches(t))
    for p, q in zip(whole.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(p, q)


def test_train_py_refuses_a_checkpoint_of_an_own_loop_in_a_sentence(tmp_path, capsys):
    """It ended in KeyError 'passes'."""
    flags = "--data digits --model vit_8 --steps 2 --batch_size 8 --workers 0 --device cpu"
    run = tmp_path / "run"
    assert train.main([*flags.split(), "--out", str(run)]) == 0
    engine = engine_of(normed())
    Writer(engine.backend, tmp_path / "own", background=False).save(1, {})
    again = [*flags.split(), "--out", str(tmp_path / "b"), "--resume"]
    assert train.main([*again, str(tmp_path / "own" / "step-1")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "of another program" in error


def test_a_run_of_train_py_is_restored_in_an_own_loop(tmp_path):
    flags = "--data digits --model vit_8 --steps 2 --batch_size 8 --workers 0 --device cpu"
    assert train.main([*flags.split(), "--optimizer", "look_sam", "--out", str(tmp_path)]) == 0
    reader = Reader(tmp_path / "checkpoints" / "step-2")
    assert (
        reader.passes
        == json.loads((tmp_path / "summary.json").read_text())["forward_backward_passes"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match="of the same model"):
            restore(engine_of(normed()), tmp_path)
    assert Path(reader.path).exists()


def test_the_loop_of_the_page_resumes_to_the_bit_with_dropout(tmp_path, monkeypatch):
    """A checkpoint has no random numbers. A loop with dropout that seeded once, as the page had it,
    resumed with others, and ended with other weights."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0].replace("500", "4")

    def trained(folder, steps):
        """Begins anew or resumes in folder: steps of k = 3 and one checkpoint, after the fourth."""
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        net = nn.Sequential(normed(), nn.Dropout(0.5))
        names = {"engine": engine_of(net), "rank": 0, "steps": steps, "batches": batches}
        base = names["engine"].optimizer.base_optimizer
        names["scheduler"] = torch.optim.lr_scheduler.StepLR(base, 1, 0.9)
        torch.manual_seed(0)
        exec(compile(code, "checkpoints.md", "exec"), {"torch": torch, "Path": Path, **names})
        return held(names["engine"])

    whole = trained(tmp_path / "whole", 7)
    trained(tmp_path / "parts", 4)
    assert_same(trained(tmp_path / "parts", 7), whole)

"""A user's DeepSpeedEngine and its own checkpoints: same ranks, and other ranks by a universal one.

DeepSpeed's converter once dropped g_v, and with SGD's state it ended in a KeyError.
"""

import json
import pickle
import sys
from pathlib import Path

import pytest
import task
import torch

from dist_looksam.cli import main as cli
from launch import HERE, run

pytestmark = pytest.mark.needs("deepspeed")

SAVED, STEPS = 7, 13  # k = 3: in mid-cycle
METHODS = {
    "sgd": {"optimizer": "look_sam", "base": "sgd"},
    "lamb": {"optimizer": "look_layer_sam", "base": None},
}
SAME = [(2, stage, name) for stage in (1, 2, 3) for name in METHODS]
OTHER = [(r, s, n) for r in (1, 2) for s in (1, 2) for n in METHODS]  # r ranks to 3 - r


class Bomb:
    """Unpickling it makes a file: proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


def play(folder, starts):
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps(starts))
    run([sys.executable, str(HERE / "user_engine_worker.py"), str(jobs), str(folder)], 900, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    fresh, later = {"start": 0, "read": None}, {"start": SAVED, "steps": STEPS, "write": None}
    starts = []
    for ranks in (1, 2):
        jobs = []
        for stage, name in [(s, n) for r, s, n in SAME if r == ranks or s < 3]:
            path = folder / f"{ranks}-{stage}-{name}"
            job = {**METHODS[name], **fresh, "stage": stage, "steps": STEPS, "write": str(path)}
            jobs.append({**job, "write_at": SAVED, "result": f"{path}-whole.pt"})
        starts.append([ranks, jobs])
    play(folder, starts)
    for ranks, stage, name in OTHER:
        path = folder / f"{ranks}-{stage}-{name}"
        assert cli.main(["checkpoint", "universal", str(path), str(path / "universal")]) == 0
    jobs = {1: [], 2: []}
    for ranks, stage, name in SAME:
        path = folder / f"{ranks}-{stage}-{name}"
        job = {**METHODS[name], **later, "stage": stage, "read": str(path)}
        jobs[ranks].append({**job, "result": f"{path}-same.pt"})
    for ranks, stage, name in OTHER:
        path = folder / f"{ranks}-{stage}-{name}"
        job = {**METHODS[name], **later, "stage": 3 - stage, "read": str(path), "universal": True}
        jobs[3 - ranks].append({**job, "result": f"{path}-other.pt"})
    play(folder, list(jobs.items()))
    return folder


@pytest.mark.parametrize("ranks, stage, name", SAME)
def test_it_goes_on_bit_for_bit_on_the_same_ranks(folder, ranks, stage, name):
    path = folder / f"{ranks}-{stage}-{name}"
    whole, got = (torch.load(f"{path}-{x}.pt", weights_only=True) for x in ("whole", "same"))
    assert got["found"] == SAVED
    assert got["steps"] == STEPS and got["looks"] == whole["looks"][SAVED:]
    for layer, weight in whole["weights"].items():
        assert torch.equal(got["weights"][layer], weight), layer


@pytest.mark.parametrize("ranks, stage, name", OTHER)
def test_a_universal_one_goes_on_at_other_ranks_and_the_other_stage(folder, ranks, stage, name):
    got = torch.load(folder / f"{ranks}-{stage}-{name}-other.pt", weights_only=True)
    optimizer, base = METHODS[name].values()
    truth = task.truth(optimizer, base, steps=STEPS)
    assert got["found"] == SAVED  # before the first step; the counters of a new engine once
    assert got["steps"] == got["again"] == STEPS  # where the universal one's were put over it
    assert got["looks"] == [r["look"] for r in truth.records[SAVED:]]
    assert task.worst(got["weights"], truth) < task.tolerance(optimizer, base)


def test_what_cannot_be_converted_is_a_sentence(folder, tmp_path, capsys):
    def says(*words) -> str:
        assert cli.main(["checkpoint", "universal", *map(str, words)]) in (1, 2)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "got stage 3" in says(folder / "2-3-sgd", tmp_path / "out")
    assert "ZeRO stage 1 or 2" in says(tmp_path, tmp_path / "out")
    assert "which exists" in says(folder / "2-1-sgd", tmp_path)
    tag = tmp_path / "hostile"
    tag.mkdir()
    for path in (folder / "2-1-sgd" / "mine").iterdir():
        (tag / path.name).write_bytes(path.read_bytes())
    second = tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    second.rename(tmp_path / "second")
    assert "files of all ranks" in says(tag, tmp_path / "out")
    (tmp_path / "second").rename(second)
    (tag / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "proof")))
    assert "damaged" in says(tag, tmp_path / "out")
    assert not (tmp_path / "proof").exists() and not (tmp_path / "out").exists()


def rename(old, new):
    """The dictionary's entry under another name, its place kept."""
    return lambda entries: {new if name == old else name: x for name, x in entries.items()}


def lead_out(name):
    def change(optimizer, model, here):
        state = optimizer["optimizer_state_dict"]
        old = next(iter(state["param_slice_mappings"][0]))
        for groups in (state["param_slice_mappings"], model["param_shapes"]):
            groups[0] = rename(old, name.replace("HERE", str(here)))(groups[0])

    return change


def lead_state_out(optimizer, *_):
    state = optimizer["optimizer_state_dict"]["base_optimizer_state"]["state"]
    state[0] = rename("momentum_buffer", "../../elsewhere")(state[0])


def too_short(optimizer, model, *_):
    last = list(model["param_shapes"][0])[-1]  # others are written before it
    model["param_shapes"][0][last] = torch.Size([1000])


NO_TRUST, NOT_SO = "do not trust these files", "is not as DeepSpeed 0.19 writes it"
DAMAGED = {
    "a layer that leads up": (lead_out("../../elsewhere"), NO_TRUST),
    "an absolute layer": (lead_out("HERE/elsewhere"), NO_TRUST),
    "a state that leads up": (lead_state_out, NO_TRUST),
    "a buffer that leads up": (
        lambda o, m, _: m["module"].update({"../../elsewhere/x": torch.ones(1)}), NO_TRUST),
    "no optimizer": (lambda o, m, _: o.pop("optimizer_state_dict"), NOT_SO),
    "another optimizer": (lambda o, m, _: o.update(optimizer_state_dict=3), NOT_SO),
    "no weights": (lambda o, m, _: m.pop("module"), NOT_SO),
    "no groups": (lambda o, m, _: m.update(param_shapes=[]), NOT_SO),
    "another shape": (too_short, "the files lack entries of fp32"),
}  # fmt: skip


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 pickle an enum's member: as getattr(kind, name)."""

    def __init__(self, kind, name: str) -> None:
        self.found = (kind, name)

    def __reduce__(self):
        return (getattr, self.found)


def copied(tag: Path, to: Path, change) -> None:
    """A tag's files, written anew after change(optimizer's file, model's file)."""
    to.mkdir(parents=True)
    read = {}
    for path in tag.glob("*_states.pt"):
        read[path.name] = torch.load(path, weights_only=False)  # written by this test's own ranks
    optimizer = next(x for file, x in read.items() if "optim" in file)
    change(optimizer, read["mp_rank_00_model_states.pt"])
    for file, content in read.items():
        torch.save(content, to / file)


def test_a_checkpoint_of_any_python_is_read_and_no_other_attribute(folder, tmp_path, capsys):
    """Debian 12's Python 3.11.2 could not convert what it had written itself."""
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def convert(kind, name: str) -> int:
        def change(optimizer, _):
            assert optimizer["optimizer_state_dict"]["zero_stage"] == 1
            optimizer["optimizer_state_dict"]["zero_stage"] = ByName(kind, name)

        copied(folder / "1-1-sgd" / "mine", tmp_path / name, change)
        return cli.main(["checkpoint", "universal", str(tmp_path / name), str(tmp_path / "out")])

    assert convert(fragment_address, "__new__") == 1
    assert "no code of it was run" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert convert(ZeroStageEnum, "optimizer_states") == 0
    assert (tmp_path / "out" / "zero" / "optimizer_state.pt").exists()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_hostile_checkpoint_is_a_sentence_and_leaves_nothing(
    folder, tmp_path, capsys, name
):
    """Names in the files became paths as they were: a layer called /tmp/x was written there. And a
    file without its optimizer was a traceback, with what had been written so far left lying."""
    change, says = DAMAGED[name]
    tag = tmp_path / "in" / "mine"
    copied(folder / "1-1-sgd" / "mine", tag, lambda o, m: change(o, m, tmp_path))
    assert cli.main(["checkpoint", "universal", str(tag), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

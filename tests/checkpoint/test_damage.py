"""Damaged, foreign and hostile checkpoints: a sentence, no code run, the one before it taken."""

import errno
import json
import pickle
import resource
from pathlib import Path

import pytest
import small
import torch
from damage import WAYS, Bomb

from dist_looksam.checkpoint import MANIFEST, Reader, Writer, choose, form, found
from dist_looksam.errors import ConfigError, RunError


@pytest.fixture
def saved(tmp_path):
    """(engine, folder) with step-1, step-2, step-3."""
    engine = small.engine(small.net(), "look_sam", "adamw")
    writer = Writer(engine.backend, tmp_path)
    for t in range(3):
        engine.step(small.micro_batches(t))
        writer.save(t + 1, {})
    writer.wait()
    return engine, tmp_path


@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
def test_a_bad_checkpoint_is_named_and_the_one_before_it_is_taken(saved, way):
    engine, folder = saved
    way(folder / "step-3")
    reader, damaged = choose(engine.backend, found(folder))
    assert reader.step == 2
    assert len(damaged) == 1 and "step-3" in damaged[0] and WAYS[way] in damaged[0]
    assert "\n" not in damaged[0]
    assert not (folder / "proof").exists()


def test_a_forged_checksum_does_not_make_a_pickle_a_part(saved):
    _, folder = saved
    path = folder / "step-3"
    part = path / "rank-00000.safetensors"
    part.write_bytes(pickle.dumps(Bomb(folder / "proof")))
    content = form.read_json(path / MANIFEST)
    content["parts"][0] |= {"sha256": form.digest_of(part), "bytes": part.stat().st_size}
    form.write_json(path / MANIFEST, content)
    with pytest.raises(RunError, match="not a safetensors file"):
        Reader(path).verify()
    assert not (folder / "proof").exists()


@pytest.mark.parametrize("change, says", [
    ({"file": "../../secret"}, "part named"),
    ({"pieces": [["0.weight", "weight", 0, 10**12]]}, "damaged or foreign"),
    ({"pieces": "everything"}, "damaged or foreign"),
])  # fmt: skip
def test_a_manifest_cannot_point_elsewhere(saved, change, says):
    _, folder = saved
    content = form.read_json(folder / "step-3" / MANIFEST)
    content["parts"][0] |= change
    form.write_json(folder / "step-3" / MANIFEST, content)
    with pytest.raises(RunError, match=says):
        Reader(folder / "step-3")


def test_a_checkpoint_of_a_later_version_is_refused(saved):
    _, folder = saved
    content = form.read_json(folder / "step-3" / MANIFEST)
    form.write_json(folder / "step-3" / MANIFEST, {**content, "format": 99})
    with pytest.raises(RunError, match="format 99"):
        Reader(folder / "step-3")


def test_another_model_is_refused(saved):
    _, folder = saved
    with pytest.raises(ConfigError, match="must be of the same model"):
        Reader(folder / "step-3")("blocks.0.weight", "weight", 0, 4)


def test_other_programs_can_read_the_parts(saved):
    """The parts are written by our own code; the safetensors library is the judge of them."""
    from safetensors.torch import load_file

    engine, folder = saved
    name, p = next(iter(engine.module.named_parameters()))
    held = load_file(folder / "step-3" / "rank-00000.safetensors")
    assert torch.equal(held[f"weight/0/{name}"], p.detach().view(-1))


def test_keep_deletes_older_ones_only(tmp_path):
    engine = small.engine(small.net(), "look_sam")
    writer = Writer(engine.backend, tmp_path, keep=2)
    for step in range(1, 6):
        writer.save(step, {})
        writer.wait()
        names = [p.name for p in found(tmp_path)]
        assert names == [f"step-{s}" for s in range(step, max(0, step - 2), -1)]
    assert {p.name for p in tmp_path.iterdir()} == {"step-4", "step-5"}


def test_nothing_older_is_deleted_before_the_newer_is_committed(tmp_path, monkeypatch):
    engine = small.engine(small.net(), "look_sam")
    writer = Writer(engine.backend, tmp_path, keep=1)
    writer.save(1, {})
    writer.wait()

    def full(path, tensors):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("dist_looksam.checkpoint.writer.write_tensors", full)
    writer.save(2, {})
    with pytest.raises(RunError, match=r"step-2 was not written: No space left on device.*step-1"):
        writer.wait()
    monkeypatch.undo()
    Reader(tmp_path / "step-1").verify()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    writer.save(3, {})  # there is room again
    writer.wait()
    assert [p.name for p in found(tmp_path)] == ["step-3"]


def test_no_space_left_while_writing_leaves_the_older_one_whole(tmp_path):
    """The kernel refuses to let files grow: the write fails in its middle."""
    engine = small.engine(small.net(), "look_sam")
    writer = Writer(engine.backend, tmp_path)
    writer.save(1, {})
    writer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        writer.save(2, {})
        with pytest.raises(RunError, match="step-2 was not written: File too large"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    Reader(tmp_path / "step-1").verify()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_what_a_killed_writer_left_is_removed_and_never_read(saved):
    engine, folder = saved
    left = folder / ".step-4.0badf00d.writing"
    left.mkdir()
    (left / "rank-00000.safetensors").write_bytes(b"half")
    assert [p.name for p in found(folder)] == ["step-3", "step-2", "step-1"]
    Writer(engine.backend, folder)
    assert not left.exists()


def test_the_copy_is_of_the_moment_of_saving(tmp_path):
    """Training goes on while the thread writes."""
    engine = small.engine(small.net(), "look_sam")
    name, p = next(iter(engine.module.named_parameters()))
    want = p.detach().clone().view(-1)
    writer = Writer(engine.backend, tmp_path)
    writer.save(1, {})
    with torch.no_grad():
        p.fill_(7.0)
    writer.wait()
    assert torch.equal(Reader(tmp_path / "step-1")(name, "weight", 0, p.numel()), want)


def test_a_manifest_says_what_wrote_it(saved):
    _, folder = saved
    manifest = Reader(folder / "step-3").manifest
    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert json.loads(Path(folder / "step-3" / MANIFEST).read_text())["content"] == manifest

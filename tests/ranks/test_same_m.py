"""train.py with the same --m gives the same weights on every backend that allows it, on 1 to 4
ranks, and costs there what its dry run says."""

import json

import pytest
from safetensors.torch import load_file

from dist_looksam.run import dryrun
from dist_looksam.settings.config import parse
from launch import play_train_by_horovod, play_trains

FLAGS = ["--data", "digits", "--model", "vit_8", "--steps", "7", "--k", "3", "--workers", "0"]
FLAGS += ["--optimizer", "look_sam", "--base", "sgd", "--device", "cpu"]
FLAGS += ["--augment", "crop,flip", "--drop_path", "0.2"]
OF_64 = ["--batch_size", "64", "--m", "32", "--micro_batch"]
OF_48 = ["--batch_size", "48", "--m", "24", "--micro_batch"]  # on 3 ranks: one of each
DDP, FSDP2, ZERO = (["--backend", name] for name in ("ddp", "fsdp2", "zero"))
HOROVOD = ["--backend", "horovod"]
LATE = ["--steps", "10", "--look_from", "0.9", "--k", "1"]
# (ranks, name) -> flags. In one process a group is two micro-batches, or half of one.
RUNS = {
    (1, "plain"): [*OF_64, "16"],
    (1, "parts"): [*OF_64, "64"],
    (2, "ddp"): [*DDP, *OF_64, "16"],  # one micro-batch of both
    (2, "ddp-own"): [*DDP, *OF_64, "32"],
    (2, "fsdp2"): [*FSDP2, *OF_64, "16"],
    **{(2, f"zero-{s}"): [*ZERO, "--zero_stage", str(s), *OF_64, "16"] for s in range(4)},
    (2, "zero-1-own"): [*ZERO, "--zero_stage", "1", *OF_64[:-1]],
    (4, "ddp"): [*DDP, *OF_64, "16"],  # of two neighbours
    (4, "fsdp2-blocks"): [*FSDP2, "--shard_ranks", "2", *OF_64, "16"],
    (4, "zero-3"): [*ZERO, "--zero_stage", "3", *OF_64, "8"],
    (1, "plain-48"): [*OF_48, "24"],
    (3, "ddp-48"): [*DDP, *OF_48, "8"],
    (3, "fsdp2-48"): [*FSDP2, *OF_48, "8"],
    (3, "zero-2-48"): [*ZERO, "--zero_stage", "2", *OF_48, "8"],
    (2, "ddp-late"): [*DDP, *OF_64, "32", *LATE],
}
OF_HOROVOD = {
    (2, "horovod"): [*HOROVOD, *OF_64, "32"],
    (2, "horovod-all"): [*HOROVOD, *OF_64, "16"],
    (2, "horovod-sharded"): [*HOROVOD, "--zero_stage", "1", *OF_64, "32"],
}


def cases(runs, folder, ranks):
    return [
        [*FLAGS, *flags, "--out", str(folder / f"{ranks}-{name}")]
        for (of, name), flags in runs.items()
        if of == ranks
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(ranks, name) -> run directory; each number of ranks is started once."""
    folder = tmp_path_factory.mktemp("same-m")
    play_trains(folder, {ranks: cases(RUNS, folder, ranks) for ranks in (1, 2, 3, 4)}, 1400)
    return lambda ranks, name: folder / f"{ranks}-{name}"


@pytest.fixture(scope="module")
def by_horovod(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same-m-horovod")
    play_train_by_horovod(folder, 2, cases(OF_HOROVOD, folder, 2))
    return lambda ranks, name: folder / f"{ranks}-{name}"


def apart(run, other):
    got, want = (load_file(path / "model.safetensors") for path in (run, other))
    return max(float((got[n] - want[n]).abs().max()) for n in want)


COMPARED = [(ranks, name) for ranks, name in RUNS if name not in ("plain", "plain-48", "ddp-late")]


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("ranks, name", COMPARED)
def test_weights_depend_on_m_and_not_on_ranks_backend_or_micro_batch(trained, ranks, name):
    """1e-6 is the contract's: see `task.tolerance`."""
    plain = trained(1, "plain-48" if name.endswith("-48") else "plain")
    assert apart(trained(ranks, name), plain) < 1e-6


@pytest.mark.needs("horovod", "deepspeed")
@pytest.mark.parametrize("ranks, name", OF_HOROVOD)
def test_and_not_on_horovod(trained, by_horovod, ranks, name):
    assert apart(by_horovod(ranks, name), trained(1, "plain")) < 1e-6


@pytest.mark.needs("deepspeed")
def test_late_looks_in_groups_cost_a_tenth_more_as_the_dry_run_says(trained):
    summary = json.loads((trained(2, "ddp-late") / "summary.json").read_text())
    said = dryrun.check(parse([*FLAGS, *RUNS[2, "ddp-late"]]), ranks=2)
    assert summary["forward_backward_passes"] == said.passes == 11

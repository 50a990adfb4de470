"""Flags and YAML files in the order in which they are given, each value of the setting's type."""

import re

import pytest

from dist_looksam.errors import ConfigError
from dist_looksam.settings import config


@pytest.fixture
def file(tmp_path):
    def write(text: str, name: str = "file.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_files_and_flags_count_in_the_order_in_which_they_are_given(file):
    one, two = file("k: 3\nrho: 1e-3\n", "one.yaml"), file("k: 4\n", "two.yaml")
    assert config.parse(["--config", one, "--k", "7"]).k == 7
    assert config.parse(["--k", "7", f"--config={one}"]).k == 3
    both = config.parse(["--config", one, "--config", two])
    assert (both.k, both.rho) == (4, 1e-3)


@pytest.mark.parametrize("lines, flags, name, value", [
    ("betas: [0.8, 0.9]", ["--betas", "0.8", "0.9"], "betas", (0.8, 0.9)),
    ("betas: 0.8,0.9", ["--betas=0.8,0.9"], "betas", (0.8, 0.9)),
    ("clip: null", ["--clip", "none"], "clip", None),
    ("base: none", ["--base=null"], "base", None),
    ("requeue: true", ["--requeue"], "requeue", True),
    ("requeue: 'no'", ["--no_requeue"], "requeue", False),
    ("batch_size: 64.0", ["--batch_size", "64"], "batch_size", 64),
    ("rho: 1e-3", ["--rho=1e-3"], "rho", 1e-3),
    ("out: 2024-01-01", ["--out", "2024-01-01"], "out", "2024-01-01"),
    ("out: 12", ["--out=12"], "out", "12"),
    ("local_rank: 2", ["--local-rank=2"], "local_rank", 2),
    ("seed: 12345678901234567", ["--seed", "12345678901234567"], "seed", 12345678901234567),
])  # fmt: skip
def test_a_line_of_a_file_and_a_flag_mean_the_same(lines, flags, name, value, file):
    """Whole numbers above 2^53 were rounded: --seed 12345678901234567 became ...568."""
    assert getattr(config.parse(["--config", file(lines)]), name) == value
    found = getattr(config.parse(flags), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("flags, says", [
    (["--lr"], "argument --lr: expected one argument"),
    (["--batch-size", "64"], "unknown flag, got --batch-size; did you mean --batch_size?"),
    (["--batchsize=64"], "unknown flag, got --batchsize; did you mean --batch_size?"),
    (["--seed", str(2**64)], "seed must be <= 9,223,372,036,854,775,807, got 18446744073709551616"),
    (["--backend", "ddp", "--offload"], "offload is of backend zero, got backend ddp; leave it"),
    (["--backend", "zero", "--compression", "fp16"], "compression fp16 is of backend horovod"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(flags, says):
    """--seed 18446744073709551616 was a traceback of torch."""
    with pytest.raises(ConfigError, match=f"^{re.escape(says)}"):
        config.parse(["--data", "digits", *flags])


def test_a_loss_given_by_a_flag_replaces_what_only_the_files_loss_has(file):
    """--loss ce with a recipe of DeiT III was told to leave out a flag that it had not given."""
    one, two = "loss: bce\nbce_target_thresh: 0\n", "class_weights: balanced\n"
    assert config.parse(["--config", file(one), "--loss", "ce"]).bce_target_thresh is None
    assert config.parse(["--config", file(two), "--loss", "bce"]).class_weights is None
    with pytest.raises(ConfigError, match=r"bce_target_thresh is of loss bce, got loss ce"):
        config.parse(["--config", file(one), "--loss", "ce", "--bce_target_thresh", "0"])


@pytest.mark.parametrize("text", ["", "# rho: 0.1\n"])
def test_a_file_without_a_line_is_a_mistake(text, file):
    with pytest.raises(ConfigError, match=r"got .*file.yaml with nothing in it"):
        config.parse(["--config", file(text)])


def test_a_resolved_file_of_before_the_rows_means_the_same(file):
    """config.yaml of a run of commit 2b4ea09, whose checkpoints must go on."""
    settings = config.parse(["--data", "digits", "--steps", "20"])
    old = settings.resolved(ranks=1, launcher="", samples=1437).to_yaml()
    assert old.splitlines()[:3] == ["optimizer: look_layer_sam", "base: lamb", "lr: 0.01"]
    again = config.parse(["--config", file(old)])
    assert again.resolved(ranks=1, launcher="", samples=1437).to_yaml() == old


def test_m_has_a_name_that_launchers_leave_to_the_program():
    """torchrun and deepspeed stopped at --m: "ambiguous option: --m could match --master_port"."""
    from torch.distributed.run import get_args_parser

    flags = ["--nproc_per_node", "2", "train.py", "--group", "16", "--shard_ranks", "2"]
    passed = get_args_parser().parse_args(flags).training_script_args
    settings = config.parse(passed)
    assert settings == config.parse(["--m", "16", "--shard_ranks", "2"]) and settings.m == 16

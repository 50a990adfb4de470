"""A launcher parses the whole line: it must leave every flag of train.py to train.py."""

import contextlib
import io
from dataclasses import fields
from unittest.mock import patch

import pytest

from dist_looksam.settings import config
from dist_looksam.settings.config import Settings


def torchrun(flag: str) -> list[str]:
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(["train.py", flag, "1"]).training_script_args


def deepspeed(flag: str) -> list[str]:
    from deepspeed.launcher import runner

    return runner.parse_args(["train.py", flag, "1"]).user_args


def horovodrun(flag: str) -> list[str]:
    from horovod.runner.launch import parse_args

    with patch("sys.argv", ["horovodrun", "-np", "1", "train.py", flag, "1"]):
        return parse_args().command[1:]


def passes(launcher, flag: str) -> bool:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return launcher(flag) == [flag, "1"]
    except SystemExit:
        return False


@pytest.mark.parametrize("launcher, library", [
    (torchrun, None), (deepspeed, "deepspeed"), (horovodrun, "horovod"),
])  # fmt: skip
def test_every_setting_has_a_name_that_launchers_pass_on(launcher, library, needs):
    """`torchrun train.py --m 64` ended: --m abbreviates --master_addr, --module and others, and
    argparse looks for abbreviations also behind the script's name."""
    if library:
        needs(library)
    for f in fields(Settings):
        names = [f"--{f.name}", *f.metadata["aliases"]]
        assert any(passes(launcher, name) for name in names), (launcher.__name__, names)


def test_group_is_m():
    assert config.parse(["--data", "digits", "--group", "32"]).m == 32

"""Files of settings with values of other types, or no text at all: one sentence."""

from pathlib import Path

import pytest
import yaml

from dist_looksam.errors import ConfigError
from dist_looksam.plan import machines
from dist_looksam.report import reference
from dist_looksam.sweep import grid

READERS = {"sweep": grid.read, "machine": machines.load, "reference": reference.read}
BINARY = b"\xff\xfe\x00\xd8 not text \x80"
MACHINE = {
    "device": {"name": "d", "flops": {"fp32": 1.0}, "memory": None, "memory_bandwidth": 1.0,
               "source": "s"},
    "network": {"name": "n", "latency": 0, "bandwidth": 1.0, "source": "s"},
}  # fmt: skip
ODD = [None, True, -1, 0, float("nan"), "1e9", "", [], [1], {}, {"fp32": "x"}, {"fp32": 0}]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [BINARY, b"", b"1", b"[]", b"null", b"a: b: c", b"{1: 2}"])
def test_what_is_no_file_of_settings_is_one_sentence(tmp_path, reader, content):
    """A file that is no text ended in a traceback of its decoder."""
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        READERS[reader](path)


def write(tmp_path: Path, part: str, name: str, value) -> Path:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump({**MACHINE, part: {**MACHINE[part], name: value}}))
    return path


@pytest.mark.parametrize(("part", "name"), [
    ("device", "flops"), ("device", "memory_bandwidth"), ("device", "pass_seconds"),
    ("device", "streams"), ("device", "memory"), ("network", "bandwidth"), ("network", "latency"),
])  # fmt: skip
def test_a_machine_of_values_of_other_types_is_one_sentence(tmp_path, part, name):
    """Its numbers were used as they were: text ended in a traceback, nan in plans of nan hours."""
    allowed = {"streams": [True], "memory": [None], "pass_seconds": [0], "latency": [0]}
    for value in ODD:
        path = write(tmp_path, part, name, value)
        if any(value is good for good in allowed.get(name, [])):
            machines.load(path)
            continue
        with pytest.raises(ConfigError, match=f"{name} of {part} of machine .* must be"):
            machines.load(path)

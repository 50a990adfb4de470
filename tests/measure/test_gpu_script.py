"""tests/gpu/all.sh in its CPU form: the same calls with tiny models, so that it runs when a GPU is
at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "all.sh"


def start(out: Path, *parts: str, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DEVICE": "cpu", "OUT": str(out), "PYTHON": sys.executable, **env}
    return subprocess.run(
        ["bash", str(SCRIPT), *parts], env=environment, capture_output=True, text=True, check=False
    )


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.needs("deepspeed")
def test_every_part_runs_without_a_gpu(tmp_path):
    done = start(tmp_path, TIME_LIMIT="600")
    found = lines_of(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not [x for x in found if "error" in x or x.get("outcome") == "failed"]
    rows = {(x["backend"], x["optimizer"]) for x in found if x["part"] == "speed"}
    assert rows >= {("bare", "adamw"), ("plain", "look_sam"), ("zero2", "look_layer_sam")}
    zero = next(x for x in found if x.get("backend") == "zero2")
    assert len(zero["to_plain"]) == 3 and zero["images_per_s"] > 0 and zero["mfu"] is None
    assert {x["step"] for x in found if "kernels" in x} == {"look", "between"}
    ran = [x["test"] for x in found if x["part"] == "correct" and x["outcome"] == "passed"]
    assert any("blocks_and_steps_share_one_graph" in test for test in ran), found
    page = (tmp_path / "README.md").read_text()
    assert "| zero2 | look_layer_sam |" in page and "### Correctness" in page


def test_an_unknown_part_is_a_sentence(tmp_path):
    done = start(tmp_path, "fast")
    assert done.returncode == 2 and "got fast" in done.stderr


def test_a_script_without_time_says_what_it_left_out(tmp_path):
    done = start(tmp_path, TIME_LIMIT="6")
    assert done.returncode == 0, done.stdout[-2000:]
    left_out = [x["part"] for x in lines_of(tmp_path) if x.get("why") == "no time was left"]
    assert left_out == ["correct", "speed", "profile"]


def test_the_page_in_docs_is_made_of_the_lines_beside_it():
    docs = ROOT / "docs" / "gpu"
    table = [sys.executable, str(ROOT / "tests" / "gpu" / "table.py"), *docs.glob("*.jsonl")]
    made = subprocess.run(table, capture_output=True, text=True, check=True).stdout
    assert made == (docs / "README.md").read_text()
    missing = [x for x in made.splitlines() if x.startswith("- vit_b16, 128, off: ")]
    assert len(missing) == 1 and "zero2 adamw" in missing[0], "rows of all.sh that nobody has run"
    assert "plain adamw" not in missing[0], "this one was"

"""Results of tests/gpu/all.sh as JSON lines, and the time that is left for a part of it."""

import json
import os
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUT = Path(os.environ.get("OUT", "build/gpu"))
ROOT = Path(__file__).resolve().parents[2]
ON_GPU = os.environ.get("DEVICE") != "cpu"


def left() -> float:
    """Seconds that the part still has."""
    return float(os.environ.get("PART_END", "inf")) - time.time()


def write(part: str, **values: Any) -> None:
    """Append one line to lines.jsonl, in one write, so that several processes may."""
    line = json.dumps({"part": part, **values})
    with (OUT / "lines.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


@cache
def where() -> dict[str, str]:
    """Card, torch and commit: what each number depends on."""
    card = "cpu"
    if ON_GPU:
        import torch  # a second, which a step without a GPU saves

        card = torch.cuda.get_device_name()
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    commit = done.stdout.strip() or os.environ.get("COMMIT", "unknown")
    return {"card": card, "torch": version("torch"), "commit": commit}


def reason(error: BaseException) -> str:
    """An exception as one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


if __name__ == "__main__":  # `lines.py COMMAND`: the line of a run
    write("run", command=sys.argv[1], date=time.strftime("%Y-%m-%d"), **where())

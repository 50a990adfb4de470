"""Fuzzes the C route under the address and undefined-behaviour sanitizers.

python tests/data/fuzz_jpeg.py SECONDS [SEED]: seconds of processor time.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jpegs
import numpy as np

DRIVER = Path(__file__).with_suffix(".c")
FLAGS = ["-g", "-O1", "-ffp-contract=off", "-Wno-psabi", "-fsanitize=address,undefined",
         "-fno-sanitize-recover=all"]  # fmt: skip


def fuzz(seconds: int, seed: int = 0) -> str:
    """What the driver counted. CalledProcessError at the first finding, which stderr describes."""
    compiler = shutil.which("cc") or "gcc"
    with tempfile.TemporaryDirectory() as scratch:
        program = f"{scratch}/fuzz"
        subprocess.run([compiler, *FLAGS, DRIVER, "-o", program, "-ljpeg"], check=True)
        random, files = np.random.default_rng(seed), []
        sources = [jpegs.jpeg(random, longest=200) for _ in range(40)]
        sources += [jpegs.jpeg(random, longest=200, progressive=True) for _ in range(10)]
        for data in [*sources, *jpegs.damaged(random).values()]:
            files.append(f"{scratch}/{len(files)}.jpg")
            Path(files[-1]).write_bytes(data)
        arguments = [program, str(seconds), str(seed), *files]
        return subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    print(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0), end="")

"""The tests that need a GPU, several processes of pytest side by side."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import lines

CUDA = "tests/ranks/test_cuda.py"
COMPILE = "tests/gpu/test_compile.py"
RESUME = "resumed_run"
SELECTIONS = [  # (file, -k); a process each, so that no one waits for another's ranks
    ("tests/gpu/test_device.py", ""),
    ("tests/gpu/test_device_augment.py", ""),
    ("tests/gpu/test_kernels.py", ""),
    ("tests/gpu/test_kernel_counts.py", ""),
    (COMPILE, ""),
    (CUDA, "base_skips or both_passes or reuse_step or images_per_s"),
    (CUDA, "reference and ddp"),
    (CUDA, "reference and fsdp"),
    (CUDA, "reference and zero"),
    (CUDA, "overflow"),
    (CUDA, "goes_on_without_one"),
    *(
        (CUDA, f"{RESUME} and {way}")
        for way in ("plain", "ddp", "zero0", "zero1", "zero2", "zero3", "fsdp2")
    ),
    ("tests/ranks/test_cuda_plan.py", ""),
]


Started = tuple[subprocess.Popen, Path]


def start(file: str, chosen: str, said: Path) -> Started:
    """A process of pytest, whose output goes to a file: a pipe that is not read would stop it."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "each_test", "-p", "no:cacheprovider"]
    command += ["--tb=short", file, *(["-k", chosen] if chosen else [])]
    with said.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=lines.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, said


def finish(name: str, process: subprocess.Popen, said: Path) -> bool:
    """Wait for it until the part ends; whether it was good."""
    try:
        process.wait(timeout=max(1.0, lines.left() - 10))
    except subprocess.TimeoutExpired:
        lines.write("correct", test=name, outcome="cut off", why="no time was left")
        stop(process)
        return True
    if process.returncode in (0, 5):  # 5: nothing was chosen
        return True
    print(f"-- {name}\n{said.read_text()[-3000:]}", flush=True)
    if process.returncode != 1:  # 1: tests failed, and have lines of their own
        lines.write("correct", test=name, outcome="failed", why=said.read_text()[-500:])
    return False


def stop(process: subprocess.Popen) -> None:
    """End it and what it has started: torchrun ends its ranks when it is asked to, not killed."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    chosen = SELECTIONS if lines.ON_GPU else [(COMPILE, "graph and False-fp32")]
    missing = [file for file, _ in chosen if not (lines.ROOT / file).exists()]
    for file in missing:
        lines.write("correct", test=file, outcome="missing", why="this commit has no such file")
    with tempfile.TemporaryDirectory() as folder:
        running = {
            f"{file} {words}".strip(): start(file, words, Path(folder, str(number)))
            for number, (file, words) in enumerate(chosen)
            if file not in missing
        }
        good = [finish(name, *started) for name, started in running.items()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())

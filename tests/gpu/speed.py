"""Images a second, on one device: starts a process of `speed_rows.py` for each list of groups."""

import subprocess
import sys
from pathlib import Path

import lines
from lines import ON_GPU

BARE = "bare"  # torch's AdamW without this package's engine
METHODS = ("adamw", "lamb", "look_sam", "look_layer_sam")
B, S = "vit_b16", "vit_s16"
ALL = [(BARE, "adamw"), *(("plain", o) for o in METHODS)]


def against_plain(backend: str) -> list[tuple[str, str]]:
    few = ("adamw", "look_layer_sam")
    return [(where, optimizer) for optimizer in few for where in ("plain", backend)]


# (compile, model, images of a micro-batch, rows), the most telling first; a process for each list.
PROCESSES: list[list[tuple[str, str, int, list[tuple[str, str]]]]] = [
    [("blocks", B, 128, ALL), ("off", B, 128, ALL), ("blocks", S, 256, ALL)],
    *(
        [(mode, B, 128, against_plain(backend)) for mode in ("blocks", "off")]
        for backend in ("zero2", "fsdp2", "zero1", "zero3")
    ),
    [
        ("blocks", S, 128, ALL), ("blocks", S, 512, ALL), ("blocks", B, 256, ALL),
        ("off", S, 256, ALL), ("blocks", B, 512, ALL[:3]), ("off", S, 512, ALL),
        ("off", S, 128, ALL), ("off", B, 256, ALL), ("off", B, 512, ALL[:3]),
    ],
]  # fmt: skip
ROWS = Path(__file__).with_name("speed_rows.py")


def main() -> int:
    failed = 0
    chosen = [[n] for n in range(len(PROCESSES))] if ON_GPU else [[0, 1]]
    for numbers in chosen:
        if lines.left() < 20:
            names = [of_group[:3] for n in numbers for of_group in PROCESSES[n]]
            lines.write("speed", skipped=names, why="no time was left")
            continue
        command = [sys.executable, str(ROWS), *map(str, numbers)]
        try:
            done = subprocess.run(command, timeout=lines.left() - 2, check=False)
        except subprocess.TimeoutExpired:
            lines.write("speed", process=numbers, why="cut off: no time was left")
            break
        if done.returncode:
            failed = 1
            lines.write("speed", process=numbers, error=f"ended with {done.returncode}")
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""wire.py TAP_A TAP_B [delay_ms=N] [jitter_ms=N] [loss=F] [rate_mbit=N] [seed=N]

A cable with the faults of a long one, where the kernel has no netem: makes two TAP devices in the
current network namespace and carries frames between them, each direction on its own. Adds about
0.2 ms itself and carries some 400 Mbit/s at most.
"""

import contextlib
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import defaultdict

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
BACKLOG = 1 << 20  # bytes that may wait for the rate in one direction; more is dropped


def options(words: list[str]) -> dict[str, float]:
    values = {"delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0, "rate_mbit": 0.0, "seed": 0.0}
    for word in words:
        key, _, value = word.partition("=")
        if key not in values:
            sys.exit(f"wire.py: got {word}; allowed: {' '.join(f'{k}=N' for k in values)}")
        values[key] = float(value)
    return values


def tap(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    return device


def frames(device: int):
    """What waits on `device`, at most 64 at a time so that the other direction gets its turn."""
    for _ in range(64):
        try:
            yield os.read(device, 65536)
        except BlockingIOError:
            return


def carry(ends: list[int], wanted: dict[str, float]) -> None:
    rng = random.Random(wanted["seed"])
    delay, jitter = wanted["delay_ms"] / 1e3, wanted["jitter_ms"] / 1e3
    seconds_a_byte = 8e-6 / wanted["rate_mbit"] if wanted["rate_mbit"] else 0.0
    free_at: dict[int, float] = defaultdict(float)  # when the rate lets the next frame leave
    last_due: dict[int, float] = defaultdict(float)  # jitter must not reorder frames
    waiting: list[tuple[float, int, int, bytes]] = []  # a heap of (due, serial, device, frame)
    serial = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for device in select.select(ends, [], [], timeout)[0]:
            out = ends[1 - ends.index(device)]
            for frame in frames(device):
                now = time.monotonic()
                start = max(now, free_at[out])
                too_many = seconds_a_byte and (start - now) / seconds_a_byte > BACKLOG
                if too_many or rng.random() < wanted["loss"]:
                    continue
                free_at[out] = start + len(frame) * seconds_a_byte
                due = free_at[out] + max(0.0, delay + rng.uniform(-jitter, jitter))
                last_due[out] = max(due, last_due[out])
                serial += 1
                heapq.heappush(waiting, (last_due[out], serial, out, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, out, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the device is down or full: a lost frame
                os.write(out, frame)


if __name__ == "__main__":
    carry([tap(name) for name in sys.argv[1:3]], options(sys.argv[3:]))

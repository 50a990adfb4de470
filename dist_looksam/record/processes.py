"""Names a process so that a later one with the same number is not taken for it."""

import os
import signal
import socket
from pathlib import Path
from typing import Any


def began(pid: int) -> str | None:
    """When a process of this host began, in clock ticks since boot; None if it has ended."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]  # Z: ended, its parent has not asked how


def named(pid: int) -> dict[str, Any]:
    """{host, pid, began} of a process of this host."""
    return {"host": socket.gethostname(), "pid": pid, "began": began(pid)}


def alive(process: dict[str, Any]) -> bool | None:
    """Whether a process of `named` runs; False for {}; None if it is of another host."""
    if not process:
        return False
    if process.get("host") != socket.gethostname():
        return None
    pid, then = process.get("pid"), process.get("began")
    return then is not None and isinstance(pid, int) and began(pid) == then


def terminate(process: dict[str, Any]) -> int | None:
    """SIGTERM to a process of `named`. Returns its number; None if it does not run on this host."""
    if not alive(process):
        return None
    os.kill(process["pid"], signal.SIGTERM)
    return process["pid"]

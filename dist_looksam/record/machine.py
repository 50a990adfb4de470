"""The machine that a run trains on, for its records."""

import platform
import re
from pathlib import Path

import torch


def machine(device: torch.device) -> dict[str, str | int]:
    """{"device": ..., "threads": ..., "torch": ...}: what the last bits of a result depend on.

    device: the name of the GPU, or the model of the processor; threads: of torch, on the host.
    """
    made: dict[str, str | int] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **made}
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        about = ""
    model = re.search(r"^model name\s*: *(.+)$", about, re.MULTILINE)
    return {"device": model[1] if model else platform.machine(), **made}

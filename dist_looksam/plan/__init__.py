"""`dist-looksam plan`: what a run holds, sends and takes, before it is started.

Arithmetic on a model's layers, a backend's collectives and a machine's speeds; nothing is trained.
`plan(settings, gpus=...)` is the same for programs.
"""

from .forecast import Plan, plan
from .machines import DEVICES, NETWORKS, Device, Machine, Network, machine
from .memory import Memory

__all__ = [
    "DEVICES", "NETWORKS", "Device", "Machine", "Memory", "Network", "Plan", "machine", "plan",
]  # fmt: skip

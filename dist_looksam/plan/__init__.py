"""`dist-looksam plan`: estimates memory, communication and time of a run before it is started.

Computed from a model's layers, a backend's collectives and a machine's speeds; nothing is trained.
Programs call `plan(settings, gpus=...)`.
"""

from .forecast import Plan, plan
from .machines import DEVICES, NETWORKS, Device, Machine, Network, device_of, machine
from .memory import Memory

__all__ = [
    "DEVICES", "NETWORKS", "Device", "Machine", "Memory", "Network", "Plan", "device_of",
    "machine", "plan",
]  # fmt: skip

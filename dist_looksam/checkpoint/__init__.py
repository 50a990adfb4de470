"""Checkpoints that any backend can read on any number of ranks.

checkpoints/step-N/
    rank-00000.safetensors ...   flat pieces "<key>/<start>/<layer>"; whole "buffer/<name>" and, of
                                 state that has another shape than its layer, "value/<name>"
    rank-00000.json ...          contents, size and checksum of that file
    manifest.json                written last: all parts, counters, settings, library versions

A layer's *slot* (its weight, g_v, exp_avg, ...) is cut into *pieces*, entries [start, stop) of the
flattened tensor. A *part* is the file of one rank; a reader joins the pieces that it needs. The
folder is written under another name, and *committed*: renamed to step-N when every part is on the
disk. So a folder named step-N is complete; checksums show later damage.
"""

from .form import MANIFEST, write_tensors
from .reader import Reader, found
from .restore import choose, restore, take
from .writer import Writer, save

__all__ = [
    "MANIFEST", "Reader", "Writer", "choose", "found", "restore", "save", "take", "write_tensors",
]  # fmt: skip

"""Checkpoints that any number of ranks and any backend can read back.

checkpoints/step-N/
    rank-00000.safetensors ...   flat pieces "<key>/<start>/<layer>"; whole "buffer/<name>" and, of
                                 state that has another shape than its layer, "value/<name>"
    rank-00000.json ...          what is in that file, its size and checksum
    manifest.json                written last: all parts, counters, settings, library versions

A layer's *slot* (its weight, g_v, exp_avg, ...) is cut into *pieces*, entries [start, stop) of the
flattened tensor. A *part* is the file of one rank; a reader puts together whatever it needs. All of
it is written under another name, and *committed*: renamed to step-N when every part is on the disk.
So what has the name step-N is whole, unless the disk lost something since; checksums tell.
"""

from .form import MANIFEST
from .reader import Reader, found
from .restore import choose, restore, take
from .writer import Writer, save

__all__ = ["MANIFEST", "Reader", "Writer", "choose", "found", "restore", "save", "take"]

"""Figures 1 and 2 of the LookSAM paper: how far g_s, g_h and g_v move from look to look.

Source: Liu et al., arXiv:2203.02714, section 4.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..maths.look import Update
from ..maths.shards import Reduce, Shards, dots
from ..optim.seen import Seen

_NORMS = ("g_norm", "gs_norm", "gh_norm", "gv_norm")
_CHANGES = ("gs_change", "gh_change", "gv_change")


class ProbeLog:
    """Called by the optimizer on looks; writes every `every`-th to probe.jsonl as one object.

    Holds the last probed g_s and g_h, 8 bytes per entry of this rank's shards.

    Args:
        path: file to write; None on ranks that write nothing.
        every: looks between probes.
        resume_step: lines of this step and later are dropped.
    """

    def __init__(self, path: Path | None, *, every: int, resume_step: int = 0) -> None:
        self.path = path
        self.every = every
        self.looks = 0
        self._last: tuple[list[Tensor], list[Tensor]] | None = None
        self._row: dict[str, Any] | None = None
        if path is not None:
            rows = files.json_lines(path) if resume_step else []
            before = [row for row in rows if row["step"] < resume_step]
            files.replace_text(path, "".join(json.dumps(row) + "\n" for row in before))

    @torch.no_grad()
    def __call__(
        self, *, step: int, grads: Shards, sam: Shards, update: Update, reduce: Reduce
    ) -> None:
        """Compute the norms of this look with one call of reduce; `flush` writes them."""
        self.looks += 1
        if (self.looks - 1) % self.every:
            return
        along = update.along(grads)
        across = [s - h for s, h in zip(sam, along, strict=True)]
        rows = [dots(x, x) for x in (grads, sam, along, across)] + [dots(grads, sam)]
        names: tuple[str, ...] = _NORMS
        if self._last is not None:
            gs, gh = self._last
            moved_s = [a - b for a, b in zip(sam, gs, strict=True)]
            moved_h = [a - b for a, b in zip(along, gh, strict=True)]
            moved_v = [a - b for a, b in zip(moved_s, moved_h, strict=True)]
            rows += [dots(x, x) for x in (moved_s, moved_h, moved_v)]
            names += _CHANGES
        sums = reduce(torch.stack(rows)).sum(-1).tolist()
        inner = sums.pop(len(_NORMS))
        self._row = {"step": step, **{n: s**0.5 for n, s in zip(names, sums, strict=True)}}
        below = self._row["g_norm"] * self._row["gs_norm"]
        self._row["cos_theta"] = inner / below if below else None
        self._last = ([s.clone() for s in sam], along)

    def flush(self, seen: Seen) -> None:
        """Write the line of the last look, if it was probed."""
        if self._row is None:
            return
        if seen.eps_cosine is not None:
            self._row["eps_cosine"] = float(seen.eps_cosine)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self._row) + "\n")
        self._row = None

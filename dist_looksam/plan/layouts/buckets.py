"""DDP: everything whole on every rank, gradients averaged in buckets while backward computes."""

from typing import Any

from ..network import Call
from ..run import PlannedRun
from . import Layout

_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes


class Buckets(Layout):
    """torch's DistributedDataParallel with gradient_as_bucket_view."""

    name = "buckets"

    def in_backward(self, run: PlannedRun) -> tuple[int, int]:
        """The buckets are the gradients; those of earlier micro-batches come on top."""
        count = run.work.parameters
        return 4 * count, 4 * count if run.accumulation > 1 else 0

    def sent(self, run: PlannedRun) -> dict[str, Any]:
        """DDP's buckets, in the order in which backward fills them."""
        sizes, bucket, limit = [], 0, _FIRST_BUCKET
        for layer in reversed(run.work.order):
            bucket += layer
            if 4 * bucket >= limit:
                sizes.append(bucket)
                bucket, limit = 0, _BUCKET
        if bucket:
            sizes.append(bucket)
        return {"gradients": tuple(Call(kind="all_reduce", elements=n, size=4) for n in sizes)}


ROW = Buckets()

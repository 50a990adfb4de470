"""FSDP2: rows of every layer on every rank, units gathered for forward and backward."""

from typing import Any

from ..network import Call
from ..run import PlannedRun
from . import Layout


class FSDP2(Layout):
    """torch's fully_shard as backends/fsdp2_units.py calls it."""

    name = "fsdp2"
    split = True
    needs_streams = True

    def shard(self, run: PlannedRun) -> int:
        return sum(_units(run))

    def autocast(self, run: PlannedRun) -> bool:
        return False

    def weights(self, run: PlannedRun) -> int:
        return 4 * (run.shard + run.work.frozen // _block(run))

    def in_backward(self, run: PlannedRun) -> tuple[int, int]:
        return 4 * run.shard if run.accumulation > 1 else 0, _gathered(run)

    def in_step(self, run: PlannedRun) -> int:
        return 4 * run.shard

    def norms(self, run: PlannedRun, look: bool) -> int:
        """Norms of g, of the base; of a look also of eps, g_v and, in 16 bits, of rounded eps."""
        return 1 + run.base.trusted + (2 + run.sixteen if look else 0)

    def sent(self, run: PlannedRun) -> dict[str, Any]:
        """The rest of the network stays gathered until the end of backward, the last block until
        its own."""
        *blocks, rest = _units(run)
        size, ranks, copies = run.weight_bytes, _block(run), run.ranks.total // _block(run)
        block = ranks if copies > 1 else None

        def gather(elements: int) -> Call:
            return Call(kind="all_gather", elements=elements, size=size, ranks=block)

        mean = Call(kind="all_reduce", elements=run.shard, size=4, ranks=copies, apart=True)
        backward = [*blocks[::-1], rest]
        return {
            "gathers": tuple(gather(n) for n in (rest, *blocks) if n),
            "again": tuple(gather(n) for n in blocks[-2::-1]),
            "gradients": tuple(
                Call(kind="reduce_scatter", elements=ranks * n, size=4, ranks=block)
                for n in backward
                if n
            ),
            "reduces": run.accumulation,
            "publish": (mean,) if copies > 1 else (),
        }


def _block(run: PlannedRun) -> int:
    """Ranks that split each layer."""
    return run.settings.shard_ranks or run.ranks.total


def _units(run: PlannedRun) -> tuple[int, ...]:
    """Entries that each rank puts into the gather of each unit: rows are padded."""
    ranks = _block(run)
    return tuple(sum(-(-r // ranks) * width for r, width in u) for u in run.work.units)


def _gathered(run: PlannedRun) -> int:
    """Bytes of units during the last block's backward, the time of most activations: the rest and
    that block, gathered, with their gradients; the block before it, twice while it is gathered."""
    ranks, size = _block(run), run.weight_bytes
    *blocks, rest = (ranks * n for n in _units(run))
    block = max(blocks, default=0)
    before = block if len(blocks) > 1 else 0
    return size * (rest + 2 * block + 2 * before)


ROW = FSDP2()

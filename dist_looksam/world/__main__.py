"""`python -m dist_looksam.world`: prints each rank's place, tests and times an all-reduce."""

import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_looksam.cli.arguments import Parser, guarded
from dist_looksam.cli.leave import leave
from dist_looksam.world import World

if TYPE_CHECKING:
    import torch


def main(argv: Sequence[str]) -> int:
    """Print a line per rank, then rank 0's results. Returns 0, or 1 for wrong sums or devices.
    Raises ConfigError."""
    parser = Parser(prog="dist-looksam world", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None)
    parser.add_argument("--megabytes", type=float, default=16.0, help="size of the all-reduce")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait (60)")
    flags = parser.parse_args(argv)
    world = World.from_env(local_rank=flags.local_rank)
    print(world, flush=True)
    if world.size == 1:
        print("one rank: no launcher's variables were found, there is nothing to add")
        return 0
    from dist_looksam.world.roster import LostRank

    try:
        return _all_reduce(world, flags.device, flags.megabytes, flags.timeout)
    except LostRank as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the transport's destructor may wait for the lost rank


def _all_reduce(world: World, device: str, megabytes: float, timeout: float) -> int:
    """Connect, add rank + 1 over the ranks, then time an all-reduce of `megabytes` MB of fp32.

    Raises LostRank if a rank does not come or is lost; ConfigError if the port is taken.
    """
    import torch
    import torch.distributed as dist

    from dist_looksam.world.roster import join

    place = torch.device("cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        # Launchers may show each rank one device.
        place = torch.device("cuda", world.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    with join(world, place, timeout=timeout):
        right, seats, best = _measured(world, place, megabytes)
    dist.destroy_process_group()
    if world.rank == 0:
        traffic = megabytes / 1e3 * 2 * (world.size - 1) / world.size
        print(f"all-reduce over {world.size} ranks: {'right' if right else 'WRONG SUM'}")
        print(
            f"{megabytes:g} MB on {place.type} in {1e3 * best:.2f} ms, "
            f"{traffic / best:.2f} GB/s per rank (best of 5)"
        )
        if seats < world.size:
            print("two ranks have the same host and local rank: they would share one device")
    return 0 if right and seats == world.size else 1


def _measured(world: World, place: "torch.device", megabytes: float) -> tuple[bool, int, float]:
    """Whether the sum was right; number of distinct (host, local rank); seconds, best of 5."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([world.rank + 1.0], device=place)
    dist.all_reduce(total)
    right = float(total) == world.size * (world.size + 1) / 2
    seats: list[object] = [None] * world.size
    dist.all_gather_object(seats, (socket.gethostname(), world.local_rank))
    payload = torch.ones(int(megabytes * 1e6 / 4), device=place)
    seconds = []
    for _ in range(6):  # the first opens the connections and is left out
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(payload)
        float(payload[0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return right, len(set(seats)), min(seconds[1:])


if __name__ == "__main__":
    leave(guarded(main, sys.argv[1:]))

"""`python -m dist_looksam.world`: what each rank sees, whether they can add, and how fast."""

import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from dist_looksam.arguments import Parser, guarded
from dist_looksam.world import World


def main(argv: Sequence[str]) -> int:
    """Print one line a rank, then rank 0's verdict. 0 good, 1 wrong sums; raises ConfigError."""
    parser = Parser(prog="dist-looksam world", description=__doc__)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None)
    parser.add_argument("--megabytes", type=float, default=16.0, help="size of the all-reduce")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    flags = parser.parse_args(argv)
    world = World.from_env(local_rank=flags.local_rank)
    print(world, flush=True)
    return 0 if world.size == 1 else _all_reduce(world, flags.device, flags.megabytes)


def _all_reduce(world: World, device: str, megabytes: float) -> int:
    """Add rank + 1 over the ranks, then time an all-reduce of `megabytes` MB of fp32."""
    import torch
    import torch.distributed as dist

    gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", world.local_rank) if gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=world.url,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(minutes=2),
    )
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
    best = min(seconds[1:])
    dist.destroy_process_group()
    if world.rank == 0:
        traffic = megabytes / 1e3 * 2 * (world.size - 1) / world.size
        print(f"all-reduce over {world.size} ranks: {'right' if right else 'WRONG SUM'}")
        print(
            f"{megabytes:g} MB on {place.type} in {1e3 * best:.2f} ms, "
            f"{traffic / best:.2f} GB/s per rank (best of 5)"
        )
        if len(set(seats)) < world.size:
            print("two ranks have the same host and local rank: they would share one device")
    return 0 if right and len(set(seats)) == world.size else 1


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))

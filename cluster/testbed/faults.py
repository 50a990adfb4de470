"""faults.py TIMEOUT SECONDS - all-reduces over gloo in a loop for SECONDS; tells each stall of
more than a second, and what error ended it. Writes its process id to ready-RANK when the first
all-reduce is through."""

import datetime
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

timeout, seconds = map(float, sys.argv[1:])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
rank, going_on = dist.get_rank(), torch.ones(250_000)
ready = Path(f"ready-{rank}")
end, start = time.time() + seconds, time.time()
try:
    # The loop ends on a reduced number, so that all ranks end in the same round.
    while going_on[0].item() > 0:
        start = time.time()
        going_on.fill_(1.0 if start < end else 0.0)
        dist.all_reduce(going_on, op=dist.ReduceOp.MIN)
        if not ready.exists():
            ready.write_text(str(os.getpid()))
        if time.time() - start > 1:
            print(f"rank {rank} stalled {time.time() - start:.1f} s, then went on", flush=True)
        time.sleep(0.02)
    print(f"rank {rank} finished", flush=True)
except RuntimeError as e:
    first_line = str(e).splitlines()[0]
    print(f"rank {rank} raised after {time.time() - start:.1f} s: {first_line}", flush=True)
    os._exit(3)  # destroying the group could wait for the lost rank

"""Trains examples/transformers_trainer.py on two forked ranks, without dropout.

python trainer_worker.py FOLDER      FOLDER/2 gets the checkpoint, FOLDER/log what is printed
"""

import runpy
import socket
import sys
from functools import partial
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "transformers_trainer.py"
STEPS = 8  # the first epoch, and no other order of batches


def load() -> dict:
    return runpy.run_path(str(EXAMPLE))


def train(example: dict, out: Path, **settings: object) -> object:
    """The trainer after STEPS steps of fp32 at a constant rate; without dropout."""
    of = example["trainer_of"]
    plain = partial(of.__globals__["GPT2Config"], attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    of.__globals__["GPT2Config"] = plain
    fixed = {"max_steps": STEPS, "save_steps": STEPS, "lr_scheduler_type": "constant"}
    trainer = of(str(out), use_cpu=True, disable_tqdm=True, **{**fixed, **settings})
    trainer.train()
    return trainer


if __name__ == "__main__":
    import forks

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    example = load()
    forks.share()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def main() -> int:
        assert train(example, folder / "2", per_device_train_batch_size=2).args.world_size == 2
        torch.distributed.destroy_process_group()
        return 0

    places = [forks.place(rank, 2) for rank in range(2)]
    forks.finish([forks.fork(main, folder / "log", **at, MASTER_PORT=port) for at in places])

"""Runs examples/gpt.py's main on forked ranks, one case after another.

python gpt_worker.py FOLDER     FOLDER/cases.json: [[ranks, [flags]], ...]
"""

import json
import runpy
import socket
import sys
from pathlib import Path

import forks
import torch

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py")


def run(folder: Path, ranks: int, flags: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def main() -> int:
        sys.argv = [GPT, *flags]
        try:
            runpy.run_path(GPT, run_name="__main__")
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    places = [forks.place(rank, ranks) for rank in range(ranks)]
    children = [forks.fork(main, folder / "log", **place, MASTER_PORT=port) for place in places]
    forks.finish(children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks.load_deepspeed()
    forks.share()
    for ranks, flags in json.loads((Path(sys.argv[1]) / "cases.json").read_text()):
        run(Path(sys.argv[1]), ranks, flags)

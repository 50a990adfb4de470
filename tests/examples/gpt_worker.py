"""Runs examples/gpt.py's main on forked ranks, one case after another; then looks with dropout.

python gpt_worker.py FOLDER     FOLDER/cases.json: [[ranks, [flags]], ...]
                                FOLDER/dropout.json: [[backend, model], ...]
"""

import argparse
import json
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import forks
import torch
import torch.distributed as dist

GPT = str(Path(__file__).parents[2] / "examples" / "gpt.py")


def run(folder: Path, ranks: int, flags: list[str]) -> None:
    def main() -> int:
        sys.argv = [GPT, *flags]
        try:
            runpy.run_path(GPT, run_name="__main__")
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    fork(main, folder, ranks)


def look(folder: Path, backend: str, model: str) -> None:
    """Writes ||g_v|| / ||g|| of a look with dropout and almost no perturbation."""

    def main() -> int:
        gpt = argparse.Namespace(**runpy.run_path(GPT))
        gpt.start(backend)
        asked = argparse.Namespace(model=model, dropout=0.3, lr=0.003, eps=1e-4, look_from=0)
        engine = gpt.engine_of(backend, asked, torch.device("cpu"))
        engine.optimizer.rho_scale = 1e-4
        rank = dist.get_rank()
        torch.manual_seed(rank)
        text = torch.frombuffer(bytearray(Path(GPT).read_bytes()), dtype=torch.uint8)
        parts = gpt.sequences(text, 0).chunk(2 * gpt.ACCUMULATION)
        ratio = float(engine.step(parts[rank::2]).seen.gv_ratio)
        (folder / f"{backend} {model} {rank}").write_text(str(ratio))
        return 0

    fork(main, folder, 2)


def fork(main: Callable[[], int], folder: Path, ranks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    places = [forks.place(rank, ranks) for rank in range(ranks)]
    children = [forks.fork(main, folder / "log", **place, MASTER_PORT=port) for place in places]
    forks.finish(children)


def import_models() -> None:
    """Modules of transformers' models, which it imports when a name of them is used."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401


if __name__ == "__main__":
    torch.set_num_threads(1)
    forks.load_deepspeed()
    import_models()
    forks.share()
    for ranks, flags in json.loads((Path(sys.argv[1]) / "cases.json").read_text()):
        run(Path(sys.argv[1]), ranks, flags)
    for backend, model in json.loads((Path(sys.argv[1]) / "dropout.json").read_text()):
        look(Path(sys.argv[1]), backend, model)

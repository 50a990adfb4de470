"""Cases that a worker plays on all its ranks, one after another, and what came out of each."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import forks
import pytest
import task
import torch
import torch.distributed as dist

from dist_looksam.cli.leave import leave
from launch import HERE, run


def play(result_of: Callable[[dict], Any], *, timeout: timedelta | None = None) -> None:
    """A worker's whole run, `worker.py RANKS FOLDER`: FOLDER/cases.json. Rank 0 keeps results."""
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])

    def kept(numbered: tuple[int, dict]) -> None:
        number, case = numbered
        result = result_of(case)
        if dist.get_rank() == 0:
            torch.save(result, task.result_file(folder, number))

    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    if "RANK" not in os.environ:
        forks.play(folder, ranks, kept, enumerate(cases), timeout)
        return
    dist.init_process_group(transport(), timeout=timeout)
    for numbered in enumerate(cases):
        kept(numbered)
    dist.destroy_process_group()
    leave(0)


def transport() -> str:
    """NCCL where every rank has a GPU of its own; ranks that share one can talk by gloo."""
    gpus = torch.cuda.device_count() if task.DEVICE == "cuda" else 0
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    return "nccl" if gpus >= int(os.environ["WORLD_SIZE"]) else "gloo"


ON_GPU = {"TASK_DEVICE": "cuda", "DS_ACCELERATOR": "cuda"}


def start(
    folder: Path,
    ranks: int,
    worker: str,
    cases: list[dict],
    *,
    under: Sequence[str] = (),
    timeout: int = 1400,
    **env: str,
) -> None:
    """`worker` plays the cases on so many ranks; task.result_file says where the results are.

    under: what the worker is started by. On GPUs (`**ON_GPU`) that is torchrun: a process that has
    asked for them cannot fork.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [*under, sys.executable]
    if env.get("TASK_DEVICE") == "cuda":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    run([*command, str(HERE / worker), str(ranks), str(folder)], timeout, env)


def of_all_ranks(result_of: Callable[[dict], Any]) -> Callable[[dict], list]:
    """The same for all ranks: what came out on each."""

    def all_of(case: dict) -> list:
        everybody: list = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, result_of(case))
        return everybody

    return all_of


def assert_course(rows: list, records: list[dict], *, numbers: bool = True) -> None:
    """Each step's [look, loss, grad_norm, update_norm] is the reference's; look alone if not
    `numbers`."""
    for (look, loss, grad_norm, update_norm), record in zip(rows, records, strict=True):
        assert look == record["look"]
        if numbers:
            assert loss == pytest.approx(record["loss"], abs=1e-4)
            assert grad_norm == pytest.approx(record["grad_norm"], rel=1e-3, abs=1e-5)
            assert update_norm == pytest.approx(record["update_norm"], rel=1e-3, abs=1e-5)


def everywhere(all_cases: dict[int, list[dict]], cases: list[dict]) -> list:
    """Parameters (ranks, number of the case) for those cases, with readable names."""
    return [
        pytest.param(ranks, number, id="-".join([str(ranks), *map(str, case.values())]))
        for ranks, of_ranks in all_cases.items()
        for number, case in enumerate(of_ranks)
        if case in cases
    ]


def results(
    make_folder: Callable[[str], Path], worker: str, all_cases: dict[int, list[dict]], **how
) -> Callable[[int, int], dict]:
    """(ranks, number) -> what came out; each number of ranks is started once, when asked for."""
    folders: dict[int, Path] = {}

    def of(ranks: int, number: int) -> dict:
        if ranks not in folders:
            folder = make_folder(f"{Path(worker).stem}-{ranks}")
            folders[ranks] = folder  # before the start, so that one that fails is not repeated
            start(folder, ranks, worker, all_cases[ranks], **how)
        return torch.load(task.result_file(folders[ranks], number), weights_only=True)

    return of

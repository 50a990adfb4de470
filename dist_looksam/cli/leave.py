"""Ends a process in which torch's gloo threads may still run."""

import atexit
import os
import sys
from pathlib import Path
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with `code`, as sys.exit does, also where gloo threads still run.

    torch's gloo threads live as long as anything holds the process group, which DDP and DeepSpeed
    do to the end. Such a thread frees its last work a little later than `wait` returns. If the
    interpreter is shutting down by then, torch 2.13 aborts the process (the thread drops a Python
    reference and is ended inside a function that must not throw: std::terminate). A finished run
    then ended with SIGABRT, and its launcher reported a failed job. So where gloo threads are left,
    exit handlers run, output is flushed, and the process exits without interpreter shutdown.
    """
    if not _gloo_threads():
        sys.exit(code)
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")  # it has no exit handler; mpirun requires MPI_Finalize
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _gloo_threads() -> int:
    """Threads of this process that torch's gloo has named; 0 where there is no /proc."""
    count = 0
    for path in Path("/proc/self/task").glob("*/comm"):
        try:
            count += path.read_text().startswith("pt_gloo")
        except OSError:  # the thread has ended since it was listed
            continue
    return count

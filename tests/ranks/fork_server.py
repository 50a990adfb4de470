"""Two processes that have imported what the workers of this folder import, and fork each of them:
a worker's start costs tenths of a second of processor time then, in place of six seconds.

One has DeepSpeed. A worker whose text calls forks.load_deepspeed() is forked from that one.

python fork_server.py [deepspeed]     stdin: a worker a line, a JSON object of "argv", "env", "cwd",
files "out" and "err", "timeout" in seconds; stdout: exit codes, null after a timeout
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path

LOADS = "forks.load_deepspeed()"


def run(command: list[str], timeout: float, env: dict[str, str]) -> subprocess.CompletedProcess:
    """As subprocess.run, for a command [python, script of this folder, arguments ...]."""
    library = "deepspeed" if LOADS in Path(command[1]).read_text() else ""
    server = _server(library, env["PYTHONPATH"])
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        worker = {"argv": command[1:], "env": env, "cwd": os.getcwd(), "timeout": timeout}
        server.stdin.write(json.dumps({**worker, "out": str(out), "err": str(err)}) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the fork server ended with {server.wait()}"
        printed = out.read_text(), err.read_text()
    if (code := json.loads(answer)) is None:
        raise subprocess.TimeoutExpired(command, timeout, *printed)
    return subprocess.CompletedProcess(command, code, *printed)


@cache
def _server(library: str, path: str) -> subprocess.Popen:
    """It ends with this process, which closes its stdin."""
    command = [sys.executable, __file__, *([library] if library else [])]
    fixed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MKL_CBWR": "AUTO"}
    env = {**os.environ, **fixed, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _work(argv: list[str], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    """Become the worker."""
    code: object = 1
    try:
        for name, number in ((os.devnull, 0), (out, 1), (err, 2)):
            os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
        os.environ.clear()
        os.environ |= env
        os.chdir(cwd)
        tempfile.tempdir, sys.argv = None, argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _exit_code(child: int, timeout: float) -> int | None:
    """The child's; its ranks, which are of its group, are not left behind."""
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    import forks
    import task  # noqa: F401
    import torch

    import dist_looksam.run.train  # noqa: F401

    torch.set_num_threads(1)
    if sys.argv[1:]:
        with contextlib.suppress(ImportError):  # the worker says so, if it needs it
            forks.load_deepspeed()
    forks.share()
    for line in sys.stdin:
        worker = json.loads(line)
        timeout = worker.pop("timeout")
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            _work(**worker)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(child, child)  # whoever of both is first
        print(json.dumps(_exit_code(child, timeout)), flush=True)
    os._exit(0)  # without destructors, which print of Triton's leaks


if __name__ == "__main__":
    main()

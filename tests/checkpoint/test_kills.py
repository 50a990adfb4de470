"""SIGKILL at every moment of writing: what is found afterwards is whole, and is the newest."""

import os
import signal

import pytest
import small

from dist_looksam.checkpoint import Reader, Writer, found

TOUCHES = ("mkdir", "fsync", "replace", "rename", "rmdir", "unlink", "open")


def _killed_at(moment: int, engine, folder) -> bool:
    """Save step 2, keeping one, in a process that is killed at its `moment`-th touch of the disk.

    False if it was through before.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    left = [moment]

    def counted(real):
        def touch(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return touch

    try:
        for name in TOUCHES:
            setattr(os, name, counted(getattr(os, name)))
        writer = Writer(engine.backend, folder, keep=1)
        writer.save(2, {})
        writer.wait()
    finally:
        os._exit(0)


@pytest.mark.timeout(600)
def test_a_kill_at_any_touch_of_the_disk_leaves_a_whole_checkpoint(tmp_path):
    moment, newest = 0, []
    while True:
        moment += 1
        folder = tmp_path / str(moment)
        engine = small.engine(small.net(), "look_sam")
        first = Writer(engine.backend, folder)
        first.save(1, {})
        first.wait()
        engine.step(small.micro_batches(0))
        if not _killed_at(moment, engine, folder):
            break
        whole = found(folder)
        assert whole, f"nothing left after a kill at touch {moment}"
        for path in whole:
            Reader(path).verify()
        newest.append(Reader(whole[0]).step)
    assert moment > 10
    # Never the older one again once the newer was there, and both happened.
    assert newest == sorted(newest) and set(newest) == {1, 2}

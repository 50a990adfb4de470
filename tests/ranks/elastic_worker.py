"""train.py, of which one worker is killed once: at step 7, on the host 127.0.0.1.

horovodrun --min-np 2 --host-discovery-script ... python elastic_worker.py MARKER FLAGS
"""

import os
import signal
import sys
from pathlib import Path

import horovod.torch as hvd
import torch

from dist_looksam.backends.horovod.whole import check_alike
from dist_looksam.run import fit, train

marker = Path(sys.argv[1])
step, finish = fit.Fit._step, fit.Fit._finish


def one_dies(self, number: int) -> None:
    if number == 7 and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, number)


def ends_alike(self, done: int):
    check_alike(self.engine.module)
    if hvd.rank() == 0:
        (self.out / "ended").write_text(f"{hvd.size()}")
    return finish(self, done)


fit.Fit._step, fit.Fit._finish = one_dies, ends_alike
torch.set_num_threads(1)
sys.exit(train.main(sys.argv[2:]))

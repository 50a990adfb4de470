"""LAMB of optim/base.py."""

from ..base import Lamb
from . import Base

ROW = Base(
    name="lamb",
    make=Lamb,
    lr=0.01,
    weight_decay=0.05,
    eps=1e-6,
    uses=frozenset({"betas", "eps"}),
    trusted=True,
    state=2,
    counter_bytes=8,
    temporaries=2,
    traffic=10,  # counted in kernels/code.py; 30 without these kernels
    place=3,
)

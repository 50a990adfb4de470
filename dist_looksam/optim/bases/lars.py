"""LARS of optim/base.py."""

from ..base import Lars
from . import Base

ROW = Base(
    name="lars",
    make=Lars,
    lr=0.01,
    weight_decay=0.05,
    uses=frozenset({"momentum"}),
    trusted=True,
    state=1,
    temporaries=1,
    traffic=16,  # counted in the code of optim/base.py
    place=4,
)

"""torch's AdamW."""

from torch.optim import AdamW

from . import Base

ROW = Base(
    name="adamw",
    make=AdamW,
    lr=2e-3,
    weight_decay=0.05,
    uses=frozenset({"betas", "eps"}),
    fused=True,
    state=2,
    counter_bytes=4,
    traffic=7,  # counted in the code of torch's fused kernel
    place=2,
)

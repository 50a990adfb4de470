"""torch's SGD with momentum."""

from torch.optim import SGD

from . import Base

ROW = Base(
    name="sgd",
    make=SGD,
    lr=0.05,
    weight_decay=5e-4,
    uses=frozenset({"momentum"}),
    fused=True,
    state=1,
    traffic=5,  # counted in the code of torch's fused kernel
    place=1,
)

"""What a user can get wrong around `deepspeed.initialize`: for each, the sentence that comes.

python zero_mistakes_worker.py RANKS FOLDER
"""

import cases
import forks
import task
import torch
import torch.distributed as dist
from torch import nn

from dist_looksam import SAM, Engine
from dist_looksam.backends.zero import library as zero_library
from dist_looksam.errors import ConfigError


def engine(case: dict) -> Engine:
    deepspeed = zero_library.load_deepspeed()
    model, extra = task.net(), list(nn.Linear(4, 4).parameters()) if case.get("outside") else []
    if case.get("experts"):
        from deepspeed.moe.layer import MoE

        model.experts = MoE(hidden_size=5, expert=nn.Linear(5, 5), num_experts=2, ep_size=1)
        for p in model.experts.parameters():
            p.requires_grad_(False)  # no gradient, no loss: what counts is that it is there
    params = [*(p for p in model.parameters() if p.requires_grad), *extra]
    base = torch.optim.SGD(params, lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": case["stage"]},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **case.get("config", {}),
    }
    theirs, *_ = deepspeed.initialize(model=model, optimizer=SAM(params, base), config=config)
    return Engine(theirs, loss=task.loss, precision=case.get("precision", "fp32"))


def said(case: dict) -> str:
    try:
        made = engine(case)
        if "train" in case:
            return str(float(made.step(task.part(0, dist.get_rank(), 2, 1)).seen.grad_norm))
        return "nothing"
    except ConfigError as error:
        return str(error)


if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(said)

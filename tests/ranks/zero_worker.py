"""A rank of the DeepSpeed tests: runs every case of a JSON list, writes what came out.

python zero_worker.py RANKS FOLDER     the cases: FOLDER/cases.json
"""

import cases
import forks
import task
import torch
import torch.distributed as dist

from dist_looksam.backends.zero import library as zero_library
from dist_looksam.engine import Engine
from dist_looksam.optim import table


def optimizer_of(case: dict, model: torch.nn.Module):
    name = case["optimizer"]
    groups = table.groups(model, task.SETTINGS["decay"], case.get("perturb", "all"))
    for group in groups:
        if group["weight_decay"] == 0:
            group["lr"] = task.SMALLER_LR
    base = table.build_base(
        table.base_of(name, case.get("base")), groups, lr=task.LR, eps=task.SETTINGS["eps"]
    )
    rule = table.rule_of(name, k=task.SETTINGS["k"], **case.get("rule", {}))
    rho = task.RHO[rule.ascent or "model"]
    return table.build(base, rule=rule, rho=rho, alpha=task.SETTINGS["alpha"])


def config_of(case: dict) -> dict:
    made = {
        "train_micro_batch_size_per_gpu": task.BATCH // (2 * dist.get_world_size()),
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if case.get("precision") == "bf16":
        made["bf16"] = {"enabled": True}
        made["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.get("precision") == "fp16":
        made["fp16"] = {
            "enabled": True,
            "initial_scale_power": 8,
            "hysteresis": 1,
            **case.get("fp16", {}),
        }
    return {**made, **case.get("config", {})}


def open_engine(case: dict) -> Engine:
    deepspeed = zero_library.load_deepspeed()
    config = config_of(case)
    if "fp16" in config:  # DeepSpeed asks for fast fp16; a CPU without it only takes longer
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    if case.get("zero_init"):
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = task.net()
    else:
        model = task.net()
    # As a user does it: deepspeed.initialize with our optimizer, then Engine around the engine.
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(case, model), config=config
    )
    rest = {"clip": case.get("clip"), "ascent": case.get("ascent", "global"), "m": case.get("m")}
    return Engine(engine, loss=task.loss, **rest)


def run(case: dict) -> dict:
    engine = open_engine(case)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = []
    for step in range(task.STEPS):
        done = engine.step(task.part(step, rank, ranks, case.get("accumulation", 2)))
        numbers = (done.loss, done.seen.grad_norm, done.seen.update_norm)
        rows.append([done.look, *map(float, numbers)])
    state = engine.optimizer.state.values()
    kept = sum(s["g_v"].numel() * s["g_v"].element_size() for s in state if "g_v" in s)
    return {"weights": engine.backend.full_weights(), "rows": rows, "gv_bytes": kept}


def with_sizes(case: dict) -> dict:
    """The result of `run`, with every rank's bytes of g_v."""
    result = run(case)
    sizes: list = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, result["gv_bytes"])
    return {**result, "gv_bytes": sizes}


if __name__ == "__main__":
    forks.load_deepspeed()
    cases.play(with_sizes)

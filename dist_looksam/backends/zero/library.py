"""Imports and starts DeepSpeed, and refuses engines that would train wrongly."""

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...errors import ConfigError
from ...optim.sharpness import Sharpness
from .config import check_predivide
from .layout import check_version

_LOCAL_RANK_OF_MPI = "OMPI_COMM_WORLD_LOCAL_RANK"


def load_deepspeed() -> Any:
    """The library, without compiling an op for gloo at import (2 minutes, and a lock file)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    check_version(deepspeed.__version__)
    if not torch.cuda.is_available():
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    return deepspeed


def gather_whole(kinds: list[type[nn.Module]], module: nn.Module) -> None:
    """Let stage 3 gather modules of these classes as one: its hooks on the layers inside would
    break a compiled forward into many graphs. Call it before the engine is opened."""
    if kinds:
        load_deepspeed().utils.set_z3_leaf_modules(module, kinds)


def open_engine(module: nn.Module, optimizer: Sharpness, config: dict[str, Any]) -> Any:
    """deepspeed.initialize; the process group must exist."""
    deepspeed = load_deepspeed()
    accelerator = deepspeed.accelerator.get_accelerator()
    if config.get("fp16", {}).get("enabled") and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"precision fp16 is not supported by DeepSpeed on this {accelerator.device_name()}, "
            f"got fp16; use --precision bf16 or --backend ddp."
        )
    # DeepSpeed needs it, and makes it the current device; srun and mpirun do not set it.
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    os.environ.setdefault("LOCAL_RANK", str(device))
    check_config(config)
    # Where all ranks of a node have device 0, it would stop for the local ranks of Open MPI.
    of_mpi = os.environ.pop(_LOCAL_RANK_OF_MPI, None)
    try:
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
    finally:
        if of_mpi is not None:
            os.environ[_LOCAL_RANK_OF_MPI] = of_mpi
    return engine


def check_config(config: dict[str, Any]) -> None:
    """ConfigError, in one sentence, if DeepSpeed raises any error for the configuration."""
    # `config.make` has checked these, and DeepSpeed does not know the number of ranks yet.
    of_ranks = {"train_batch_size", "gradient_accumulation_steps"}
    try:
        load_deepspeed().DeepSpeedConfig({k: v for k, v in config.items() if k not in of_ranks})
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        if hasattr(error, "errors"):  # pydantic's, without its address and the text of the value
            first = error.errors()[0]
            text = f"{'.'.join(map(str, first['loc']))} {first['input']!r}: {first['msg']}"
        raise ConfigError(
            f"the DeepSpeed config must be what DeepSpeed takes, got {type(error).__name__} from "
            f"it: {text}; correct it."
        ) from error


def check_parallel(engine: Any) -> None:
    """ConfigError for parallelism in which ranks hold different parameters of one name."""
    kinds = {
        "mixture of experts": engine.has_moe_layers,
        "tensor parallelism": engine.mp_world_size > 1 or engine.autotp_size() > 1,
        "sequence parallelism": engine.sequence_parallel_size > 1,
        "pipeline parallelism": getattr(engine, "is_pipe_parallel", False),
    }
    for kind, used in kinds.items():
        if used:
            raise ConfigError(
                f"a DeepSpeed engine must be data parallel alone, got {kind}, under which norms of "
                f"layers would be added up over the wrong ranks; leave it out."
            )


def check_arithmetic(engine: Any, stage: int) -> None:
    """ConfigError for 16 bits with a loss scale or a rounding that a step does not account for."""
    dtype = engine.torch_autocast_dtype()
    if engine.torch_autocast_enabled() and dtype in (torch.float16, None):
        raise ConfigError(
            f"torch_autocast must have dtype bfloat16, got {dtype}, whose loss scale is kept apart "
            f"from the optimizer's; use bfloat16 there, or fp16 with ZeRO stage 1, 2 or 3."
        )
    if engine.fp16_master_weights_and_gradients() or engine.bf16_master_weights_and_gradients():
        raise ConfigError(
            "master weights must be fp32, got 16 bits, which round most of a perturbation away; "
            "leave out fp16_master_weights_and_grads and bf16_master_weights_and_grads."
        )
    if stage == 0 and (engine.fp16_enabled() or engine.bfloat16_enabled()):
        raise ConfigError(
            "ZeRO stage 0 must be fp32, got 16 bits, where DeepSpeed unscales wrongly; "
            "use stage 1, 2 or 3."
        )


def check_precision(engine: Any, precision: str) -> None:
    """ConfigError for 16 bits that the engine's config does not have. "fp32", the default of
    `Engine`, leaves it to the config."""
    bf16 = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
    own = "fp16" if engine.fp16_enabled() else "bf16" if bf16 else "fp32"
    if precision not in ("fp32", own):
        raise ConfigError(
            f"precision must be that of the DeepSpeed config, got {precision} for a DeepSpeed "
            f'engine in {own}; set "{precision}": {{"enabled": true}} in the config.'
        )


def check_engine(engine: Any) -> None:
    """ConfigError for an engine that would be trained wrongly."""
    client = engine.basic_optimizer
    if not isinstance(client, Sharpness):
        raise ConfigError(
            f"a DeepSpeed engine must be initialised with an optimizer of dist_looksam, got "
            f"{type(client).__name__}; pass optimizer=LookLayerSAM(...) to deepspeed.initialize."
        )
    stage = int(engine.zero_optimization_stage())
    if engine.gradient_clipping() > 0:
        raise ConfigError(
            f"gradient_clipping must be 0 in the DeepSpeed config, got "
            f"{engine.gradient_clipping()} (1.0 is its default); set it to 0 and pass clip here."
        )
    if stage in (1, 2) and engine.zero_round_robin_gradients():
        raise ConfigError(
            "round_robin_gradients must be false, got true, which moves layers about; remove it."
        )
    if engine.postscale_gradients():
        check_predivide(engine.gradient_predivide_factor(), stage, dist.get_world_size())
    check_arithmetic(engine, stage)
    check_parallel(engine)

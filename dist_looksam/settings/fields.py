"""Every setting once: its name, default, help and allowed values."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..backends.compiled import COMPILES
from ..backends.rows import BACKENDS
from ..data.augment import ALLOWED, AUGMENT_ON
from ..data.losses import LOSSES
from ..data.sets import SETS
from ..engine import ASCENTS
from ..maths.schedule import RHO_SCHEDULES, SCALINGS, SCHEDULES
from ..optim.bases import BASES
from ..optim.rule import LAYER_ASCENTS, REUSES, SCOPES
from ..optim.table import METHODS
from ..optim.when import DECIDERS
from ..record.trackers import TRACKERS
from . import when

PRECISIONS = ("fp32", "bf16", "fp16")
COMPRESSIONS = ("none", "fp16")
DEVICES = ("auto", "cpu", "cuda")


def flag(default: Any, text: str, choices: Iterable[str] = (), *aliases: str) -> Any:
    """One setting: its default, its line of help, its allowed values, other flags for it."""
    choices = tuple(choices)
    text += f": {', '.join(choices)}" if choices else ""
    return field(default=default, metadata={"help": text, "choices": choices, "aliases": aliases})


def _users(name: str) -> str:
    """The base optimizers that use a setting."""
    return " and ".join(base for base, row in BASES.items() if name in row.uses)


def _only(name: str) -> str:
    """The backends that have a setting."""
    return "only with backend " + " and ".join(homes(name))


def of_backends() -> list[str]:
    """The settings that not every backend has."""
    return sorted({name for row in BACKENDS.values() for name in row.flags})


def homes(name: str) -> list[str]:
    """The backends that have a setting; [] for one of all backends."""
    return [backend for backend, row in BACKENDS.items() if name in row.flags]


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The settings of a run as they are given; None is a value that the others imply."""

    optimizer: str = flag("look_layer_sam", "training method", METHODS)
    base: str | None = flag(None, "base optimizer, by default the method's own", BASES)
    lr: float | None = flag(None, "peak learning rate; default by base optimizer")
    lr_scaling: str = flag("none", "growth of lr with batch_size / lr_base_batch", SCALINGS)
    lr_base_batch: int = flag(256, "batch size in samples that lr is meant for, used by lr_scaling")
    weight_decay: float | None = flag(None, "weight decay of matrices; default by base optimizer")
    momentum: float = flag(0.9, f"momentum of {_users('momentum')}")
    betas: tuple[float, float] = flag(
        (0.9, 0.999), f"decay rates of the gradient's mean and mean square, of {_users('betas')}"
    )
    eps: float | None = flag(None, f"eps of {_users('eps')}; default by base optimizer")
    rho: float | None = flag(
        None, "radius of the ascent; of layer-wise methods relative to ||w_i||; default by method"
    )
    alpha: float | None = flag(None, "weight of g_v, or of what gsam subtracts; default by method")
    k: int = flag(5, "steps from one look (step with a second gradient) to the next")
    looks: str = flag("periodic", "every k steps, or in 1 of k, where ||g|| is large", DECIDERS)
    look_from: int | float = flag(0, f"first step that may look{when.MOMENT}")
    look_until: int | float | None = flag(
        None, f"first step that may no longer look{when.MOMENT}; default: the end"
    )
    rho_schedule: str = flag("constant", "factor of rho over the steps", RHO_SCHEDULES)
    rho_end: float | None = flag(None, "factor of rho at the end, may be above 1; default 0")
    rho_warmup_steps: int = flag(0, "linear warm-up of rho in steps, from look_from on; 0: none")
    p: float = flag(2.0, "p of the p-norm of the model-wide ascent, in (1, inf]")
    perturb: str = flag("all", "layers to perturb: all, norms, or a regular expression of names")
    ascent: str = flag("global", "global, as --m says; rank, m = batch_size / ranks", ASCENTS)
    m: int | None = flag(  # torchrun and deepspeed take --m for their own --master_port
        None, "samples that climb together; default all; --group in launchers", (), "--group"
    )
    layer_ascent: str = flag("scaled", "formula of the layer-wise ascent", LAYER_ASCENTS)
    decompose: str = flag("model", "scope of the decomposition of g_s, or of gsam's of g", SCOPES)
    reuse: str = flag("natural", "size of the reused g_v", REUSES)
    clip: float | None = flag(
        None, "maximum norm of the gradient passed to the base optimizer; no clipping by default"
    )
    batch_size: int = flag(128, "samples per step, over all ranks")
    micro_batch: int | None = flag(
        None, "samples per rank and forward; default: the largest divisor of the batch up to 256"
    )
    epochs: float | None = flag(None, "training length in epochs; default by data set")
    steps: int | None = flag(None, "training length in optimizer steps, instead of epochs")
    warmup_steps: int | None = flag(
        None, "length of the linear warm-up in steps; default 1/20 of the training"
    )
    warmup_epochs: float | None = flag(
        None, "length of the linear warm-up in epochs, instead of warmup_steps"
    )
    schedule: str = flag("cosine", "learning rate after the warm-up", SCHEDULES)
    ema: float = flag(0.0, "decay of the moving average of weights, as 0.9998; 0: there is none")
    model: str = flag("auto", "vit_s16, deit3_b16, ..., a timm name, or auto: by data set")
    init: str | None = flag(
        None, "weights to start from: a file, a run, a checkpoint or timm:NAME; default: random"
    )
    freeze: str | None = flag(
        None, "regular expression of names of parameters that are not trained; default: none"
    )
    layer_decay: float = flag(1.0, "factor of lr from each block to the one before it, in (0, 1]")
    head_lr: float = flag(1.0, "factor of the head's lr")
    drop_path: float = flag(0.0, "rate of dropped residual branches in the last block, in [0, 1)")
    label_smoothing: float = flag(0.0, "share of the target that all classes get, in [0, 1)")
    loss: str = flag("ce", "cross-entropy, or binary cross-entropy, of training", LOSSES)
    bce_target_thresh: float | None = flag(
        None, "of loss bce: targets above it become 1, others 0; default: none do"
    )
    class_weights: str | None = flag(
        None, "of loss ce: balanced, or a YAML file of weights by class name; default none"
    )
    data: str = flag("fashion_mnist", "data set", SETS)
    data_dir: str | None = flag(
        None, "folder of the data: train/CLASS/* and val/CLASS/*, or shards, see docs/data.md"
    )
    image_size: int = flag(224, "height and width of images of files, in pixels")
    image_size_from: int | None = flag(
        None, "image size of the first steps, growing to image_size; default: image_size"
    )
    data_cache: str | None = flag(
        None, "folder on a disk of the node that shards are copied to first; default: none"
    )
    train_images: int | None = flag(None, "training images, held-out ones included; default all")
    holdout: int = flag(0, "training images held out for evaluation; 0: evaluation on test images")
    shuffle: str = flag("full", "order of training images: full, or block:B,W,c on network disks")
    augment: str = flag("auto", f"augmentation of training images: {ALLOWED}")
    augment_on: str = flag(
        "host", "where randaugment, trivialaugment, 3augment and jitter are made", AUGMENT_ON
    )
    mixup_until: int | float | None = flag(
        None, f"first step without mixup and cutmix{when.MOMENT}; default: the end"
    )
    workers: int | None = flag(None, "threads per rank that decode images; default one per core")
    backend: str = flag("auto", "data-parallel backend", ("auto", *BACKENDS))
    zero_stage: int | None = flag(None, f"ZeRO stage 0 to 3, {_only('zero_stage')}; default 2")
    shard_ranks: int | None = flag(
        None, f"ranks in a row that split each layer, {_only('shard_ranks')}; default all"
    )
    deepspeed_config: str | None = flag(
        None, f"JSON file of DeepSpeed's settings, {_only('deepspeed_config')}; default none"
    )
    compression: str = flag(
        "none", f"compression of sent gradients, {_only('compression')}", COMPRESSIONS
    )
    offload: bool = flag(
        False, f"keep the optimizer state in host memory, {_only('offload')}; default off"
    )
    compile: str = flag("off", "what torch.compile compiles of the network", COMPILES)
    checkpoint_activations: bool = flag(
        False, "keep only the blocks' inputs for backward: less memory, a forward more; default off"
    )
    precision: str = flag("fp32", "number format of forward and backward", PRECISIONS)
    seed: int = flag(0, "seed of weights, sample order, augmentation and dropout")
    out: str = flag("runs/latest", "run directory")
    resume: str = flag("none", "what to resume: auto (newest in --out), none, a run or checkpoint")
    extend: bool = flag(
        False, "with --resume and more --steps: lr goes on from its value of then; default off"
    )
    save_every: int = flag(0, "steps between checkpoints; 0: one at the end")
    keep: int = flag(0, "number of checkpoints to keep, the newest; 0: all")
    requeue: bool = flag(False, "requeue the SLURM job after SIGUSR1 or SIGUSR2; default off")
    eval_every: int = flag(0, "steps between evaluations; 0: one epoch")
    max_skips: int = flag(100, "skipped steps in a row after which the run ends; 0: it never does")
    track: str = flag("none", "experiment tracker that also gets the metrics", TRACKERS)
    probe_every: int = flag(0, "looks between lines of probe.jsonl (norms of g_s, g_v); 0: none")
    device: str = flag("auto", "device to train on", DEVICES)
    timeout: float = flag(600.0, "seconds to wait for a silent rank before the run ends")
    dry_run: bool = flag(False, "check the settings and print what they mean; train nothing")
    ranks: int | None = flag(None, "number of ranks for --dry_run; default: those started")
    local_rank: int | None = flag(
        None, "rank on this node, set by launchers; default by environment", (), "--local-rank"
    )

"""Every setting once: one dataclass makes flags, YAML file and help, and checks itself.

`--config FILE.yaml` comes first, flags override it, `--print_config` shows the outcome.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser

from ..backends.zero import config as zero_config
from ..engine import ASCENTS
from ..errors import ConfigError, did_you_mean
from ..maths.schedule import SCALINGS, SCHEDULES
from ..optim.rule import LAYER_ASCENTS, REUSES, SCOPES, check_alpha, check_choice, check_rho
from ..optim.table import BASES, LR, METHODS, RHO, WEIGHT_DECAY, base_of, method, rule_of
from ..record.trackers import TRACKERS
from .numbers import check_most, micro_batch, whole

BACKENDS = ("auto", "plain", "ddp", "zero", "horovod", "fsdp2")
PRECISIONS = ("fp32", "bf16", "fp16")
COMPRESSIONS = ("none", "fp16")
DEVICES = ("auto", "cpu", "cuda")
EPOCHS = {"digits": 30.0, "fashion_mnist": 5.0, "folder": 90.0}


def flag(default: Any, text: str, kind: Any) -> Any:
    """One setting: its default, its line of help, its type."""
    return field(default=default, metadata={"help": text, "type": kind})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is asked to do. None means: chosen from the other settings by `resolved`."""

    optimizer: str = flag("look_layer_sam", f"one of {', '.join(METHODS)}", str)
    base: str | None = flag(None, f"base optimizer, one of {', '.join(BASES)}", str)
    lr: float | None = flag(None, "peak learning rate; default by base", float)
    lr_scaling: str = flag("none", f"lr over batch size: {', '.join(SCALINGS)}", str)
    lr_base_batch: int = flag(256, "batch size that lr was found at, for lr_scaling", int)
    weight_decay: float | None = flag(None, "of matrices only; default by base", float)
    momentum: float = flag(0.9, "of sgd and lars", float)
    betas: tuple[float, float] = flag((0.9, 0.999), "of adamw and lamb: 0.9,0.999", str)
    eps: float | None = flag(None, "of adamw (default 1e-8) and lamb (1e-6)", float)
    rho: float | None = flag(None, "ascent radius; layer scope: relative to ||w_i||", float)
    alpha: float = flag(0.7, "weight of the reused g_v", float)
    k: int = flag(5, "steps from one look to the next", int)
    p: float = flag(2.0, "norm of the model-wide ascent, in (1, inf]", float)
    ascent: str = flag("global", f"gradient that is climbed: {', '.join(ASCENTS)}", str)
    layer_ascent: str = flag("scaled", f"layer scope's rule: {', '.join(LAYER_ASCENTS)}", str)
    decompose: str = flag("model", f"scope of g_v: {', '.join(SCOPES)}", str)
    reuse: str = flag("natural", f"size of the reused g_v: {', '.join(REUSES)}", str)
    clip: float | None = flag(None, "limit of the norm of what the base gets", float)
    batch_size: int = flag(128, "samples per step, over all ranks", int)
    micro_batch: int | None = flag(None, "samples per rank and forward; default fits 256", int)
    epochs: float | None = flag(None, "length in passes over the data", float)
    steps: int | None = flag(None, "length in optimizer steps, instead of epochs", int)
    warmup_steps: int | None = flag(None, "linear warm-up; default a twentieth", int)
    warmup_epochs: float | None = flag(None, "the same in passes over the data", float)
    schedule: str = flag("cosine", f"after warm-up: {', '.join(SCHEDULES)}", str)
    model: str = flag("auto", "vit_ti16, vit_s16, vit_b16, ..., or a timm name", str)
    drop_path: float = flag(0.0, "rate of dropped residual branches in the last block", float)
    label_smoothing: float = flag(0.0, "in [0, 1)", float)
    data: str = flag("fashion_mnist", "fashion_mnist, digits, or folder", str)
    data_dir: str | None = flag(None, "folder with train/CLASS/* and val/CLASS/*", str)
    image_size: int = flag(224, "pixels, of folder data", int)
    train_images: int | None = flag(None, "training images to use; default all there are", int)
    holdout: int = flag(0, "so many of them to evaluate on, instead of the test images", int)
    augment: str = flag("auto", "auto, none, or of crop,flip,randaugment,mixup,cutmix", str)
    workers: int | None = flag(None, "threads that decode images; default one per core", int)
    backend: str = flag("auto", f"one of {', '.join(BACKENDS)}", str)
    zero_stage: int | None = flag(None, "0-3, of backend zero (default 2) and horovod", int)
    deepspeed_config: str | None = flag(None, "JSON file, merged with the flags (zero)", str)
    compression: str = flag("none", f"of gradients (horovod): {', '.join(COMPRESSIONS)}", str)
    offload: bool = flag(False, "optimizer state in host memory (zero)", bool)
    precision: str = flag("fp32", f"one of {', '.join(PRECISIONS)}", str)
    seed: int = flag(0, "of weights, order, augmentation", int)
    out: str = flag("runs/latest", "run directory", str)
    resume: str = flag("none", "auto, none, or a checkpoint directory", str)
    save_every: int = flag(0, "steps between checkpoints; 0: only at the end", int)
    keep: int = flag(0, "newest checkpoints to keep; 0: all", int)
    requeue: bool = flag(False, "on SIGUSR1/2 under SLURM, queue the job again", bool)
    eval_every: int = flag(0, "steps between evaluations; 0: once per epoch", int)
    max_skips: int = flag(100, "steps skipped in a row that end the run; 0: none do", int)
    track: str = flag("none", f"metrics elsewhere, too: {', '.join(TRACKERS)}", str)
    probe_every: int = flag(0, "looks between probes of g_s, g_h, g_v; 0: none", int)
    device: str = flag("auto", f"one of {', '.join(DEVICES)}", str)
    timeout: float = flag(600.0, "seconds to wait for a silent rank before ending", float)
    dry_run: bool = flag(False, "check the settings, say what they mean, train nothing", bool)
    ranks: int | None = flag(None, "that --dry_run checks for; default those started", int)
    local_rank: int | None = flag(None, "given by launchers", int)

    def __post_init__(self) -> None:
        base_of(self.optimizer, self.base)
        for name, allowed in (
            ("ascent", ASCENTS),
            ("lr_scaling", SCALINGS),
            ("schedule", SCHEDULES),
            ("backend", BACKENDS),
            ("precision", PRECISIONS),
            ("compression", COMPRESSIONS),
            ("device", DEVICES),
            ("track", TRACKERS),
        ):
            check_choice(name, getattr(self, name), allowed)
        assert self.rule  # made here for its checks
        check_alpha(self.alpha)
        if self.rho is not None:
            check_rho(self.rho)
        self._check_numbers()
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(
                f"either epochs or steps must be given, got epochs {self.epochs:g} and steps "
                f"{self.steps}; leave one out."
            )
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ConfigError(
                f"either warmup_epochs or warmup_steps must be given, got {self.warmup_epochs:g} "
                f"and {self.warmup_steps}; leave one out."
            )
        if self.backend in ("plain", "ddp", "fsdp2") and (
            self.zero_stage is not None or self.offload
        ):
            raise ConfigError(
                f"zero_stage is of the backends zero and horovod, offload of zero, got backend "
                f"{self.backend}; leave them out or use --backend zero."
            )
        if self.data == "folder" and self.data_dir is None:
            raise ConfigError("--data folder needs --data_dir, got none; name the image folder.")

    def _check_numbers(self) -> None:
        at_least = {
            "batch_size": 1, "micro_batch": 1, "steps": 1, "warmup_steps": 0, "lr_base_batch": 1,
            "image_size": 1, "workers": 0, "save_every": 0, "eval_every": 0, "probe_every": 0,
            "keep": 0, "seed": 0, "holdout": 0, "warmup_epochs": 0, "lr": 0, "weight_decay": 0,
            "eps": 0, "ranks": 1, "train_images": 1, "max_skips": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ConfigError(f"{name} must be >= {least} and finite, got {value}.")
        for f in fields(self):
            check_most(f.name, getattr(self, f.name), f.metadata["type"])
        for name in ("momentum", "drop_path", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("clip", "epochs", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be > 0 and finite, got {value}.")
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {self.betas}; usual are 0.9,0.999.")
        if self.zero_stage is not None and self.zero_stage not in range(4):
            raise ConfigError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}.")

    @property
    def rule(self) -> Any:
        """The optimizer's `Rule`."""
        return rule_of(
            self.optimizer,
            k=self.k,
            p=self.p,
            layer_ascent=self.layer_ascent,
            decompose=self.decompose,
            reuse=self.reuse,
        )

    def resolved(self, *, ranks: int, launcher: str, samples: int) -> "Settings":
        """Every None filled in, and what needs the number of ranks and samples checked.

        Args:
            ranks: processes that train together. launcher: as in `World`. samples: in training.
        """
        base = base_of(self.optimizer, self.base)
        steps = self.steps or max(1, round(self._epochs * samples / self.batch_size))
        backend = self._backend(ranks, launcher)
        file = zero_config.read(self.deepspeed_config)
        if file and backend != "zero":
            raise ConfigError(f"deepspeed_config is of backend zero, got {backend}; drop it.")
        stage, clip = self.zero_stage, self.clip
        if backend == "zero":
            stage, clip = zero_config.stage_of(file, stage), zero_config.clip_of(file, clip)
        return replace(
            self,
            base=base,
            zero_stage=stage,
            clip=clip,
            lr=LR[base] if self.lr is None else self.lr,
            weight_decay=WEIGHT_DECAY[base] if self.weight_decay is None else self.weight_decay,
            eps=(1e-6 if base == "lamb" else 1e-8) if self.eps is None else self.eps,
            rho=RHO.get(method(self.optimizer).ascent or "", 0.0) if self.rho is None else self.rho,
            backend=backend,
            micro_batch=micro_batch(self.batch_size, ranks=ranks, asked=self.micro_batch),
            epochs=None,
            steps=steps,
            warmup_steps=self._warmup(steps, samples),
            warmup_epochs=None,
            dry_run=False,
            ranks=None,
            local_rank=None,
        )

    @property
    def _epochs(self) -> float:
        return EPOCHS.get(self.data, 10.0) if self.epochs is None else self.epochs

    def _warmup(self, steps: int, samples: int) -> int:
        warmup = steps // 20 if self.warmup_steps is None else self.warmup_steps
        if self.warmup_epochs is not None:
            warmup = round(self.warmup_epochs * samples / self.batch_size)
        if warmup >= steps:
            raise ConfigError(
                f"warm-up must be shorter than the run's {steps} steps, got {warmup}; "
                f"use --warmup_steps {steps // 20} or train longer."
            )
        return warmup

    def _backend(self, ranks: int, launcher: str) -> str:
        if self.backend == "auto":
            known = {"deepspeed": "zero", "horovod": "horovod"}
            if launcher in known:
                return known[launcher]
            if self.zero_stage is not None:
                return "zero"
            return "ddp" if ranks > 1 else "plain"
        if self.backend == "plain" and ranks > 1:
            raise ConfigError(f"backend plain is for one rank, got {ranks}; use --backend auto.")
        return self.backend

    def to_yaml(self) -> str:
        """The settings as a file that `--config` takes."""
        values = asdict(self)
        for name in ("dry_run", "ranks", "local_rank"):
            del values[name]
        values["betas"] = list(self.betas)
        return yaml.safe_dump(values, sort_keys=False)


DEFAULTS = {f.name: f.default for f in fields(Settings)}
_OTHERS = ("plain", "ddp", "fsdp2", "horovod")
# Settings of ZeRO, and the backends that do not know them.
_OF_ZERO = {"zero_stage": _OTHERS[:3], "offload": _OTHERS, "deepspeed_config": _OTHERS}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="train.py",
        exit_on_error=False,
        allow_abbrev=False,  # `_flags_first` knows flags by their whole names
        description="Train a Vision Transformer with SAM, LookSAM or Look-LayerSAM.",
    )
    parser.add_argument("--config", action="config", help="YAML file of settings")
    for f in fields(Settings):
        names = [f"--{f.name}"] + (["--local-rank"] if f.name == "local_rank" else [])
        kind, default = f.metadata["type"], f.default
        assert default is not MISSING
        if kind is bool:
            action = ActionYesNo(yes_prefix="", no_prefix="no_")
            parser.add_argument(*names, action=action, default=default, help=f.metadata["help"])
        elif f.name == "betas":
            parser.add_argument(*names, nargs="+", default=list(default), help=f.metadata["help"])
        else:
            parser.add_argument(*names, default=default, help=f.metadata["help"])
    return parser


def _typed(name: str, value: Any, kind: Any, *, optional: bool) -> Any:
    """A flag's text, or a YAML value, as the type of the setting."""
    if value is None or (optional and str(value).lower() in ("null", "none")):
        return None
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is str and not isinstance(value, str | int | float):
            raise ValueError
        converted = whole(value) if kind is int else kind(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{name} must be {words[kind]}, got {value!r}.") from None
    if converted != converted:
        raise ConfigError(f"{name} must be {words[kind]}, got {value!r}.")
    return converted


def _betas(values: Any) -> tuple[float, float]:
    values = list(values) if isinstance(values, list | tuple) else [values]
    try:
        pair = [float(v) for text in values for v in str(text).strip("[]()").split(",") if v]
    except ValueError:
        pair = []
    if len(pair) != 2:
        raise ConfigError(f"betas must be two numbers, got {values}; write --betas 0.9,0.999.")
    return pair[0], pair[1]


def _sentence(error: ArgumentError) -> str:
    """jsonargparse's report, which may have many lines, as one sentence."""
    text = " ".join(str(error).split())
    names = [f.name for f in fields(Settings)]
    if "nrecognized arguments" in text:
        got = next((w for w in text.split() if w.startswith("-")), text.split()[-1])
        name = got.strip("-").replace("-", "_")
        hint = did_you_mean(name, names, "see --help for all flags.", flag="--")
        return f"unknown flag, got {got}; {hint}"
    if unknown := re.search(r"Option '(.+?)' is not accepted", text):
        name, otherwise = (
            unknown[1].replace("-", "_"),
            "its names are those of the flags in --help.",
        )
        hint = did_you_mean(name, names, otherwise)
        return f"config has an unknown setting, got {unknown[1]}; {hint}"
    if "Value not boolean" in text:
        flags = " and ".join(f.name for f in fields(Settings) if f.metadata["type"] is bool)
        return f"{flags} must be true or false, got {text.split(':')[-1].strip(' .')!r}."
    if "Problems parsing config" in text or "Unexpected config" in text:
        return f"config must be YAML with lines like `rho: 0.02`, got{text.split(':', 1)[1]}."
    if "File does not exist" in text:
        return f"config must be a YAML file, got {text.split('exist:')[-1].strip()}, not found."
    return text


def _flags_first(values: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """`values` without what the file of --config says against a flag: the flag wins.

    Two settings of which a run can have one: --steps 5 ends a recipe of 300 epochs after 5 steps,
    --backend ddp takes it off ZeRO, --zero_stage 2 a file of ddp to it. Where both are flags, or
    both in the file, `Settings` objects.
    """
    flags = {a.split("=")[0].removeprefix("--") for a in argv if a.startswith("--")}
    if "ranks" in flags and not values["dry_run"]:
        raise ConfigError(
            f"--ranks is what --dry_run checks for, got --ranks {values['ranks']} without it; "
            "leave it out: a run's ranks are those that its launcher starts."
        )
    if "config" not in flags:
        return values
    lengths = (("steps", "epochs"), ("warmup_steps", "warmup_epochs"))
    dropped = {b for pair in lengths for a, b in (pair, pair[::-1]) if a in flags}
    clash = {name for name, others in _OF_ZERO.items() if values["backend"] in others}
    if "backend" in flags:
        dropped |= clash
    elif any(str(values[n]).lower() not in ("none", "null", "false") for n in clash & flags):
        values = values | {"backend": "zero"}
    return values | {name: DEFAULTS[name] for name in dropped - flags}


def parse(argv: Sequence[str]) -> Settings:
    """Flags to settings. `--help` and `--print_config` print and leave with SystemExit(0).

    Raises:
        ConfigError: an unknown flag, a value of the wrong type or out of range, in one sentence.
    """
    argv = list(argv)
    show = "--print_config" in argv
    if show:
        argv.remove("--print_config")
    try:
        values = vars(_parser().parse_args(argv))
    except ArgumentError as error:
        raise ConfigError(_sentence(error)) from error
    values.pop("config", None)
    values = _flags_first(values, argv)
    typed: dict[str, Any] = {}
    for f in fields(Settings):
        value = values[f.name]
        if f.name == "betas":
            typed[f.name] = _betas(value)
            continue
        typed[f.name] = _typed(f.name, value, f.metadata["type"], optional=f.default is None)
        if typed[f.name] is None and f.default is not None:
            raise ConfigError(f"{f.name} must have a value, got none; the default is {f.default}.")
    settings = Settings(**typed)
    if show:
        print(settings.to_yaml(), end="")
        sys.exit(0)
    return settings


def write(settings: Settings, path: Path, made_with: dict[str, str | None]) -> None:
    """Write config.yaml, which begins with a comment of what it was made with."""
    by = ", ".join(f"{name} {value}" for name, value in made_with.items() if value)
    path.write_text(f"# dist_looksam {by}\n{settings.to_yaml()}", encoding="utf-8")

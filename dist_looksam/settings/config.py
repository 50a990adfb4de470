"""Settings that check themselves and fill in what they leave open.

Flags override `--config FILE.yaml`; `--print_config` prints the result.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..backends.rows import BACKENDS, BackendRow, chosen
from ..data.blocks import parse_shuffle
from ..data.sets import data_set
from ..errors import ConfigError
from ..maths.together import Groups, groups
from ..models import check_pattern
from ..optim.rule import check_alpha, check_choice, check_rho
from ..optim.table import base_of, base_row, method, rule_of
from . import flags, when
from .fields import Fields, homes
from .numbers import check_most, micro_batch

LOSS_OF = {"bce_target_thresh": "bce", "class_weights": "ce"}  # setting: the one loss that has it


@dataclass(frozen=True, kw_only=True)
class Settings(Fields):
    """The settings of a run. `resolved` replaces each None by a value that the others imply."""

    def __post_init__(self) -> None:
        data_set(self.data)
        for f in fields(self):
            if f.metadata["choices"] and getattr(self, f.name) is not None:
                check_choice(f.name, getattr(self, f.name), f.metadata["choices"])
        assert base_of(self.optimizer, self.base) and self.rule  # made here for their checks
        for check, value in ((check_alpha, self.alpha), (check_rho, self.rho)):
            if value is not None:
                check(value)
        when.check(self)
        parse_shuffle(self.shuffle)
        if self.freeze is not None:
            check_pattern(self.freeze)
        self._check_numbers()
        if not self.out or "\0" in self.out:  # "" would be the current directory
            raise ConfigError(f"out must name a directory, got {self.out!r}; name one with --out.")
        if self.epochs is not None and self.steps is not None:
            raise ConfigError(
                f"either epochs or steps must be given, got epochs {self.epochs:g} and steps "
                f"{self.steps}; leave one out."
            )
        if self.extend and self.resume == "none":
            raise ConfigError(
                "extend makes a run longer, got no --resume; name the run with --resume RUN, or "
                "leave --extend out."
            )
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ConfigError(
                f"either warmup_epochs or warmup_steps must be given, got {self.warmup_epochs:g} "
                f"and {self.warmup_steps}; leave one out."
            )
        self._check_backend()
        self._check_loss()
        if data_set(self.data).data_dir == "needs":
            data_set(self.data).check_dir(self.data_dir)

    def _check_backend(self) -> None:
        """ConfigError for a setting that the backend does not have."""
        for f in fields(self) if self.backend in BACKENDS else ():
            owners, value = homes(f.name), getattr(self, f.name)
            if owners and self.backend not in owners and value != f.default:
                what = f"{f.name} {value}" if f.metadata["choices"] else f.name
                named = " and ".join(owners)
                raise ConfigError(
                    f"{what} is of {'backend' if len(owners) == 1 else 'the backends'} {named}, "
                    f"got backend {self.backend}; leave it out or use --backend {owners[0]}."
                )

    def _check_loss(self) -> None:
        """ConfigError for settings that the loss does not have."""
        threshold = self.bce_target_thresh
        for name, owner in LOSS_OF.items():
            if getattr(self, name) is not None and self.loss != owner:
                raise ConfigError(
                    f"{name} is of loss {owner}, got loss {self.loss}; leave it out or use --loss "
                    f"{owner}."
                )
        if threshold is None:
            return
        if not 0 <= threshold < 1:
            raise ConfigError(f"bce_target_thresh must be in [0, 1), got {threshold}.")
        if self.label_smoothing:
            raise ConfigError(
                f"label_smoothing and bce_target_thresh, which makes targets 0 or 1, must not both "
                f"be given, got {self.label_smoothing} and {threshold}; leave one out."
            )

    def _check_numbers(self) -> None:
        at_least = {
            "batch_size": 1, "micro_batch": 1, "steps": 1, "warmup_steps": 0, "lr_base_batch": 1,
            "image_size": 1, "workers": 0, "save_every": 0, "eval_every": 0, "probe_every": 0,
            "keep": 0, "seed": 0, "holdout": 0, "warmup_epochs": 0, "lr": 0, "weight_decay": 0,
            "eps": 0, "m": 1, "shard_ranks": 1, "ranks": 1, "train_images": 1, "max_skips": 0,
            "rho_end": 0, "rho_warmup_steps": 0, "mixup_until": 0,
            "image_size_from": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ConfigError(f"{name} must be >= {least} and finite, got {value}.")
        for f in fields(self):
            check_most(f.name, getattr(self, f.name), flags.kind_of(f))
        for name in ("momentum", "drop_path", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay must be in (0, 1], got {self.layer_decay}.")
        for name in ("clip", "epochs", "timeout", "head_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be > 0 and finite, got {value}.")
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas must be in [0, 1), got {self.betas}; usual are 0.9,0.999.")
        if self.zero_stage is not None and self.zero_stage not in range(4):
            raise ConfigError(f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}.")

    @property
    def rule(self) -> Any:
        """The optimizer's `Rule`; a share of the run counts once it is `resolved`."""
        return rule_of(
            self.optimizer,
            k=self.k,
            p=self.p,
            layer_ascent=self.layer_ascent,
            decompose=self.decompose,
            reuse=self.reuse,
            looks=self.looks,
            **when.known(self),
        )

    @property
    def backend_row(self) -> BackendRow:
        """The backend of resolved settings."""
        return BACKENDS[self.backend]

    def for_ranks(self, *, ranks: int, launcher: str) -> "Settings":
        """Fill in every None that needs no data, and check against the backend.

        Args:
            ranks: processes that train together. launcher: as in `World`.
        """
        base = base_row(base_of(self.optimizer, self.base))
        own_method, row = method(self.optimizer), chosen(self, ranks=ranks, launcher=launcher)
        own = data_set(self.data)
        filled = replace(
            self,
            base=base.name,
            lr=base.lr if self.lr is None else self.lr,
            weight_decay=base.weight_decay if self.weight_decay is None else self.weight_decay,
            eps=base.eps if self.eps is None else self.eps,
            rho=own_method.default_rho if self.rho is None else self.rho,
            alpha=own_method.default_alpha if self.alpha is None else self.alpha,
            model=own.model if self.model == "auto" else self.model,
            backend=row.name,
            dry_run=False,
            ranks=None,
            local_rank=None,
        )
        filled = replace(filled, **row.resolve(filled))
        filled = replace(filled, **filled._samples(ranks))
        row.check(filled, ranks)
        return filled

    def _samples(self, ranks: int) -> dict[str, Any]:
        """micro_batch, and of a method with ascent m, which ascent rank stands for.

        Raises:
            ConfigError: micro-batches do not make up m, or backend or method cannot climb so.
        """
        m, ascent = (self.m, self.ascent) if self.rule.ascent else (None, "global")
        if ascent == "rank" and self.batch_size % ranks == 0:
            m = self.batch_size // ranks
            if self.m not in (None, m):
                wrong = f"m must be batch_size / ranks with ascent rank, which is {m}, got {self.m}"
                raise ConfigError(f"{wrong}; leave out --ascent or --group.")
        self.rule.check_m("" if m in (None, self.batch_size) else f"m {m}")
        climbing = self.backend_row.climbing_ranks(self, ranks)
        size = micro_batch(
            self.batch_size, ranks=ranks, asked=self.micro_batch, m=m, climbing=climbing
        )
        replace(self, m=m, micro_batch=size).groups(ranks, " by ascent rank" * (ascent == "rank"))
        return {"micro_batch": size, **({} if m is None else {"m": m, "ascent": "global"})}

    def groups(self, ranks: int, why: str = "") -> Groups | None:
        """The groups of m samples of settings that name micro_batch and backend; None for one."""
        assert self.micro_batch is not None
        return groups(
            self.m if self.rule.two_passes else None,
            micro_batch=self.micro_batch,
            accumulation=self.batch_size // (ranks * self.micro_batch),
            ranks=ranks,
            climbing=self.backend_row.climbing_ranks(self, ranks),
            backend=self.backend,
            why=why,
            flag="--group ",  # which launchers leave to train.py
        )

    def resolved(self, *, ranks: int, launcher: str, samples: int) -> "Settings":
        """`for_ranks`, and the training length in steps. samples: number of training samples."""
        epochs = data_set(self.data).epochs if self.epochs is None else self.epochs
        steps = self.steps or max(1, round(epochs * samples / self.batch_size))
        return replace(
            self.for_ranks(ranks=ranks, launcher=launcher),
            epochs=None,
            steps=steps,
            warmup_steps=self._warmup(steps, samples),
            warmup_epochs=None,
            mixup_until=when.step_of(self.mixup_until, steps),
            **when.window(self, steps),
        )

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

    def to_yaml(self) -> str:
        """The settings as a file that `--config` takes."""
        values = asdict(self)
        for name in ("dry_run", "ranks", "local_rank"):
            del values[name]
        values["betas"] = list(self.betas)
        return yaml.safe_dump(values, sort_keys=False)


DEFAULTS = {f.name: f.default for f in fields(Settings)}


def _flags_first(values: dict[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """`values` without settings of the --config file that contradict a flag: the flag wins.

    For example --steps 5 replaces the 300 epochs of a recipe, --loss ce its bce_target_thresh,
    --backend ddp its ZeRO stage, and --zero_stage 2 its backend ddp. Two flags, or two lines of the
    file, that contradict each other are refused by `Settings`.
    """
    given = {a.split("=")[0].removeprefix("--") for a in argv if a.startswith("--")}
    if "ranks" in given and not values["dry_run"]:
        raise ConfigError(
            f"--ranks is what --dry_run checks for, got --ranks {values['ranks']} without it; "
            "leave it out: a run's ranks are those that its launcher starts."
        )
    if "config" not in given:
        return values
    lengths = (("steps", "epochs"), ("warmup_steps", "warmup_epochs"))
    dropped = {b for pair in lengths for a, b in (pair, pair[::-1]) if a in given}
    if "loss" in given:
        dropped |= {name for name, loss in LOSS_OF.items() if loss != values["loss"]}
    clash = [n for n in values if homes(n) and values["backend"] not in ("auto", *homes(n))]
    if "backend" in given:
        dropped |= {*clash}
    elif asked := [n for n in clash if n in given and values[n] != DEFAULTS[n]]:
        values = values | {"backend": homes(asked[0])[0]}
    return values | {name: DEFAULTS[name] for name in dropped - given}


def parse(argv: Sequence[str]) -> Settings:
    """Flags to settings. `--help` and `--print_config` print and leave with SystemExit(0).

    Raises:
        ConfigError: an unknown flag, a value of the wrong type or out of range, in one sentence.
    """
    argv = list(argv)
    show = "--print_config" in argv
    if show:
        argv.remove("--print_config")
    about = (
        "Train a Vision Transformer with SAM, LookSAM or Look-LayerSAM. "
        "--print_config prints the settings and ends."
    )
    values = flags.read(Settings, argv, prog="train.py", description=about)
    settings = Settings(**_flags_first(values, argv))
    if show:
        print(settings.to_yaml(), end="")
        sys.exit(0)
    return settings


def write(settings: Settings, path: Path, made_with: dict[str, str | None]) -> None:
    """Write config.yaml; its first line is a comment with the package's version and commit."""
    by = ", ".join(f"{name} {value}" for name, value in made_with.items() if value)
    files.replace_text(path, f"# dist_looksam {by}\n{settings.to_yaml()}")

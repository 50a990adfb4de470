"""What a run is, in the titles of its pictures: method, model, data, batch, seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_looksam import files
from dist_looksam.record import rundir

_NO_DIFFERENCE = ("out", "resume", "data_dir", "ranks", "workers", "save_every", "keep", "track")


def config_of(folder: Path) -> dict[str, Any]:
    """The settings of a run; {} where they cannot be read."""
    try:
        config = files.yaml_of((folder / rundir.CONFIG).read_bytes())
    except (OSError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def title(config: dict[str, Any]) -> str:
    """As `sam on lamb, vit_8, digits`; "" of no settings."""
    method, base = config.get("optimizer"), config.get("base")
    named = f"{method} on {base}" if method and base and base != method else method
    facts = (named, config.get("model"), config.get("data"))
    return ", ".join(str(fact) for fact in facts if fact and fact != "auto")


def facts(config: dict[str, Any]) -> list[str]:
    """For a subtitle."""
    known = ((name, config.get(name)) for name in ("batch_size", "seed"))
    return [f"{n.removesuffix('_size')} {v:,}" for n, v in known if isinstance(v, int)]


def same(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings that all runs share."""
    first = configs[0]
    return {n: v for n, v in first.items() if all(c.get(n) == v for c in configs)}


def labels(folders: Sequence[Path], configs: Sequence[dict[str, Any]] | None = None) -> list[str]:
    """One a run, all different: its method and the settings in which the runs differ. `configs`:
    their settings, if they have been read."""
    configs = configs or [config_of(folder) for folder in folders]
    names = [n for n in dict.fromkeys(n for c in configs for n in c) if n not in _NO_DIFFERENCE]
    differing = [n for n in names if len({repr(config.get(n)) for config in configs}) > 1]
    shown = ["optimizer", *(n for n in differing if n != "optimizer")][:5]
    texts = [
        ", ".join(str(config.get(n)) if n == "optimizer" else f"{n} {config.get(n)}" for n in shown)
        for config in configs
    ]
    if len(set(texts)) == len(texts) and all(configs):
        return texts
    return [f"{text} ({folder})" for text, folder in zip(texts, folders, strict=True)]

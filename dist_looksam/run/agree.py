"""Checks that all ranks have the same data and settings; each opens its own files."""

import hashlib
import socket
from dataclasses import replace
from typing import Any

from ..backends.zero import config as zero_config
from ..data import Data, class_weights
from ..data.fingerprint import fingerprint
from ..errors import ConfigError
from ..settings.config import Settings

# Paths may differ between hosts, as long as the files are the same.
_OWN = {"data_dir", "data_cache", "deepspeed_config", "class_weights", "local_rank", "workers"}


def check(settings: Settings, data: Data, ranks: int) -> Data:
    """ConfigError on every rank if two ranks differ; else the data with the notes of all ranks,
    each once, and a sentence of each host without a cache. One small gather, and a second if they
    differ.

    Call it once the ranks are connected, before the model is made, whose shape depends on the data.
    """
    if ranks == 1:
        return data
    gather = settings.backend_row.gather
    inputs = _inputs(settings, data)
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()
    digests, notes, uncached = zip(*gather((digest, data.notes, data.uncached)), strict=True)
    if len({*digests}) > 1:
        raise ConfigError(_difference(gather((socket.gethostname(), inputs))))
    return replace(
        data,
        notes=tuple(dict.fromkeys(note for of_rank in notes for note in of_rank)),
        uncached={host: why for of_rank in uncached for host, why in of_rank.items()},
    )


def _inputs(settings: Settings, data: Data) -> dict[str, Any]:
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    own = {name: value for name, value in values.items() if name not in _OWN}
    which = settings.class_weights
    weights = None if which is None else class_weights.read(which)
    return {
        **fingerprint(data),
        **own,
        "class_weights": which if weights is None else sorted(weights.items()),
        "deepspeed_config": zero_config.read(settings.deepspeed_config),
    }


def _difference(all_ranks: list[tuple[str, dict[str, Any]]]) -> str:
    """A sentence about the first difference: its values, and the ranks that differ from rank 0."""
    host, first = all_ranks[0]
    name = next(n for n in first if any(inputs[n] != first[n] for _, inputs in all_ranks))
    others = [(r, h, i[name]) for r, (h, i) in enumerate(all_ranks) if i[name] != first[name]]
    rank, other_host, value = others[0]
    more = ", ".join(f"rank {r} on {h}" for r, h, _ in others[1:8])
    more += f" and {len(others) - 8} more" if len(others) > 8 else ""
    also = f" (other than rank 0, too: {more})" if more else ""
    return (
        f"{name} must be the same on all ranks, got {first[name]} on rank 0 on {host} and {value} "
        f"on rank {rank} on {other_host}{also}; give every host the same flags, and the same "
        f"complete copy of the data and files."
    )

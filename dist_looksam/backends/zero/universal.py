"""A DeepSpeed checkpoint of a user's engine as a universal one, with g_v and any base's state.

DeepSpeed's own converter (`python -m deepspeed.checkpoint.ds_to_universal`) knows Adam's state
alone: it drops g_v and the counters, and fails with other bases. Its loader takes any state per
layer (ZeRO stages 1 and 2). So this module writes a folder with all of it:

    OUT/zero/<layer>/<key>.pt      {"param": the whole layer's slot}; step.pt: a number
    OUT/zero/optimizer_state.pt    loss scale, groups; in each group our counters as "sharpness"
    OUT/mp_rank_00_model_states.pt as it was

Private names of the library are those in the files of version 0.19.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, RunError
from .library import load_deepspeed

_MODEL = "mp_rank_00_model_states.pt"
_SHARDED = ("base_optimizer_state", "param_slice_mappings", "single_partition_of_fp32_groups")


def convert(source: Path, target: Path) -> list[str]:
    """Write the universal folder `target`; returns the keys that every layer has.

    Args:
        source: folder of one tag, or the one above it, whose newest tag is taken.
        target: must not exist; its parent gets `latest_universal`, which names it to DeepSpeed.

    Raises:
        ConfigError: `source` is no checkpoint that can be converted, or `target` exists.
        RunError: a file is damaged or incomplete, names a path outside `target`, or cannot be
            written. `target` does not exist then.
    """
    if target.exists():
        raise ConfigError(f"out must be a new folder, got {target}, which exists; name another.")
    scratch = target.with_name(f".{target.name}.writing")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
    try:
        keys = _write(_tag(source), scratch)
        os.rename(scratch, target)
        (target.parent / "latest_universal").write_text(target.name)
    except (ConfigError, RunError):
        raise
    except (OSError, RuntimeError) as error:  # torch.save has its own for a full disk
        raise RunError(f"{target} was not written: {_line(error)}.") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{source} is not as DeepSpeed 0.19 writes it ({type(error).__name__}: {_line(error)}) "
            f"and was not converted; save it again, with that version."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return keys


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _write(tag: Path, scratch: Path) -> list[str]:
    ranks = [_read(path)["optimizer_state_dict"] for path in _rank_files(tag)]
    _check(ranks[0], len(ranks), tag)
    model = _read(tag / _MODEL)
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    keys = _write_layers(scratch / "zero", ranks, shapes)
    _write_rest(scratch / "zero", ranks[0], model["module"])
    shutil.copy2(tag / _MODEL, scratch)
    return sorted(keys)


def _place(folder: Path, name: str, key: str) -> Path:
    """The file of a layer's slot. RunError if names in the checkpoint lead out of the folder."""
    parts = name.split("/")  # of an absolute name, the first is empty
    if not set(parts).isdisjoint({"", ".", ".."}) or "/" in key or "\0" in name + key:
        raise RunError(
            f"names of layers and their state must lead to files below OUT, got layer {name!r}, "
            f"state {key!r} in the checkpoint; nothing was written: do not trust these files."
        )
    return folder / name / f"{key}.pt"


def _tag(source: Path) -> Path:
    latest = source / "latest"
    tag = source / latest.read_text().strip() if latest.is_file() else source
    if (tag / f"zero_pp_rank_0_{_MODEL}").is_file():
        raise ConfigError(
            f"a universal checkpoint is made of ZeRO stage 1 or 2, got stage 3 in {tag}: there "
            f"DeepSpeed's loader reads Adam's state only, and gives all groups the first one's "
            f"settings; save with dist_looksam.checkpoint.Writer, which any stage reads."
        )
    if not _rank_files(tag) or not (tag / _MODEL).is_file():
        raise ConfigError(
            f"path must be a checkpoint that a DeepSpeed engine has saved, ZeRO stage 1 or 2, got "
            f"{source}; name the folder that was given to save_checkpoint."
        )
    return tag


def _rank_files(tag: Path) -> list[Path]:
    paths = tag.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    return sorted(paths, key=lambda p: int(p.name.split("pp_rank_")[1].split("_")[0]))


def _read(path: Path) -> dict[str, Any]:
    """One of DeepSpeed's files: pickles, in which only a few of its own classes are allowed."""
    load_deepspeed()
    if not hasattr(torch.serialization, "safe_globals"):
        raise ConfigError(
            f"a universal checkpoint needs torch >= 2.5, which reads DeepSpeed's files without "
            f"running what is in them, got {torch.__version__}; convert where torch is newer."
        )
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> Any:
        """Python 3.11.0 to 3.11.3 pickle a member of an enum as getattr(kind, name)."""
        if kind is not ZeroStageEnum:
            raise ValueError(f"getattr of {kind}")
        return kind[name]

    member.__module__, member.__name__, member.__qualname__ = "builtins", "getattr", "getattr"
    known = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, member]
    try:
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is none of torch's
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise anything
        raise RunError(
            f"{path} is damaged, or holds more than DeepSpeed writes; no code of it was run."
        ) from error


def _check(first: dict[str, Any], ranks: int, tag: Path) -> None:
    if set(first["partition_count"]) != {ranks}:
        raise ConfigError(
            f"path must hold the files of all ranks and no tensor parallelism, got {ranks} of "
            f"{first['partition_count'][0]} in {tag}; copy the missing ones there."
        )


def _write_layers(folder: Path, ranks: list[dict[str, Any]], shapes: dict[str, Any]) -> set[str]:
    keys: set[str] = set()
    for group in range(len(ranks[0]["param_slice_mappings"])):
        names = dict.fromkeys(n for r in ranks for n in r["param_slice_mappings"][group])
        for name in names:
            slots, step = _layer(ranks, group, name)
            _place(folder, name, "step").parent.mkdir(parents=True)
            for key, flat in slots.items():
                if flat.numel() != torch.Size(shapes[name]).numel():
                    raise RunError(f"the files lack entries of {key} of {name}.")
                whole = flat.view(shapes[name])
                torch.save({"param": whole, "cat_dim": 0}, _place(folder, name, key))
            if step is not None:
                torch.save(step, _place(folder, name, "step"))
            keys |= set(slots)
    return keys


def _layer(ranks: list[dict[str, Any]], group: int, name: str) -> tuple[dict[str, Tensor], Any]:
    """A layer's slots, each joined from the ranks' fragments, and its number of steps."""
    parts: dict[str, list[Tensor]] = {}
    step = None
    for rank in ranks:
        at = rank["param_slice_mappings"][group].get(name)
        if at is None:
            continue
        master = rank["single_partition_of_fp32_groups"][group]
        state = rank["base_optimizer_state"]["state"].get(group, {})
        step = state.get("step", step)
        flats = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.ndim == 1}
        for key, flat in {"fp32": master, **flats}.items():  # padding is cut off some of them
            parts.setdefault(key, []).append(flat[at.start : at.start + at.numel])
    return {key: torch.cat(pieces) for key, pieces in parts.items()}, step


def _write_rest(folder: Path, first: dict[str, Any], module: dict[str, Tensor]) -> None:
    """The optimizer's state that is of no layer; frozen parameters and buffers."""
    base = first["base_optimizer_state"]
    counters = {"sharpness": base["sharpness"]} if "sharpness" in base else {}
    common = {k: v for k, v in first.items() if k not in _SHARDED}
    common["param_groups"] = [{**group, **counters} for group in base["param_groups"]]
    torch.save(common, folder / "optimizer_state.pt")
    for name, tensor in module.items():
        place = _place(folder, name, "fp32")
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"param": tensor.float()}, place)

"""dist-looksam checkpoint ls|verify|export|universal."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..backends.averages import KEY as EMA
from ..cli.arguments import Parser, check_new_file
from ..data import card
from ..errors import ConfigError, RunError
from ..models.named import SIZES
from ..models.timm_form import as_timm
from .form import write_tensors
from .reader import Reader, candidates

NAMES = "ls|verify|export|universal"


def main(argv: Sequence[str]) -> int:
    """Run one of the four. Raises ConfigError, RunError."""
    parser = Parser(prog="dist-looksam checkpoint", description="What a run has saved.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=NAMES)
    for name, text, where in (
        ("ls", "list the checkpoints of a run", "run directory"),
        ("verify", "read every byte and compare checksums", "run directory or checkpoint"),
        ("export", "write the weights as one safetensors file", "run directory or checkpoint"),
        ("universal", "make a DeepSpeed engine's own checkpoint universal", "what it has saved"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=Path, help=where)
        if name == "export":
            command.add_argument("file", type=Path, help="to write, such as weights.safetensors")
            command.add_argument("--timm", action="store_true", help="our ViT under timm's names")
            command.add_argument("--ema", action="store_true", help="the averages of the weights")
        if name == "universal":
            command.add_argument("out", type=Path, help="folder to make")
    flags = parser.parse_args(argv)
    run = {"ls": _ls, "verify": _verify, "export": _export, "universal": _universal}
    return run[flags.command](flags)


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint `path`, or those of the run `path`, the newest first."""
    paths = candidates(path)
    if not paths:
        raise ConfigError(
            f"path must be a run directory or a checkpoint, got {path}, which holds none; "
            f"name one like runs/latest."
        )
    return paths


def _ls(flags: argparse.Namespace) -> int:
    for path in reversed(_checkpoints(flags.path)):
        try:
            reader = Reader(path)
        except RunError as error:
            print(f"{path.name:<14} {error}")
            continue
        m = reader.manifest
        size = sum(part["bytes"] for part in m["parts"]) / 1e6
        settings = m["extra"].get("settings", {})
        named = " ".join(str(settings[n]) for n in ("optimizer", "base", "model") if n in settings)
        print(
            f"{path.name:<14} {size:9.1f} MB  {m['ranks']} ranks of {m['backend']}  {named}  "
            f"holds {', '.join(['weights', *reader.keys])}"
        )
    return 0


def _verify(flags: argparse.Namespace) -> int:
    """Exit code 1 if any is damaged."""
    bad = 0
    for path in reversed(_checkpoints(flags.path)):
        try:
            Reader(path).verify()
            print(f"{path}: whole")
        except RunError as error:
            bad += 1
            print(f"{path}: {error}")
    return 1 if bad else 0


def weights_of(reader: Reader, *, key: str = "weight") -> dict[str, Tensor]:
    """Layers, frozen parameters and buffers, named as in the module's state_dict.

    key: "ema" for the averages of trained layers.
    """
    weights = {name: reader.unlayered(name, 0, 1) for name in reader.tensor_shapes()}
    for name, shape in reader.shapes.items() if key != "weight" else ():
        if (average := reader(name, key, 0, torch.Size(shape).numel())) is not None:
            weights[name] = average.view(shape)
    tied = reader.manifest.get("aliases", {})
    return weights | {alias: weights[name].clone() for alias, name in tied.items()}


def _export(flags: argparse.Namespace) -> int:
    check_new_file("file", flags.file)
    reader = Reader(_checkpoints(flags.path)[0])
    reader.verify()
    if flags.file.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigError(
            f"file must not have an ending of torch.save, got {flags.file}, since safetensors are "
            f"written; name it {flags.file.with_suffix('.safetensors')}."
        )
    if flags.ema and EMA not in reader.keys:
        raise ConfigError(
            f"path must hold averages of the weights for --ema, got {reader.path}, which holds "
            f"{', '.join(['weights', *reader.keys])}; leave --ema out, or train with --ema 0.9998."
        )
    weights, call = weights_of(reader, key=EMA if flags.ema else "weight"), ""
    model = str(reader.extra.get("settings", {}).get("model", ""))
    about = {"model": model, "step": str(reader.step), **card.metadata(reader.extra.get("card"))}
    if flags.timm and model in SIZES:  # other models have timm's names already
        weights, call = as_timm(weights, SIZES[model])
    try:
        write_tensors(flags.file, weights, about)
    except OSError as error:
        raise RunError(f"{flags.file} was not written: {error}.") from error
    print(f"{flags.file}: {len(weights)} tensors of step {reader.step}")
    print(card.sentence(about))
    if call:
        print(f"They fit {call}")
    return 0


def _universal(flags: argparse.Namespace) -> int:
    from ..backends.zero.universal import convert

    keys = convert(flags.path, flags.out)
    print(
        f"{flags.out}: {', '.join(keys)} of every layer, for any number of ranks at stages 1 and 2"
    )
    return 0

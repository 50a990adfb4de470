"""Reads the fields of a dataclass from flags and YAML files, each value converted to its type.

A field's annotation is its type, and its metadata "help" its line of `--help`. Of several files
and flags that set a field, the last one counts.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields
from datetime import date
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from .. import files, project
from ..cli.arguments import Parser
from ..errors import ConfigError, did_you_mean
from .numbers import share_or_steps, whole

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
_NONE = ("null", "none")


def read(kind: Any, argv: Sequence[str], *, prog: str, description: str) -> dict[str, Any]:
    """The value of every field, from its default, --config files and flags.

    A boolean x is set by --x and --no_x, and "_" in a flag of launchers may be "-".

    Raises:
        ConfigError: an unknown flag or line, or a value of the wrong type, in one sentence.
    """
    known = {f.name: f for f in fields(kind)}
    values, rest = _parser(known, prog, description).parse_known_args(list(argv))
    if rest:
        got = next((word for word in rest if word.startswith("-")), rest[0]).split("=")[0]
        name = got.strip("-").replace("-", "_")
        hint = did_you_mean(name, known, "see --help for all flags.", flag="--")
        raise ConfigError(f"unknown flag, got {got}; {hint}")
    return {name: _converted(f, getattr(values, name)) for name, f in known.items()}


def _parser(known: dict[str, Any], prog: str, description: str) -> Parser:
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--config",
        action=_File,
        known=known,
        help="YAML file of settings, or recipe:NAME of `dist-looksam recipes`; flags override it",
    )
    for name, f in known.items():
        text = f.metadata["help"]
        if f.default is not None and f.type is not bool:
            text += f"; default {_shown(f.default)}"
        if f.type is bool:
            add(f"--{name}", action="store_true", default=f.default, help=text)
            off = f"--no_{name}"
            add(off, action="store_false", dest=name, default=f.default, help=argparse.SUPPRESS)
        else:
            names = [f"--{name}", *f.metadata.get("aliases", ())]
            many = "+" if get_origin(f.type) is tuple else None
            add(*names, nargs=many, default=f.default, help=text)
    return parser


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else f"{default}"


class _File(argparse.Action):
    """Reads a YAML file into the values at the place of --config."""

    def __init__(self, *, known: dict[str, Any], **how: Any) -> None:
        super().__init__(metavar="FILE", default=None, **how)
        self.known = known

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        for name, value in _content(values).items():
            if name not in self.known:
                got = str(name).replace("-", "_")
                hint = did_you_mean(got, self.known, "its names are those of --help.")
                raise ConfigError(f"config has an unknown setting, got {name}; {hint}")
            setattr(namespace, name, value)


def _content(path: str) -> dict[Any, Any]:
    """The values of a YAML file by their names."""
    try:
        content = files.yaml_of(project.file(path).read_text(encoding="utf-8"))
    except OSError as error:
        what = "not found" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"config must be a YAML file, got '{path}', {what}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"config must be YAML with lines like `rho: 0.02`, got {path}: {reason}."
        ) from None
    if not isinstance(content, dict):
        got = "nothing in it" if content is None else f"{content!r:.50}"
        raise ConfigError(
            f"config must be YAML with lines like `rho: 0.02`, got {path} with {got}."
        )
    return content


def kind_of(f: Any) -> Any:
    """The type of a field, without None."""
    kinds = [kind for kind in get_args(f.type) if kind is not NoneType]
    return kinds[0] if kinds and get_origin(f.type) is not tuple else f.type


def _converted(f: Any, value: Any) -> Any:
    """A flag's text or a YAML value as the type of its field."""
    if get_origin(f.type) is tuple:
        return _numbers(f, value)
    optional = NoneType in get_args(f.type)
    if value is None or (optional and str(value).lower() in _NONE):
        if optional:
            return None
        raise ConfigError(f"{f.name} must have a value, got none; the default is {f.default}.")
    if {int, float} <= {*get_args(f.type)}:
        return _share_or_steps(f.name, value)
    return _typed(f.name, value, kind_of(f))


def _share_or_steps(name: str, value: Any) -> int | float:
    try:
        return share_or_steps(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(
            f"{name} must be a share of the run in [0.0, 1.0] or a whole number of steps, got "
            f"{value!r}; 0.9 is nine tenths of the run, 900 is step 900."
        ) from None


def _typed(name: str, value: Any, kind: Any) -> Any:
    try:
        if kind is bool:
            return value if isinstance(value, bool) else _BOOLEANS[value.lower()]
        if isinstance(value, bool):
            raise ValueError
        if kind is str and isinstance(value, str | int | float | date):
            return str(value)
        if kind is int:
            return whole(value)
        if kind is not float or math.isnan(number := float(value)):
            raise ValueError
        return number
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError):
        raise ConfigError(f"{name} must be {_WORDS[kind]}, got {value!r}.") from None


def _numbers(f: Any, values: Any) -> tuple[float, ...]:
    """Numbers from separate words, one word with commas, or a list."""
    values = list(values) if isinstance(values, list | tuple) else [values]
    default = _shown(f.default)
    try:
        numbers = [float(v) for text in values for v in str(text).strip("[]()").split(",") if v]
    except ValueError:
        numbers = []
    if len(numbers) != len(get_args(f.type)):
        raise ConfigError(
            f"{f.name} must be two numbers, got {values}; write --{f.name} {default}."
        )
    return tuple(numbers)

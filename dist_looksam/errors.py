"""The errors that a user sees as one sentence: wrong settings, and runs that cannot go on."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting is wrong: what, got, allowed, do. Raised before any training; exit code 2."""


class RunError(RuntimeError):
    """A run cannot go on (a lost rank, a full disk): one sentence; exit code 1."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str, *, flag: str = "") -> str:
    """The end of a sentence about an unknown `word`: the most similar known word, with `flag`
    before it, or `otherwise` if none is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {flag}{near[0]}?" if near else otherwise

"""The package's version, and its commit in a git checkout."""

import os
import subprocess
from pathlib import Path

from .. import __version__

_CHECKOUT = Path(__file__).parents[2]
_PATIENCE = 5.0  # seconds for git, on a slow file system


def made_with(checkout: Path = _CHECKOUT) -> dict[str, str | None]:
    """{"version": ..., "commit": ...} for the records of a run.

    commit: 40 hexadecimal digits, with "-dirty" if tracked files were changed; None outside a
    checkout, or where git is missing, fails or is too slow.
    """
    made: dict[str, str | None] = {"version": __version__, "commit": None}
    if not (checkout / ".git").exists():  # else git uses a repository around the installation
        return made
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return made
    return made | {"commit": done.stdout.strip() or None}

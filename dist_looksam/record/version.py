"""What a run was made with: the package's version, and its commit where it is a git checkout."""

import os
import subprocess
from pathlib import Path

from .. import __version__

_CHECKOUT = Path(__file__).parents[2]
_PATIENCE = 5.0  # seconds for git, on a slow file system


def made_with(checkout: Path = _CHECKOUT) -> dict[str, str | None]:
    """{"version": ..., "commit": 40 hexadecimal digits, "-dirty" after them if tracked files were
    changed; None outside a checkout, or where git is missing, refuses or is too slow}."""
    found: dict[str, str | None] = {"version": __version__, "commit": None}
    if not (checkout / ".git").exists():  # else git finds the repository around an installation
        return found
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        said = subprocess.run(
            [*command, "--exclude=*"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return found
    return found | {"commit": said.stdout.strip() or None}

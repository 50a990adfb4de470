"""Which source a run or a page is made with."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str | None:
    """The commit of the checkout that the package is in, and whether files differ from it."""
    if not (ROOT / ".git").exists():
        return None

    def git(*words: str) -> str:
        line = ["git", "-C", str(ROOT), *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        found = git("rev-parse", "--short=12", "HEAD")
        changed = " with local changes" if git("status", "--porcelain", "-uno") else ""
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a slow file system
        return None
    return f"{found}{changed}" if found else None

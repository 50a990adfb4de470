"""Command lines: argparse with one-sentence errors, and exit codes of errors."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import ConfigError, RunError


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message and the command that lists the flags."""
        raise ConfigError(f"{' '.join(message.split())}; see {self.prog} --help.")


def check_new_file(flag: str, path: Path) -> None:
    """ConfigError, which names the flag, where `path` cannot be written: known before the work."""
    folder = path.absolute().parent
    if not folder.is_dir() or path.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{flag} must be a file in a directory that can be written, got {path}; name another."
        )


def guarded(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """command(argv); prints errors as one line on stderr.

    Returns the exit code: 0 done, 1 failed, 2 wrong settings, 130 Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may have characters it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command(argv) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except OSError as error:  # a folder of others, a full disk
        known = error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not known or argv[:1] == ["train"]:
            raise
        place = "" if error.filename is None else f" ({error.filename})"
        print(f"error: {error.strerror}{place}", file=sys.stderr, flush=True)
        return 1

"""Command lines: argparse whose mistakes are one sentence, and errors turned into exit codes."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from ..errors import ConfigError, RunError


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """One sentence of what argparse found, and where the flags are listed."""
        raise ConfigError(f"{' '.join(message.split())}; see {self.prog} --help.")


def guarded(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """command(argv), its errors as one line on stderr. 0 done, 1 failed, 2 wrong settings, 130
    Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may have what it cannot say
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command(argv) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
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

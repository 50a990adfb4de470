"""`dist-looksam watch`."""

import socket
from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..cli.arguments import Parser, check_new_file
from ..errors import ConfigError, RunError
from .board import Board, page
from .serve import FIRST_PORT, Server


def main(argv: Sequence[str]) -> int:
    """Follow runs on a page in the browser while they train."""
    flags = _parser().parse_args(argv)
    folders = [Path(run) for run in flags.runs]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(
                f"run must be a run directory (--out) or a folder of runs, got {folder}, which is "
                f"none; name one that exists."
            )
    if flags.port is not None and not 0 <= flags.port < 2**16:
        raise ConfigError(f"port must be from 0 to 65535, got {flags.port}.")
    if flags.export:
        check_new_file("export", flags.export)
    board = Board(folders)
    return _export(board, flags.export) if flags.export else _serve(board, flags.port)


def _parser() -> Parser:
    parser = Parser(
        prog="dist-looksam watch",
        description="Follow runs on a page in the browser while they train: curves, looks, speed, "
        "time left, log. The page works offline and changes nothing in the runs.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", default=["runs"],
        help="run directory (--out) or a folder of runs; default runs/",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=int, help=f"port on 127.0.0.1; default the first free from {FIRST_PORT}"
    )
    parser.add_argument(
        "--export", type=Path, metavar="FILE.html",
        help="write the page as it is now into a file, and end",
    )  # fmt: skip
    return parser


def _export(board: Board, path: Path) -> int:
    board.read_all()
    try:
        files.replace_text(path, page(board.answer()))
    except OSError as error:
        raise RunError(f"the page cannot be written to {path}: {error.strerror}.") from None
    print(path)
    return 0


def _serve(board: Board, port: int | None) -> int:
    with Server(board, port) as server:
        print(f"{server.address}  (Ctrl-C ends the page; the runs go on)")
        there = f"{server.server_port}:127.0.0.1:{server.server_port}"
        print(f"from another machine: ssh -N -L {there} {socket.gethostname()}", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
    return 0

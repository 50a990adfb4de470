"""New lines of a file that another process writes, without reading the older ones again."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_CHUNK = 2**20  # bytes; no line of this program is as long
_MOST = 4 * _CHUNK  # bytes read at once: less than a second's work
_SIGN = 64  # bytes before the offset, by which a rewritten file is recognised


def open_file(path: Path) -> BinaryIO | None:
    """A regular file to read; None where there is none. A pipe would block its reader for ever."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    return None


class Lines:
    """The whole lines of `path`, each given once; all of them again when the file is another one.

    `share`: how much of the file has been read. `changed`: when it was last written, in seconds
    since 1970. `last`: of a longer file only about that many bytes at its end are read.
    """

    def __init__(self, path: Path, *, last: int | None = None) -> None:
        self.path = path
        self.share = 1.0
        self.changed: float | None = None
        self._last = last
        self._forget()

    def _forget(self) -> None:
        self._offset, self._file = 0, (0, 0)
        self._before = b""  # the bytes before the offset
        self._cut = False  # the offset is within a line, which is left out

    def new(self) -> tuple[bool, list[bytes]]:
        """(whether what was given before is void, new lines), of at most 4 MiB."""
        file = open_file(self.path)
        if file is None:
            void = self._offset > 0
            self._forget()
            self.share, self.changed = 1.0, None
            return void, []
        with file:
            void = not self._same(file)
            if void:
                self._forget()
            found = os.fstat(file.fileno())
            self._file, self.changed = (found.st_dev, found.st_ino), found.st_mtime
            if self._last and found.st_size - self._offset > self._last:
                self._offset, self._cut = found.st_size - self._last, True
            lines = self._read(file)
            start = max(0, self._offset - _SIGN)
            file.seek(start)
            self._before = file.read(self._offset - start)
            self.share = self._offset / found.st_size if found.st_size else 1.0
        return void, lines

    def _same(self, file: BinaryIO) -> bool:
        """Whether the file begins with what was read: a resumed run replaces it."""
        if not self._offset:
            return True
        found = os.fstat(file.fileno())
        if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def _read(self, file: BinaryIO) -> list[bytes]:
        lines: list[bytes] = []
        end = self._offset + _MOST
        while self._offset < end:
            file.seek(self._offset)
            chunk = file.read(_CHUNK)
            whole, newline, _ = chunk.rpartition(b"\n")
            if newline:
                lines += whole.split(b"\n")[self._cut :]
                self._offset, self._cut = self._offset + len(whole) + 1, False
            elif len(chunk) == _CHUNK:
                self._offset, self._cut = self._offset + _CHUNK, True
            else:  # the end, or a line that is being written
                break
        return lines

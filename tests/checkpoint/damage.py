"""Ways in which a checkpoint goes bad."""

import pickle
import shutil
from pathlib import Path


class Bomb:
    """Unpickling it makes a file: proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


def _part(path: Path) -> Path:
    return path / "rank-00000.safetensors"


def flip(path: Path) -> None:
    """One bit, in the middle of the tensors."""
    raw = bytearray(_part(path).read_bytes())
    raw[len(raw) // 2] ^= 1
    _part(path).write_bytes(raw)


def flip_manifest(path: Path) -> None:
    """One digit of a counter; it is still JSON."""
    manifest = path / "manifest.json"
    text = manifest.read_text()
    assert '"steps":' in text
    at = text.index('"steps":') + len('"steps":')
    manifest.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])


def truncate(path: Path) -> None:
    _part(path).write_bytes(_part(path).read_bytes()[:-100])


def lose_part(path: Path) -> None:
    _part(path).unlink()


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def foreign(path: Path) -> None:
    """Somebody else's directory of the same name."""
    shutil.rmtree(path)
    path.mkdir()
    (path / "manifest.json").write_text('{"epoch": 3, "weights": "pytorch_model.bin"}')


def bomb_part(path: Path) -> None:
    _part(path).write_bytes(pickle.dumps(Bomb(path.parent / "proof")))


def bomb_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(pickle.dumps(Bomb(path.parent / "proof")))


def nested(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


WAYS = {
    flip: "checksum differs",
    flip_manifest: "checksum differs",
    truncate: "cut short",
    lose_part: "is missing",
    lose_manifest: "has no manifest.json",
    foreign: "damaged or foreign",
    bomb_part: "cut short",
    bomb_manifest: "damaged or foreign",
    nested: "damaged or foreign",
}

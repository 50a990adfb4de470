"""Reads and writes the files of a checkpoint; a written file is on the disk at return."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import replace_text

FORMAT = 3
FORMATS = (2, 3)  # that can be read
MANIFEST = "manifest.json"
BLOCK = 2**24
_NO_TEXTS: Mapping[str, str] = {}
# Dtypes by torch and by the safetensors format.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


def part_name(rank: int) -> str:
    """The file of one rank, without its ending."""
    return f"rank-{rank:05d}"


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _NO_TEXTS
) -> tuple[str, int]:
    """Write a safetensors file of host tensors; returns its sha256 and size in bytes.

    Not by the library's `save_file`, which copies every tensor and holds Python's global lock while
    it writes. Here hashing and writing release the lock, so that training goes on; and the same
    content is the same file, where the library shuffles the metadata.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(sorted(metadata.items()))}
    # The format wants aligned data: widest first, as the library itself writes it.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            file.write(block)
            digest.update(block)
        for name in order:
            raw = tensors[name].contiguous().view(-1).view(torch.uint8).numpy()
            for start in range(0, len(raw), BLOCK):
                piece = raw[start : start + BLOCK].data
                file.write(piece)
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), 8 + len(text) + at


def canonical(content: Any) -> str:
    """JSON text that is the same for the same content, for checksums."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write {"sha256": checksum of the content, "content": content} atomically."""
    text = canonical(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    replace_text(path, f'{{"sha256":"{digest}","content":{text}}}\n')


def read_json(path: Path) -> dict[str, Any]:
    """The content that `write_json` wrote. ValueError for another file or a changed one."""
    try:
        stored = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("content"), dict):
        raise ValueError("not a manifest of this program")
    if hashlib.sha256(canonical(stored["content"]).encode()).hexdigest() != stored.get("sha256"):
        raise ValueError("its checksum differs")
    return stored["content"]


def digest_of(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

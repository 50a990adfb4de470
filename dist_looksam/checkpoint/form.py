"""Files of a checkpoint, written so that they are on the disk when the call returns."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files

FORMAT = 3
FORMATS = (2, 3)  # that can be read
MANIFEST = "manifest.json"
BLOCK = 2**24
# The names that the safetensors format has for what torch holds.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def part_name(rank: int) -> str:
    """The file of one rank, without its ending."""
    return f"rank-{rank:05d}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """Write a safetensors file of host tensors; returns its sha256 and size in bytes.

    Not by the library's `save_file`, which copies every tensor and holds Python's lock while it
    writes: training runs meanwhile. Here both hashing and writing let it run.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
    """JSON text that is the same for the same content: what checksums are taken of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write {"sha256": of the content, "content": content} under its name only when complete."""
    text = canonical(content)
    whole = f'{{"sha256":"{hashlib.sha256(text.encode()).hexdigest()}","content":{text}}}\n'
    files.replace_text(path, whole)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. ValueError if it is not that, or was changed since."""
    try:
        whole = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("content"), dict):
        raise ValueError("not a manifest of this program")
    if hashlib.sha256(canonical(whole["content"]).encode()).hexdigest() != whole.get("sha256"):
        raise ValueError("its checksum differs")
    return whole["content"]


def digest_of(path: Path) -> str:
    """sha256 of a file, read once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """The names in a folder reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

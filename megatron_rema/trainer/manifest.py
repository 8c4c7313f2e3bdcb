"""Checksums of a folder: ``manifest.json`` holds size and SHA-256 of every other file in it, and a digest of itself.

The ranks share the reading: each one seals the files it wrote and checks its part of a folder. `sha256sum` gives the same digests.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_rema.parallel.exchange import gather

NAME = "manifest.json"


class Seal(NamedTuple):
    """What is known of a file's content."""

    size: int  # bytes
    sha256: str


def seal(file: Path) -> Seal:
    """Read ``file`` once, in pieces, after forcing it to the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Seal(stream.tell(), digest)


def write(folder: Path, seals: Mapping[str, Seal]) -> None:
    """Write the manifest of ``folder``. ``seals`` are those known already; other files are read here. Forces everything to the disk."""
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    files = {name: seals.get(name) or seal(folder / name) for name in sorted(names)}
    rows = {name: entry._asdict() for name, entry in files.items()}
    (folder / NAME).write_text(json.dumps({"files": rows, "sha256": _digest(rows)}, indent=1))
    seal(folder / NAME)
    for inner in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(inner)
    sync_folder(folder)


def read(folder: Path) -> dict[str, Seal] | None:
    """Seals by file name relative to ``folder``; None when the manifest is missing or is not what was written."""
    try:
        stored = json.loads((folder / NAME).read_bytes())
        return {name: Seal(**row) for name, row in stored["files"].items()} if stored["sha256"] == _digest(stored["files"]) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def fault(folder: Path) -> str | None:
    """What is wrong with ``folder``, with the name of the file, or None. Every byte is read, in equal parts by all ranks: a collective."""
    seals = read(folder)
    if seals is None:
        is_there = (folder / NAME).exists()
        return f"{folder / NAME} {'is not the manifest that was written' if is_there else 'is missing: the folder was never whole'}"
    grouped = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    largest_first = sorted(seals, key=lambda name: (-seals[name].size, name))
    found = [text for name in largest_first[rank::world] if (text := _fault_of(folder / name, seals[name]))]
    everywhere = gather(found) if grouped else [found]
    return min((text for texts in everywhere for text in texts), default=None)


def looks_whole(folder: Path) -> bool:
    """Manifest read and every file there with its size; no content is read."""
    seals = read(folder)
    return seals is not None and all(_size(folder / name) == entry.size for name, entry in seals.items())


def sync_folder(folder: Path) -> None:
    """Force the folder's names to the disk: without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault_of(file: Path, expected: Seal) -> str | None:
    size = _size(file)
    if size is None:
        return f"{file} is missing"
    if size != expected.size:
        return f"{file} has {size} bytes, {expected.size} were written: it is {'truncated' if size < expected.size else 'too long'}"
    digest = seal(file).sha256
    return None if digest == expected.sha256 else f"{file} is corrupted: its SHA-256 is {digest}, it was written as {expected.sha256}"


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _digest(rows: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

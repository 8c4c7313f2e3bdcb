"""What a run computed, so that two runs can be compared bit by bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from megatron_rema.trainer import manifest


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def results(folder: Path, steps: int) -> dict[str, list]:
    """Everything that a run computes, without what it takes: seconds and rates. Rows as text: NaN is not equal to itself."""

    def computed(row: dict) -> str:
        return json.dumps({name: value for name, value in row.items() if not name.endswith("_s")})

    found: dict[str, list] = {name: [computed(row) for row in rows(folder / f"{name}.jsonl")] for name in ("metrics", "evaluations")}
    found |= {file.stem: rows(file) for file in sorted((folder / "episodes").glob("*.jsonl"))}
    seals = json.loads((folder / "checkpoints" / f"step_{steps:06d}" / "manifest.json").read_text())["files"]
    found["weights"] = [{name: row["sha256"]} for name, row in sorted(seals.items()) if name.endswith(".distcp")]
    exported = sorted((folder / "hf").rglob("*.safetensors"))
    found["exported"] = [{str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()} for file in exported]
    return found


def differences(found: dict[str, list], expected: dict[str, list]) -> list[str]:
    """Names of what is not the same."""
    return sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))


def damaged_checkpoints(folder: Path) -> list[str]:
    """Checkpoints that would be taken for whole by their name and are not."""
    return [fault for path in sorted((folder / "checkpoints").glob("step_*")) if (fault := manifest.fault(path)) is not None]


def leavings(folder: Path) -> list[str]:
    """Half-written files that nobody will clear away."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "partial" in path.name or path.name.endswith(".new"))

"""What a run leaves on disk, written by rank 0 only: config, metrics, episodes, evaluations, alerts (design: the run folder)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_rema.trainer import restart


class RunFolder:
    """Append-only JSON lines. After a resume, rows of steps that will run again are cut, so that every step stands once."""

    def __init__(self, path: str | Path, *, writes: bool, private: bool = True) -> None:
        """``private``: a folder that is made here is for its owner only; one that is there keeps its rights."""
        self.path = Path(path)
        self.writes = writes
        if writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700 if private else 0o777, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_config(self, mapping: dict[str, Any]) -> None:
        if self.writes:
            restart.record(self.path, mapping)

    def metrics(self, row: dict[str, Any]) -> None:
        self._append("metrics.jsonl", [row])

    def evaluation(self, row: dict[str, Any]) -> None:
        self._append("evaluations.jsonl", [row])

    def alert(self, row: dict[str, Any]) -> None:
        self._append("alerts.jsonl", [row])

    def audit(self, row: dict[str, Any]) -> None:
        self._append("audits.jsonl", [row])

    def episodes(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Whole file at once: a step that runs again replaces its own episodes."""
        if not self.writes:
            return
        folder = self.path / "episodes"
        folder.mkdir(exist_ok=True)
        target = folder / f"step_{step:06d}.jsonl"
        partial = target.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        partial.replace(target)

    def read(self, name: str) -> list[dict[str, Any]]:
        file = self.path / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def cut_after(self, step: int) -> None:
        """Drop rows and episode files of steps later than ``step``, and a torn last line: a resumed run writes them anew."""
        if not self.writes:
            return
        for name in ("metrics.jsonl", "evaluations.jsonl", "alerts.jsonl", "audits.jsonl"):
            file = self.path / name
            if file.exists():
                partial = file.with_suffix(".partial")
                partial.write_text("".join(f"{line}\n" for line in file.read_text().splitlines() if _step_of(line) <= step))
                partial.replace(file)
        for file in (self.path / "episodes").glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        if self.writes:
            with (self.path / name).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def _step_of(line: str) -> float:
    """Step of a row; infinity for a line torn by a kill, which must go."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")

"""The comparison of a sweep's runs: labelled by what was swept, however many keys of the configuration that moved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rema.report.compare import Comparison, compare
from megatron_rema.report.run_folder import read_run
from megatron_rema.sweep.jobs import swept_values
from megatron_rema.sweep.record import RECORD


def comparison_of(folders: Sequence[Path]) -> tuple[Comparison, list[str]]:
    """Of run folders, and of sweeps' folders, which stand for their runs; and the names of jobs that have not written anything yet.

    One sweep alone is labelled by its overrides, anything else by the keys of the configurations that differ.
    Raises ValueError for a folder that is neither, and where no run is left.
    """
    found, missing, settings = [], [], []
    for folder in folders:
        if not (folder / RECORD).is_file():
            found.append(read_run(folder))
            continue
        jobs = json.loads((folder / RECORD).read_text())["jobs"]
        for job, values in zip(jobs, swept_values([job["overrides"] for job in jobs]), strict=True):
            if any((folder / job["name"] / name).is_file() for name in ("metrics.jsonl", "evaluations.jsonl")):
                found.append(read_run(folder / job["name"]))
                settings.append({key: value.strip("'\"") for key, value in values.items()})
            else:
                missing.append(job["name"])
    if not found:
        raise ValueError(f"no job of {', '.join(map(str, folders))} has written metrics or evaluations yet; there is nothing to compare.")
    return compare(found, settings if len(folders) == 1 and settings else None), missing

"""Which detectors catch reward hacking, and which cry wolf? Trains tiny policies in the worlds of benchmarks/gym and scores the monitor.

    python benchmarks/integrity.py run                     trains what is not recorded yet, writes the tables (452 runs took 79 minutes)
    python benchmarks/integrity.py run --only g5/hack --seeds 0 1
    python benchmarks/integrity.py run --reduced --results FILE --folder FOLDER      one hack, its twin, and the hack guarded: for CI
    python benchmarks/integrity.py list                    what is recorded, what is missing
    python benchmarks/integrity.py tables                  writes docs/integrity_scoreboard.md from what is recorded

A run is one process (forked, the imports are paid once), --jobs of them at once; a finished run is one line of
benchmarks/results/integrity.jsonl. Run folders lie in runs/gym and are removed when measured (--keep keeps them).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gym import runs, task  # noqa: E402
from benchmarks.gym.runs import MITIGATIONS, Run  # noqa: E402
from benchmarks.gym.worlds import CLEAN, HACK, SHARP, TWIN, WORLDS, World  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "integrity.jsonl"
FOLDER = ROOT / "runs" / "gym"
REDUCED_COLD_START_STEPS, REDUCED_STEPS = 150, 40
# seeds: thresholds are taken from CALIBRATION and never from EVALUATED; below 20 is for trying things out
EVALUATED, CALIBRATION = range(20, 32), range(100, 102)
GUARD = "guard"
COMPARED, NUM_COMPARED = ("g0", "g1", "g5", "g6"), 4  # worlds and seeds in which the other mitigations are compared


def all_runs(seeds: Sequence[int] | None = None, *, reduced: bool = False) -> list[Run]:
    """Seed by seed, so that an interrupted scoreboard has as many seeds of every arm as possible."""
    if reduced:
        return [Run(WORLDS["g5"], arm, 0, steps=REDUCED_STEPS, mitigation=how) for arm, how in ((HACK, ""), (TWIN, ""), (HACK, GUARD))]
    chosen = seeds or [s for pair in zip(EVALUATED, [*CALIBRATION, *[None] * len(EVALUATED)], strict=False) for s in pair if s is not None]
    main = [Run(world, arm, seed, mitigation=how) for seed in chosen for world in WORLDS.values() for arm, how in arms_of(world, seed)]
    compared = [
        Run(WORLDS[world], CLEAN if world == "g0" else HACK, seed, mitigation=how)
        for seed in (seeds or EVALUATED[:NUM_COMPARED])
        for world in COMPARED
        for how in MITIGATIONS
        if how != GUARD
    ]
    return main + compared


def arms_of(world: World, seed: int) -> list[tuple[str, str]]:
    """(arm, mitigation). Thresholds are taken from runs without a hack, and a guard has nothing to act on in a twin."""
    if seed in CALIBRATION:
        return [(arm, "") for arm in world.arms if arm in (CLEAN, TWIN, SHARP)]
    return [*((arm, "") for arm in world.arms), *((arm, GUARD) for arm in (CLEAN, HACK) if arm in world.arms)]


def key(run: Run) -> tuple:
    return run.world.id, run.title, run.seed, run.steps


def recorded(file: Path) -> dict[tuple, dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {(row["world"], row["arm"], row["seed"], row["steps"]): row for row in rows}


def train(todo: Sequence[Run], workers: int, file: Path, folder: Path, *, keep: bool, cold_start_steps: int) -> int:
    """Number of runs that failed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    task.save_model(folder / "preload", ())
    runs.preload(folder / "preload")
    logs, starts = folder / "logs", folder / "cold_start"
    missing = {run.world.cold_start_of(run.arm): run for run in todo if not runs.start_of(run.world, run.arm, starts).exists()}
    cold = [(f"cold_start_{name}", partial(_cold_start, run.world, run.arm, starts, cold_start_steps)) for name, run in missing.items()]
    failed = _work("cold starts", cold, workers, logs, lambda value: f"{value:.0f} s")
    if failed:
        return failed
    file.parent.mkdir(parents=True, exist_ok=True)

    def record(row: dict) -> str:
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        name = f"{row['world']}/{row['arm']}_seed{row['seed']}"  # Run.name
        if not keep:
            shutil.rmtree(folder / name, ignore_errors=True)
        proxy, gold = row["curves"]["proxy"], row["curves"]["gold"]
        first = next((alert for alert in row["alerts"]), None)
        told = f"{first['level']} at step {first['step']}: {first['mechanism']}" if first else "no alert"
        return f"proxy {proxy[0]:.2f} -> {proxy[-1]:.2f}, gold {gold[0]:.2f} -> {gold[-1]:.2f}, {told}"

    jobs = [(run.name, partial(runs.train, run, folder / run.name, runs.start_of(run.world, run.arm, starts))) for run in todo]
    return _work("runs", jobs, workers, logs, record)


def _cold_start(world: World, arm: str, starts: Path, steps: int) -> float:
    begin = time.perf_counter()
    runs.cold_start(world, arm, starts, steps)
    return time.perf_counter() - begin


def _work(title: str, jobs: Sequence[runs.Job], workers: int, logs: Path, tell) -> int:
    begin, failed = time.monotonic(), 0
    for done, (name, value, error) in enumerate(runs.forked(jobs, workers, logs), start=1):
        spent = time.monotonic() - begin
        left = spent / done * (len(jobs) - done)
        failed += bool(error)
        print(f"{title} {done}/{len(jobs)}, {spent / 60:.1f} min, {left / 60:.0f} min left: {name}: {error or tell(value)}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "list", "tables"))
    parser.add_argument("--only", nargs="*", default=[], help="WORLD or WORLD/ARM")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of run folders and cold starts")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    chosen = [
        run
        for run in all_runs(options.seeds, reduced=options.reduced)
        if not options.only or run.world.id in options.only or f"{run.world.id}/{run.title}" in options.only
    ]
    known = recorded(options.results)
    todo = [run for run in chosen if key(run) not in known]
    if options.command == "list":
        print(f"{len(chosen) - len(todo)} of {len(chosen)} runs are recorded in {options.results}")
        for run in todo:
            print(f"missing: {run.name}")
        return 0
    failed = 0
    if options.command == "run" and todo:
        steps = REDUCED_COLD_START_STEPS if options.reduced else runs.COLD_START_STEPS
        failed = train(todo, options.jobs, options.results, options.folder, keep=options.keep, cold_start_steps=steps)
    from benchmarks.gym.tables import write

    rows, seeds = list(recorded(options.results).values()), {"evaluated": EVALUATED, "calibration": CALIBRATION}
    if options.results != RESULTS:  # trials, and CI's reduced runs: every seed is shown, beside the results
        seeds, files = (
            {"evaluated": sorted({row["seed"] for row in rows}), "calibration": []},
            {
                "page": options.results.with_suffix(".md"),
                "figure": None,
            },
        )
    else:
        files = {}
    print(write(rows, **seeds, **files))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

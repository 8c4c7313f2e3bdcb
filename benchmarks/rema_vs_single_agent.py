"""Does ReMA beat one agent, and does it stay stable? Trains every method with several seeds on the arith task and writes docs/results.md.

    python benchmarks/rema_vs_single_agent.py run              trains what is not recorded yet, then writes the tables
    python benchmarks/rema_vs_single_agent.py run --only comparison/vrp --seeds 2
    python benchmarks/rema_vs_single_agent.py list             what is recorded, what is missing
    python benchmarks/rema_vs_single_agent.py tables           writes docs/results.md and its figures from what is recorded

Each run is one process (tensor 1, pipeline 1), --jobs of them at once. A finished run is one line of benchmarks/results/STUDY.jsonl; a
run that was interrupted begins anew. Run folders lie in runs/experiments. Nothing is chosen after the fact: every recorded run is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "experiments"
PAGE = ROOT / "docs" / "results.md"
FIGURES = ROOT / "docs" / "img"

Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """One row of a table: what is trained, from which cold start."""

    name: str
    title: str
    cold_start: str  # key of COLD_STARTS
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """Methods at the same settings over the same seeds."""

    name: str
    seeds: int
    methods: tuple[Method, ...]
    overrides: tuple[str, ...]  # of every method
    seeded_cold_start: bool  # every seed from a cold start of its own


COLD_STARTS = {  # name -> experiment, policy whose weights are the start
    "rema": ("quickstart_cold_start", "shared"),
    "vrp": ("arith_vrp_cold_start", "reasoner"),
    "mrp": ("arith_mrp_cold_start", "reasoner"),
}
COMMON = ("parallel=single", "trainer.save_hf=false", "trainer.checkpoint_every=0", "trainer.evaluate_every=0")
TOKEN_BUDGET = 250_000
COMPARISON = Study(
    name="comparison",
    seeds=5,
    methods=(
        Method("vrp", "VRP_RL: one agent, chain of thought", "vrp", ("experiment=arith_vrp",)),
        Method("mrp", "MRP_RL: one agent, plan then solve", "mrp", ("experiment=arith_mrp",)),
        Method("shared_turn", "ReMA, shared weights, turn ratio", "rema", ("experiment=quickstart",)),
        Method("shared_token", "ReMA, shared weights, token ratio", "rema", ("experiment=quickstart", "algorithm=grpo_token")),
        Method(
            "alternating",
            "ReMA, separate weights, alternating every 10 steps",
            "rema",
            ("experiment=quickstart", "agents=separate", "agents.schedule=alternating", "agents.alternate_every=10"),
        ),
    ),
    overrides=(
        *COMMON,
        f"trainer.token_budget={TOKEN_BUDGET}",
        "trainer.steps=1000",  # the budget ends the run long before
        "trainer.minibatches_per_step=2",
        "rollout.prompts_per_step=16",
        "rollout.episodes_per_prompt=8",
    ),
    seeded_cold_start=True,
)
STABILITY = Study(
    name="stability",
    seeds=12,
    methods=(
        Method("default", "default settings", "rema", ("experiment=quickstart",)),
        Method(
            "reference",
            "the reference implementation's settings",
            "rema",
            (
                "experiment=quickstart",
                "algorithm.aggregation=episode",
                "optimizer.schedule=constant",
                "reward.mask_unfinished_reward=false",
            ),
        ),
    ),
    overrides=(
        *COMMON,
        "trainer.steps=200",
        "trainer.evaluation_samples=2",
        "rollout.prompts_per_step=8",
        "rollout.episodes_per_prompt=8",
    ),
    seeded_cold_start=False,
)
STUDIES = {study.name: study for study in (COMPARISON, STABILITY)}

# A run has collapsed when the mean reward of WINDOW steps falls below half of what it was before, or the sampled accuracy on held-out
# problems ends below that of the cold start.
WINDOW = 10
# Kept of every step beside reward and tokens: the signs of a collapse, by name of the metric.
SIGNS = {
    "finished": "reward/finished_frac",
    "finish at round 1": "behaviour/finish_round/1_frac",
    "empty turns, planner": "behaviour/meta_thinking/empty_rate",
    "empty turns, reasoner": "behaviour/reasoning/empty_rate",
    "planner copies": "behaviour/meta_thinking/copy_ratio",
    "planner leaks first": "behaviour/meta_thinking/leak_first_rate",
    "entropy, nats": "train/entropy_nats",
}


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    study: Study
    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.study.name}/{self.method.name}_seed{self.seed}"

    @property
    def cold_start_seed(self) -> int:
        return self.seed if self.study.seeded_cold_start else 0

    @property
    def overrides(self) -> list[str]:
        policy = COLD_STARTS[self.method.cold_start][1]
        start = cold_start_dir(self.method.cold_start, self.cold_start_seed) / "hf" / policy
        return [
            *self.method.overrides,
            *self.study.overrides,
            f"seed={self.seed}",
            f"model.path={start.relative_to(ROOT)}",
            f"run_dir={(RUNS / self.name).relative_to(ROOT)}",
        ]


def cold_start_dir(name: str, seed: int) -> Path:
    return RUNS / "cold_start" / f"{name}_seed{seed}"


def recorded(study: Study) -> dict[tuple[str, int], Row]:
    """(method, seed) -> its line. Raises ValueError where a line was made with other settings than the study now has."""
    file = RESULTS / f"{study.name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {method.name: method for method in study.methods}
    for row in rows:
        if row["method"] not in known:
            raise ValueError(f"{file}: method {row['method']!r} is none of {', '.join(known)}; delete its lines.")
        job = Job(study, known[row["method"]], row["seed"])
        if row["overrides"] != job.overrides:
            raise ValueError(f"{file}: {job.name} was run with other settings than the study has now; delete its line to run it again.")
    return {(row["method"], row["seed"]): row for row in rows}


def jobs_of(study: Study, seeds: int | None = None) -> list[Job]:
    """Seed by seed, so that an interrupted study has as many seeds of every method as possible."""
    return [Job(study, method, seed) for seed in range(seeds or study.seeds) for method in study.methods]


def run(jobs: Sequence[Job], workers: int) -> None:
    starts = {(job.method.cold_start, job.cold_start_seed): job for job in jobs}
    starts = {key: job for key, job in starts.items() if not (cold_start_dir(*key) / "hf").exists()}
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(workers) as pool:
        for title, todo, work in (("cold starts", list(starts), _cold_start), ("runs", list(jobs), _train)):
            bar = progress.add_task(title, total=len(todo))
            for line in pool.map(work, todo):
                progress.advance(bar)
                progress.console.print(line)


def _cold_start(start: tuple[str, int]) -> str:
    name, seed = start
    folder = cold_start_dir(name, seed)
    overrides = [f"experiment={COLD_STARTS[name][0]}", "parallel=single", f"seed={seed}", f"run_dir={folder.relative_to(ROOT)}"]
    seconds, _ = _execute("sft", folder, overrides)
    return f"cold start {name}, seed {seed}: {seconds:.0f} s"


_recording = threading.Lock()


def _train(job: Job) -> str:
    wall, cpu = _execute("train", RUNS / job.name, job.overrides)
    row = {"method": job.method.name, "seed": job.seed, "overrides": job.overrides, **measured(RUNS / job.name)}
    row |= {
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": _commit(),
    }
    with _recording:
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / f"{job.study.name}.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
    return f"{job.name}: {wall:.0f} s, held-out {final(row, 'heldout', 1.0):.3f}, ood {final(row, 'ood', 1.0):.3f}"


def _execute(program: str, folder: Path, overrides: Sequence[str]) -> tuple[float, float]:
    """Run one front door, whose run_dir is ``folder``, in a process of its own. Returns its (wall, CPU) seconds, children included."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"megatron_rema.{program}", *overrides],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        process.returncode = status
        raise RuntimeError(f"{program} for {folder} ended with {os.waitstatus_to_exitcode(status)}: see {log}")
    process.returncode = 0
    return time.perf_counter() - begin, _cpu_seconds(usage)


def _commit() -> str:
    """Of the code that ran; "+" where the working tree differed from it."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _cpu_seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def measured(folder: Path) -> Row:
    """What is kept of a run: its curves and its evaluations."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    kept = ("step", "set", "temperature", "num_problems", "samples_per_problem", "accuracy", "low", "high", "finished_frac")
    return {
        "steps": metrics[-1]["step"],
        "sampled_tokens": metrics[-1]["rollout/sampled_tokens_total"],
        "reward": [round(row["reward/mean"], 4) for row in metrics],
        "tokens": [row["rollout/sampled_tokens_total"] for row in metrics],
        "signs": {
            name: [round(row[key], 4) if key in row else None for row in metrics]
            for name, key in SIGNS.items()
            if any(key in row for row in metrics)
        },
        "evaluations": [{key: row[key] for key in kept} for row in evaluations],
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def accuracies(row: Row, name: str, temperature: float) -> tuple[float, float]:
    """(before RL, after RL)"""
    found = [e["accuracy"] for e in row["evaluations"] if e["set"] == name and e["temperature"] == temperature]
    return found[0], found[-1]


def final(row: Row, name: str, temperature: float) -> float:
    return accuracies(row, name, temperature)[1]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95% interval (Student's t; with one seed there is none)."""
    mean = statistics.fmean(values)
    if len(values) < 2 or len(set(values)) == 1:
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    return mean, float(low), float(high)


def shown(values: Sequence[float], *, signed: bool = False) -> str:
    """``mean [low, high]``; the interval of an accuracy (not ``signed``) ends at 0 and 1."""
    mean, low, high = interval(values)
    if not signed:
        low, high = max(low, 0.0), min(high, 1.0)
    plus = "+" if signed else ""
    return f"{mean:{plus}.3f} [{low:{plus}.3f}, {high:{plus}.3f}]"


def windowed(rewards: Sequence[float]) -> list[float]:
    """Mean reward of every WINDOW steps in a row."""
    return [statistics.fmean(rewards[end - WINDOW : end]) for end in range(WINDOW, len(rewards) + 1)]


def collapse_step(rewards: Sequence[float]) -> int | None:
    """The first step (from 1) at which the mean reward of WINDOW steps is below half of an earlier one; None: never."""
    best = 0.0
    for end, mean in enumerate(windowed(rewards), start=WINDOW):
        if mean < best / 2:
            return end
        best = max(best, mean)
    return None


def has_collapsed(row: Row) -> bool:
    before, after = accuracies(row, "heldout", 1.0)
    return collapse_step(row["reward"]) is not None or after < before


def comparison_tables(rows: dict[tuple[str, int], Row]) -> Iterator[str]:
    methods = [m for m in COMPARISON.methods if any(name == m.name for name, _ in rows)]
    of = {m.name: [row for (name, _), row in sorted(rows.items()) if name == m.name] for m in methods}
    yield "| method | seeds | held-out, sampled | held-out, greedy | harder, sampled | harder, greedy | tokens | steps | CPU min a run |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for m in methods:
        own = of[m.name]
        cells = [shown([final(row, s, t) for row in own]) for s in ("heldout", "ood") for t in (1.0, 0.0)]
        tokens, steps = (round(statistics.fmean(row[key] for row in own)) for key in ("sampled_tokens", "steps"))
        minutes = statistics.fmean(row["cpu_s"] for row in own) / 60
        yield f"| {m.title} | {len(own)} | {' | '.join(cells)} | {tokens:,} | {steps} | {minutes:.1f} |"
    yield ""
    yield "Before RL, after the cold start:"
    yield ""
    yield "| method | held-out, sampled | held-out, greedy | harder, sampled | harder, greedy |"
    yield "|---|---|---|---|---|"
    for m in methods:
        cells = [shown([accuracies(row, s, t)[0] for row in of[m.name]]) for s in ("heldout", "ood") for t in (1.0, 0.0)]
        yield f"| {m.title} | {' | '.join(cells)} |"
    yield ""
    yield "Minus VRP_RL, seed by seed (an interval that holds 0 shows no difference):"
    yield ""
    yield "| method | held-out, sampled | held-out, greedy | harder, sampled | harder, greedy |"
    yield "|---|---|---|---|---|"
    for m in methods:
        if m.name == "vrp":
            continue
        seeds = [seed for (name, seed) in sorted(rows) if name == m.name and ("vrp", seed) in rows]
        cells = [
            shown([final(rows[m.name, seed], s, t) - final(rows["vrp", seed], s, t) for seed in seeds], signed=True)
            for s in ("heldout", "ood")
            for t in (1.0, 0.0)
        ]
        yield f"| {m.title} | {' | '.join(cells)} |"


def stability_tables(rows: dict[tuple[str, int], Row]) -> Iterator[str]:
    yield (
        "| settings | runs | collapsed | worst mean of 10 steps after the first 50 | last 10 steps | held-out, sampled: before | after | "
        "harder, sampled: before | after |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for m in STABILITY.methods:
        own = [row for (name, _), row in sorted(rows.items()) if name == m.name]
        if not own:
            continue
        worst = min(min(windowed(row["reward"])[50 - WINDOW :]) for row in own)
        last = [statistics.fmean(row["reward"][-WINDOW:]) for row in own]
        cells = [shown([accuracies(row, s, 1.0)[when] for row in own]) for s in ("heldout", "ood") for when in (0, 1)]
        collapsed = sum(has_collapsed(row) for row in own)
        yield f"| {m.title} | {len(own)} | **{collapsed}** | {worst:.3f} | {shown(last)} | {' | '.join(cells)} |"
    yield ""
    yield "Run by run (reward: mean of the last 10 steps; signs of collapse: mean of the last 10 steps):"
    yield ""
    names = list(SIGNS)
    yield f"| settings | seed | collapsed | reward | held-out before | after | {' | '.join(names)} |"
    yield "|---|---|---|---|---|---|" + "---|" * len(names)
    for (name, seed), row in sorted(rows.items()):
        before, after = accuracies(row, "heldout", 1.0)
        step = collapse_step(row["reward"])
        verdict = f"step {step}" if step else "at the end" if has_collapsed(row) else "no"
        signs = [_mean_of_last(row["signs"].get(sign, [])) for sign in names]
        reward = statistics.fmean(row["reward"][-WINDOW:])
        yield f"| {name} | {seed} | {verdict} | {reward:.3f} | {before:.3f} | {after:.3f} | {' | '.join(signs)} |"


def _mean_of_last(values: Sequence[float | None]) -> str:
    known = [value for value in values[-WINDOW:] if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_comparison(rows: dict[tuple[str, int], Row], file: Path) -> None:
    """Left: reward over sampled tokens, mean and range over seeds. Right: accuracies after RL with their intervals, a dot a seed."""
    import numpy as np
    from matplotlib.figure import Figure

    from megatron_rema.report.plots import COLORS

    figure = Figure(figsize=(11.6, 4.2), layout="constrained")
    curve, dots = figure.subplots(1, 2, width_ratios=(1, 1.15))
    methods = [m for m in COMPARISON.methods if any(name == m.name for name, _ in rows)]
    panels = [("heldout", 1.0, "held-out\nsampled"), ("heldout", 0.0, "held-out\ngreedy"), ("ood", 1.0, "harder\nsampled")]
    panels.append(("ood", 0.0, "harder\ngreedy"))
    for index, m in enumerate(methods):
        own = [row for (name, _), row in sorted(rows.items()) if name == m.name]
        at = np.linspace(0, TOKEN_BUDGET, 60)[3:]
        lines = np.array([np.interp(at, row["tokens"], _smooth(row["reward"])) for row in own])
        curve.plot(at / 1000, lines.mean(0), color=COLORS[index], label=m.title)
        curve.fill_between(at / 1000, lines.min(0), lines.max(0), color=COLORS[index], alpha=0.13, linewidth=0)
        for place, (name, temperature, _) in enumerate(panels):
            values = [final(row, name, temperature) for row in own]
            mean, low, high = interval(values)
            x = place + (index - (len(methods) - 1) / 2) * 0.15
            reach = [[mean - max(low, 0.0)], [min(high, 1.0) - mean]]
            dots.errorbar(x, mean, reach, fmt="o", color=COLORS[index], capsize=3, markersize=5)
            dots.plot([x] * len(values), values, ".", color=COLORS[index], alpha=0.45, markersize=4)
    curve.set(title="Training reward (range over seeds)", xlabel="sampled tokens, thousands", ylabel="mean reward")
    curve.legend(fontsize=7, loc="lower right")
    dots.set(title="Accuracy after RL, 95% interval over seeds", xticks=range(len(panels)), ylabel="accuracy")
    dots.set_xticklabels([title for *_, title in panels])
    for axes in (curve, dots):
        axes.grid(alpha=0.25)
    figure.savefig(file, dpi=110)


def draw_stability(rows: dict[tuple[str, int], Row], file: Path) -> None:
    """Mean reward of ten steps, a line a seed."""
    from matplotlib.figure import Figure

    from megatron_rema.report.plots import COLORS

    figure = Figure(figsize=(11.6, 3.4), layout="constrained")
    for axes, m, color in zip(figure.subplots(1, 2, sharey=True), STABILITY.methods, COLORS, strict=False):
        for (name, _), row in sorted(rows.items()):
            if name == m.name:
                axes.plot(range(WINDOW, len(row["reward"]) + 1), windowed(row["reward"]), color=color, alpha=0.6, linewidth=1)
        axes.set(title=m.title, xlabel="step", ylabel=f"mean reward of {WINDOW} steps", ylim=(0, 1.02))
        axes.grid(alpha=0.25)
    figure.savefig(file, dpi=110)


def _smooth(values: Sequence[float]) -> list[float]:
    from megatron_rema.report.plots import moving_average

    return moving_average(values, 5)


def write_page() -> None:
    """The generated parts of docs/results.md, between their marks; what is written around them stays."""
    found = {name: recorded(study) for name, study in STUDIES.items()}
    text = PAGE.read_text()
    for name, tables in (("comparison", comparison_tables), ("stability", stability_tables)):
        begin, end = f"<!-- {name}: generated -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE}: needs the lines {begin!r} and {end!r} once each; put them back where the tables belong.")
        body = "\n".join(tables(found[name])) if found[name] else "No run is recorded yet."
        wall, cpu = (sum(row[key] for row in found[name].values()) / 3600 for key in ("wall_s", "cpu_s"))
        study = STUDIES[name]
        note = (
            f"\n\n{len(found[name])} of {study.seeds * len(study.methods)} runs; {cpu:.2f} CPU hours. Wall times add up to {wall:.2f} "
            "hours, two at once on two cores that did other work too."
        )
        text = text.split(begin)[0] + begin + "\n" + body + note + "\n" + end + text.split(end)[1]
    PAGE.write_text(text)
    FIGURES.mkdir(exist_ok=True)
    for name, draw in (("comparison", draw_comparison), ("stability", draw_stability)):
        if found[name]:
            draw(found[name], FIGURES / f"results_{name}.png")


def list_runs() -> None:
    view = Table("study", "method", "recorded seeds", "missing")
    for study in STUDIES.values():
        done = recorded(study)
        for m in study.methods:
            seeds = sorted(seed for name, seed in done if name == m.name)
            view.add_row(study.name, m.name, ", ".join(map(str, seeds)), str(max(study.seeds - len(seeds), 0)))
    Console().print(view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("run", "list", "tables"), nargs="?", default="run")
    parser.add_argument("--only", help="a study, or STUDY/METHOD")
    parser.add_argument("--seeds", type=int, help="seeds of every method; left out: the study's own number")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: 2)")
    arguments = parser.parse_args()
    try:
        if arguments.do == "run":
            wanted = [job for study in STUDIES.values() for job in jobs_of(study, arguments.seeds)]
            if arguments.only:
                wanted = [job for job in wanted if arguments.only in (job.study.name, f"{job.study.name}/{job.method.name}")]
                if not wanted:
                    names = [f"{study.name}/{m.name}" for study in STUDIES.values() for m in study.methods]
                    raise ValueError(f"--only {arguments.only} names no study or method; choose one of {', '.join([*STUDIES, *names])}.")
            done = {name: recorded(study) for name, study in STUDIES.items()}
            run([job for job in wanted if (job.method.name, job.seed) not in done[job.study.name]], arguments.jobs)
        if arguments.do == "list":
            list_runs()
        else:
            write_page()
    except ValueError as error:
        sys.exit(f"rema_vs_single_agent: {error}")


if __name__ == "__main__":
    main()

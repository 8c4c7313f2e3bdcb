"""The run's curves as PNG files. A panel whose metrics the run does not have is left out, and so is a figure without panels.

A panel is a function that draws on one matplotlib Axes; its builder returns None when there is nothing to draw.
matplotlib is imported when a figure is drawn, without pyplot: no global state and no display.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rema.report.run_folder import Run, Series, read_run
from megatron_rema.types import Action, EpisodeStatus, Role

Panel = Callable[[Any], None]

COLORS = ("#4f6bdc", "#d9822b", "#2a9d78", "#b3479b", "#8a8f98", "#c8443c", "#6f4fb3", "#3f9bc4")
ROLE_COLORS = {Role.META_THINKING: COLORS[0], Role.REASONING: COLORS[1]}
END_COLORS = {
    EpisodeStatus.FINISHED: "#2a9d78",
    EpisodeStatus.MAX_ROUNDS: "#e0b13c",
    EpisodeStatus.TRUNCATED: "#d9822b",
    EpisodeStatus.CONTEXT_OVERFLOW: "#c8443c",
    EpisodeStatus.ABORTED: "#8a8f98",
}
PHASES = {
    "generate": "rollout/generate_s",
    "verify": "reward/verify_s",
    "score": "experience/score_s",
    "update": "train/update_s",
    "sync": "sync/sync_s",
}
FEW = 40  # up to so many steps, points get markers and stacks are bars
WIDTH_INCHES, ROW_INCHES = 11.6, 2.9


def write_plots(run_dir: str | Path) -> list[Path]:
    """Draw RUN/plots/*.png; returns the files written, in the order of a report."""
    return [file for file, _ in draw_plots(read_run(run_dir))]


def draw_plots(run: Run) -> list[tuple[Path, str]]:
    """(file, title) of every figure that has something to show."""
    folder = run.path / "plots"
    written = []
    for name, (title, build) in FIGURES.items():
        panels = [panel for panel in build(run) if panel is not None]
        if panels:
            folder.mkdir(exist_ok=True)
            write_figure(panels, folder / f"{name}.png")
            written.append((folder / f"{name}.png", title))
    return written


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last ``window`` values up to each place, NaN skipped; fewer at the start."""
    averages = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        averages.append(sum(known) / len(known) if known else math.nan)
    return averages


def _learning(run: Run) -> list[Panel | None]:
    return [_reward(run), _accuracy(run)]


def _dialogue(run: Run) -> list[Panel | None]:
    ends = {str(s): _first(run, f"status/{s}_frac", f"behaviour/end/{s}_frac") for s in END_COLORS}
    tokens = run.series_by_owner("behaviour/tokens_per_turn")
    turns = _first(run, "rollout/turns_per_episode", "behaviour/turns_per_episode")
    actions = {name: run.series(f"behaviour/action_{name}_frac") for name in (*map(str.lower, Action), "invalid")}
    return [
        _lines("turns per episode", "turns", {"": turns}),
        _stack("how episodes end", "fraction of episodes", ends, {str(s): color for s, color in END_COLORS.items()}),
        _lines("tokens per turn", "tokens", tokens, colors={str(role): color for role, color in ROLE_COLORS.items()}),
        _stack("what the meta-thinker asks for", "fraction of its messages", actions, {}),
    ]


def _health(run: Run) -> list[Panel | None]:
    clipped = {f"{level} ratio": f"train/{level}_ratio_clipped_frac" for level in ("token", "turn", "trace")}
    return [
        _lines("loss", "weighted sum", _owned(run, {"": "train/loss"})),
        _lines("gradient norm", "before clipping", _owned(run, {"": "train/grad_norm"})),
        _lines("entropy", "nats per token", _owned(run, {"": "train/entropy_nats"})),
        _lines(
            "KL",
            "nats per token",
            _owned(run, {"k3": "train/kl_k3_nats", "old/new k3": "train/kl_old_k3_nats", "to reference": "train/kl_ref_nats"}),
        ),
        _lines("clipped fraction", "fraction", _owned(run, {"": "train/clipped_frac", **clipped})),
        _lines(
            "engine against trainer logprob gap",
            "nats",
            _owned(run, {"max": "sync/logprob_gap_max", "mean": "sync/logprob_gap_mean"}),
            log=True,
        ),
        _lines("learning rate", "", _owned(run, {"": "train/lr"})),
    ]


def _time(run: Run) -> list[Panel | None]:
    phases: dict[str, Series | None] = {label: run.series(name) for label, name in PHASES.items()}
    total, known = run.series("time_s"), [series for series in phases.values() if series is not None]
    if total is not None:
        spent = [sum(values) for values in zip(*_on_steps(total.steps, known), strict=True)]
        rest = [max(t - s, 0.0) for t, s in zip(total.values, spent, strict=True)] if known else total.values
        phases["other" if known else "whole step"] = Series(total.steps, rest)
    speed = run.series("rollout/sampled_tokens_per_s")
    return [_stack("time per step by phase", "seconds", phases, {}), _lines("sampled tokens per second", "tokens/s", {"": speed})]


def _integrity(run: Run) -> list[Panel | None]:
    proxy, gold = (run.series(f"integrity/audit/proxy_gold/{name}") for name in ("proxy", "gold"))
    effects = {
        label: run.series(f"integrity/audit/{name}")
        for label, name in {
            "plan stated the answer": "plan_leak/leak_frac",
            "planted wrong answer followed": "plan_leak/follow_frac",
            "lost without plan": "plan_use/ablation_effect",
            "lost with another's plan": "plan_use/swap_effect",
        }.items()
    }
    alarms = sorted({row["step"] for row in run.alerts if str(row.get("alert", "")).startswith("integrity_") and "step" in row})
    return [
        _with_alarms(_lines("what is paid and what it is worth, in audits", "mean", {"proxy": proxy, "gold": gold}), alarms),
        _with_alarms(_lines("audits of the two agents", "fraction of problems", effects), alarms),
        _lines("signals that fired", "signals", {"": run.series("integrity/signals_fired")}),
        _lines("time of audits", "seconds", {"": run.series("integrity/audit_s")}),
    ]


def _with_alarms(panel: Panel | None, steps: Sequence[int]) -> Panel | None:
    if panel is None or not steps:
        return panel

    def draw(axes: Any) -> None:
        panel(axes)
        for step in steps:
            axes.axvline(step, color=COLORS[5], linestyle="--", linewidth=1, label="integrity alert" if step == steps[0] else None)
        axes.legend()

    return draw


FIGURES: dict[str, tuple[str, Callable[[Run], list[Panel | None]]]] = {
    "learning_curve": ("Learning", _learning),
    "dialogue_shape": ("Shape of the dialogues", _dialogue),
    "integrity": ("Integrity", _integrity),
    "training_health": ("Health of the training", _health),
    "time_per_phase": ("Where the time goes", _time),
}


def _reward(run: Run) -> Panel | None:
    series = run.series("reward/mean")
    if series is None:
        return None
    window = max(1, min(20, len(series.values) // 5))

    def draw(axes: Any) -> None:
        axes.plot(series.steps, series.values, color=COLORS[0], alpha=0.35, linewidth=1, label="each step", **_marker(series))
        if window > 1:
            axes.plot(
                series.steps, moving_average(series.values, window), color=COLORS[0], linewidth=2.2, label=f"mean of the last {window}"
            )
        axes.legend()
        _name(axes, "mean reward in training", "reward")

    return draw


def _accuracy(run: Run) -> Panel | None:
    groups = run.evaluations_by_set()
    if not groups:
        return None

    def draw(axes: Any) -> None:
        for color, (label, rows) in zip(_cycle(len(groups)), groups.items(), strict=True):
            accuracy = [row["accuracy"] for row in rows]
            below = [max(row["accuracy"] - row.get("low", row["accuracy"]), 0.0) for row in rows]
            above = [max(row.get("high", row["accuracy"]) - row["accuracy"], 0.0) for row in rows]
            steps = [row["step"] for row in rows]
            axes.errorbar(steps, accuracy, yerr=[below, above], color=color, marker="o", capsize=4, linewidth=1.4, label=label)
        axes.legend()
        _name(axes, "evaluation accuracy, 95% intervals", "accuracy")

    return draw


def _lines(
    title: str, unit: str, lines: Mapping[str, Series | None], *, colors: Mapping[str, str] | None = None, log: bool = False
) -> Panel | None:
    drawn = {label: series for label, series in lines.items() if series is not None}
    if not drawn:
        return None

    def draw(axes: Any) -> None:
        for color, (label, series) in zip(_cycle(len(drawn)), drawn.items(), strict=True):
            axes.plot(series.steps, series.values, color=(colors or {}).get(label, color), label=label, linewidth=1.5, **_marker(series))
        if any(drawn):
            axes.legend()
        if log and all(value > 0 for series in drawn.values() for value in series.values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        _name(axes, title, unit)

    return draw


def _stack(title: str, unit: str, parts: Mapping[str, Series | None], colors: Mapping[str, str]) -> Panel | None:
    drawn = {label: series for label, series in parts.items() if series is not None and any(value > 0 for value in series.values)}
    if not drawn:
        return None
    steps = sorted({step for series in drawn.values() for step in series.steps})
    rows = _on_steps(steps, list(drawn.values()))
    shades = [colors.get(label, color) for color, label in zip(_cycle(len(drawn)), drawn, strict=True)]

    def draw(axes: Any) -> None:
        if len(steps) > FEW:
            axes.stackplot(steps, rows, labels=list(drawn), colors=shades, alpha=0.9)
        else:
            bottom = [0.0] * len(steps)
            for label, row, color in zip(drawn, rows, shades, strict=True):
                axes.bar(steps, row, bottom=bottom, width=0.9, label=label, color=color)
                bottom = [b + r for b, r in zip(bottom, row, strict=True)]
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)  # beside the stack, in its order
        _name(axes, title, unit)

    return draw


def _owned(run: Run, names: Mapping[str, str]) -> dict[str, Series]:
    """Lines of several metrics, each once or once for every policy."""
    return {
        " ".join(filter(None, (label, owner))): series
        for label, name in names.items()
        for owner, series in run.series_by_owner(name).items()
    }


def _first(run: Run, *names: str) -> Series | None:
    return next((series for name in names if (series := run.series(name)) is not None), None)


def _on_steps(steps: Sequence[int], parts: Sequence[Series]) -> list[list[float]]:
    """The parts' values at ``steps``; 0.0 where a part has none."""
    rows = []
    for part in parts:
        known = {step: value for step, value in zip(part.steps, part.values, strict=True) if not math.isnan(value)}
        rows.append([known.get(step, 0.0) for step in steps])
    return rows


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _marker(series: Series) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(series.steps) <= FEW else {}


def _name(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)


def write_figure(panels: Sequence[Panel], *files: Path) -> None:
    """The panels side by side, up to three in a row, once for each of ``files`` in the format that its suffix names."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    look = {
        "text.parse_math": False,  # names of sets and policies are text, not formulas
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e8ec",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    width = WIDTH_INCHES if num_columns > 1 else WIDTH_INCHES / 2
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(width, ROW_INCHES * num_rows), dpi=110, layout="constrained")
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(num_rows, num_columns, index + 1)
            panel(axes)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        for file in files:
            figure.savefig(file, format=file.suffix[1:])

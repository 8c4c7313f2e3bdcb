"""From a run folder to the row that is kept: curves of proxy and gold, what signals said, what audits found, what it cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.gym.worlds import Setting, paid
from megatron_rema.types import Episode

# signals whose readings are kept, by metric
SIGNALS = (
    "length_growth_frac",
    "non_length_gain_frac",
    "surface_gain_frac",
    "new_phrase_top_frac",
    "group_std",
    "geometry_distance",
    "ambiguous_answer_frac",
    "role_advantage_correlation",
    "signals_fired",
)
# values of findings that scores read; the rest is in the run folder
FINDINGS = {
    "proxy_gold": ("proxy", "gold", "cusum"),
    "canaries": ("positive_frac_max", "used_frac_max"),
    "isomorphic": ("effect", "low"),
    "strip_and_rescore": ("low",),
    "plan_leak": ("leak_frac", "follow_frac", "redaction_effect_low"),
}
START = 5  # steps that signals are compared with
ALERT = ("step", "mechanism", "access", "action", "gates", "back_to")


def measured(folder: Path, setting: Setting) -> dict[str, Any]:
    rows = read(folder / "metrics.jsonl")
    audits = read(folder / "audits.jsonl")
    alerts = [row for row in read(folder / "alerts.jsonl") if str(row.get("alert", "")).startswith("integrity_")]
    curves: dict[str, list[float]] = {"proxy": [], "gold": [], "tokens": []}
    proxy, gold = Balanced(setting), Balanced(setting)
    for row in rows:
        episodes = [Episode.from_json(e) for e in read(folder / "episodes" / f"step_{row['step']:06d}.jsonl")]
        scored = [e for e in episodes if e.turn_rewards]
        curves["proxy"].append(short(proxy.mean(scored, paid)))
        curves["gold"].append(short(gold.mean(scored, setting.gold)))
        curves["tokens"].append(short(fmean(e.num_sampled_tokens for e in scored)))
    signals = {name: [row[f"integrity/{name}"] for row in rows if f"integrity/{name}" in row] for name in SIGNALS}
    return {
        "curves": curves,
        "signals": {name: summary(values) for name, values in signals.items() if values},
        "audits": [_audit(row) for row in audits],
        "alerts": [{"level": a["alert"].removeprefix("integrity_"), **{name: a[name] for name in ALERT}} for a in alerts],
        "kl": short(next((row["train/kl_ref_nats"] for row in reversed(rows) if "train/kl_ref_nats" in row), None)),
        "sampled_tokens": sum(row["rollout/sampled_tokens"] for row in rows),
        "audit_tokens": sum(row["sampled_tokens"] for row in audits),
        "step_s": short(sum(row["time_s"] for row in rows)),
        "audit_s": short(sum(row.get("integrity/audit_s", 0.0) for row in rows)),
    }


class Balanced:
    """Means with easy and hard questions in the proportion of the world: which of them the eight problems of a step are is luck. A step
    without any of one kind stands where the last one with some stood."""

    def __init__(self, setting: Setting) -> None:
        self._shares = {True: setting.hard_frac, False: 1.0 - setting.hard_frac}
        self._is_hard = setting.world.is_hard
        self._means: dict[bool, float] = {}

    def mean(self, episodes: Sequence[Episode], of: Callable[[Episode], float]) -> float:
        for kind in self._shares:
            values = [of(episode) for episode in episodes if self._is_hard(episode.prompt.question) is kind]
            if values:
                self._means[kind] = fmean(values)
        known = {kind: share for kind, share in self._shares.items() if kind in self._means}
        return sum(share * self._means[kind] for kind, share in known.items()) / sum(known.values())


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"min": short(min(values)), "max": short(max(values)), "start": short(fmean(values[:START]))}


def _audit(row: Mapping[str, Any]) -> dict[str, Any]:
    findings = {}
    for finding in row["findings"]:
        if (kept := FINDINGS.get(finding["audit"])) is not None:
            values = {name: short(finding["values"][name]) for name in kept if name in finding["values"]}
            findings[finding["audit"]] = {"alarm": finding["alarm"], **values}
    return {"step": row["step"], "problems": len(row["problems"]), "verdict": row["verdict"], "findings": findings}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 3)


def smoothed(values: Sequence[float], width: int = 5) -> list[float]:
    """Mean of the last ``width`` values (fewer at the start)."""
    return [fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]

"""Integrity in a run: signals after every step, audits on a budget of sampled tokens, verdicts in alerts.jsonl, outcomes in audits.jsonl.

Everything is a function of what every rank holds alike (episodes, metrics, tokens, never a clock), so ranks agree on when an audit is due
without a word, and a resumed run audits where the uninterrupted one would. Nothing here changes rewards, advantages or weights.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_rema.config import IntegrityConfig, RunConfig
from megatron_rema.integrity import audits, texts
from megatron_rema.integrity.audits import AuditPoint, Finding
from megatron_rema.integrity.gold import Gold
from megatron_rema.integrity.signals import SIGNALS, Past, Reading
from megatron_rema.integrity.verdict import Level, Verdict, verdict_of
from megatron_rema.integrity.view import Observation, rollouts_of
from megatron_rema.reward.behaviour import leaks_first
from megatron_rema.reward.functions import named_function
from megatron_rema.trainer.audit_arms import (
    FEWEST_PROBLEMS,
    arms_of,
    canary_rewards,
    follows,
    proxy_of,
    stripped_rewards,
    transcripts,
)
from megatron_rema.trainer.bench import Bench
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.types import Episode, Prompt

KEPT_AUDITS = 4  # paired outcomes are accumulated over so many
Oracle = Callable[[Episode], float]


def oracle_of(name: str) -> Oracle:
    """The gold function. Raises ValueError for one that cannot be imported."""
    if name == "verdict":
        return lambda episode: episode.score["correct"] * episode.score["finished"]
    return named_function("integrity.oracle", name)


def audit_problems(prompts: Sequence[Prompt], settings: IntegrityConfig, seed: int) -> list[Prompt]:
    """The problems that every audit of a run takes from the front: no two with one question, a judge's in the order as given."""
    distinct = list({p.question: p for p in reversed(prompts) if not p.is_swapped}.values())
    return random.Random(f"audit/{seed}").sample(distinct, min(settings.audit_problems, len(distinct)))


class Monitor:
    """Watches one run."""

    def __init__(self, settings: IntegrityConfig, prompts: Sequence[Prompt], *, folder: RunFolder, reporter: Reporter) -> None:
        self.settings, self.prompts, self.folder, self.reporter = settings, prompts, folder, reporter
        self.oracle = oracle_of(settings.oracle)
        self.credit = 0.0  # tokens that audits may still sample
        self.readings: dict[str, Reading] = {}
        self.reasons: list[str] = []  # of signals that began to fire since the last audit
        self._firing: set[str] = set()  # signals that fired in the last step: one that goes on firing asks for no further audit
        self._start = Observation(0, [])
        self._trained: list[Episode] = []  # of the last step, at most audit_problems: what proxy and gold are compared on
        self._metrics: list[dict[str, float]] = []  # of earlier steps
        self._outcomes: list[dict[str, Any]] = []  # rows of audits.jsonl, oldest first

    # --- every step --------------------------------------------------------------------------------------------------

    def observe(
        self,
        step: int,
        episodes: Sequence[Episode],
        metrics: Mapping[str, float],
        members: Mapping[str, Sequence[float]] | None = None,
    ) -> dict[str, float]:
        """Signals of one step, as ``integrity/...`` metrics. ``episodes``: those that were rewarded; ``members``: what each member of a
        reward ensemble says of them."""
        now = Observation(step, rollouts_of(episodes, members), metrics)
        self._trained = spread(episodes, self.settings.audit_problems)
        past = Past(self._start, self._metrics)
        self.readings = {signal.name: signal.measure(now, past) for signal in SIGNALS}
        values = {f"integrity/{key}": value for reading in self.readings.values() for key, value in reading.values.items()}
        fired = {name: reading.reason for name, reading in self.readings.items() if reading.fires}
        self.reasons += [f"{name}: {reason}" for name, reason in fired.items() if name not in self._firing]
        self._firing = set(fired)
        values |= {f"integrity/fires/{name}": 1.0 for name in fired}
        sampled = metrics["rollout/sampled_tokens"]
        self.credit += self.settings.budget_frac * sampled * (self.settings.audit_every if step == 1 else 1)
        values |= {"integrity/signals_fired": float(len(fired)), "integrity/credit_tokens": self.credit}
        self._remember(now, values)
        return values

    def _remember(self, now: Observation, values: Mapping[str, float]) -> None:
        if now.step <= self.settings.start_steps:
            self._start = Observation(now.step, [*self._start.rollouts, *now.rollouts])
        kept = ("train/", "integrity/", "rollout/")
        self._metrics.append({name: value for name, value in {**now.metrics, **values}.items() if name.startswith(kept)})

    def restore(self, step: int) -> None:
        """Back to where the run folder says that the monitor stood after ``step``: a fold over its files. Every rank reads them."""
        self._outcomes = [row for row in self.folder.read("audits.jsonl") if row["step"] <= step]
        audited = self._outcomes[-1]["step"] if self._outcomes else 0
        for row in self.folder.read("metrics.jsonl"):
            if row["step"] > step or "integrity/credit_tokens" not in row:  # the second: a step without a monitor
                continue
            rollouts = []
            if row["step"] <= self.settings.start_steps:
                rows = self.folder.read(f"episodes/step_{row['step']:06d}.jsonl")
                rollouts = rollouts_of([Episode.from_json(one) for one in rows])
            self._remember(Observation(row["step"], rollouts, row), {})
            self.credit = row["integrity/credit_tokens"]
            firing = {name.rpartition("/")[2] for name in row if name.startswith("integrity/fires/")}
            if firing - self._firing and row["step"] > audited:
                self.reasons.append(f"signals of step {row['step']}, before the run was resumed")
            self._firing = firing
        self.credit -= sum(row["sampled_tokens"] for row in self._outcomes if row["step"] == step)

    # --- audits ------------------------------------------------------------------------------------------------------

    def num_problems(self, bench: Bench) -> int:
        """How many problems the budget allows an audit of."""
        per_episode = self._metrics[-1]["rollout/sampled_tokens"] / max(self._metrics[-1]["rollout/episodes"], 1.0)
        return min(len(self.prompts), int(self.credit / max(per_episode * len(arms_of(bench.rules)), 1.0)))

    def is_due(self, step: int, bench: Bench) -> bool:
        """The first one after step 1; then every ``audit_every`` steps, or where a signal fired, as soon as the budget allows."""
        last = self._outcomes[-1]["step"] if self._outcomes else None
        wanted = last is None or step - last >= self.settings.audit_every or bool(self.reasons)
        return wanted and self.num_problems(bench) >= min(FEWEST_PROBLEMS, len(self.prompts))

    def audit(self, step: int, bench: Bench) -> dict[str, float]:
        """Play, judge, decide; write audits.jsonl and, unless all is clean, an alert. Returns metrics. A collective."""
        problems = self.prompts[: self.num_problems(bench)]
        row, sampled = self._play(step, problems, bench)
        self.credit -= sampled
        self._outcomes.append(row)
        findings = findings_of(self._outcomes, self.settings.oracle)
        before = self._outcomes[-2] if len(self._outcomes) > 1 else {"verdict": Level.CLEAN, "mechanism": None}
        verdict = verdict_of(findings, self.readings, before["mechanism"] if before["verdict"] == Level.HACK else None)
        row |= {"verdict": verdict.level, "mechanism": verdict.mechanism}
        self._tell(step, findings, verdict)
        self.reasons = []
        values = {f"integrity/audit/{f.audit}/{name}": float(value) for f in findings for name, value in f.values.items()}
        alarms = sum(finding.alarm for finding in findings)
        return values | {"integrity/audit/sampled_tokens": float(sampled), "integrity/audit/alarms": float(alarms)}

    def _play(self, step: int, problems: Sequence[Prompt], bench: Bench) -> tuple[dict[str, Any], int]:
        """One row of audits.jsonl, item by item, and the tokens that it cost."""
        sampled = 0
        outcomes: dict[str, list[float | None]] = {}
        right: dict[str, list[float | None]] = {}  # whatever the oracle values, a plan is asked what it does to the answer
        gold: dict[str, float] = {}
        row: dict[str, Any] = {"step": step, "problems": [p.prompt_id for p in problems], "reasons": self.reasons}
        full: list[Episode] = []
        said: dict[str, list[Episode]] = {}
        for arm in arms_of(bench.rules):
            episodes, judgements = bench.play(problems, arm.rules(bench.rules, full, problems))
            sampled += sum(episode.num_sampled_tokens for episode in episodes)
            paid = {episode.episode_id: episode for episode in bench.pay(episodes, judgements)}
            gold = {episode_id: float(self.oracle(episode)) for episode_id, episode in paid.items()}
            outcomes[arm.name] = [gold.get(episode.episode_id) for episode in episodes]
            strict = {episode_id: episode.score["correct"] * episode.score["finished"] for episode_id, episode in paid.items()}
            right[arm.name] = [strict.get(episode.episode_id) for episode in episodes]
            said[arm.name] = episodes
            if arm.name == "full":
                full = episodes
                row |= {
                    "proxy": [proxy_of(paid[e.episode_id]) if e.episode_id in paid else None for e in episodes],
                    "episode_ids": [e.episode_id for e in episodes],
                    "leaks": [leaks_first(e) for e in episodes],
                }
            if arm.name == "wrong_answer":
                row["followed"] = [follows(episode) for episode in episodes]
        row |= {"gold": outcomes, "right": right, "sampled_tokens": sampled}
        # As sampled for training: greedy decoding may never show, or never end, what samples are paid for
        row["trained"] = {
            "proxy": [proxy_of(episode) for episode in self._trained],
            "gold": [float(self.oracle(episode)) for episode in self._trained],
            "episode_ids": [episode.episode_id for episode in self._trained],
        }
        row["canaries"] = canary_rewards(problems, bench)
        row["stripped"], row["stripped_phrases"] = stripped_rewards(full, bench)
        row["transcripts"] = transcripts(row, said)
        return row, sampled

    def _tell(self, step: int, findings: Sequence[Finding], verdict: Verdict) -> None:
        row = {
            **self._outcomes[-1],
            "findings": [finding.to_json() for finding in findings],
        }
        self.folder.audit(row)
        if verdict.level is Level.CLEAN:
            return
        self.folder.alert(
            {
                "step": step,
                "alert": f"integrity_{verdict.level}",
                "mechanism": verdict.mechanism,
                "statement": verdict.statement,
                "access": verdict.access,
                "evidence": [item for finding in verdict.findings for item in finding.evidence][:8],
                "compared_with_step": self._outcomes[0]["step"],
            }
        )
        self.reporter.say(f"ALERT step {step}: integrity {verdict.level}: {verdict.statement}")


def findings_of(outcomes: Sequence[Mapping[str, Any]], oracle: str) -> list[Finding]:
    """All findings after the last of these audits. Items without a verdict on either side of a pair are left out."""
    recent, first = outcomes[-KEPT_AUDITS:], outcomes[0]
    found = [audits.proxy_gold([_point(row, oracle) for row in outcomes])]
    found.append(audits.canaries(outcomes[-1]["canaries"], first["canaries"] if len(outcomes) > 1 else None))
    raw, stripped = _pairs([{"a": row["proxy"], "b": row["stripped"]} for row in recent], "a", "b")
    phrases = texts.commonest([phrase for row in recent for phrase in row["stripped_phrases"]])
    found.append(audits.strip_and_rescore(raw, stripped, phrases))
    answers = [row["right"] for row in recent]
    if "no_plan" in answers[-1]:
        full, no_plan, swapped = _pairs(answers, "full", "no_plan", "swapped")
        found.append(audits.plan_use(full, no_plan, swapped))
        full, redacted = _pairs(answers, "full", "redacted")
        leaks, followed = ([item for row in recent for item in row[name]] for name in ("leaks", "followed"))
        found.append(audits.plan_leak(leaks, full, redacted, followed))
    if "continued" in answers[-1]:
        ended, continued = _pairs(answers, "full", "continued")
        found.append(audits.forced_continuation(ended, continued))
    return found


def spread(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """At most ``count`` of them, of as many problems as there are; counterfactual ones are left out."""
    turn: Counter[str] = Counter()
    order = []
    for episode in episodes:
        if not episode.is_counterfactual:
            order.append((turn[episode.prompt.prompt_id], len(order), episode))
            turn[episode.prompt.prompt_id] += 1
    return [episode for _, _, episode in sorted(order, key=lambda item: item[:2])[:count]]


def _point(row: Mapping[str, Any], oracle: str) -> AuditPoint:
    trained = row["trained"]
    return AuditPoint(row["step"], trained["proxy"], [Gold(score, oracle) for score in trained["gold"]], trained["episode_ids"])


def _pairs(rows: Sequence[Mapping[str, Sequence[float | None]]], *names: str) -> list[list[float]]:
    """The columns ``names`` of all rows, end to end, where every one of them is known."""
    items = [item for row in rows for item in zip(*(row[name] for name in names), strict=True) if None not in item]
    return [list(column) for column in zip(*items, strict=True)] if items else [[] for _ in names]


def monitor_of(config: RunConfig, prompts: Sequence[Prompt], folder: RunFolder, reporter: Reporter, step: int) -> Monitor | None:
    """The run's monitor, as it stood after ``step``; None with integrity.mode=off."""
    if config.integrity.mode == "off":
        return None
    monitor = Monitor(config.integrity, audit_problems(prompts, config.integrity, config.seed), folder=folder, reporter=reporter)
    monitor.restore(step)
    return monitor

"""Integrity in a run: signals after every step, audits on a budget of sampled tokens, verdicts in alerts.jsonl, outcomes in audits.jsonl.

Everything is a function of what every rank holds alike (episodes, metrics, tokens, never a clock), so ranks agree on when an audit is due
without a word, and a resumed run audits where the uninterrupted one would. Nothing here changes rewards, advantages or weights: a verdict's
response says what should, and trainer/guard.py does it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from megatron_rema.config import IntegrityConfig, RunConfig
from megatron_rema.integrity.audits import Finding
from megatron_rema.integrity.signals import SIGNALS, Past, Reading
from megatron_rema.integrity.verdict import Action, Level, Response, Verdict, change_point, response_of, verdict_of
from megatron_rema.integrity.view import Observation, rollouts_of
from megatron_rema.reward.behaviour import leaks_first
from megatron_rema.reward.functions import named_function
from megatron_rema.reward.math_verifier import Judgement
from megatron_rema.trainer.audit_arms import (
    FEWEST_PROBLEMS,
    Arm,
    arms_of,
    canary_rewards,
    follows,
    proxy_of,
    shown_canaries,
    stripped_rewards,
    transcripts,
)
from megatron_rema.trainer.audit_problems import audit_problems, renewed_problems, spread
from megatron_rema.trainer.bench import Bench
from megatron_rema.trainer.findings import findings_of
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.whitebox import findings as white_box_findings
from megatron_rema.trainer.whitebox import white_box
from megatron_rema.types import Episode, Prompt

RECENT_STEPS = 5  # a step's few problems are easy or hard by luck
Score = Callable[[Episode], float | None]


def oracle_of(name: str) -> Score:
    """The gold function. Raises ValueError for one that cannot be imported."""
    if name == "verdict":
        return lambda episode: episode.score["correct"] * episode.score["finished"]
    return named_function("integrity.oracle", name)


class Monitor:
    """Watches one run."""

    def __init__(
        self,
        settings: IntegrityConfig,
        prompts: Sequence[Prompt],
        *,
        folder: RunFolder,
        reporter: Reporter,
        renewed: Mapping[str, Prompt] | None = None,
    ) -> None:
        """``prompts``: what audits play, from the front; ``renewed``: prompt_id -> the problem drawn anew, where there is one."""
        self.settings, self.prompts, self.folder, self.reporter = settings, prompts, folder, reporter
        self.renewed = renewed or {}
        self.oracle = oracle_of(settings.oracle)
        self.second_judge = named_function("integrity.second_judge", settings.second_judge) if settings.second_judge else None
        self.paraphrase = named_function("integrity.paraphrase", settings.paraphrase) if settings.paraphrase else None
        self.credit = 0.0  # tokens that audits may still sample
        self.readings: dict[str, Reading] = {}
        self.reasons: list[str] = []  # of signals that began to fire since the last audit
        self._firing: set[str] = set()  # signals that fired in the last step: one that goes on firing asks for no further audit
        self.response = Response()  # what audits so far have led to
        self._verdict: Verdict | None = None  # of the last audit
        self._audited: int | None = None  # its step
        self._canaries: dict[str, Judgement] = {}  # by episode_id
        self._start = Observation(0, [])
        # Of the last RECENT_STEPS steps, at most audit_problems each: what proxy and gold are compared on
        self._recent: deque[list[Episode]] = deque(maxlen=RECENT_STEPS)
        self._metrics: list[dict[str, float]] = []  # of earlier steps
        self._outcomes: list[dict[str, Any]] = []  # rows of audits.jsonl, oldest first; without those that a roll-back undid

    @property
    def is_clean(self) -> bool:
        """A guard may come back to what the last audit saw: no oracle says that it is worse than it looks, and nothing points that way."""
        return self._verdict is not None and self._verdict.is_worth_keeping and self._outcomes[-1]["cusum"] == 0.0

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
        self._recent.append(spread(episodes, self.settings.audit_problems))
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
        row = {name: value for name, value in {**now.metrics, **values}.items() if name.startswith(kept)}
        self._metrics.append({"step": now.step, **row})

    def restore(self, step: int) -> None:
        """Back to where the run folder says that the monitor stood after ``step``: a fold over its files. Every rank reads them."""
        audited = {row["step"]: row for row in self.folder.read("audits.jsonl") if row["step"] <= step}
        for row in self.folder.read("metrics.jsonl"):
            if row["step"] > step or "integrity/credit_tokens" not in row:  # the second: a step without a monitor
                continue
            episodes = []
            if row["step"] <= self.settings.start_steps or row["step"] > step - RECENT_STEPS:
                rows = self.folder.read(f"episodes/step_{row['step']:06d}.jsonl")
                episodes = [episode for episode in map(Episode.from_json, rows) if episode.turn_rewards]
            self._remember(Observation(row["step"], rollouts_of(episodes), row), {})
            self._recent.append(spread(episodes, self.settings.audit_problems))
            self.credit = row["integrity/credit_tokens"]
            firing = {name.rpartition("/")[2] for name in row if name.startswith("integrity/fires/")}
            if firing - self._firing:
                self.reasons.append(f"signals of step {row['step']}, before the run was resumed")
            self._firing = firing
            if (outcome := audited.get(row["step"])) is not None:
                self._audited, self.reasons = row["step"], []
                self._outcomes.append(outcome)
                self.credit -= outcome["sampled_tokens"]
                self._verdict = Verdict(Level(outcome["verdict"]), outcome["mechanism"], (), None, outcome["gate"])
                self._obey(Response.from_json(outcome["response"]))

    # --- audits ------------------------------------------------------------------------------------------------------

    def arms(self, bench: Bench) -> tuple[Arm, ...]:
        frozen = tuple(bench.frozen) if self.settings.cross_play else ()
        return arms_of(bench.rules, renewed=self.renewed, hints=self.settings.hints, paraphrase=self.paraphrase, frozen=frozen)

    def num_problems(self, bench: Bench) -> int:
        """How many problems the budget allows an audit of."""
        per_episode = self._metrics[-1]["rollout/sampled_tokens"] / max(self._metrics[-1]["rollout/episodes"], 1.0)
        return min(len(self.prompts), int(self.credit / max(per_episode * len(self.arms(bench)), 1.0)))

    def is_due(self, step: int, bench: Bench) -> bool:
        """The first one after step 1; then every ``audit_every`` steps, or where a signal fired, as soon as the budget allows."""
        wanted = self._audited is None or step - self._audited >= self.settings.audit_every or bool(self.reasons)
        return wanted and self.num_problems(bench) >= min(FEWEST_PROBLEMS, len(self.prompts))

    def audit(self, step: int, bench: Bench, clean_steps: Sequence[int] = ()) -> dict[str, float]:
        """Play, judge, decide; write audits.jsonl and, unless all is clean, an alert. Returns metrics; `response` says what is to be done.
        ``clean_steps``: of the checkpoints that a roll-back may choose from. A collective."""
        problems = self.prompts[: self.num_problems(bench)]
        row, sampled = self._play(step, problems, bench)
        self.credit -= sampled
        self._audited = step
        self._outcomes.append(row)
        findings = findings_of(self._outcomes, self.settings.oracle)
        findings += white_box_findings(row, findings)
        verdict = verdict_of(findings, self.readings, self._verdict)
        row["cusum"] = next((finding.values["cusum"] for finding in findings if finding.audit == "proxy_gold"), 0.0)
        parted = self._outcomes[change_point([row["cusum"] for row in self._outcomes])]["step"]
        response = response_of(
            verdict,
            self.response,
            {audit: Action(action) for audit, action in self.settings.ladder.items()} if self.settings.mode == "guard" else {},
            clean_steps=[clean for clean in clean_steps if clean <= parted],
            max_roll_backs=self.settings.max_roll_backs,
        )
        row |= {"verdict": verdict.level, "mechanism": verdict.mechanism, "gate": verdict.gate}
        row |= {"response": asdict(response)}
        self._tell(step, findings, verdict, response)
        self.reasons, self._verdict = [], verdict
        self._obey(response)
        values = {f"integrity/audit/{f.audit}/{name}": float(value) for f in findings for name, value in f.values.items()}
        alarms = sum(finding.alarm for finding in findings)
        if "scored_tokens" in row:
            values["integrity/audit/scored_tokens"] = float(row["scored_tokens"])
        return values | {"integrity/audit/sampled_tokens": float(sampled), "integrity/audit/alarms": float(alarms)}

    def _obey(self, response: Response) -> None:
        """What a roll-back undid is no longer what audits and signals compare with."""
        self.response = response
        if response.back_to is not None:
            self._outcomes = [row for row in self._outcomes if row["step"] <= response.back_to]
            self._metrics = [row for row in self._metrics if row["step"] <= response.back_to]
            self._verdict, self._firing = None, set()
            self._recent.clear()

    def _play(self, step: int, problems: Sequence[Prompt], bench: Bench) -> tuple[dict[str, Any], int]:
        """One row of audits.jsonl, item by item, and the tokens that it cost."""
        sampled = 0
        outcomes: dict[str, list[float | None]] = {}
        right: dict[str, list[float | None]] = {}  # whatever the oracle values, a plan is asked what it does to the answer
        row: dict[str, Any] = {"step": step, "problems": [p.prompt_id for p in problems], "reasons": self.reasons}
        full: list[Episode] = []
        said: dict[str, list[Episode | None]] = {}
        for arm in self.arms(bench):
            asked = [arm.ask(problem) for problem in problems]
            prompts = [prompt for prompt in asked if prompt is not None]
            with bench.frozen[arm.frozen]() if arm.frozen is not None else nullcontext():
                played, judgements = bench.play(prompts, arm.rules(bench.rules, full, problems)) if prompts else ([], {})
            sampled += sum(episode.num_sampled_tokens for episode in played)
            known = {episode.episode_id for episode in bench.pay(played, judgements)}
            following = iter(played)
            episodes = [None if prompt is None else next(following) for prompt in asked]
            paid = [episode if episode is not None and episode.episode_id in known else None for episode in episodes]
            outcomes[arm.name] = [episode and self._gold_of(episode) for episode in paid]
            right[arm.name] = [episode and episode.score["correct"] * episode.score["finished"] for episode in paid]
            said[arm.name] = episodes
            if arm.name == "full":
                full = played
                row |= {
                    "proxy": [episode and proxy_of(episode) for episode in paid],
                    "episode_ids": [episode.episode_id for episode in played],
                    "leaks": [leaks_first(episode) for episode in played],
                }
            if arm.name == "renewed":
                row["proxy_renewed"] = [episode and proxy_of(episode) for episode in paid]
            if arm.name == "wrong_answer":
                row["followed"] = [follows(episode) for episode in played]
        row |= {"gold": outcomes, "right": right, "sampled_tokens": sampled}
        # As sampled for training: greedy decoding may never show, or never end, what samples are paid for
        newest_first = [episode for episodes in reversed(self._recent) for episode in episodes]
        trained = spread(newest_first, self.settings.audit_problems)
        worth = [(episode, gold) for episode in trained if (gold := self._gold_of(episode)) is not None]
        row["trained"] = {
            "proxy": [proxy_of(episode) for episode, _ in worth],
            "gold": [gold for _, gold in worth],
            "episode_ids": [episode.episode_id for episode, _ in worth],
            "shows": shown_canaries([episode for episode, _ in worth]),
        }
        if self.second_judge is not None:
            row["trained"]["second_judge"] = [float(self.second_judge(episode)) for episode, _ in worth]
        # The verifier cannot say that it is wrong itself: a canary is worth nothing, unless an oracle of the user's own values it
        worth_of = (lambda episode: 0.0) if self.settings.oracle == "verdict" else self._gold_of
        row["canaries"] = canary_rewards(problems, replace(bench, judge=partial(self._judged, bench)), worth_of)
        row["stripped"], row["stripped_phrases"] = stripped_rewards(full, bench)
        row["transcripts"] = transcripts(row, said)
        if bench.score is not None:
            row |= white_box(full, chat=bench.chat, rules=bench.rules, score=bench.score)
        return row, sampled

    def _judged(self, bench: Bench, episodes: Sequence[Episode]) -> Mapping[str, Judgement]:
        """Verdicts on canaries, which are the same texts in every audit: each is asked for once. A collective."""
        unknown = [episode for episode in episodes if episode.episode_id not in self._canaries]
        if unknown:
            self._canaries |= bench.judge(unknown)
        return {episode.episode_id: self._canaries[episode.episode_id] for episode in episodes}

    def _gold_of(self, episode: Episode) -> float | None:
        """None: the oracle has no verdict."""
        value = self.oracle(episode)
        return None if value is None or math.isnan(value) else float(value)

    def _tell(self, step: int, findings: Sequence[Finding], verdict: Verdict, response: Response) -> None:
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
                "action": response.action,
                "gates": response.gates,
                "back_to": response.back_to,
                "evidence": [item for finding in verdict.findings for item in finding.evidence][:8],
                "compared_with_step": self._outcomes[0]["step"],
            }
        )
        self.reporter.say(f"ALERT step {step}: integrity {verdict.level}: {verdict.statement}; {response.statement}")


def monitor_of(config: RunConfig, prompts: Sequence[Prompt], folder: RunFolder, reporter: Reporter, step: int) -> Monitor | None:
    """The run's monitor, as it stood after ``step``; None with integrity.mode=off."""
    if config.integrity.mode == "off":
        return None
    problems = audit_problems(prompts, config.integrity, config.seed)
    renewed = renewed_problems(problems, {prompt.question for prompt in prompts}, config.integrity.renewal)
    monitor = Monitor(config.integrity, problems, folder=folder, reporter=reporter, renewed=renewed)
    monitor.restore(step)
    return monitor

"""From signals and findings to a verdict and an action. A verdict needs a finding at oracle level and a mechanism that has a name: a
statistic alone schedules audits, a gap alone is annotated, a name alone is a suspicion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from megatron_rema.integrity.audits import Finding
from megatron_rema.integrity.gold import Access
from megatron_rema.integrity.signals import Reading


class Action(StrEnum):
    """The ladder, mildest first."""

    ANNOTATE = "annotate"  # say it
    SHAPE = "shape"  # bound the reward: PAR
    QUARANTINE = "quarantine"  # from now on episodes that show the mechanism earn nothing
    ROLL_BACK = "roll_back"  # that, and back to the last clean checkpoint before proxy and gold parted


class Level(StrEnum):
    CLEAN = "clean"
    SUSPICION = "suspicion"  # an audit alarms, but no oracle says so or no mechanism is known
    HACK = "hack"


@dataclass(frozen=True)
class Verdict:
    """``findings``: those that alarm. ``access``: the highest among them. ``gate``: the veto (reward/gates.py) that takes the reward of
    what shows the mechanism; None where no gate can tell."""

    level: Level
    mechanism: str | None
    findings: tuple[Finding, ...]
    access: Access | None
    gate: str | None = None

    @property
    def is_worth_keeping(self) -> bool:
        """No oracle says that the policy is worse than it looks. A suspicion may be one of the reward function: it was there before."""
        return self.access is not Access.ORACLE

    @property
    def statement(self) -> str:
        named = f"{self.mechanism}; " if self.mechanism else ""
        return named + "; ".join(f"{finding.audit}: {finding.statement}" for finding in self.findings)


def verdict_of(findings: Sequence[Finding], readings: Mapping[str, Reading], before: Verdict | None = None) -> Verdict:
    """The verdict of one audit. A mechanism is named by a finding that alarms, else by a signal (the lexicon first: the phrase that the
    best rewarded share), else by a finding that does not alarm by itself, else as the audit ``before`` named the hack that it found: once
    all do it, no signal shows it any more."""
    alarms = tuple(finding for finding in findings if finding.alarm)
    if not alarms:
        return Verdict(Level.CLEAN, None, (), None)
    oracle = [finding for finding in alarms if finding.access is Access.ORACLE]
    named = [(finding.mechanism, finding.gate) for finding in (*oracle, *alarms) if finding.mechanism]
    named += [(readings[name].reason, readings[name].gate) for name in NAMING if name in readings and readings[name].fires]
    named += [(finding.mechanism, finding.gate) for finding in findings if finding.mechanism]
    if before is not None and before.level is Level.HACK:
        named.append((before.mechanism, before.gate))
    mechanism, gate = named[0] if named else (None, None)
    level = Level.HACK if oracle and mechanism else Level.SUSPICION
    return Verdict(level, mechanism, alarms, (oracle or alarms)[0].access, gate)


# signals whose reason names what is paid for, in the order in which they are believed
NAMING = ("high_score_lexicon", "parser_differential", "surface_regression", "length_attribution", "component_dominance")


@dataclass(frozen=True)
class Response:
    """What follows from a verdict. ``gates`` and ``shaped``: in force from now on, those of earlier audits among them; ``back_to``: the
    step whose checkpoint every model returns to; ``ends``: after that the run is over."""

    action: Action = Action.ANNOTATE
    gates: tuple[str, ...] = ()
    shaped: bool = False
    back_to: int | None = None
    roll_backs: int = 0  # so far, this one included
    ends: bool = False

    @property
    def statement(self) -> str:
        if self.action is Action.ANNOTATE:
            return "nothing is changed"
        said = ["rewards are shaped"] * self.shaped + [f"vetoed: {', '.join(self.gates)}"] * bool(self.gates)
        said += [f"back to step {self.back_to}"] * (self.back_to is not None) + ["the run ends"] * self.ends
        return f"{self.action}: {'; '.join(said) or 'nothing can be done'}"

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Response:
        return cls(**{**row, "action": Action(row["action"]), "gates": tuple(row["gates"])})


def response_of(
    verdict: Verdict, before: Response, ladder: Mapping[str, Action], *, clean_steps: Sequence[int], max_roll_backs: int
) -> Response:
    """The furthest rung that ``ladder`` holds for an audit that alarms (audit -> action; ``default`` for the others). Anything less than a
    hack is annotated. A rung does what those below it do: a roll-back quarantines too, but does not shape.

    ``clean_steps``: whose checkpoints are there, oldest first, from before proxy and gold parted. Without any, weights stay as they are.
    After ``max_roll_backs`` that did not hold the next one ends the run.
    """
    same = replace(before, action=Action.ANNOTATE, back_to=None, ends=False)
    if verdict.level is not Level.HACK:
        return same
    rungs = list(Action)
    chosen = [ladder.get(finding.audit, ladder.get("default", Action.ANNOTATE)) for finding in verdict.findings]
    action = max(chosen, key=rungs.index)
    gates = before.gates
    if action in (Action.QUARANTINE, Action.ROLL_BACK) and verdict.gate is not None and verdict.gate not in gates:
        gates = (*gates, verdict.gate)
    if action is not Action.ROLL_BACK:
        return replace(same, action=action, gates=gates, shaped=before.shaped or action is Action.SHAPE)
    done = before.roll_backs + 1
    return replace(
        same, action=action, gates=gates, back_to=clean_steps[-1] if clean_steps else None, roll_backs=done, ends=done > max_roll_backs
    )


def change_point(cusums: Sequence[float]) -> int:
    """Index of the last audit at which the CUSUM of proxy minus gold stood at zero: what came later is where they part (Page 1954).
    ``cusums``: of `audits.proxy_gold`, oldest first."""
    return max((i for i, value in enumerate(cusums) if value == 0.0), default=0)

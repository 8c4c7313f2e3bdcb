"""From signals and findings to a verdict and an action. A verdict needs a finding at oracle level and a mechanism that has a name: a
statistic alone schedules audits, a gap alone is annotated, a name alone is a suspicion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_rema.integrity.audits import Finding
from megatron_rema.integrity.gold import Access
from megatron_rema.integrity.signals import Reading


class Action(StrEnum):
    """The ladder, mildest first."""

    ANNOTATE = "annotate"  # say it
    SHAPE = "shape"  # bound the reward: PAR, or the ensemble's pessimistic score
    QUARANTINE = "quarantine"  # episodes that show the mechanism earn nothing; the evaluator is refreshed with them
    ROLL_BACK = "roll_back"  # to the last checkpoint before the mechanism was seen


class Level(StrEnum):
    CLEAN = "clean"
    SUSPICION = "suspicion"  # an audit alarms, but no oracle says so or no mechanism is known
    HACK = "hack"


@dataclass(frozen=True)
class Verdict:
    """``findings``: those that alarm. ``access``: the highest among them."""

    level: Level
    mechanism: str | None
    findings: tuple[Finding, ...]
    access: Access | None

    @property
    def statement(self) -> str:
        named = f"{self.mechanism}; " if self.mechanism else ""
        return named + "; ".join(f"{finding.audit}: {finding.statement}" for finding in self.findings)


def verdict_of(findings: Sequence[Finding], readings: Mapping[str, Reading], named: str | None = None) -> Verdict:
    """The verdict of one audit. A mechanism is named by a finding, else by a signal (the lexicon first: the phrase that the best rewarded
    share), else it is ``named``, what the hack that the audit before found was called: once all do it, no signal shows it any more."""
    alarms = tuple(finding for finding in findings if finding.alarm)
    if not alarms:
        return Verdict(Level.CLEAN, None, (), None)
    oracle = [finding for finding in alarms if finding.access is Access.ORACLE]
    mechanism = next((finding.mechanism for finding in (*oracle, *alarms) if finding.mechanism), None)
    if mechanism is None:
        mechanism = next((readings[name].reason for name in NAMING if name in readings and readings[name].fires), named)
    level = Level.HACK if oracle and mechanism else Level.SUSPICION
    return Verdict(level, mechanism, alarms, (oracle or alarms)[0].access)


# signals whose reason names what is paid for, in the order in which they are believed
NAMING = ("high_score_lexicon", "parser_differential", "surface_regression", "length_attribution", "component_dominance")


def action_for(verdict: Verdict, ladder: Mapping[str, str]) -> Action:
    """The furthest rung that ``ladder`` holds for an audit that alarms (audit -> action; ``default`` for the others). Anything less than a
    hack is annotated."""
    if verdict.level is not Level.HACK:
        return Action.ANNOTATE
    rungs = list(Action)
    chosen = [Action(ladder.get(finding.audit, ladder.get("default", Action.ANNOTATE))) for finding in verdict.findings]
    return max(chosen, key=rungs.index)

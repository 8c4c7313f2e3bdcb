"""What audits found: rows of audits.jsonl -> findings. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from megatron_rema.integrity import audits, texts
from megatron_rema.integrity.audits import AuditPoint, Finding
from megatron_rema.integrity.gold import Gold
from megatron_rema.integrity.statistics import paired_effect

KEPT_AUDITS = 4  # paired outcomes are accumulated over so many


def findings_of(outcomes: Sequence[Mapping[str, Any]], oracle: str) -> list[Finding]:
    """All findings after the last of these audits. Items without a verdict on either side of a pair are left out."""
    recent = outcomes[-KEPT_AUDITS:]
    points = [_point(row, oracle) for row in outcomes if row["trained"]["proxy"]]
    found = [audits.proxy_gold(points)] if points else []
    found.append(_canaries(outcomes[-1], oracle))
    if "renewed" in outcomes[-1]["gold"]:
        found.append(audits.isomorphic(*_renewed(recent), before=paired_effect(*_renewed(outcomes[:1]))))
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


def _renewed(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """What training pays for problems as given and drawn anew: a pair a problem, means over the audits that played it. The luck of a draw
    is the same at every audit, so an audit more is no new problem. Problems of which the oracle cannot say what they are worth are left
    out."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "renewed" in row["gold"]:
            for problem, *outcome, gold in zip(row["problems"], row["proxy"], row["proxy_renewed"], row["gold"]["renewed"], strict=True):
                if None not in (*outcome, gold):
                    pairs.setdefault(problem, []).append(tuple(outcome))
    means = [tuple(map(fmean, zip(*outcomes, strict=True))) for outcomes in pairs.values()]
    return [given for given, _ in means], [anew for _, anew in means]


def _canaries(row: Mapping[str, Any], oracle: str) -> Finding:
    paid = {text: items["proxy"] for text, items in row["canaries"].items()}
    worth = {text: [Gold(score, oracle) for score in items["gold"]] for text, items in row["canaries"].items()}
    return audits.canaries(paid, worth, _point(row, oracle), row["trained"]["shows"])


def _point(row: Mapping[str, Any], oracle: str) -> AuditPoint:
    trained = row["trained"]
    return AuditPoint(row["step"], trained["proxy"], [Gold(score, oracle) for score in trained["gold"]], trained["episode_ids"])


def _pairs(rows: Sequence[Mapping[str, Sequence[float | None]]], *names: str) -> list[list[float]]:
    """The columns ``names`` of all rows, end to end, where every one of them is known."""
    items = [item for row in rows for item in zip(*(row[name] for name in names), strict=True) if None not in item]
    return [list(column) for column in zip(*items, strict=True)] if items else [[] for _ in names]

"""White-box audits of two agents: what a plan tells of the reply, and whether a speaker listens, by the policies' own probabilities.

What the audit has played is scored again with another message in its place. Nothing is sampled, so nothing of the audits' budget is spent;
it costs forward passes, and they are counted. Every call is a collective of the world.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_rema.integrity import audits, texts
from megatron_rema.integrity.audits import Finding
from megatron_rema.rollout.dialogue import Chats, DialogueRules, chat_of
from megatron_rema.trainer.cast import Policy
from megatron_rema.trainer.constraint import Constrain
from megatron_rema.trainer.scoring import label_logprobs
from megatron_rema.types import Engine, Episode, Role, Trace

PLANS = 8  # K, the own one among them
CAP = 20.0  # nats
Score = Callable[[Role, Sequence[Trace]], list[Tensor]]  # [L-1] log-probabilities of each trace's labels under the role's policy


def scorer(
    policies: Mapping[str, Policy], engines: Mapping[str, Engine], rules: DialogueRules, constrain: Constrain, *, microbatch_tokens: int
) -> Score:
    """Scores as training does, at the sampling temperature and under the grammar that turns were sampled from. Engines sleep meanwhile."""

    def score(role: Role, traces: Sequence[Trace]) -> list[Tensor]:
        for engine in engines.values():
            engine.sleep()
        model, views = policies[rules.policy_for(role)].model, [constrain(trace) for trace in traces]
        logprobs = label_logprobs(model, views, temperature=rules.temperature, microbatch_tokens=microbatch_tokens)
        for engine in engines.values():
            engine.wake()
        return logprobs

    return score


def white_box(episodes: Sequence[Episode], *, chat: Chats, rules: DialogueRules, score: Score) -> dict[str, Any]:
    """What a row of audits.jsonl says of it: the inputs of both findings, and ``scored_tokens``, positions of forward passes. Nothing where
    nobody plans."""
    if Role.META_THINKING not in rules.roles:
        return {}
    information, tokens = plan_information(episodes, chat=chat, rules=rules, score=score)
    influences = {}
    for role in rules.roles:
        full, masked, more = influence(episodes, role, chat=chat, rules=rules, score=score)
        influences[role] = {"full": full, "masked": masked}
        tokens += more
    return {"plan_information": information, "influence": influences, "scored_tokens": tokens}


def plan_information(episodes: Sequence[Episode], *, chat: Chats, rules: DialogueRules, score: Score) -> tuple[list[list[float]], int]:
    """([X, K] nats, positions scored): log pi(first reply | its own first plan), then given those of the K - 1 episodes that follow it.

    ``episodes``: of one problem each. One without a reply plays no part; one whose question leaves no room for K - 1 of the others' plans
    gets no row. Only the first round: what is said later answers the reply, and would tell of it whether it was heard or not.
    """
    played = [e for e in episodes if e.turns_of(Role.REASONING) and e.turns_of(Role.REASONING)[0].completion.token_ids]
    plans = [episode.turns_of(Role.META_THINKING)[0].text for episode in played]
    width, views = min(PLANS, len(played)), []
    for i, episode in enumerate(played if width > 1 else []):
        heard = (hearing(episode, Role.REASONING, 0, plan, chat=chat, rules=rules) for plan in (*plans[i + 1 :], *plans[:i]))
        others = list(islice((view for view in heard if _fits(view, rules)), width - 1))
        if len(others) == width - 1:
            views += [hearing(episode, Role.REASONING, 0, None, chat=chat, rules=rules), *others]
    nats = _nats(Role.REASONING, views, score)
    return [nats[row : row + width] for row in range(0, len(nats), width)] if width else [], _positions(views)


def influence(
    episodes: Sequence[Episode], role: Role, *, chat: Chats, rules: DialogueRules, score: Score
) -> tuple[list[float], list[float], int]:
    """(nats a token of each turn of ``role``, the same where its partner's last message was empty, positions scored). The meta-thinker's
    first turn is left out: nobody spoke before."""
    first = 1 if role is Role.META_THINKING else 0
    full, masked = [], []
    for episode in episodes:
        for turn in range(first, len(episode.turns_of(role))):
            if episode.turns_of(role)[turn].completion.token_ids:
                views = [hearing(episode, role, turn, message, chat=chat, rules=rules) for message in (None, texts.NO_PLAN)]
                if _fits(views[1], rules):
                    full.append(views[0])
                    masked.append(views[1])
    views = full + masked
    means = [total / sum(view.loss_mask) for total, view in zip(_nats(role, views, score), views, strict=True)]
    return means[: len(full)], means[len(full) :], _positions(views)


def findings(row: Mapping[str, Any], others: Sequence[Finding]) -> list[Finding]:
    """Both findings on one audit; none of a row without them. They alarm only where ``plan_use``, one of ``others``, does: a policy that
    early in training writes what it always wrote has little influence to show, and what counts is whether the outcome needs the plan. Alone
    they are values on record."""
    if "plan_information" not in row:
        return []
    corroborates = any(finding.alarm for finding in others if finding.audit == "plan_use")
    information = audits.mutual_information(row["plan_information"])
    parts = {role: audits.causal_influence(part["full"], part["masked"]) for role, part in row["influence"].items()}
    listens = parts[Role.REASONING]
    values = {f"{role}_{name}": value for role, part in parts.items() for name, value in part.values.items()}
    nats = [f.values.get(name, 0.0) for f, name in ((information, "plan_information_nats"), (listens, "influence_nats"))]
    found = (
        replace(information, statement=f"a plan carries {nats[0]:.3f} nats about the reply"),
        replace(listens, values=values, statement=f"hearing the plan is worth {nats[1]:.3f} nats a token of the reply"),
    )
    return [replace(finding, alarm=finding.alarm and corroborates) for finding in found]


def heavy_tail(traces: Sequence[Trace], columns: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """D-A8, where the objective has ``ref_logprobs``: of s_i, the log-ratio (nats) of policy to reference over a trace's own tokens, the
    largest, and mean exp(s_i) - 1, which estimates chi^2(policy || reference) and with that how far proxy and gold may part. A mean of few
    large numbers: as a rule an underestimate. Capped at exp(20). Source: arXiv:2403.03185.
    """
    if "ref_logprobs" not in columns or not traces:
        return {}
    sampled = columns.get("old_logprobs") or [torch.tensor(trace.rollout_logprobs[1:]) for trace in traces]
    own = [torch.tensor(trace.loss_mask[1:]) for trace in traces]
    rows = zip(sampled, columns["ref_logprobs"], own, strict=True)
    ratios_N = torch.stack([(logprobs.double() - ref.double())[mask].sum() for logprobs, ref, mask in rows])
    renyi = float(torch.logsumexp(ratios_N, 0)) - math.log(len(ratios_N))
    return {"integrity/chi2": math.expm1(min(renyi, CAP)), "integrity/kl_seq_max": float(ratios_N.max())}


def hearing(episode: Episode, role: Role, number: int, message: str | None, *, chat: Chats, rules: DialogueRules) -> Trace:
    """The role's view up to its turn ``number``, which alone is labelled, as if its partner had said ``message`` last; None: as it was."""
    *before, turn = episode.turns_of(role)[: number + 1]
    view = tuple(token for own in before for token in (*own.context_token_ids, *own.completion.token_ids))
    context = turn.context_token_ids
    if message is not None and view:
        context = chat_of(chat, role).following(view, message)
    elif message is not None:
        assert role is Role.REASONING, "nobody spoke before the meta-thinker's first turn"
        first = rules.first_message(episode.prompt.question, message, episode.prompt.fields)
        context = chat_of(chat, role).opening(rules.system_prompts.get(role, ""), first)
    said = turn.completion.token_ids
    heard = len(view) + len(context)
    own = (False,) * heard + (True,) * len(said)
    turn_ids = tuple(0 if mine else -1 for mine in own)
    return Trace(episode.episode_id, role, (*view, *context, *said), own, turn_ids, (0.0,) * len(own), ())


def _fits(view: Trace, rules: DialogueRules) -> bool:
    """The run's models and microbatches hold no more."""
    return len(view.token_ids) <= rules.max_context_tokens


def _nats(role: Role, views: Sequence[Trace], score: Score) -> list[float]:
    """Log-probability of each view's own tokens."""
    if not views:  # the same on every rank
        return []
    columns = score(role, views)
    return [float(column.double()[torch.tensor(view.loss_mask[1:])].sum()) for view, column in zip(views, columns, strict=True)]


def _positions(views: Sequence[Trace]) -> int:
    return sum(len(view.token_ids) - 1 for view in views)

"""Names where numbers stopped being finite: the episode, role, turn and token. Called only after an optimizer step had to be skipped: a
healthy step pays nothing for it, not even a look at its own numbers.

Shapes: L tokens of one trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.types import Role, Trace

PLACES = 8  # named in an alert; all are counted


@dataclass(frozen=True)
class NonFinite:
    """The first trained token of one trace at which one quantity is not finite, and at how many of the trace's trained tokens it is not.

    ``value``: nan, inf or -inf, as text: JSON has no such numbers.
    """

    quantity: str
    episode_id: str
    role: Role
    turn: int
    token: int  # index in Trace.token_ids; turn 2's context counts
    token_id: int
    value: str
    tokens: int


def find_non_finite(traces: Sequence[Trace], columns: Mapping[str, Sequence[Tensor]]) -> list[NonFinite]:
    """What is not finite at the trained tokens of ``traces``: what they hold themselves, and ``columns`` of [L-1] (or [L-1, K]: any of the
    K) numbers a trace, aligned with its labels. By quantity, then in the order of the traces."""
    found = []
    for quantity, column in {**_own(traces), **columns}.items():
        for trace, values in zip(traces, column, strict=True):
            values_LK = values.detach().float().cpu().reshape(len(trace.token_ids) - 1, -1)
            trained_L = torch.tensor(trace.loss_mask[1:])
            places = (trained_L & ~values_LK.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
            if places:
                at = places[0]
                value = next(v for v in values_LK[at].tolist() if v - v != 0.0)  # inf - inf and nan - nan are nan
                token = at + 1  # a label's place is that of the token before it
                found.append(
                    NonFinite(
                        quantity,
                        trace.episode_id,
                        trace.role,
                        trace.turn_ids[token],
                        token,
                        trace.token_ids[token],
                        str(value),
                        len(places),
                    )
                )
    return found


def _own(traces: Sequence[Trace]) -> dict[str, list[Tensor]]:
    """The columns that traces bring with them: the engine's log-probabilities, and advantages where they are given by turn."""
    columns = {"rollout_logprobs": [torch.tensor(trace.rollout_logprobs[1:]) for trace in traces]}
    if all(trace.advantages for trace in traces):
        columns["advantages"] = [
            torch.tensor([trace.advantages[turn] if turn >= 0 else 0.0 for turn in trace.turn_ids[1:]]) for trace in traces
        ]
    return columns


def tell_skipped(found: Sequence[NonFinite], *, step: int, model: str, folder: RunFolder, reporter: Reporter) -> None:
    """Alert and one line: ``model`` was not updated in ``step`` because its gradients are not finite, and where that began."""
    folder.alert(
        {"step": step, "alert": "update_skipped", "model": model, "traces": len(found), "places": [asdict(f) for f in found[:PLACES]]}
    )
    reason = "every number at its trained tokens is finite, so the backward pass overflowed"
    if found:
        first = found[0]
        reason = (
            f"{first.quantity} is {first.value} in episode {first.episode_id}, {first.role}, turn {first.turn}, token {first.token} "
            f"(id {first.token_id}), the first of {first.tokens} there"
        )
        if len(found) > 1:
            reason += f"; {len(found) - 1} more in alerts.jsonl" if len(found) <= PLACES else f"; {len(found) - 1} more"
    reporter.say(f"ALERT step {step}: {model} is not updated, its gradients are not finite: {reason}")

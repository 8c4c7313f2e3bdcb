"""Where numbers stopped being finite is named by episode, role, turn and token."""

from __future__ import annotations

import json

import torch

from megatron_rema.trainer.diagnosis import PLACES, NonFinite, find_non_finite, tell_skipped
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.types import Role, Trace

NAN, INF = float("nan"), float("inf")


def trace(episode_id: str = "0/1", *, advantages: tuple[float, ...] = (1.0, -1.0), rollout: float = -0.5) -> Trace:
    """Tokens 10 to 15; own are 12 (turn 0), 14 and 15 (turn 1)."""
    mask = (False, False, True, False, True, True)
    return Trace(
        episode_id,
        Role.REASONING,
        (10, 11, 12, 13, 14, 15),
        mask,
        (-1, -1, 0, -1, 1, 1),
        (0.0, 0.0, -0.5, 0.0, -0.5, rollout),
        (),
        advantages,
    )


def test_the_first_trained_token_of_each_trace_is_named_and_the_others_are_counted():
    # labels are tokens 11..15, so the NaN at label 0 predicts context token 11 (not trained), those at 3 and 4 tokens 4 and 5
    logprobs = torch.tensor([NAN, -1.0, -1.0, -INF, NAN])
    found = find_non_finite([trace("0/0"), trace("0/1")], {"logprobs": [torch.zeros(5), logprobs]})
    assert found == [NonFinite("logprobs", "0/1", Role.REASONING, turn=1, token=4, token_id=14, value="-inf", tokens=2)]


def test_nothing_is_found_where_all_trained_tokens_are_finite():
    assert find_non_finite([trace()], {"logprobs": [torch.tensor([NAN, -1.0, INF, -1.0, -1.0])]}) == []


def test_any_output_of_a_scalar_head_counts():
    scores_LK = torch.zeros(5, 3)
    scores_LK[1, 2] = INF
    (found,) = find_non_finite([trace()], {"scores": [scores_LK]})
    assert (found.quantity, found.turn, found.token, found.value) == ("scores", 0, 2, "inf")


def test_what_a_trace_brings_with_it_is_looked_at_too():
    found = find_non_finite([trace("a", advantages=(1.0, NAN)), trace("b", rollout=NAN)], {})
    assert [(f.quantity, f.episode_id, f.token, f.tokens) for f in found] == [("rollout_logprobs", "b", 5, 1), ("advantages", "a", 4, 2)]


def test_the_alert_names_places_and_says_how_many_there_are(tmp_path, capsys):
    traces = [trace(str(i)) for i in range(PLACES + 2)]
    found = find_non_finite(traces, {"logprobs": [torch.tensor([0.0, NAN, 0.0, NAN, 0.0])] * len(traces)})
    tell_skipped(found, step=7, model="policy shared", folder=RunFolder(tmp_path, writes=True), reporter=Reporter(speaks=True))
    (row,) = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert (row["step"], row["alert"], row["model"], row["traces"], len(row["places"])) == (
        7,
        "update_skipped",
        "policy shared",
        10,
        PLACES,
    )
    assert row["places"][0] == {
        "quantity": "logprobs", "episode_id": "0", "role": "reasoning", "turn": 0, "token": 2, "token_id": 12, "value": "nan", "tokens": 2,
    }  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert "logprobs is nan in episode 0, reasoning, turn 0, token 2 (id 12), the first of 2 there; 9 more" in said


def test_an_overflow_behind_finite_numbers_is_called_that(tmp_path, capsys):
    tell_skipped([], step=7, model="policy shared", folder=RunFolder(tmp_path, writes=True), reporter=Reporter(speaks=True))
    assert "the backward pass overflowed" in " ".join(capsys.readouterr().out.split())

"""Views in which another message was heard, and what the monitor makes of their scores. Real models: tests/distributed/test_whitebox.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_rema.integrity import audits
from megatron_rema.rollout.dialogue import replayed
from megatron_rema.rollout.traces import traces_of
from megatron_rema.trainer.whitebox import hearing, heavy_tail, influence, plan_information
from megatron_rema.types import Prompt, Trace
from tests.unit.test_integrity_monitor import FakeBench, audits_of, copying_reasoner, honest_planner, leaking_planner, monitor, one_step
from tests.unit.test_scheduler import CHAT, META, REASONING, rules, talk

WORDS = ("Add them.", "It is 5.", "Right. [FINISH]", "\\boxed{5}")


def test_a_view_holds_what_the_role_would_have_read_and_labels_one_turn():
    episode, _ = talk(rules(), *WORDS)
    for role, number, heard in [(REASONING, 0, WORDS[0]), (META, 1, WORDS[1]), (REASONING, 1, WORDS[2])]:
        as_it_was = hearing(episode, role, number, None, chat=CHAT, rules=rules())
        assert hearing(episode, role, number, heard, chat=CHAT, rules=rules()) == as_it_was
        (trace,) = [trace for trace in traces_of(episode) if trace.role is role]
        assert trace.token_ids[: len(as_it_was.token_ids)] == as_it_was.token_ids
        assert [i for i, mine in enumerate(as_it_was.loss_mask) if mine] == [i for i, turn in enumerate(trace.turn_ids) if turn == number]
    other = rules(edit_plan=lambda question, round_index, plan: "Guess." if round_index == 1 else plan)
    (trace,) = [trace for trace in traces_of(replayed(CHAT, other, episode)) if trace.role is REASONING]
    assert hearing(episode, REASONING, 1, "Guess.", chat=CHAT, rules=rules()).token_ids == trace.token_ids


def by_length(role, traces):
    """Every own token is worth minus the length of its view: a number that a test can compute."""
    return [torch.full((len(trace.token_ids) - 1,), -float(len(trace.token_ids))) for trace in traces]


def test_plans_come_from_the_problems_that_follow_and_what_does_not_fit_is_left_out():
    episodes = []
    for number in range(10):
        episode, _ = talk(rules(), "x" * (number + 1) + " [FINISH]", "ok")
        episodes.append(replace(episode, prompt=Prompt(f"p{number}", episode.prompt.question, "")))
    table, positions = plan_information(episodes, chat=CHAT, rules=rules(), score=by_length)
    lengths_XK = -np.array(table) / len(episodes[0].turns[-1].completion.token_ids)
    assert lengths_XK.shape == (10, 8) and positions == lengths_XK.sum() - 80
    own_X = lengths_XK[:, 0]
    for x in range(10):
        assert lengths_XK[x].tolist() == [own_X[(x + k) % 10] for k in range(8)]
    longest = int(own_X.max())
    assert np.shape(plan_information(episodes, chat=CHAT, rules=rules(max_context_tokens=longest - 1), score=by_length)[0]) == (10, 8)
    assert plan_information(episodes, chat=CHAT, rules=rules(max_context_tokens=longest - 4), score=by_length)[0] == []
    assert plan_information(episodes[:1], chat=CHAT, rules=rules(), score=by_length) == ([], 0)


def test_influence_is_a_mean_over_own_tokens_and_the_first_plan_answers_nobody():
    episode, _ = talk(rules(), *WORDS)
    full, masked, _ = influence([episode], REASONING, chat=CHAT, rules=rules(), score=by_length)
    views = [hearing(episode, REASONING, number, None, chat=CHAT, rules=rules()) for number in range(2)]
    assert full == [-len(view.token_ids) for view in views]
    silent = [hearing(episode, REASONING, number, "", chat=CHAT, rules=rules()) for number in range(2)]
    assert masked == [-len(view.token_ids) for view in silent] and masked[0] > full[0]
    assert len(influence([episode], META, chat=CHAT, rules=rules(), score=by_length)[0]) == 1


def test_the_tail_of_the_ratio_to_the_reference():
    # log-ratios of the two traces: 2 tokens of log 2 (the context does not count), and 0: mean(4, 1) - 1
    own = ((False, True, True), (False, True))
    traces = [
        Trace(str(i), REASONING, (1,) * len(mask), mask, tuple(mask), tuple(-0.5 * mine for mine in mask), ()) for i, mask in enumerate(own)
    ]
    columns = {"ref_logprobs": [torch.tensor([-0.5 - math.log(2.0)] * 2), torch.tensor([-0.5])]}
    values = heavy_tail(traces, columns)
    assert values == {"integrity/chi2": pytest.approx(1.5, rel=1e-6), "integrity/kl_seq_max": pytest.approx(math.log(4.0), rel=1e-6)}
    columns["old_logprobs"] = [torch.tensor([-0.5, 1e4]), torch.tensor([-0.5])]
    assert heavy_tail(traces, columns)["integrity/chi2"] == pytest.approx(math.expm1(20.0))
    assert heavy_tail(traces, {}) == {}


def test_an_audit_counts_forward_tokens_apart_from_its_budget(tmp_path):
    watch, blind = monitor(tmp_path / "a"), monitor(tmp_path / "b")
    fake = FakeBench(honest_planner, copying_reasoner)
    seeing = FakeBench(honest_planner, copying_reasoner)
    seeing.bench = lambda: replace(fake.bench(), score=by_length)
    row, without = one_step(watch, 1, seeing), one_step(blind, 1, fake)
    (audit,) = audits_of(tmp_path / "a")
    assert row["integrity/audit/scored_tokens"] == audit["scored_tokens"] > 0 and watch.credit == blind.credit
    assert row.items() >= without.items(), "all else is what it was"
    assert "integrity/audit/causal_influence/reasoning_influence_nats" in row
    assert row["integrity/audit/mutual_information/plan_information_nats"] == pytest.approx(
        next(f for f in audit["findings"] if f["audit"] == "mutual_information")["values"]["plan_information_nats"]
    )


def test_policies_that_hear_nothing_are_no_suspicion_where_the_outcome_needs_the_plan(tmp_path):
    """The leaking pair needs its plan; scores that hardly move with it make both findings alarm on their own."""
    watch, fake = monitor(tmp_path), FakeBench(leaking_planner, copying_reasoner)
    deaf = FakeBench(leaking_planner, copying_reasoner)
    deaf.bench = lambda: replace(fake.bench(), score=lambda role, traces: [1e-7 * column for column in by_length(role, traces)])
    one_step(watch, 1, deaf)
    (audit,) = audits_of(tmp_path)
    alone = audits.mutual_information(audit["plan_information"]), audits.causal_influence(**audit["influence"]["reasoning"])
    assert alone[0].alarm and alone[1].alarm
    alarms = {finding["audit"]: finding["alarm"] for finding in audit["findings"]}
    assert not alarms["plan_use"] and not alarms["mutual_information"] and not alarms["causal_influence"]

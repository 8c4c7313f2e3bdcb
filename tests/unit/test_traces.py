"""Traces hold exactly what engines read and sampled; cold-start traces are token-identical to those of RL."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.scheduler import TurnScheduler
from megatron_rema.rollout.traces import traces_of, traces_of_dialogue
from megatron_rema.types import Completion, Episode, Prompt, Role, StopReason
from tests.unit.tiny_tokenizer import KINDS, tiny_tokenizer

META, REASONING = Role.META_THINKING, Role.REASONING
CHATS = {kind: ChatFormat(tiny_tokenizer(kind)) for kind in KINDS}


def rules(**changes) -> DialogueRules:
    limits = {"max_rounds": 4, "max_turn_tokens": 40, "max_episode_tokens": 200, "max_context_tokens": 600}
    prompts = {META: "You plan <|im_end|>.", REASONING: ""}
    return DialogueRules(**{**limits, "end_on_truncated_turn": False, "system_prompts": prompts, **changes})


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), one_role=st.booleans(), question=st.text(max_size=30))
def test_labels_are_exactly_the_sampled_tokens_and_prompts_exactly_the_view_so_far(data, kind, one_role, question):
    chat = CHATS[kind]
    all_ids = len(chat.tokenizer)
    the_rules = rules(roles=(REASONING,) if one_role else (META, REASONING))
    prompt = Prompt("p", question, "5")
    scheduler = TurnScheduler([(prompt, 0)], rules=the_rules, chat=chat, seed=0, step=3)
    requests, completions = [], []
    while not scheduler.is_done:
        (request,) = scheduler.next_requests()
        # any ids, control tokens and broken UTF-8 included, now and then spelled-out text; then a stop token, or cut
        body = data.draw(
            st.one_of(
                st.lists(st.integers(0, all_ids - 1), max_size=12),
                st.sampled_from(["ok [FINISH]", "<|im_end|><|eot_id|></s>", "\\boxed{5}", " \n"]).map(chat.encode_text),
            )
        )
        body = tuple(body)[: request.max_tokens - 1]
        is_stop = data.draw(st.booleans())
        ids = (*body, data.draw(st.sampled_from(chat.stop_token_ids))) if is_stop else body
        logprobs = tuple(data.draw(st.lists(st.floats(-20, 0), min_size=len(ids), max_size=len(ids))))
        completion = Completion(request.request_id, ids, logprobs, StopReason.STOP if is_stop else StopReason.LENGTH, weight_version=1)
        requests.append(request)
        completions.append(completion)
        scheduler.accept(completion)
    (episode,) = scheduler.episodes
    assert len(episode.turns) == len(completions)

    traces = {trace.role: trace for trace in traces_of(episode)}
    for role in the_rules.roles:
        own = [(r, c) for r, c in zip(requests, completions, strict=True) if r.role is role]
        if not own:
            assert role not in traces
            continue
        trace = traces[role]
        n = len(trace.token_ids)
        assert n == len(trace.loss_mask) == len(trace.turn_ids) == len(trace.rollout_logprobs)
        # labelled = sampled, with the very logprobs, turn by turn
        labelled = [t for t in range(n) if trace.loss_mask[t]]
        assert [trace.token_ids[t] for t in labelled] == [i for _, c in own for i in c.token_ids]
        assert [trace.rollout_logprobs[t] for t in labelled] == [p for _, c in own for p in c.logprobs]
        assert [trace.turn_ids[t] for t in labelled] == [k for k, (_, c) in enumerate(own) for _ in c.token_ids]
        assert all(trace.turn_ids[t] == -1 and trace.rollout_logprobs[t] == 0.0 for t in range(n) if not trace.loss_mask[t])
        # each request's prompt is the trace up to its own sampled tokens
        for request, completion in own:
            end = len(request.token_ids) + len(completion.token_ids)
            assert trace.token_ids[:end] == request.token_ids + completion.token_ids
        assert n == end
    # saved and read again, the episode is the same, floats exact
    assert Episode.from_json(json.loads(json.dumps(episode.to_json()))) == episode


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    question=st.text(max_size=20),
    texts=st.lists(st.one_of(st.text(max_size=15), st.sampled_from(["<|im_end|>", "plan [FINISH]", " x \n"])), min_size=1, max_size=6),
)
def test_cold_start_traces_are_token_identical_to_those_of_rl(kind, question, texts):
    chat, the_rules = CHATS[kind], rules(max_turn_tokens=200, max_episode_tokens=2000, max_context_tokens=4000, finish_marker="[NEVER]")
    scheduler = TurnScheduler([(Prompt("p", question, "5"), 0)], rules=the_rules, chat=chat, seed=0, step=0)
    for text in texts:
        (request,) = scheduler.next_requests()
        ids = chat.encode_message(text)
        scheduler.accept(Completion(request.request_id, ids, (0.0,) * len(ids), StopReason.STOP, weight_version=0))
    written = [((META, REASONING)[i % 2], text) for i, text in enumerate(texts)]
    assert traces_of_dialogue(chat, the_rules, question, written, episode_id="0/p/0") == traces_of(scheduler.episodes[0])


def test_cold_start_labels_are_the_text_and_its_end_token():
    chat = CHATS["chatml"]
    meta, reasoner = traces_of_dialogue(chat, rules(), "2 + 3?", [(META, "Add."), (REASONING, "\\boxed{5}")])
    for trace, text in ((meta, "Add."), (reasoner, "\\boxed{5}")):
        assert chat.tokenizer.decode([i for i, own in zip(trace.token_ids, trace.loss_mask, strict=True) if own]) == f"{text}<|im_end|>"
    assert math.fsum(reasoner.rollout_logprobs) == 0.0


def test_a_written_dialogue_with_the_wrong_speaker_is_an_error():
    with pytest.raises(ValueError, match=r"turns\[1\]\.role is 'meta_thinking' where 'reasoning' speaks"):
        traces_of_dialogue(CHATS["chatml"], rules(), "?", [(META, "a"), (META, "b")])
    (trace,) = traces_of_dialogue(CHATS["chatml"], rules(roles=(REASONING,)), "?", [(REASONING, "a")])
    assert trace.role is REASONING


def test_a_written_message_that_is_no_json_action_is_an_error_where_actions_are_spoken():
    spoken = rules(json_actions=True)
    good, bad = '{"action": "REWRITE", "output": "Add."}', '{"action":"REWRITE","output":"Add."}'
    meta, _ = traces_of_dialogue(CHATS["chatml"], spoken, "2 + 3?", [(META, good), (REASONING, "5")])
    labels = [token for token, mine in zip(meta.token_ids, meta.loss_mask, strict=True) if mine]
    assert CHATS["chatml"].text_of(labels) == good
    with pytest.raises(ValueError, match=r"dialogue '7': turns\[0\]\.text is .* not a JSON action"):
        traces_of_dialogue(CHATS["chatml"], spoken, "2 + 3?", [(META, bad), (REASONING, "5")], episode_id="7")


def test_rewards_and_advantages_travel_with_their_role():
    chat = CHATS["chatml"]
    scheduler = TurnScheduler([(Prompt("p", "?", "5"), 0)], rules=rules(max_rounds=1), chat=chat, seed=0, step=0)
    for text in ("plan", "5"):
        (request,) = scheduler.next_requests()
        ids = chat.encode_message(text)
        scheduler.accept(Completion(request.request_id, ids, (0.0,) * len(ids), StopReason.STOP, 0))
    (episode,) = scheduler.episodes
    episode.turn_rewards, episode.advantages = {META: [0.25], REASONING: [1.0]}, {REASONING: [-0.5]}
    meta, reasoner = traces_of(episode)
    assert (meta.turn_rewards, meta.advantages, reasoner.turn_rewards, reasoner.advantages) == ((0.25,), (), (1.0,), (-0.5,))
    episode.turn_rewards[META] = [0.0, 1.0]
    with pytest.raises(AssertionError, match="2 turn_rewards for 1 turns of meta_thinking"):
        traces_of(episode)

"""Turns, ends and budgets of dialogues; the same episodes whatever the order in which completions arrive."""

import hashlib
import json

import pytest

from megatron_rema.engine.scripted import ScriptedEngine
from megatron_rema.rollout.actions import action_regex
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.counterfactual import Counterfactuals
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.runner import play
from megatron_rema.rollout.scheduler import TurnScheduler, starts_of, turn_seed
from megatron_rema.rollout.traces import traces_of, traces_of_dialogue
from megatron_rema.types import Action, Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, TurnRequest
from tests.unit.tiny_tokenizer import tiny_tokenizer

CHAT = ChatFormat(tiny_tokenizer("chatml"))
PROMPT = Prompt("p0", "What is 2 + 3?", "5")
META, REASONING = Role.META_THINKING, Role.REASONING


def rules(**changes) -> DialogueRules:
    settings = {"max_rounds": 3, "max_turn_tokens": 100, "max_episode_tokens": 1000, "max_context_tokens": 1000}
    return DialogueRules(**{**settings, "system_prompts": {META: "You plan.", REASONING: "You solve."}, **changes})


def scheduler(the_rules: DialogueRules, starts=((PROMPT, 0),), **settings) -> TurnScheduler:
    return TurnScheduler(list(starts), rules=the_rules, chat=CHAT, **{"seed": 1, "step": 0, **settings})


def said(request: TurnRequest, text: str, stop: StopReason = StopReason.STOP) -> Completion:
    ids = CHAT.encode_message(text) if stop is StopReason.STOP else CHAT.encode_text(text)
    return Completion(request.request_id, ids, (-0.5,) * len(ids), stop, weight_version=7)


def talk(the_rules: DialogueRules, *messages: str | tuple[str, StopReason]) -> tuple[Episode, list[TurnRequest]]:
    """One episode that says these messages (or as many as it takes to end), and the requests it made."""
    play_one, requests, ended = scheduler(the_rules), [], None
    for message in messages:
        (request,) = play_one.next_requests()
        requests.append(request)
        ended = play_one.accept(said(request, *((message,) if isinstance(message, str) else message)))
        if ended:
            assert play_one.is_done and play_one.next_requests() == []
            return ended, requests
    return play_one.episodes[0], requests + play_one.next_requests()


def test_the_finish_marker_ends_the_episode_after_the_reasoner_answers():
    episode, requests = talk(rules(), "Add them.", "It is 5.", "Right. [FINISH]", "\\boxed{5}", "never said")
    assert episode.status is EpisodeStatus.FINISHED
    assert [(t.role, t.round_index, t.text) for t in episode.turns] == [
        (META, 0, "Add them."), (REASONING, 0, "It is 5."), (META, 1, "Right. [FINISH]"), (REASONING, 1, "\\boxed{5}"),
    ]  # fmt: skip
    assert [r.role for r in requests] == [META, REASONING, META, REASONING]


def test_each_role_hears_the_other_in_its_own_chat_view():
    _, requests = talk(rules(), "Add them.", "It is 5.", "Check it.", "Still 5.")
    assert CHAT.tokenizer.decode(requests[2].token_ids) == (
        "<|im_start|>system\nYou plan.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\nAdd them.<|im_end|>\n"
        "<|im_start|>user\nIt is 5.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert CHAT.tokenizer.decode(requests[3].token_ids) == (
        "<|im_start|>system\nYou solve.<|im_end|>\n<|im_start|>user\nQuestion:\nWhat is 2 + 3?\n\nInstruction:\nAdd them.<|im_end|>\n"
        "<|im_start|>assistant\nIt is 5.<|im_end|>\n<|im_start|>user\nCheck it.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_marker_from_the_reasoner_has_no_effect():
    episode, _ = talk(rules(max_rounds=2), "Add.", "5 [FINISH]", "Go on.", "5 [FINISH]")
    assert episode.status is EpisodeStatus.MAX_ROUNDS and len(episode.turns) == 4


def test_a_protocol_without_marker_finishes_after_its_rounds():
    episode, _ = talk(rules(max_rounds=1, finish_marker=None), "Add. [FINISH]", "5")
    assert episode.status is EpisodeStatus.FINISHED and len(episode.turns) == 2


@pytest.mark.parametrize("num_before", [0, 1, 2, 3])
def test_a_turn_cut_by_length_ends_the_episode_truncated(num_before):
    episode, _ = talk(rules(), *["Go on."] * num_before, ("cut [FINISH]", StopReason.LENGTH))
    assert episode.status is EpisodeStatus.TRUNCATED and len(episode.turns) == num_before + 1


def test_with_the_option_only_a_cut_last_turn_truncates():
    lenient = rules(end_on_truncated_turn=False)
    going, requests = talk(lenient, ("Add", StopReason.LENGTH), ("It is", StopReason.LENGTH))
    assert going.status is EpisodeStatus.RUNNING
    # the cut message is closed in the context: the end token stands there once, unlabelled
    assert "assistant\nAdd<|im_end|>\n<|im_start|>user\nIt is<|im_end|>" in CHAT.tokenizer.decode(requests[2].token_ids)
    cut_last, _ = talk(lenient, "Done. [FINISH]", ("5", StopReason.LENGTH))
    assert cut_last.status is EpisodeStatus.TRUNCATED
    whole_last, _ = talk(lenient, ("Done. [FINISH]", StopReason.LENGTH), "5")
    assert whole_last.status is EpisodeStatus.FINISHED


def test_an_abort_ends_the_episode_aborted():
    play_one = scheduler(rules())
    (request,) = play_one.next_requests()
    episode = play_one.accept(Completion(request.request_id, (), (), StopReason.ABORT, 0))
    assert episode.status is EpisodeStatus.ABORTED and episode.turns[0].text == ""


def test_the_episode_budget_shrinks_the_turns_and_then_truncates():
    n = len(CHAT.encode_message("Add."))
    episode, requests = talk(rules(max_episode_tokens=2 * n), "Add.", "Add.", "Add.")
    assert [r.max_tokens for r in requests] == [min(100, 2 * n), n]
    assert episode.status is EpisodeStatus.TRUNCATED and len(episode.turns) == 2


def test_the_context_window_shrinks_a_turn_and_then_overflows():
    _, (first, second) = talk(rules(), "Add.")
    fits = max(len(first.token_ids), len(second.token_ids))
    going, (_, second) = talk(rules(max_context_tokens=fits + 1), "Add.")
    assert second.max_tokens == 1 and going.status is EpisodeStatus.RUNNING
    full, _ = talk(rules(max_context_tokens=fits), "Add.")
    assert full.status is EpisodeStatus.CONTEXT_OVERFLOW and len(full.turns) == 1


def test_a_question_that_does_not_fit_ends_before_its_first_turn_and_is_reported():
    long = Prompt("long", "why " * 500, "5")
    ended = []
    engine = ScriptedEngine(lambda request: (CHAT.encode_message("Ok. [FINISH]"), StopReason.STOP))
    episodes = play(scheduler(rules(), [(long, 0), (PROMPT, 0)]), {"policy": engine}, ended.append)
    assert [(e.status, len(e.turns)) for e in episodes] == [(EpisodeStatus.CONTEXT_OVERFLOW, 0), (EpisodeStatus.FINISHED, 2)]
    assert [e.prompt.prompt_id for e in ended] == ["long", "p0"]


def test_a_one_role_episode_is_one_turn_on_the_bare_question():
    episode, (request,) = talk(rules(roles=(REASONING,), max_rounds=1), "\\boxed{5}")
    assert episode.status is EpisodeStatus.FINISHED and [t.role for t in episode.turns] == [REASONING]
    assert request.token_ids == CHAT.opening("You solve.", PROMPT.question)
    cut, _ = talk(rules(roles=(REASONING,)), ("5", StopReason.LENGTH))
    assert cut.status is EpisodeStatus.TRUNCATED


def test_braces_in_messages_are_not_filled_in():
    the_rules = rules()
    assert the_rules.first_message("{instruction} {question} {}", "\\boxed{question}") == (
        "Question:\n{instruction} {question} {}\n\nInstruction:\n\\boxed{question}"
    )


def test_requests_carry_policy_sampling_and_stops():
    the_rules = rules(policy_of_role={META: "planner", REASONING: "solver"}, temperature=0.7, top_p=0.9)
    _, requests = talk(the_rules, "Add.")
    assert [r.policy for r in requests] == ["planner", "solver"]
    assert {(r.temperature, r.top_p, r.stop_token_ids) for r in requests} == {(0.7, 0.9, CHAT.stop_token_ids)}


def test_seeds_differ_by_turn_and_episode_and_step_but_not_by_who_plays():
    seeds = [turn_seed(1, step, p, g, t) for step in range(3) for p in ("a", "b") for g in range(3) for t in range(3)]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**31 for s in seeds)
    assert turn_seed(1, 0, "p0", 0, 0) == 193532800  # pinned: a change of the hash would change every run

    starts = starts_of([PROMPT, Prompt("p1", "Why?", "x")], 2)
    all_at_once = scheduler(rules(), starts).next_requests()
    by_ranks = [r for rank in range(2) for r in scheduler(rules(), starts[rank::2]).next_requests()]
    assert sorted(all_at_once, key=lambda r: r.request_id) == sorted(by_ranks, key=lambda r: r.request_id)


def test_a_prompt_listed_twice_gets_a_group_twice_as_large():
    assert [index for _, index in starts_of([PROMPT, PROMPT], 2)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="listed 2 times"):
        scheduler(rules(), [(PROMPT, 0), (PROMPT, 0)])


def test_a_completion_that_was_not_asked_for_is_an_error():
    play_one = scheduler(rules())
    (request,) = play_one.next_requests()
    play_one.accept(said(request, "Add."))
    with pytest.raises(ValueError, match=r"'0/p0/0/0', which is not in flight"):
        play_one.accept(said(request, "Add."))


MESSAGES = ["Add them.", "It is 5.", "Check [FINISH]", "\\boxed{5}", "<|im_end|> \u00e9", ""]


def digest(*key: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def scripted_answer(request: TurnRequest) -> tuple[tuple[int, ...], StopReason]:
    """Depends on the request alone."""
    ids = CHAT.encode_message(MESSAGES[digest(request.seed) % len(MESSAGES)])
    if len(ids) > request.max_tokens or request.seed % 11 == 0:
        return ids[:-1][: request.max_tokens], StopReason.LENGTH
    return ids, StopReason.STOP


def play_scripted(latency_salt: int, max_num_seqs: int, the_rules: DialogueRules) -> tuple[list[dict], list[str], list[tuple[int, int]]]:
    engines = {
        name: ScriptedEngine(scripted_answer, latency=lambda r: 1 + digest(latency_salt, r.request_id) % 5, max_num_seqs=max_num_seqs)
        for name in ("planner", "solver")
    }
    starts = starts_of([Prompt(f"p{i}", f"What is {i} + {i}?", str(2 * i)) for i in range(6)], 3)
    order, progress = [], []
    episodes = play(scheduler(the_rules, starts), engines, lambda e: order.append(e.episode_id), lambda *p: progress.append(p))
    return [e.to_json() for e in episodes], order, progress


def test_two_runs_with_different_latencies_give_identical_episodes():
    the_rules = rules(policy_of_role={META: "planner", REASONING: "solver"}, max_episode_tokens=60)
    first, first_order, progress = play_scripted(1, 1000, the_rules)
    second, second_order, _ = play_scripted(2, 3, the_rules)
    assert first == second
    assert first_order != second_order  # the runs were interleaved differently
    assert {row["status"] for row in first} >= {"finished", "max_rounds", "truncated"}
    assert progress[-1] == (18, sum(len(t["completion"]["token_ids"]) for row in first for t in row["turns"]))


def test_a_finished_turn_is_followed_at_once_while_slow_dialogues_still_run():
    answer = (CHAT.encode_message("Go. [FINISH]"), StopReason.STOP)
    engine = ScriptedEngine(lambda request: answer, latency=lambda request: 50 if "slow" in request.request_id else 1)
    ended_at = {}
    starts = [(Prompt("slow", "?", "1"), 0), (PROMPT, 0)]
    play(scheduler(rules(), starts), {"policy": engine}, lambda e: ended_at.update({e.prompt.prompt_id: engine.counters.num_steps}))
    assert ended_at == {"p0": 2, "slow": 100}  # a barrier between turns would end p0 at step 51


def test_an_engine_that_loses_a_request_or_a_missing_engine_is_an_error():
    class Amnesiac(ScriptedEngine):
        def submit(self, request):
            pass

    with pytest.raises(RuntimeError, match="1 turns are in flight"):
        play(scheduler(rules()), {"policy": Amnesiac(scripted_answer)})
    with pytest.raises(ValueError, match="no engine for policy 'policy', which speaks for meta_thinking"):
        play(scheduler(rules()), {"solver": ScriptedEngine(scripted_answer)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": (META,)}, "roles must be"),
        ({"max_rounds": 0}, "max_rounds must be at least 1, got 0"),
        ({"finish_marker": " "}, "finish_marker must hold text"),
        ({"reasoner_template": "{question}"}, r"must hold \{instruction\}"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_impossible_rules_are_errors_that_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        rules(**changes)


# --- several answers to one plan --------------------------------------------------------------------------------------


def two_plans_of_two_answers(plans: dict[str, str | tuple[str, StopReason]], **changes) -> tuple[list[Episode], list[TurnRequest]]:
    """Episodes 0 to 3 of one prompt, two answers a plan; every reasoner's answer is its own request id in a box."""
    starts = [(PROMPT, index) for index in range(4)]
    settings = {"samples_per_plan": 2, "max_rounds": 1, "finish_marker": None, **changes}
    play_all, requests = scheduler(rules(**settings), starts), []
    while not play_all.is_done:
        for request in play_all.next_requests():
            requests.append(request)
            said_now = plans[request.request_id] if request.role is META else f"\\boxed{{{request.request_id}}}"
            play_all.accept(said(request, *((said_now,) if isinstance(said_now, str) else said_now)))
    return play_all.episodes, requests


def test_a_plan_is_sampled_once_and_answered_several_times():
    episodes, requests = two_plans_of_two_answers({"0/p0/0/0": "Add.", "0/p0/2/0": "Count."})
    assert [r.request_id for r in requests if r.role is META] == ["0/p0/0/0", "0/p0/2/0"]
    assert [[turn.text for turn in e.turns] for e in episodes] == [
        [plan, f"\\boxed{{0/p0/{index}/1}}"] for index, plan in enumerate(["Add.", "Add.", "Count.", "Count."])
    ]
    assert [e.plan_of for e in episodes] == [None, "0/p0/0", None, "0/p0/2"]
    assert [e.status for e in episodes] == [EpisodeStatus.FINISHED] * 4
    assert len({r.seed for r in requests}) == 6, "two plans, four answers, each with luck of its own"


def test_who_shares_a_plan_labels_it_in_one_trace_only():
    episodes, _ = two_plans_of_two_answers({"0/p0/0/0": "Add.", "0/p0/2/0": "Count."})
    own, shared = traces_of(episodes[0]), traces_of(episodes[1])
    assert [trace.role for trace in own] == [META, REASONING] and [trace.role for trace in shared] == [REASONING]
    assert Episode.from_json(json.loads(json.dumps(episodes[1].to_json()))) == episodes[1]


def test_a_later_turn_of_a_shared_plan_is_labelled_and_the_plan_is_context():
    episodes, _ = two_plans_of_two_answers({f"0/p0/{i}/{t}": "Add." for i in range(4) for t in (0, 2)}, max_rounds=2)
    own, shared = (next(t for t in traces_of(episodes[i]) if t.role is META) for i in (0, 1))
    plan = len(CHAT.encode_message("Add."))
    assert own.turn_ids.count(0) == own.turn_ids.count(1) == shared.turn_ids.count(1) == plan and shared.turn_ids.count(0) == 0
    first_label = own.turn_ids.index(0)
    assert not any(shared.loss_mask[first_label : first_label + plan])


def test_a_plan_that_was_cut_ends_all_that_share_it_once_each():
    the_rules, handed_out = rules(samples_per_plan=2), []
    play_all = scheduler(the_rules, [(PROMPT, index) for index in range(2)])
    (request,) = play_all.next_requests()
    ended = play_all.accept(said(request, "Add and", StopReason.LENGTH))
    handed_out += play_all.take_ended_unasked()
    assert play_all.is_done and [ended, *handed_out] == play_all.episodes and play_all.take_ended_unasked() == []
    assert {e.status for e in play_all.episodes} == {EpisodeStatus.TRUNCATED}


def test_a_question_that_does_not_fit_ends_all_that_would_share_its_plan():
    play_all = scheduler(rules(samples_per_plan=2, max_context_tokens=10), [(PROMPT, index) for index in range(2)])
    assert play_all.is_done and play_all.take_ended_unasked() == play_all.episodes
    assert {e.status for e in play_all.episodes} == {EpisodeStatus.CONTEXT_OVERFLOW}


def test_a_shared_plan_that_is_played_elsewhere_is_refused():
    with pytest.raises(ValueError, match="'0/p0/1' answers the plan of '0/p0/0'"):
        scheduler(rules(samples_per_plan=2), [(PROMPT, 1)])
    with pytest.raises(ValueError, match="samples_per_plan is 2 where nobody plans"):
        rules(samples_per_plan=2, roles=(REASONING,))


# --- without the plan under test ---------------------------------------------------------------------------------------

PLANS = ["Add.", "Count.", ""]  # of the episodes 0, 1 and 2; the last one is an end token alone


def counterfactual_rules(kind: str, samples: int, **changes) -> DialogueRules:
    return rules(max_rounds=1, finish_marker=None, counterfactuals=Counterfactuals(kind, 3, samples), **changes)


def play_plans(the_rules: DialogueRules, starts: list[tuple[Prompt, int]]) -> tuple[list[Episode], dict[str, TurnRequest], list[Episode]]:
    """All episodes, the requests by id, the episodes as they ended. An episode's plan is that of its number, its answer its id in a box."""

    def answer(request: TurnRequest) -> tuple[tuple[int, ...], StopReason]:
        group_index = int(request.request_id.split("/")[2])
        text = PLANS[group_index % (3 + the_rules.num_counterfactuals)] if request.role is META else f"\\boxed{{{request.request_id}}}"
        return CHAT.encode_message(text), StopReason.STOP

    engine, ended = ScriptedEngine(answer), []
    episodes = play(scheduler(the_rules, starts), {"policy": engine}, ended.append)
    return episodes, {request.request_id: request for request in engine.requests}, ended


def test_an_ablated_reasoner_reads_what_it_reads_after_an_empty_plan():
    episodes, requests, ended = play_plans(counterfactual_rules("ablated", 2), starts_of([PROMPT], 5))
    assert [[turn.text for turn in e.turns] for e in episodes] == [
        [plan, f"\\boxed{{0/p0/{index}/1}}"] for index, plan in enumerate([*PLANS, "", ""])
    ]
    assert [e.counterfactual_of for e in episodes] == [None, None, None, "p0", "p0"] and {e.plan_of for e in episodes} == {None}
    assert requests["0/p0/3/1"].token_ids == requests["0/p0/4/1"].token_ids == requests["0/p0/2/1"].token_ids
    assert requests["0/p0/3/1"].token_ids == CHAT.opening("You solve.", "Question:\nWhat is 2 + 3?\n\nInstruction:\n")
    assert len(requests) == 3 * 2 + 2 and len({r.seed for r in requests.values()}) == 8, "nobody is asked for the empty plan"
    assert [e.num_sampled_tokens for e in episodes[3:]] == [len(e.turns[1].completion.token_ids) for e in episodes[3:]]
    assert len(ended) == 5 and {e.status for e in episodes} == {EpisodeStatus.FINISHED}


def test_a_swapped_reasoner_answers_the_plans_of_the_next_episodes_of_its_prompt():
    episodes, requests, ended = play_plans(counterfactual_rules("swapped", 2), starts_of([PROMPT], 9))
    # episode i and sample j stand at 3 + 2 i + j and follow plan (i + 1 + j) mod 3
    follows = [(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)]
    assert [(e.counterfactual_of, e.plan_of) for e in episodes[3:]] == [(f"0/p0/{i}", f"0/p0/{plan}") for i, plan in follows]
    for index, (_, plan) in enumerate(follows, start=3):
        assert episodes[index].turns[0].completion.token_ids == episodes[plan].turns[0].completion.token_ids
        assert requests[f"0/p0/{index}/1"].token_ids == requests[f"0/p0/{plan}/1"].token_ids, "exactly what the plan's own reasoner reads"
    assert sum(r.role is META for r in requests.values()) == 3 and len(requests) == 3 + 9
    assert len({r.seed for r in requests.values()}) == 12 and len(ended) == 9


def test_a_prompt_drawn_twice_swaps_plans_inside_each_of_its_two_groups():
    episodes, _, _ = play_plans(counterfactual_rules("swapped", 1), starts_of([PROMPT, PROMPT], 6))
    assert [e.group_index for e in episodes if not e.is_counterfactual] == [0, 1, 2, 6, 7, 8]
    assert [(e.counterfactual_of, e.plan_of) for e in episodes[9:]] == [
        ("0/p0/6", "0/p0/7"), ("0/p0/7", "0/p0/8"), ("0/p0/8", "0/p0/6"),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), [("ablated", 4), ("swapped", 6)])
def test_the_real_episodes_are_those_of_a_run_without_counterfactuals(kind, size):
    alone, _, _ = play_plans(rules(max_rounds=1, finish_marker=None), starts_of([PROMPT], 3))
    beside, _, _ = play_plans(counterfactual_rules(kind, 1), starts_of([PROMPT], size))
    assert [e.to_json() for e in beside[:3]] == [e.to_json() for e in alone]


def test_the_plan_that_a_counterfactual_episode_was_given_is_nobodys_to_train():
    for kind, size in (("ablated", 4), ("swapped", 6)):
        other = play_plans(counterfactual_rules(kind, 1), starts_of([PROMPT], size))[0][-1]
        assert other.is_counterfactual and [trace.role for trace in traces_of(other)] == [REASONING]
        assert Episode.from_json(json.loads(json.dumps(other.to_json()))) == other


def test_a_plan_that_was_cut_or_does_not_fit_ends_those_that_were_given_it():
    play_all = scheduler(counterfactual_rules("swapped", 1), starts_of([PROMPT], 6))
    for request in play_all.next_requests():
        play_all.accept(said(request, *(("Add and", StopReason.LENGTH) if request.request_id == "0/p0/1/0" else ("Add.",))))
    assert play_all.take_ended_unasked() == [play_all.episodes[3]], "the one in place of the plan of 0"
    assert [e.status for e in play_all.episodes if e.turns[0].text == "Add and"] == [EpisodeStatus.TRUNCATED] * 2
    too_long = scheduler(counterfactual_rules("ablated", 1, max_context_tokens=10), starts_of([PROMPT], 4))
    assert too_long.is_done and len(too_long.take_ended_unasked()) == 4
    assert {e.status for e in too_long.episodes} == {EpisodeStatus.CONTEXT_OVERFLOW}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": (REASONING,)}, r"roles \('reasoning',\)"),
        ({"max_rounds": 2}, "max_rounds 2"),
        ({"samples_per_plan": 3}, "samples_per_plan 3"),
    ],
)
def test_counterfactuals_outside_a_single_turn_of_two_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        rules(**{"max_rounds": 1, "counterfactuals": Counterfactuals("ablated", 3, 1), **changes})


def test_a_group_holds_no_more_swapped_plans_than_others():
    with pytest.raises(ValueError, match="3 swapped plans for each of 3 episodes: a group holds 2 other plans"):
        Counterfactuals("swapped", 3, 3)
    with pytest.raises(ValueError, match="got 3 and 0"):
        Counterfactuals("ablated", 3, 0)


def test_agents_with_different_tokenizers_hear_each_other_as_text():
    chats = {META: ChatFormat(tiny_tokenizer("chatml")), REASONING: ChatFormat(tiny_tokenizer("llama3"))}
    play_one = TurnScheduler([(PROMPT, 0)], rules=rules(), chat=chats, seed=1, step=0)
    heard = {}
    for role, text in ((META, "Add them."), (REASONING, "It is 5."), (META, "Right. [FINISH]"), (REASONING, "\\boxed{5}")):
        (request,) = play_one.next_requests()
        assert request.role is role and request.stop_token_ids == chats[role].stop_token_ids
        heard[role] = chats[role].tokenizer.decode(request.token_ids)
        ids = chats[role].encode_message(text)
        play_one.accept(Completion(request.request_id, ids, (0.0,) * len(ids), StopReason.STOP, 0))
    assert "It is 5." in heard[META] and "Right. [FINISH]" in heard[REASONING]
    assert play_one.episodes[0].status is EpisodeStatus.FINISHED
    written = [(turn.role, turn.text) for turn in play_one.episodes[0].turns]
    for ours, theirs in zip(traces_of(play_one.episodes[0]), traces_of_dialogue(chats, rules(), PROMPT.question, written), strict=True):
        assert ours.token_ids == theirs.token_ids and ours.turn_ids == theirs.turn_ids


def action(word: str, output: str = "") -> str:
    return json.dumps({"action": word, "output": output})


def test_the_meta_thinker_of_json_actions_is_asked_under_their_grammar_and_nobody_else():
    _, requests = talk(rules(json_actions=True), action("REWRITE", "Add 2 and 3."), "It is 5.", action("EMPTY", "[FINISH]"), "5")
    assert [r.regex for r in requests] == [action_regex("[FINISH]"), None] * 2
    _, plain = talk(rules(), "Add.", "5")
    assert [r.regex for r in plain] == [None] * 3


def test_the_reasoner_hears_the_output_of_an_action_and_the_meta_thinker_keeps_its_tokens():
    messages = action("DECOMPOSE", 'first "add",\nthen check'), "It is 5.", action("EMPTY"), "Still 5."
    episode, requests = talk(rules(json_actions=True), *messages)
    assert [(t.action, t.text) for t in episode.turns] == [
        (Action.DECOMPOSE, 'first "add",\nthen check'), (None, "It is 5."), (Action.EMPTY, ""), (None, "Still 5."),
    ]  # fmt: skip
    assert CHAT.tokenizer.decode(requests[3].token_ids) == (
        "<|im_start|>system\nYou solve.<|im_end|>\n<|im_start|>user\nQuestion:\nWhat is 2 + 3?\n\n"
        'Instruction:\nfirst "add",\nthen check<|im_end|>\n'
        "<|im_start|>assistant\nIt is 5.<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert CHAT.tokenizer.decode(requests[4].token_ids).count(f"assistant\n{messages[0]}<|im_end|>") == 1
    assert Episode.from_json(json.loads(json.dumps(episode.to_json()))) == episode


def test_an_empty_action_leaves_the_single_turn_reasoner_alone_with_the_problem():
    episode, requests = talk(rules(json_actions=True, max_rounds=1, finish_marker=None), action("EMPTY"), "5")
    assert episode.status is EpisodeStatus.FINISHED
    assert CHAT.tokenizer.decode(requests[1].token_ids).endswith(
        "Question:\nWhat is 2 + 3?\n\nInstruction:\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_action_that_finishes_ends_the_dialogue_as_any_message_does():
    for last in (action("EMPTY", "[FINISH]"), action("REWRITE", "Right. [FINISH]")):
        episode, _ = talk(rules(json_actions=True), action("EMPTY"), "4", last, "5", "never said")
        assert episode.status is EpisodeStatus.FINISHED and len(episode.turns) == 4


@pytest.mark.parametrize("lenient", [False, True])
def test_an_action_that_was_cut_ends_the_episode_truncated_even_where_cut_turns_may_go_on(lenient):
    the_rules = rules(json_actions=True, end_on_truncated_turn=not lenient)
    episode, _ = talk(the_rules, (action("REWRITE", "Add")[:-2], StopReason.LENGTH), "never said")
    assert episode.status is EpisodeStatus.TRUNCATED
    assert (episode.turns[0].action, episode.turns[0].text) == (None, '{"action": "REWRITE", "output": "Add')


def test_json_actions_need_a_meta_thinker():
    with pytest.raises(ValueError, match="json_actions are messages of the meta-thinker"):
        rules(json_actions=True, roles=(REASONING,))


def test_an_answer_without_a_plan_is_no_invalid_action():
    the_rules = rules(json_actions=True, max_rounds=1, finish_marker=None, counterfactuals=Counterfactuals("ablated", 1, 1))
    play_one = scheduler(the_rules, [(PROMPT, 0), (PROMPT, 1)])
    planned, answered = play_one.next_requests()
    assert (planned.role, answered.role) == (META, REASONING)
    assert play_one.accept(said(answered, "5")).status is EpisodeStatus.FINISHED

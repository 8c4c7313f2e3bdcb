"""ChatFormat on real model families: token-exact against their templates, over awkward text and over the published data.

Where a template rewrites history (Qwen3 drops old thoughts, Llama-3 trims what was said) the view keeps the sampled ids; only that differs.
The whole chat encoded at once is no reference for a message that begins with a newline: the header's own newline would merge with it, so
that tokens depend on neighbours. There the texts are compared; everywhere else the ids.
"""

import itertools
import random
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.repair import pair_views, read_role_views
from megatron_rema.rollout.scheduler import TurnScheduler
from megatron_rema.rollout.traces import traces_of, traces_of_dialogue
from megatron_rema.types import Completion, EpisodeStatus, Prompt, Role, StopReason
from tests.family_tokenizers import FAMILIES, QWEN_DEFAULT_SYSTEM, family_tokenizer, save_family
from tests.real_data import math_file

META, REASONING = Role.META_THINKING, Role.REASONING
NO_THOUGHT = "<think>\n\n</think>\n\n"
# what a generation prompt adds to the assistant's header, and the template drops once the message is history
OPENED = {"qwen3_no_thinking": NO_THOUGHT, "qwen3_2507": "<think>\n"}
DATE = {"date_string": "26 Jul 2024"}
# case -> (family, template_kwargs)
CASES = {
    "qwen2_5": ("qwen2_5", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_no_thinking": ("qwen3", {"enable_thinking": False}),
    "qwen3_2507": ("qwen3_2507", {}),
    "llama3": ("llama3", {}),
    "llama3_1": ("llama3_1", DATE),
}


@cache
def chat_of(case: str) -> ChatFormat:
    name, template_kwargs = CASES[case]
    return ChatFormat(family_tokenizer(name), template_kwargs=template_kwargs)


def render(case: str, system: str, *messages: str, prompt: bool = True) -> str:
    """The template's own text of system, user, assistant, user, ..."""
    name, template_kwargs = CASES[case]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
    head = [{"role": "system", "content": system}] if system else []
    return family_tokenizer(name).apply_chat_template(head + chat, tokenize=False, add_generation_prompt=prompt, **template_kwargs)


def expected_view(case: str, system: str, *messages: str) -> str:
    """The template's text of a chat that ends with a user, each assistant message as it was said, after the prompt it was said to."""
    own = messages[1::2]
    names = [text if i % 2 == 0 else f"OWN{i // 2}OWN" for i, text in enumerate(messages)]
    text = render(case, system, *names)
    for i, said in enumerate(own):
        before, found, after = text.partition(f"OWN{i}OWN")
        assert found
        text = before + OPENED.get(case, "") + said + after
    return text


def view(case: str, system: str, *messages: str) -> tuple[int, ...]:
    """The same chat as ChatFormat builds it."""
    chat = chat_of(case)
    ids = chat.opening(system, messages[0])
    for said, heard in zip(messages[1::2], messages[2::2], strict=True):
        ids += chat.encode_message(said)
        ids += chat.following(ids, heard)
    return ids


def encode(case: str, text: str) -> tuple[int, ...]:
    """A whole chat at once, special tokens recognised."""
    return tuple(chat_of(case).tokenizer.encode(text, add_special_tokens=False))


def decode(case: str, ids) -> str:
    return chat_of(case).tokenizer.decode(list(ids))


def as_read(case: str, text: str) -> str:
    return FAMILIES[CASES[case][0]].as_read(text)


def begins_with_newline(text: str) -> bool:
    return re.match(r"\s*[\r\n]", text) is not None


SPELLINGS = sorted({token for family in FAMILIES.values() for token in (*family.special, *family.unflagged)} | {"OWN", "[FINISH]"})
awkward_pieces = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [*SPELLINGS, "\n", "\n\n", " \n ", "\r\n", "  ", "\t", " the", "'s", "1234", ".[", "e\u0301", "\U0001f469\u200d\U0001f52c"]
    ),
    st.sampled_from(["<|im_", "end|>", "<", "|>", "</think", "PLACEHOLDERUSER", "\u0338", "\u3000", "\x85", "\x1c", "\u200b", "\ufeff"]),
)
awkward_texts = st.lists(awkward_pieces, max_size=6).map("".join).filter(lambda text: not re.search(r"OWN\dOWN", text))
# no leading white space that a header's newline could merge with, nothing that looks like a special token
plain_texts = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(["\n\n", " the", " \n", "1234567", ".[FINISH]"])), min_size=1).map(
    lambda pieces: re.sub(r"^\s+", "", re.sub("[<>]", "", "".join(pieces))) or "x"
)
conversations = st.lists(awkward_texts, min_size=0, max_size=2).flatmap(lambda own: st.tuples(*[awkward_texts] * (2 * len(own) + 1)))
plain_conversations = st.integers(0, 2).flatmap(lambda rounds: st.tuples(*[plain_texts] * (2 * rounds + 1)))

LITERAL = {  # the published formats, written by hand: system S, user U, assistant A, user V
    "qwen2_5": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
LITERAL["qwen3"] = LITERAL["qwen2_5"]
LITERAL["qwen3_no_thinking"] = LITERAL["qwen2_5"].replace("assistant\n", f"assistant\n{NO_THOUGHT}")
LITERAL["qwen3_2507"] = LITERAL["qwen2_5"].replace("assistant\n", "assistant\n<think>\n")
LITERAL["llama3_1"] = LITERAL["llama3"].replace("S<", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nS<")


@pytest.mark.parametrize("case", CASES)
def test_a_view_is_the_familys_published_format(case):
    ids = view(case, "S", "U", "A", "V")
    assert decode(case, ids) == LITERAL[case] and ids == encode(case, LITERAL[case])


NO_SYSTEM = {
    "qwen2_5": f"<|im_start|>system\n{QWEN_DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    "qwen3": "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
    "qwen3_no_thinking": f"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n{NO_THOUGHT}",
    "qwen3_2507": "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3_1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


@pytest.mark.parametrize("case", CASES)
def test_without_a_system_prompt_the_family_says_what_it_says_by_default(case):
    ids = chat_of(case).opening("", "U")
    assert decode(case, ids) == NO_SYSTEM[case] == render(case, "", "U") and ids == encode(case, NO_SYSTEM[case])


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(list(CASES)), system=plain_texts, messages=plain_conversations)
def test_ids_equal_those_of_the_whole_rendered_chat(case, system, messages):
    ids, text = view(case, system, *messages), expected_view(case, system, *messages)
    assert ids == encode(case, text)
    is_rewritten = (case in OPENED and len(messages) > 1) or (case.startswith("llama") and any(m != m.strip() for m in messages[1::2]))
    assert (text == render(case, system, *messages)) is not is_rewritten


@settings(max_examples=250, deadline=None)
@given(case=st.sampled_from(list(CASES)), system=awkward_texts, messages=conversations)
def test_the_text_of_a_view_is_the_rendered_chat_whatever_the_messages_hold(case, system, messages):
    chat, ids = chat_of(case), view(case, system, *messages)
    assert as_read(case, decode(case, ids)) == as_read(case, expected_view(case, system, *messages))
    special = set(chat.tokenizer.all_special_ids)
    harmless = view(case, "s" if system else "", *("x" for _ in messages))
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]  # none lost, none smuggled in by a message


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("message", ["\n12", "\n\nthe", " \n the", "\r\n", "\n"])
def test_a_leading_newline_does_not_merge_with_the_header(case, message):
    """Merged, the ids of a prompt would depend on the first characters that follow it: a sampled message could not continue it."""
    chat = chat_of(case)
    opening = chat.opening("S", "U")
    whole = opening + chat.encode_message(message)
    assert whole[: len(opening)] == opening and decode(case, whole) == decode(case, opening) + message + decode(case, [chat.end_token_id])
    assert encode(case, decode(case, whole))[: len(opening)] != opening  # encoded at once it does merge: this is why


@settings(max_examples=150, deadline=None)
@given(data=st.data(), case=st.sampled_from(list(CASES)), question=awkward_texts)
def test_the_loss_mask_covers_exactly_what_was_sampled(data, case, question):
    chat = chat_of(case)
    rules = DialogueRules(
        max_turn_tokens=60, max_episode_tokens=400, max_context_tokens=4000, max_rounds=3, end_on_truncated_turn=False,
        system_prompts={META: "You plan.", REASONING: "You solve."},
    )  # fmt: skip
    scheduler = TurnScheduler([(Prompt("p", question, "5"), 0)], rules=rules, chat=chat, seed=0, step=0)
    sampled, prompts = {role: [] for role in Role}, {role: [] for role in Role}
    while not scheduler.is_done:
        (request,) = scheduler.next_requests()
        text_ids = awkward_texts.map(chat.encode_text)
        one_by_one = awkward_texts.map(lambda text: tuple(i for character in text for i in chat.encode_text(character)))
        any_ids = st.lists(st.integers(0, len(chat.tokenizer) - 1), max_size=10).map(tuple)
        body = data.draw(st.one_of(text_ids, one_by_one, any_ids))[: request.max_tokens - 1]
        is_stop = data.draw(st.booleans())
        ids = (*body, data.draw(st.sampled_from(chat.stop_token_ids))) if is_stop else body
        sampled[request.role].append(ids)
        prompts[request.role].append(request.token_ids)
        reason = StopReason.STOP if is_stop else StopReason.LENGTH
        scheduler.accept(Completion(request.request_id, ids, (-0.5,) * len(ids), reason, weight_version=0))
    for trace in traces_of(scheduler.episodes[0]):
        labelled = [(k, i) for k, i, own in zip(trace.turn_ids, trace.token_ids, trace.loss_mask, strict=True) if own]
        assert labelled == [(k, i) for k, ids in enumerate(sampled[trace.role]) for i in ids]
        for prompt, ids in zip(prompts[trace.role], sampled[trace.role], strict=True):
            assert trace.token_ids[: len(prompt) + len(ids)] == prompt + ids  # what the engine read and said, verbatim
        assert len(trace.token_ids) == len(prompts[trace.role][-1]) + len(sampled[trace.role][-1])


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(list(CASES)),
    cuts=st.sets(st.integers(1, 7)),
    before=st.sampled_from(["", "Done.", "Done. ", "\\(", "x\n\n", "[", "<"]),
    after=st.sampled_from(["", ".", "]", "\\).", "\n"]),
)
def test_a_finish_marker_split_over_any_tokens_ends_the_episode(case, cuts, before, after):
    chat = chat_of(case)
    edges = [0, *sorted(cuts), 8]
    pieces = [before, *("[FINISH]"[a:b] for a, b in itertools.pairwise(edges)), after]
    ids = tuple(i for piece in pieces for i in chat.encode_text(piece))
    rules = DialogueRules(max_turn_tokens=60, max_episode_tokens=400, max_context_tokens=4000, max_rounds=9)
    scheduler = TurnScheduler([(Prompt("p", "?", "5"), 0)], rules=rules, chat=chat, seed=0, step=0)
    for said in (ids, chat.encode_text("\\boxed{5}")):
        (request,) = scheduler.next_requests()
        said = (*said, chat.end_token_id)
        scheduler.accept(Completion(request.request_id, said, (0.0,) * len(said), StopReason.STOP, weight_version=0))
    (episode,) = scheduler.episodes
    assert episode.status is EpisodeStatus.FINISHED and episode.turns[0].text == f"{before}[FINISH]{after}"


@pytest.mark.parametrize("case", CASES)
def test_the_markers_own_ids_need_not_stand_in_a_message_that_holds_it(case):
    chat = chat_of(case)
    marker, message = chat.encode_text("[FINISH]"), chat.encode_text("The answer is \\([FINISH]\\).")
    assert len(marker) > 1 and not any(message[i : i + len(marker)] == marker for i in range(len(message)))
    assert "[FINISH]" in chat.text_of(message)


@pytest.mark.parametrize("case", CASES)
def test_a_message_that_was_cut_is_closed_as_the_template_closes_it_and_its_special_tokens_are_seen(case):
    chat, opening = chat_of(case), chat_of(case).opening("S", "U")
    for said in (chat.encode_text("A"), chat.encode_message("A")):  # cut by length, and ended by itself
        assert decode(case, opening + said + chat.following(said, "V")) == LITERAL[case]
    first = chat.opening("S", "U")[0]  # a control token in the middle of a message is part of its text, only the last one is not
    assert chat.text_of((first, *chat.encode_message("A"))) == decode(case, [first]) + "A"


# ---- what each family does with history


def test_qwen3_thoughts_stay_in_the_view_that_the_template_would_strip_them_from():
    said = "<think>\nTry 7.\n</think>\n\nUse 7."
    ids = view("qwen3", "S", "U", said, "V")
    assert decode("qwen3", ids) == LITERAL["qwen3"].replace("\nA<", f"\n{said}<")
    assert render("qwen3", "S", "U", said, "V") == LITERAL["qwen3"].replace("\nA<", "\nUse 7.<")  # the one difference
    chat = chat_of("qwen3")
    thought = chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [i for i in chat.encode_text(said) if i in thought] == thought  # as the model samples it: one token each


def test_qwen3_without_thinking_keeps_the_empty_thought_of_each_prompt_and_labels_none_of_it():
    texts = [(META, "plan"), (REASONING, "6"), (META, "Done. [FINISH]"), (REASONING, "\\boxed{6}")]
    chat = chat_of("qwen3_no_thinking")
    rules = DialogueRules(max_turn_tokens=9, max_episode_tokens=9, max_context_tokens=9)
    for trace in traces_of_dialogue(chat, rules, "6?", texts):
        assert decode("qwen3", trace.token_ids).count(f"assistant\n{NO_THOUGHT}") == 2
        labelled = decode("qwen3", [i for i, own in zip(trace.token_ids, trace.loss_mask, strict=True) if own])
        assert "think" not in labelled and labelled.count("<|im_end|>") == 2
    history = render("qwen3_no_thinking", "", "6?", "plan", "6")
    assert history.count(NO_THOUGHT) == 1 and history.endswith(NO_THOUGHT)  # the template keeps it in the generation prompt alone


def test_a_thought_spelled_out_in_a_message_does_not_close_the_empty_one():
    chat = chat_of("qwen3_no_thinking")
    thought = chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert set(thought).isdisjoint(chat.encode_text("</think><think>")) and chat.opening("", "</think>").count(thought[1]) == 1


@pytest.mark.parametrize("case", ["llama3", "llama3_1"])
def test_llama_trims_what_is_heard_but_never_what_was_said(case):
    said = " A\n"
    ids = view(case, " S ", "\n U", said, "V\n\n")
    assert decode(case, ids) == LITERAL[case].replace("\nA<", f"\n{said}<")
    assert render(case, " S ", "\n U", said, "V\n\n") == LITERAL[case]


@pytest.mark.parametrize("case", ["llama3", "llama3_1"])
def test_the_first_token_stands_once_though_template_and_post_processor_both_add_it(case):
    tokenizer, ids = chat_of(case).tokenizer, view(case, "S", "U", "A", "V")
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.encode(render(case, "S", "U")).count(tokenizer.bos_token_id) == 2  # the trap


def test_llama3_1_prints_the_date_that_it_is_given():
    dated = ChatFormat(family_tokenizer("llama3_1"), template_kwargs={"date_string": "01 Jan 2025"})
    text = dated.tokenizer.decode(dated.opening("S", "U"))
    assert "Today Date: 01 Jan 2025\n\nS<|eot_id|>" in text and text.replace("01 Jan 2025", "26 Jul 2024") == render("llama3_1", "S", "U")


# ---- tokenizers


@pytest.mark.parametrize("name", FAMILIES)
def test_no_special_token_is_lost_in_the_vocabulary_in_text_or_in_a_folder(name, tmp_path):
    from transformers import AutoTokenizer

    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    save_family(name, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat, again = ChatFormat(tokenizer), ChatFormat(loaded)
    assert type(loaded).__name__.startswith("Qwen2Tokenizer") is name.startswith("qwen")  # transformers' own class for the family
    assert len(loaded) == len(tokenizer)
    for token in (*family.special, *family.unflagged):
        (token_id,) = tokenizer.encode(token, add_special_tokens=False)
        assert loaded.encode(f"a{token}b", add_special_tokens=False)[1] == token_id and tokenizer.decode([token_id]) == token
        # in a message it stays text, but for an unflagged token that the template never prints: only the model says that one
        spelled, is_printed = chat.encode_text(token), token_id in chat.opening("S", "U")
        assert (token_id in spelled) is (token in family.unflagged and not is_printed) and tokenizer.decode(spelled) == token
    for text in ("\n\nIt's 1234567 <|im_end|> na\u00efve e\u0301 \u4f60\u597d\r\n", "".join(SPELLINGS)):
        assert chat.opening(text, text) == again.opening(text, text) and chat.encode_message(text) == again.encode_message(text)
    assert chat.stop_token_ids == again.stop_token_ids


@pytest.mark.parametrize(("name", "num_tokens"), [("qwen2_5", 7), ("qwen3", 7), ("qwen3_2507", 7), ("llama3", 3), ("llama3_1", 3)])
def test_numbers_are_cut_as_the_family_cuts_them(name, num_tokens):
    words = family_tokenizer(name).backend_tokenizer.pre_tokenizer.pre_tokenize_str("1234567")
    assert len(words) == num_tokens  # digit by digit, or in threes: 123 456 7


# ---- published data


SYSTEMS = {META: "You are a meta-thinking agent. Plan; end with [FINISH].", REASONING: "Reason step by step; use \\boxed{}."}


def sampled(items: list, case: str, num: int) -> list:
    """Everything for the first case of each normalizer and pattern, a fixed sample for the others: a minute is enough."""
    return items if case in ("qwen3_no_thinking", "llama3") else random.Random(0).sample(items, min(num, len(items)))


@pytest.mark.parametrize("case", CASES)
def test_all_published_problems_round_trip_as_prompts(case):
    import pyarrow.parquet as parquet

    questions = parquet.read_table(math_file("math_train_lv3to5_8k.parquet"), columns=["question"])["question"].to_pylist()
    assert len(questions) == 8523
    chat = chat_of(case)
    special = set(chat.tokenizer.all_special_ids)
    num_special = sum(i in special for i in chat.opening(SYSTEMS[META], "x"))
    for question in sampled(questions, case, 800):
        ids, text = chat.opening(SYSTEMS[META], question), render(case, SYSTEMS[META], question)
        assert decode(case, ids) == as_read(case, text)
        assert ids == encode(case, text) or begins_with_newline(question)
        assert sum(i in special for i in ids) == num_special


@pytest.mark.parametrize("case", CASES)
def test_all_published_dialogues_round_trip_as_traces(case):
    views = [read_role_views(math_file(f"mamrp_{name}.jsonl")) for name in ("meta_thinking", "reasoning")]
    dialogues = pair_views(*views)
    assert len(dialogues) == 804
    chat = chat_of(case)
    rules = DialogueRules(max_turn_tokens=1, max_episode_tokens=1, max_context_tokens=1, system_prompts=SYSTEMS)
    special = set(chat.tokenizer.all_special_ids)
    end = chat.tokenizer.decode([chat.end_token_id])
    for dialogue in sampled(dialogues, case, 80):
        texts = [text for _, text in dialogue.turns]
        first = rules.first_message(dialogue.question, texts[0])
        told = {META: [dialogue.question, *texts[:-1]], REASONING: [first, *texts[1:]]}  # heard, said, heard, said, ...
        for trace in traces_of_dialogue(chat, rules, dialogue.question, dialogue.turns):
            messages = told[trace.role]
            said = messages[1::2]
            # the whole trace: the chat up to the last prompt, then the last message and its end token
            text = expected_view(case, SYSTEMS[trace.role], *messages[:-1]) + messages[-1] + end
            assert decode(case, trace.token_ids) == as_read(case, text)
            assert trace.token_ids == encode(case, text) or any(map(begins_with_newline, messages))
            # the labels: each message with its end token, nothing else
            labels = [i for i, own in zip(trace.token_ids, trace.loss_mask, strict=True) if own]
            assert decode(case, labels) == as_read(case, "".join(message + end for message in said))
            assert sum(i in special for i in labels) == len(said)

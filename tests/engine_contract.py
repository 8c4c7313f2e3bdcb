"""What every engine that holds a model must do. Subclasses (one per engine) provide ``start``: model path -> running engine.

The reference is a plain transformers forward over prompt + sampled tokens. Old and new weights differ by about 1 nat per token, so
agreement to TOLERANCE says without doubt which weights spoke.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_rema.engine.grammar import Grammars
from megatron_rema.rollout.actions import action_regex, parse_action
from megatron_rema.types import Action, Completion, Engine, Role, StopReason, TurnRequest
from tests.tiny_models import save_tiny_model
from tests.unit.tiny_tokenizer import tiny_tokenizer

TOLERANCE = 2e-5  # nats, fp32: two orders of summation over 2 layers; 1.1e-5 was the worst seen over 4,096 tokens of a larger model
VOCAB = 101
MODEL = "qwen2_tied"


def request(name: str, *, length: int = 20, max_tokens: int = 12, **kw) -> TurnRequest:
    """A request whose context depends on its name's hash-free seed: ``name`` must end in a number."""
    seed = kw.pop("seed", int(name.rsplit("_", 1)[-1]))
    context = kw.pop("context", tuple((7 * i + 13 * seed) % 90 + 5 for i in range(length)))
    return TurnRequest(name, "policy", Role.REASONING, context, max_tokens, seed, **kw)


def finish(engine: Engine) -> dict[str, Completion]:
    """Step until nothing is left; by request id."""
    done: dict[str, Completion] = {}
    while engine.num_unfinished:
        for completion in engine.step():
            assert completion.request_id not in done
            done[completion.request_id] = completion
    return done


def ask(engine: Engine, *requests: TurnRequest) -> list[Completion]:
    for one in requests:
        engine.submit(one)
    done = finish(engine)
    return [done[one.request_id] for one in requests]


def weights(path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())  # a tied lm_head appears once, as the embedding


def changed(named: dict[str, torch.Tensor], **kw: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    return iter({**named, **kw}.items())


@torch.no_grad()
def forward_logits(path, one: TurnRequest, completion: Completion) -> torch.Tensor:
    """[n, V] logits that the sampled tokens were drawn from, under the checkpoint at ``path``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokens = torch.tensor([*one.token_ids, *completion.token_ids])
    return model(tokens[None]).logits[0, len(one.token_ids) - 1 : -1].float()


def forward_logprobs(path, one: TurnRequest, completion: Completion) -> torch.Tensor:
    """[n] log-probabilities of the sampled tokens under the checkpoint at ``path``, temperature applied."""
    logprobs = (forward_logits(path, one, completion) / (one.temperature or 1.0)).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def gap(path, one: TurnRequest, completion: Completion) -> float:
    """Largest difference in nats between the engine's log-probabilities and the forward's."""
    assert len(completion.logprobs) == len(completion.token_ids) > 0
    return (forward_logprobs(path, one, completion) - torch.tensor(completion.logprobs)).abs().max().item()


ACTION = {"regex": action_regex("[FINISH]"), "stop_token_ids": (tiny_tokenizer("chatml").eos_token_id,)}


def allowed_by_grammar(path, one: TurnRequest, completion: Completion) -> torch.Tensor:
    """[n, V] bool: the tokens that each sampled one was chosen from."""
    vocab_size = len(tiny_tokenizer("chatml"))
    matcher = Grammars(path, vocab_size).matcher(one.regex, one.stop_token_ids)
    rows = []
    for token_id in completion.token_ids:
        bits = int.from_bytes(matcher.allowed(), "little")  # one long number, read bit by bit: another way than the product's
        rows.append([bool(bits >> v & 1) for v in range(vocab_size)])
        matcher.accept(token_id)
    return torch.tensor(rows)


class EngineContract:
    @pytest.fixture
    def start(self):
        raise NotImplementedError

    @pytest.fixture
    def speaker(self, tmp_path):
        """A model with a tokenizer, as grammars need it."""
        return save_tiny_model(tmp_path / "speaker", MODEL, tokenizer=tiny_tokenizer("chatml"))

    def test_every_turn_that_ends_under_the_grammar_of_actions_is_a_valid_action(self, start, speaker):
        engine = start(speaker, constrained=True, max_model_len=512)
        completions = ask(engine, *(request(f"r_{i}", max_tokens=300, **ACTION) for i in range(16)))
        ended = [c.token_ids[:-1] for c in completions if c.stop_reason is StopReason.STOP]
        messages = [parse_action(tiny_tokenizer("chatml").decode(ids), "[FINISH]") for ids in ended]
        assert len(messages) > 4 and None not in messages  # config.json has another eos (2), which must not end a turn
        assert Action.EMPTY in {action for action, _ in messages}
        assert all(len(c.token_ids) == 300 for c in completions if c.stop_reason is StopReason.LENGTH)  # nothing else ends a turn

    @pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
    def test_logprobs_under_a_grammar_are_those_over_the_tokens_that_it_allows(self, start, speaker, temperature):
        engine, one = start(speaker, constrained=True), request("a_3", max_tokens=60, temperature=temperature, **ACTION)
        free = request("b_4", max_tokens=60, temperature=temperature)
        completion, unconstrained = ask(engine, one, free)
        allowed_nV = allowed_by_grammar(speaker, one, completion)
        logits_nV = forward_logits(speaker, one, completion) / (temperature or 1.0)
        labels_n1 = torch.tensor(completion.token_ids)[:, None]
        expected_n = logits_nV.masked_fill(~allowed_nV, float("-inf")).log_softmax(-1).gather(1, labels_n1)[:, 0]
        sampled_n = torch.tensor(completion.logprobs)
        assert (expected_n - sampled_n).abs().max() < TOLERANCE
        forced_n = allowed_nV.sum(1) == 1
        assert forced_n.sum() > 20 and (sampled_n[forced_n] == 0.0).all()  # {"action": " and the like, byte by byte
        assert (logits_nV.log_softmax(-1).gather(1, labels_n1)[:, 0] - sampled_n)[forced_n].min() < -1  # not what the policy alone says
        assert gap(speaker, free, unconstrained) < TOLERANCE  # its neighbour in the batch is as free as ever

    def test_a_turn_under_a_grammar_ends_with_its_own_stop_tokens_only(self, start, speaker):
        engine = start(speaker, constrained=True)
        ends = {
            c.token_ids[-1] for c in ask(engine, *(request(f"r_{i}", max_tokens=9, regex="a?", stop_token_ids=(7, 9)) for i in range(20)))
        }
        assert ends == {7, 9}  # neither the tokenizer's end of sequence nor that of config.json

    def test_new_weights_in_mid_turn_leave_the_grammar_where_it_was(self, start, speaker):
        engine, one = start(speaker, constrained=True, max_model_len=512), request("a_1", max_tokens=300, **ACTION)
        engine.submit(one)
        for _ in range(20):
            engine.step()
        engine.load_weights(iter(weights(speaker).items()), weight_version=1)
        completion = finish(engine)["a_1"]
        assert allowed_by_grammar(speaker, one, completion).shape[0] == len(completion.token_ids)  # every token was accepted

    def test_a_regex_that_could_not_be_kept_is_refused(self, start, speaker, model):
        with pytest.raises(ValueError, match="'a_1' has a regex, but the engine was started without its tokenizer"):
            start(model).submit(request("a_1", **ACTION))
        with pytest.raises(ValueError, match="'a_1' has a regex but no stop_token_ids"):
            start(speaker, constrained=True).submit(request("a_1", regex="a"))

    @pytest.fixture
    def model(self, tmp_path):
        return save_tiny_model(tmp_path / "old", MODEL)

    @pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied", "qwen3", "llama3"])
    def test_logprobs_are_the_forwards_before_and_after_new_weights(self, start, tmp_path, name):
        old, new = (save_tiny_model(tmp_path / f"{seed}", name, seed=seed) for seed in (0, 1))
        engine = start(old)
        requests = [request(f"r_{i}", length=10 + 17 * i, temperature=0.7) for i in range(4)]
        before = ask(engine, *requests)
        assert max(gap(old, r, c) for r, c in zip(requests, before, strict=True)) < TOLERANCE
        engine.load_weights(iter(weights(new).items()), weight_version=1)
        after = ask(engine, *requests)
        assert max(gap(new, r, c) for r, c in zip(requests, after, strict=True)) < TOLERANCE
        assert min(gap(old, r, c) for r, c in zip(requests, after, strict=True)) > 0.1  # the new weights are really others
        engine.load_weights(iter(weights(old).items()), weight_version=2)
        assert [c.token_ids for c in ask(engine, *requests)] == [c.token_ids for c in before]

    def test_completions_carry_the_weight_version_of_their_submission(self, start, model):
        engine = start(model)
        assert engine.weight_version == 0
        assert ask(engine, request("a_1"))[0].weight_version == 0
        engine.load_weights(iter(weights(model).items()), weight_version=7)
        assert engine.weight_version == 7
        assert ask(engine, request("a_2"))[0].weight_version == 7

    def test_weights_that_arrive_in_mid_turn_speak_from_the_next_token_on(self, start, model, tmp_path):
        new = save_tiny_model(tmp_path / "new", MODEL, seed=1)
        engine, one = start(model), request("a_1", length=40, max_tokens=20)
        engine.submit(one)
        for _ in range(8):
            assert engine.step() == []
        engine.load_weights(iter(weights(new).items()), weight_version=1)
        completion = finish(engine)["a_1"]
        sampled = torch.tensor(completion.logprobs)
        under_old = (forward_logprobs(model, one, completion) - sampled).abs()
        under_new = (forward_logprobs(new, one, completion) - sampled).abs()
        assert under_old[:8].max() < TOLERANCE and under_new[8:].max() < TOLERANCE  # stale keys would show from token 8 on
        assert under_old[8:].max() > 0.1
        assert completion.weight_version == 0  # the oldest that any of its tokens came from

    def test_a_stop_token_ends_the_turn_and_is_its_last_token(self, start, model):
        engine = start(model)
        free = ask(engine, request("a_1", max_tokens=30))[0]
        assert (free.stop_reason, len(free.token_ids)) == (StopReason.LENGTH, 30)
        stop = next(t for t in free.token_ids[5:] if t not in free.token_ids[:5])
        cut = ask(engine, request("a_1", max_tokens=30, stop_token_ids=(stop, 100)))[0]
        first = free.token_ids.index(stop)
        assert cut.stop_reason is StopReason.STOP
        assert cut.token_ids == free.token_ids[: first + 1]
        assert cut.logprobs == pytest.approx(free.logprobs[: first + 1], abs=TOLERANCE)

    def test_only_the_requests_own_stop_tokens_stop(self, start, model):
        engine = start(model)
        eos, requests = 2, [request(f"r_{i}", max_tokens=60) for i in range(8)]
        completions = ask(engine, *requests)
        assert any(eos in c.token_ids[:-1] for c in completions)  # 480 draws from 101 tokens: the model's eos comes up
        assert {c.stop_reason for c in completions} == {StopReason.LENGTH}

    def test_a_stop_token_on_the_last_of_the_budget_counts_as_stop(self, start, model):
        engine = start(model)
        free = ask(engine, request("a_1", max_tokens=10))[0]
        last = free.token_ids.index(free.token_ids[-1])  # its first appearance
        cut = ask(engine, request("a_1", max_tokens=last + 1, stop_token_ids=(free.token_ids[-1],)))[0]
        assert (cut.stop_reason, len(cut.token_ids)) == (StopReason.STOP, last + 1)

    def test_a_request_is_answered_by_its_seed_alone(self, start, model):
        engine = start(model)
        alone = ask(engine, request("a_1", seed=5))[0]
        crowd = ask(engine, *(request(f"x_{i}", length=5 + i) for i in range(6)), request("b_1", seed=5))[-1]
        assert crowd.token_ids == alone.token_ids
        other = ask(engine, request("c_1", seed=6, context=request("a_1", seed=5).token_ids))[0]
        assert other.token_ids != alone.token_ids

    def test_the_trainers_random_state_is_left_alone(self, start, model):
        torch.manual_seed(3)
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        engine = start(model)
        ask(engine, request("a_1"))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(threads)  # still the real one

    def test_turns_of_unequal_length_overlap_and_successors_join_in_the_middle(self, start, model):
        engine = start(model, max_num_seqs=3)
        waiting = [request(f"r_{i}", length=8 + 23 * (i % 4), max_tokens=4 + 5 * (i % 3)) for i in range(9)]
        asked, done = {r.request_id: r for r in waiting}, []
        for one in waiting[:5]:
            engine.submit(one)
        for one in waiting[5:]:
            done += engine.step()
            engine.submit(one)
        while engine.num_unfinished:
            done += engine.step()
        assert sorted(c.request_id for c in done) == sorted(asked)
        assert [c.request_id for c in done] != sorted(asked)  # short turns overtook long ones
        assert max(gap(model, asked[c.request_id], c) for c in done) < TOLERANCE

    def test_a_following_turn_builds_on_the_tokens_of_the_one_before(self, start, model):
        engine, first = start(model), request("a_1", length=50)
        answer = ask(engine, first)[0]
        second = request("a_2", context=(*first.token_ids, *answer.token_ids, 7, 8, 9))
        assert gap(model, second, ask(engine, second)[0]) < TOLERANCE

    def test_temperature_zero_is_greedy_and_reports_the_untempered_policy(self, start, model):
        engine = start(model)
        first, second = (ask(engine, request("a_1", seed=seed, context=(5, 6, 7), temperature=0.0))[0] for seed in (1, 2))
        assert first.token_ids == second.token_ids
        assert gap(model, request("a_1", context=(5, 6, 7), temperature=0.0), first) < TOLERANCE
        assert gap(model, request("a_1", context=(5, 6, 7)), first) < TOLERANCE

    def test_top_p_draws_from_the_nucleus_only_and_renormalises(self, start, model):
        engine = start(model)
        one = request("a_1", max_tokens=40, top_p=0.3)
        completion = ask(engine, one)[0]
        plain = forward_logprobs(model, one, completion)
        mass = (plain - torch.tensor(completion.logprobs)).exp()  # p / (p / mass of the nucleus) = that mass
        assert mass.min() >= 0.3 - 1e-4 and mass.max() < 0.7  # 0.3 plus at most one token's probability

    def test_two_engines_in_one_process_do_not_know_each_other(self, start, tmp_path):
        paths = [save_tiny_model(tmp_path / f"{seed}", MODEL, seed=seed) for seed in (0, 1)]
        engines, one = [start(path) for path in paths], request("a_1")
        for engine in engines:
            engine.submit(one)
        done = [[], []]
        while any(engine.num_unfinished for engine in engines):
            for engine, ended in zip(engines, done, strict=True):
                ended += engine.step()
        assert all(gap(path, one, ended[0]) < TOLERANCE for path, ended in zip(paths, done, strict=True))
        engines[0].load_weights(iter(weights(paths[1]).items()), weight_version=1)
        assert gap(paths[1], one, ask(engines[0], one)[0]) < TOLERANCE
        assert engines[1].weight_version == 0
        engines[0].close()
        assert gap(paths[1], one, ask(engines[1], one)[0]) < TOLERANCE

    def test_incomplete_or_unknown_weights_raise_and_a_full_load_heals(self, start, model):
        engine, named = start(model), weights(model)
        norm = "model.layers.1.input_layernorm.weight"
        with pytest.raises(ValueError, match=rf"1 of {len(named)} tensors are missing: {norm}"):
            engine.load_weights(((n, w) for n, w in named.items() if n != norm), weight_version=1)
        assert engine.weight_version == 0
        with pytest.raises(RuntimeError, match="mixture"):
            engine.submit(request("a_1"))
        with pytest.raises(ValueError, match=r"unknown tensor 'lm_head\.weight'"):  # tied: the embedding speaks for it
            engine.load_weights(changed(named, **{"lm_head.weight": named["model.embed_tokens.weight"]}), weight_version=1)
        engine.load_weights(iter(named.items()), weight_version=2)
        one = request("a_1")
        assert gap(model, one, ask(engine, one)[0]) < TOLERANCE

    def test_sleep_and_wake_keep_the_weights(self, start, model):
        engine, one = start(model), request("a_1")
        before = ask(engine, one)[0]
        engine.sleep()
        engine.wake()
        assert ask(engine, one)[0].token_ids == before.token_ids

    @pytest.mark.parametrize(
        ("bad", "rule"),
        [
            ({"length": 250, "max_tokens": 12}, r"250 context tokens \+ max_tokens \(12\) = 262 exceed max_model_len \(256\)"),
            ({"max_tokens": 0}, r"max_tokens \(0\) must be at least 1"),
            ({"context": ()}, "token_ids is empty"),
            ({"temperature": -0.1}, r"temperature \(-0.1\)"),
            ({"top_p": 0.0}, r"top_p \(0.0\)"),
            ({"seed": -1}, r"seed \(-1\)"),
        ],
    )
    def test_a_request_that_cannot_be_answered_is_refused_with_the_rule(self, any_engine, bad, rule):
        with pytest.raises(ValueError, match=rule):
            any_engine.submit(request("a_1", **bad))
        assert any_engine.num_unfinished == 0

    def test_a_request_may_fill_the_context_window_to_the_last_token(self, any_engine):
        assert len(ask(any_engine, request("a_1", length=240, max_tokens=16))[0].token_ids) == 16

    def test_a_request_id_is_unique_among_unfinished_requests(self, any_engine):
        any_engine.submit(request("a_1"))
        with pytest.raises(ValueError, match="'a_1' was submitted twice"):
            any_engine.submit(request("a_1"))
        finish(any_engine)
        any_engine.submit(request("a_1"))
        assert list(finish(any_engine)) == ["a_1"]

    def test_the_counters_count(self, any_engine):
        ask(any_engine, *(request(f"r_{i}", length=20, max_tokens=6) for i in range(3)))
        counters = any_engine.counters
        assert (counters.num_requests, counters.num_prompt_tokens, counters.num_sampled_tokens) == (3, 60, 18)
        assert counters.num_steps == 6  # together, not one after another
        assert any_engine.step() == [] and counters.num_steps == 6  # nothing to do is no step

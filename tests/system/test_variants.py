"""Variants of ReMA are configuration: each trains for two steps with the one trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from megatron_rema.types import Episode, Role, StopReason
from tests.system.test_training import rows, run
from tests.tiny_models import save_tiny_model
from tests.tiny_task import WORDS, save_tiny_judge_task, save_tiny_task
from tests.unit.tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    """The tiny task and its model, cold-started until it answers some problems right and some wrong."""
    folder = tmp_path_factory.mktemp("task")
    overrides = save_tiny_task(folder)
    run("sft", 1, *overrides, f"run_dir={folder}/sft", "trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002")
    common = [f"model.path={folder}/sft/hf/shared", "trainer.steps=2", "trainer.evaluation_problems=2", "trainer.save_hf=false"]
    return [o for o in overrides if not o.startswith("model.path=")] + common


def two_steps(folder: Path, *overrides: str, ranks: int = 1) -> tuple[list[dict], list[Episode]]:
    """Metrics of both steps, and the last step's episodes."""
    run("train", ranks, *overrides, f"run_dir={folder}")
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    return metrics, [Episode.from_json(row) for row in rows(folder / "episodes" / "step_000002.jsonl")]


SINGLE_TURN = ["rollout.max_rounds=1", "task.finish_marker=null"]


def test_single_turn_by_algorithm_1_alternates_and_leaves_solved_and_hopeless_prompts_out(task, tmp_path):
    settings = ["agents=separate", "agents.schedule=alternating", "agents.alternate_every=1", "algorithm=reinforce_plus_plus"]
    filtered = ["reward=base", "rollout.success_low=0.2", "rollout.success_high=0.8", "rollout.prompts_per_step=8"]
    metrics, episodes = two_steps(tmp_path, *task, *SINGLE_TURN, *settings, *filtered)
    assert "train/meta_thinker/loss" in metrics[0] and "train/reasoner/loss" in metrics[1] and "train/meta_thinker/loss" not in metrics[1]
    assert all(0 < row["rollout/prompts_chosen_frac"] < 1 for row in metrics)
    for episode in episodes:
        rate = sum(e.score["correct"] for e in episodes if e.prompt == episode.prompt) / 4
        assert bool(episode.advantages) == (0.2 <= rate <= 0.8), "only episodes that are trained on are compared"
        assert [turn.role for turn in episode.turns] == [Role.META_THINKING, Role.REASONING] or episode.status.is_cut


def test_a_plan_with_several_answers_earns_their_agreement(task, tmp_path):
    settings = ["reward=consistency", "rollout.samples_per_plan=2", "algorithm=rloo"]
    metrics, episodes = two_steps(tmp_path, *task, *SINGLE_TURN, *settings, ranks=2)
    planners = [e for e in episodes if e.plan_of is None]
    assert len(episodes) == 16 and len(planners) == 8
    for planner in planners:
        (other,) = [e for e in episodes if e.plan_of == planner.episode_id]
        assert other.turns[0].completion.token_ids == planner.turns[0].completion.token_ids
        assert planner.turn_rewards[Role.META_THINKING][0] in (0.0, 0.5, 1.0) and Role.META_THINKING not in other.turn_rewards
    once = sum(len(t.completion.token_ids) for e in episodes for t in e.turns if e.plan_of is None or t.role is Role.REASONING)
    assert metrics[1]["rollout/sampled_tokens"] == once, "a shared plan was sampled once"
    assert metrics[1]["train/grad_norm"] > 0


def test_a_plan_learns_from_what_the_reasoner_does_without_it(task, tmp_path):
    metrics, episodes = two_steps(tmp_path, *task, *SINGLE_TURN, "algorithm=counterfactual", "algorithm.counterfactual_samples=2")
    real, others = [e for e in episodes if not e.is_counterfactual], [e for e in episodes if e.is_counterfactual]
    assert len(real) == 16 and len(others) == 8
    assert {e.counterfactual_of for e in others} == {e.prompt.prompt_id for e in real}
    for other in others:
        assert other.turns[0].completion.token_ids == () and other.turns[1].role is Role.REASONING and not other.advantages
    without = {e.prompt.prompt_id: fmean(o.turn_rewards[Role.META_THINKING][0] for o in others if o.prompt == e.prompt) for e in real}
    for episode in real:
        reward = episode.turn_rewards[Role.META_THINKING][0]
        assert episode.advantages[Role.META_THINKING] == [reward - without[episode.prompt.prompt_id]]
    reward_of = {kind: fmean(e.turn_rewards[Role.META_THINKING][0] for e in part) for kind, part in (("real", real), ("other", others))}
    assert metrics[1]["reward/mean"] == pytest.approx(reward_of["real"]), "outcome reward, and no counterfactual in the mean"
    assert metrics[1]["reward/plan_effect"] == pytest.approx(reward_of["real"] - reward_of["other"])
    assert metrics[1]["rollout/episodes"] == 16 and metrics[1]["rollout/counterfactual_episodes"] == 8
    assert metrics[1]["rollout/sampled_tokens"] == sum(e.num_sampled_tokens for e in episodes)
    assert metrics[1]["train/grad_norm"] > 0


def test_swapped_plans_are_answered_where_they_are_made(task, tmp_path):
    """Two replicas, an odd number of episodes a block: plans and those who are given them come together all the same."""
    swapped = ["algorithm=counterfactual", "algorithm.credit=swapped", "algorithm.counterfactual_samples=2", "algorithm.advantage=rloo"]
    settings = [*task, *SINGLE_TURN, *swapped, "reward=base", "rollout.episodes_per_prompt=3"]
    metrics, episodes = two_steps(tmp_path, *settings, ranks=2)
    real, others = {e.episode_id: e for e in episodes if not e.is_counterfactual}, [e for e in episodes if e.is_counterfactual]
    assert len(real) == 12 and len(others) == 24
    for other in others:
        assert other.counterfactual_of in real and other.counterfactual_of != other.plan_of
        assert other.turns[0].completion.token_ids == real[other.plan_of].turns[0].completion.token_ids
    for episode in real.values():
        rewards = [o.turn_rewards[Role.META_THINKING][0] for o in others if o.counterfactual_of == episode.episode_id]
        assert episode.advantages[Role.META_THINKING] == [episode.turn_rewards[Role.META_THINKING][0] - fmean(rewards)]
    plans = sum(len(e.turns[0].completion.token_ids) for e in real.values())
    answers = sum(len(t.completion.token_ids) for e in episodes for t in e.turns if t.role is Role.REASONING)
    assert metrics[1]["rollout/sampled_tokens"] == plans + answers, "a plan was sampled once"
    assert metrics[1]["train/grad_norm"] > 0


def test_a_frozen_partner_speaks_and_is_not_updated(task, tmp_path):
    task = [o for o in task if o != "trainer.save_hf=false"]
    metrics, episodes = two_steps(tmp_path, *task, "agents=frozen_partner", "algorithm=ema", "trainer.checkpoint_every=1")
    source = load_file(Path(next(o for o in task if o.startswith("model.path=")).removeprefix("model.path=")) / "model.safetensors")
    for name, is_frozen in (("reasoner", True), ("meta_thinker", False)):
        exported = load_file(tmp_path / "hf" / name / "model.safetensors")
        assert all(torch.equal(exported[key], source[key]) for key in source) == is_frozen
    assert all("train/meta_thinker/loss" in row and "train/reasoner/loss" not in row for row in metrics)
    assert any(turn.role is Role.REASONING for e in episodes for turn in e.turns)
    assert {path.name for path in (tmp_path / "checkpoints" / "step_000002").iterdir() if path.is_dir()} == {"meta_thinker"}


def test_dapo_draws_until_enough_prompts_tell_something(task, tmp_path):
    dapo = ["algorithm=dapo", "rollout.max_draws=3", "rollout.success_low=0.01", "rollout.success_high=0.99"]
    metrics, episodes = two_steps(tmp_path, *task, *dapo, "reward.overlong_buffer_tokens=64", "rollout.max_episode_tokens=64")
    assert metrics[0]["rollout/prompts_taken"] > 4, "the first four prompts were not enough"
    assert all(e.score["overlong_penalty"] < 0 for e in episodes if e.score)
    assert len({e.episode_id for e in episodes}) == len(episodes)


def test_agents_may_have_different_models_and_tokenizers(task, tmp_path):
    other = save_tiny_model(tmp_path / "other", "llama3", tokenizer=tiny_tokenizer("llama3"))
    model = next(o for o in task if o.startswith("model.path="))
    separate = ["agents=separate", f"agents.policies.meta_thinker.path={other}"]
    cold_start = [o for o in task if o != "trainer.save_hf=false"] + ["trainer.steps=30", "trainer.global_batch_dialogues=36"]
    run("sft", 1, *cold_start, *separate, f"run_dir={tmp_path}/sft", "optimizer.lr=0.002")
    taught = [
        f"agents.policies.meta_thinker.path={tmp_path}/sft/hf/meta_thinker",
        f"agents.policies.reasoner.{model.removeprefix('model.')}",
    ]
    metrics, episodes = two_steps(tmp_path / "run", *task, "agents=separate", *taught, "algorithm=grpo_token", ranks=2)
    opening = {turn.role: turn.context_token_ids[0] for e in episodes for turn in e.turns if turn.round_index == 0}
    assert opening[Role.META_THINKING] == tiny_tokenizer("llama3").bos_token_id, "each reads its own chat format"
    assert opening[Role.REASONING] == tiny_tokenizer("chatml").convert_tokens_to_ids("<|im_start|>")
    assert any(e.score.get("correct") for e in episodes), "the reasoner understands what the meta-thinker says"
    assert all(math.isfinite(row[f"train/{name}/loss"]) for row in metrics for name in ("meta_thinker", "reasoner"))
    assert max(row[f"sync/{name}/logprob_gap_max"] for row in metrics for name in ("meta_thinker", "reasoner")) < 1e-3


@pytest.fixture(scope="module")
def json_task(tmp_path_factory) -> list[str]:
    """The tiny task whose meta-thinker speaks in JSON actions, cold-started on each action in turn."""
    folder = tmp_path_factory.mktemp("json")
    overrides = save_tiny_task(folder) + ["task.json_actions=true", "rollout.max_turn_tokens=80", "rollout.max_context_tokens=400"]
    dialogues = rows(folder / "dialogues.jsonl")
    spoken = (("DECOMPOSE", "add [FINISH]"), ("REWRITE", "sum [FINISH]"), ("EMPTY", "[FINISH]"))
    for number, dialogue in enumerate(dialogues):
        dialogue["turns"][0]["text"] = json.dumps(dict(zip(("action", "output"), spoken[number % 3], strict=True)))
    (folder / "dialogues.jsonl").write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues))
    run("sft", 1, *overrides, f"run_dir={folder}/sft", "trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002")
    common = [f"model.path={folder}/sft/hf/shared", "trainer.steps=2", "trainer.evaluation_problems=2", "trainer.save_hf=false"]
    return [o for o in overrides if not o.startswith("model.path=")] + common


IN_CHUNKS = ["trainer.logits_chunk_tokens=50"]
JSON_VARIANTS = {
    # tensor 2 cuts the vocabulary that the grammar speaks of; two updates a rollout and a reference ask for scored log-probabilities
    "multi_turn": (
        2,
        ["parallel.actor.tensor=2", "trainer.minibatches_per_step=2", "algorithm.kl_coef=0.01", "algorithm.entropy_coef=0.01"],
    ),
    "exact_kl": (1, ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=exact", "trainer.minibatches_per_step=2", *IN_CHUNKS]),
    "single_turn": (1, [*SINGLE_TURN, "rollout.samples_per_plan=2", "agents=separate", "engine.name=transformers"]),
}


@pytest.mark.parametrize("variant", JSON_VARIANTS)
def test_json_actions_are_sampled_and_trained_under_their_grammar(json_task, tmp_path, variant):
    ranks, settings = JSON_VARIANTS[variant]
    metrics, episodes = two_steps(tmp_path, *json_task, *settings, ranks=ranks)
    for row in metrics:
        shares = [row[f"behaviour/action_{name}_frac"] for name in ("decompose", "rewrite", "empty", "invalid")]
        assert sum(shares) == pytest.approx(1) and max(shares[:3]) > 0
        gaps = [value for name, value in row.items() if name.endswith("logprob_gap_max")]
        assert gaps and max(gaps) < 1e-3  # nats: engine and trainer speak of the distribution under the grammar, whose steps are nats apart
    turns = [turn for e in episodes for turn in e.turns if turn.role is Role.META_THINKING]
    assert all(turn.action is not None for turn in turns if turn.completion.stop_reason is StopReason.STOP)
    forced = sum(logprob == 0.0 for turn in turns for logprob in turn.completion.logprobs)
    assert forced > 10 * len(turns), "the skeleton of an action has probability 1"
    chat = tiny_tokenizer("chatml")
    for e in episodes:
        for turn, answer in zip(e.turns, e.turns[1:], strict=False):
            if turn.role is Role.META_THINKING:
                assert turn.text in chat.decode(answer.context_token_ids) and "action" not in chat.decode(answer.context_token_ids)
    assert any(e.score.get("correct") for e in episodes)


def test_a_policy_without_a_trace_is_not_updated_and_the_run_goes_on(task, tmp_path):
    """An untrained meta-thinker never ends its message: the reasoner is never asked."""
    babbler = save_tiny_model(tmp_path / "babbler", tokenizer=tiny_tokenizer("chatml"))
    settings = ["agents=separate", f"agents.policies.meta_thinker.path={babbler}", "rollout.max_turn_tokens=2"]
    metrics, _ = two_steps(tmp_path / "run", *task, *settings)
    assert all("train/meta_thinker/loss" in row and "train/reasoner/loss" not in row for row in metrics)
    alerts = [row for row in rows(tmp_path / "run" / "alerts.jsonl") if row["alert"] == "no_trainable_trace"]
    assert alerts == [{"step": step, "alert": "no_trainable_trace", "policy": "reasoner"} for step in (1, 2)]


OBJECTIVES = {  # what shares a ratio: overrides
    "turn": ["algorithm.ratio_mean=arithmetic", "algorithm.aggregation=episode"],  # the paper's equations 12 and 13
    "trace": ["algorithm=gspo"],
    "token": ["algorithm=rloo", "algorithm.ratio_level=token", "algorithm.aggregation=constant"],
}


@pytest.mark.parametrize("level", OBJECTIVES)
def test_every_ratio_moves_once_a_rollout_has_more_than_one_update(level, task, tmp_path):
    settings = ["rollout.prompts_per_step=8", "trainer.minibatches_per_step=2", "optimizer.lr=0.001"]
    metrics, _ = two_steps(tmp_path, *task, *OBJECTIVES[level], *settings)
    assert all(math.isfinite(row["train/loss"]) and row["train/skipped_updates"] == 0 for row in metrics)
    first = metrics[0]
    assert not (tmp_path / "alerts.jsonl").exists(), "two steps are too few to say that the clip never acts"
    # the first of the two updates has ratio 1, the second has not: the policy has moved
    assert first["train/grad_norm"] > 0
    assert abs(first[f"train/{level}_ratio_mean"] - 1) > 1e-6 and first["train/kl_old_k3_nats"] > 0


def test_the_exact_kl_is_taken_from_a_reference_that_runs_beside_the_policy(task, tmp_path):
    """The policy lies in two stages, the reference whole on each rank and in host memory between updates."""
    layout = ["parallel.actor.pipeline=2", "parallel.reference={tensor:1,pipeline:1,offload:true}"]
    settings = ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=exact", "rollout.prompts_per_step=8", "optimizer.lr=0.001"]
    metrics, _ = two_steps(tmp_path, *task, *layout, *settings, *IN_CHUNKS, "trainer.minibatches_per_step=2", ranks=2)
    assert all(math.isfinite(row["train/loss"]) and row["train/skipped_updates"] == 0 for row in metrics)
    assert 0 < metrics[0]["train/kl_ref_nats"] < metrics[1]["train/kl_ref_nats"], "two updates a step: the policy leaves its start"


def test_dr_grpo_compares_with_the_mean_and_divides_by_nothing(task, tmp_path):
    metrics, episodes = two_steps(tmp_path, *task, "algorithm=dr_grpo")
    means = {e.prompt.prompt_id: [] for e in episodes}
    for episode in episodes:
        means[episode.prompt.prompt_id].append(episode.turn_rewards[Role.REASONING][-1])
    for episode in episodes:  # R - mean of the prompt, not divided by anything
        rewards = means[episode.prompt.prompt_id]
        expected = episode.turn_rewards[Role.REASONING][-1] - sum(rewards) / len(rewards)
        assert episode.advantages[Role.REASONING] == pytest.approx([expected] * len(episode.advantages[Role.REASONING]))
    assert all(math.isfinite(row["train/loss"]) for row in metrics)


@pytest.fixture(scope="module")
def judge_task(tmp_path_factory) -> list[str]:
    """The tiny judge's task and its model, cold-started until it says a letter."""
    folder = tmp_path_factory.mktemp("judge")
    overrides = save_tiny_judge_task(folder)
    run("sft", 1, *overrides, f"run_dir={folder}/sft", "trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002")
    common = [f"model.path={folder}/sft/hf/shared", "trainer.steps=2", "trainer.save_hf=false"]
    return [o for o in overrides if not o.startswith("model.path=")] + common


def read_by(role: Role, episode: Episode) -> str:
    tokens = [token for turn in episode.turns if turn.role is role for token in turn.context_token_ids]
    return tiny_tokenizer("chatml").decode(tokens)


def test_a_judge_trains_in_both_orders_and_its_meta_thinker_never_reads_the_answers(judge_task, tmp_path):
    metrics, episodes = two_steps(tmp_path, *judge_task, "reward=base", "rollout.prompts_per_step=8", ranks=2)
    assert all(math.isfinite(row["train/loss"]) and 0 < row["behaviour/reasoning/chose_a_rate"] < 1 for row in metrics)
    assert {e.prompt.is_swapped for e in episodes} == {False, True}
    for episode in episodes:
        answers = episode.prompt.fields
        assert episode.prompt.question in read_by(Role.META_THINKING, episode)
        assert not any(word in read_by(Role.META_THINKING, episode) for word in WORDS)
        right = WORDS[sum(map(int, episode.prompt.question.split(" + ")))]
        assert answers[f"answer_{episode.prompt.answer.lower()}"] == right, "the label goes with the answer"
        if episode.turns_of(Role.REASONING):
            shown = f"Answer A:\n{answers['answer_a']}\n\nAnswer B:\n{answers['answer_b']}\n"
            assert shown in read_by(Role.REASONING, episode)
    (before, after) = rows(tmp_path / "evaluations.jsonl")
    for row in (before, after):
        judged = row["judging"]
        assert row["num_problems"] == 12 and judged["num_pairs"] == 6, "every comparison in both orders"
        both = judged["as_given"]["mean"] + judged["swapped"]["mean"]
        assert judged["strict"]["mean"] <= both / 2 == pytest.approx(row["accuracy"]) and judged["answered_frac"] > 0.5
    page = (tmp_path / "report.html").read_text()
    assert "right in both orders" in page and "same letter in both" in page


def test_a_lone_judge_trains_in_one_order_and_is_evaluated_in_both(judge_task, tmp_path):
    metrics, episodes = two_steps(tmp_path / "run", *judge_task, "agents=single", "algorithm=grpo_token", "task.both_orders=false")
    assert not any(e.prompt.is_swapped for e in episodes) and {t.role for e in episodes for t in e.turns} == {Role.REASONING}
    assert all(e.prompt.fields["answer_a"] in read_by(Role.REASONING, e) for e in episodes)
    assert rows(tmp_path / "run" / "evaluations.jsonl")[-1]["judging"]["num_pairs"] == 6 and len(metrics) == 2


def test_a_judge_is_evaluated_from_its_checkpoint(judge_task, tmp_path):
    greedy = ["trainer.evaluation_temperatures=[0.0]", f"run_dir={tmp_path}/run"]
    out = run("evaluate", 1, *judge_task, *greedy)
    assert all(word in out for word in ("right as given", "right in both orders", "same letter in both", "chose A")), out
    (row,) = rows(tmp_path / "run" / "evaluations.jsonl")
    assert row["judging"]["num_pairs"] == 6 and 0 <= row["judging"]["strict"]["low"] <= row["judging"]["strict"]["high"] <= 1

"""Plans by hand: parameters of published models, bytes of a tiny one term by term, batches, times, and what a search may answer."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rema.architecture import Architecture
from megatron_rema.config import ConfigError, LayoutConfig, ParallelConfig
from megatron_rema.planning.advice import advice, explain_why
from megatron_rema.planning.batch import BatchShape
from megatron_rema.planning.explain import everything, settings
from megatron_rema.planning.hardware import CPU, GIB, GPUS, WHERE, Assumptions, Cluster, Runtime, with_settings
from megatron_rema.planning.job import Agent, EngineShape, Job, host_memory, kv_bytes_per_token, phase_memory
from megatron_rema.planning.memory import Work, activations, in_flight, layer_bytes, optimizer_state, scoring, total, updating, weights
from megatron_rema.planning.search import price, search, with_label
from megatron_rema.planning.shapes import BUILT_IN, Shard, architecture, whole_parameters
from megatron_rema.planning.timing import Speeds, step_seconds, update_seconds

ROOT = Path(__file__).resolve().parents[2]
TINY = Architecture(
    family="qwen2",
    num_layers=4,
    hidden_size=4,
    ffn_hidden_size=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=2,
    vocab_size=16,
    rope_theta=1e4,
    rope_scaling_factor=None,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tied=False,
    max_positions=64,
    eos_token_ids=(0,),
)


def cut(**settings) -> LayoutConfig:
    return LayoutConfig(**settings)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),  # totals of the checkpoints' safetensors indices
    [
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.3-70b", 70_553_706_496),
    ],
)
def test_built_in_shapes_have_as_many_parameters_as_the_published_checkpoints(name, published):
    assert whole_parameters(BUILT_IN[name]) == published


def test_parameters_of_a_tiny_model_counted_by_hand():
    # a layer: q, k, v 4x4 each with bias 4, o 4x4, gate and up 4x8 each, down 8x4, two norms of 4: 48 + 12 + 16 + 96 + 8 = 180
    # the model: 4 * 180, embedding 16 * 4, final norm 4, output layer 16 * 4
    assert Shard(TINY, cut()).layer_parameters == 180
    assert Shard(TINY, cut()).num_parameters == 4 * 180 + 64 + 4 + 64
    first, last = (Shard(TINY, cut(pipeline=2), stage) for stage in (0, 1))
    assert (first.num_parameters, last.num_parameters) == (2 * 180 + 64, 2 * 180 + 4 + 64)
    # tensor 2: matrices and biases halve, norms do not: 156 / 2 + ... = (48 + 12 + 16 + 96) / 2 + 8 = 94
    assert Shard(TINY, cut(tensor=2)).num_parameters == 4 * 94 + 32 + 4 + 32


def test_a_tied_output_layer_is_a_second_copy_on_the_last_of_several_stages():
    tied = replace(TINY, tied=True)
    assert Shard(tied, cut()).num_parameters == 4 * 180 + 64 + 4
    assert Shard(tied, cut(pipeline=2), 1).num_parameters == 2 * 180 + 4 + 64


def test_a_scalar_head_takes_the_place_of_the_output_layer():
    assert Shard(TINY.with_scalar_head(3), cut()).num_parameters == 4 * 180 + 64 + 4 + 3 * 4


def test_an_unknown_model_is_refused_with_the_names_that_exist():
    with pytest.raises(ValueError, match=r"model 'gpt-5' is neither a folder .* qwen2.5-7b"):
        architecture("gpt-5")


# --- memory -----------------------------------------------------------------------------------------------------------


def test_state_takes_16_bytes_a_parameter_in_float32_18_in_bfloat16_and_zero1_shares_all_but_weights_and_gradients():
    shard, zero1 = Shard(TINY, cut()), Shard(TINY, cut(distributed_optimizer=True))
    number = shard.num_parameters

    def state(own: Shard, work: Work) -> float:
        return total(weights(own, work)) + total(optimizer_state(own, work))

    assert state(shard, Work(8)) == 16 * number
    assert state(shard, Work(8, element_bytes=2)) == 18 * number
    assert state(zero1, Work(8, element_bytes=2, data=4)) == (2 + 4 + 12 / 4) * number
    assert state(shard, Work(8, element_bytes=2, data=4)) == 18 * number, "without ZeRO-1 nothing is shared"


def test_bytes_that_a_layer_keeps_for_backward_counted_by_hand():
    # 10 tokens, float32, H 4, heads 2 of 2 (query 4, keys 4), F 8:
    # 2 norms and 2 sums: 4 * 10 * 4; qkv 10 * 12; rotated queries and keys 10 * 8; output 10 * 4; gate, up, silu, product 10 * 4 * 8
    floats = 160 + 120 + 80 + 40 + 320
    assert layer_bytes(Shard(TINY, cut()), Work(10)) == 4 * floats + 10 * 2 * 4  # and one float32 a head for the softmax
    # padded to 12 cells: queries, keys, values and the output in cells, the output as tokens; qkv is gone
    floats = 160 + 12 * (12 + 4) + 40 + 320
    assert layer_bytes(Shard(TINY, cut()), Work(10, padding=1.2)) == 4 * floats + 12 * 2 * 4
    # two tensor ranks halve all but the residual stream, sequence parallelism that too
    assert layer_bytes(Shard(TINY, cut(tensor=2)), Work(10)) == 4 * (160 + 560 / 2) + 10 * 4
    assert layer_bytes(Shard(TINY, cut(tensor=2, sequence_parallel=True)), Work(10)) == 4 * (160 / 2 + 560 / 2) + 10 * 4


@pytest.mark.parametrize(
    ("pipeline", "virtual", "microbatches", "expected"),
    [
        (1, 1, 8, [1]),
        (4, 1, 8, [4, 3, 2, 1]),  # 1F1B: as many as stages from here on
        (4, 1, 2, [2, 2, 2, 1]),  # never more than there are
        (2, 2, 4, [5, 3]),  # interleaved: 2 * (stages behind) + (virtual - 1) * stages warm up, and the one that turns round
        (2, 2, 1, [4, 3]),  # one microbatch is filled up to two, of two chunks each
    ],
)
def test_chunks_whose_activations_wait_follow_megatrons_schedules(pipeline, virtual, microbatches, expected):
    layout = cut(pipeline=pipeline, virtual_pipeline=virtual)
    assert [in_flight(Shard(TINY, layout, stage), microbatches) for stage in range(pipeline)] == expected


def test_recomputed_layers_keep_their_inputs_only():
    work = Work(10)
    kept = total(activations(Shard(TINY, cut(recompute=True)), work))
    everything = total(activations(Shard(TINY, cut()), work))
    assert everything - kept == 4 * (layer_bytes(Shard(TINY, cut()), work) - 10 * 4 * 4)


def test_logits_in_chunks_take_a_chunks_share_and_the_exact_kl_doubles_them():
    wide = replace(TINY, vocab_size=1 << 16)
    shard, whole, chunked = Shard(wide, cut()), Work(64), Work(64, logits_chunk_tokens=8)
    assert updating(shard, whole)["logits"] == 64 * (1 << 16) * 4
    assert updating(shard, chunked)["logits"] == 8 * (1 << 16) * 4
    assert updating(shard, chunked, exact_kl=True)["logits"] == 2 * 8 * (1 << 16) * 4
    exact, plain = (total(updating(shard, whole, exact_kl=exact)) for exact in (True, False))
    # the output layer's gradient (vocabulary x 4) and the hidden states' give way to the reference's logits and three hidden states
    assert exact - plain == 64 * (1 << 16) * 4 + 3 * 64 * 4 * 4 - ((1 << 16) * 4 * 4 + 64 * 4 * 4)


def test_a_forward_pass_holds_weights_one_layer_and_no_state():
    parts = scoring(Shard(TINY, cut()), Work(10))
    assert parts["weights"] == 852 * 4 and set(parts) == {"weights", "workspace"}


# --- batch vocabulary -------------------------------------------------------------------------------------------------

BATCH = BatchShape(
    prompts=6,
    episodes_per_prompt=4,
    rounds=3,
    turn_tokens=10,
    episode_tokens=50,
    context_tokens=100,
    minibatches=2,
    microbatch_tokens=200,
    prompt_tokens=20,
)


def test_every_number_of_a_batch_follows_from_prompts_episodes_turns_and_tokens():
    assert (BATCH.episodes, BATCH.turns_per_episode, BATCH.traces) == (24, 6, 48)
    assert BATCH.sampled_tokens_per_episode == 50  # 6 turns of 10 are 60, the episode's budget is 50
    assert BATCH.sampled_tokens == 24 * 50
    assert BATCH.trace_tokens == 70  # 20 of the problem, 50 of the dialogue
    assert BATCH.trained_tokens == 48 * 70
    # one policy of both roles: 24 * 2 * 70 / 2 updates = 1680 tokens over 2 ranks of 200 a microbatch: 4.2
    assert BATCH.microbatches(2, roles=2) == 5
    assert BATCH.microbatches(2, roles=1) == 3
    assert BATCH.longest_microbatch(2, roles=2) == 200
    assert BATCH.longest_microbatch(12, roles=2) == 140, "no more than there is"


def test_counterfactuals_and_draws_are_played_and_not_trained_on():
    more = replace(BATCH, counterfactuals_per_prompt=2, draws=3)
    assert (more.played_episodes, more.episodes) == (3 * 6 * 6, 24)


# --- phases -----------------------------------------------------------------------------------------------------------


def job(layout: LayoutConfig | None = None, model: str = "qwen2.5-7b", **settings) -> Job:
    return Job(
        agents={"meta": Agent(BUILT_IN[model]), "reasoner": Agent(BUILT_IN[model])},
        parallel=ParallelConfig(actor=layout or cut()),
        engine=EngineShape(tensor=1, kv_cache_gib=4.0, max_num_seqs=64),
        batch=BatchShape(128, 8, rounds=2, turn_tokens=1024, episode_tokens=4096, context_tokens=4096, microbatch_tokens=4096),
        **settings,
    )


def test_a_key_value_cache_counts_both_in_every_layer_and_repeats_heads_that_are_fewer_than_ranks():
    arch = BUILT_IN["qwen2.5-7b"]  # 28 layers, 4 heads of 128, two bytes, keys and values
    assert kv_bytes_per_token(arch, EngineShape(tensor=1)) == 2 * 28 * 4 * 128 * 2
    assert kv_bytes_per_token(arch, EngineShape(tensor=4)) == kv_bytes_per_token(arch, EngineShape(tensor=8)) == 2 * 28 * 128 * 2


def test_engines_leave_the_device_while_models_work_and_offloaded_models_while_engines_do():
    parameters = 7_615_616_512
    phases = phase_memory(job(cut(tensor=2, offload=True)), 8, Runtime(0, False, True))
    assert phases["generate"]["engine weights"] == 2 * parameters * 2
    assert "policy weights" not in phases["generate"] and "policy state" not in phases["generate"]
    assert "engine weights" not in phases["update"] and "policy state" not in phases["update"]
    # one of the two learners works; nothing of the other is there: weights, gradients, masters and moments of half a model
    half = Shard(BUILT_IN["qwen2.5-7b"], cut(tensor=2)).num_parameters
    assert phases["update"]["weights"] + phases["update"]["gradients"] + phases["update"]["optimizer"] == 18 * half
    stays = phase_memory(job(cut(tensor=2)), 8, Runtime(0, False, True))
    assert stays["update"]["policy state"] == 16 * half and stays["update"]["policy weights"] == 2 * half
    assert "engine weights" in phase_memory(job(cut(tensor=2)), 8, CPU)["update"], "on a CPU engines have no sleep mode"


def test_host_memory_holds_what_rests_and_the_sleeping_engines():
    # weights 2, masters and moments 12 bytes a parameter for each agent; gradients are not kept; engines 2 bytes
    assert host_memory(job(cut(offload=True)), 8) == pytest.approx(2 * 7_615_616_512 * (14 + 2))
    assert host_memory(job(cut()), 8) == pytest.approx(2 * 7_615_616_512 * 2)


def test_an_exact_kl_puts_the_reference_beside_the_policy_and_asks_for_its_cut():
    own = job(cut(tensor=2), reference=True, exact_kl=True)
    phases = phase_memory(own, 8, Runtime(0, False, True))
    half = Shard(BUILT_IN["qwen2.5-7b"], cut(tensor=2)).num_parameters
    assert phases["update"]["reference weights"] == 2 * 2 * half, "the one at work, and the other agent's at rest"
    with pytest.raises(ConfigError, match="needs tensor 2 and pipeline 1, got 2 and 2"):
        replace(own, parallel=ParallelConfig(actor=cut(tensor=2, pipeline=2))).check(8)


# --- times ------------------------------------------------------------------------------------------------------------

H100_8 = Cluster(GPUS["h100"], 8)


def test_an_update_takes_six_operations_a_parameter_and_token_at_the_assumed_efficiency():
    own = replace(job(cut()), assumptions=with_settings(Assumptions(), {"token_fill": 1.0}))
    (model, _), world = own.models, 1
    seconds = update_seconds(own, model, Speeds(own, Cluster(GPUS["h100"], 1, 1)), world)
    arch, tokens = model.arch, 1024 * own.batch.trace_tokens
    shard = Shard(arch, cut())
    matrices = 28 * shard.layer_matrices + shard.head_parameters
    attention = 28 * 4 * 3584 * own.batch.trace_tokens / 2
    expected = 3 * tokens * (2 * matrices + attention) / (989e12 * 0.4)
    assert seconds == pytest.approx(expected, rel=0.01), "what is left is reading and writing the optimizer's state"


def test_twice_the_devices_take_less_time_and_a_slower_network_more():
    small, large = (sum(step_seconds(job(cut(tensor=2, distributed_optimizer=True)), Cluster(GPUS["h100"], n)).values()) for n in (8, 16))
    slow = Cluster(replace(GPUS["h100"], inter_node_gb_per_s=1), 16)
    assert large < small
    assert sum(step_seconds(job(cut(tensor=2, distributed_optimizer=True)), slow).values()) > large


def test_every_assumption_says_where_it_comes_from_and_unknown_ones_are_refused():
    assert set(WHERE) == set(vars(Assumptions()))
    with pytest.raises(ValueError, match="assumption 'speed' is unknown"):
        with_settings(Assumptions(), {"speed": 1.0})
    with pytest.raises(ValueError, match="token_fill is 0"):
        with_settings(Assumptions(), {"token_fill": 0})


# --- search -----------------------------------------------------------------------------------------------------------


def test_a_search_lists_what_fits_fastest_first_and_a_plans_label_means_that_plan():
    plans, nearest = search(job(), H100_8)
    assert plans and nearest is None and all(plan.fits for plan in plans)
    assert [plan.step_seconds for plan in plans] == sorted(plan.step_seconds for plan in plans)
    for plan in plans[:3]:
        again = price(with_label(job(), plan.label, H100_8), H100_8)
        assert again.label == plan.label and again.peak == pytest.approx(plan.peak) and again.seconds == plan.seconds


def test_what_does_not_fit_is_explained_with_the_change_that_helps_most():
    own = with_label(job(), "t2 p1 sp zero1 kv8", H100_8)
    plan = price(own, H100_8)
    assert not plan.fits and plan.binding == "sync"
    found = advice(plan)
    assert found[0][0] == "parallel.actor.offload=true" and found[0][1].fits, "both agents' state waits beside both engines"
    lines = explain_why(plan)
    assert "does not fit" in lines[0] and any("GiB too much" in line and "policy state" in line for line in lines)
    assert any("parallel.actor.offload=true" in line and "fits" in line for line in lines)


@pytest.mark.parametrize(
    ("label", "change"),
    [
        # a long microbatch whose activations fill the device: layers are recomputed
        ("t2 p1 sp zero1 offload mb32768 kv4", "parallel.actor.recompute=true"),
        # cache that no one has room for
        ("t2 p1 sp zero1 offload mb4096 kv28", "engine.kv_cache_mib 28672 -> 14336"),
    ],
)
def test_the_single_change_that_makes_a_plan_fit_is_among_the_advice(label, change):
    plan = price(with_label(job(), label, H100_8), H100_8)
    assert not plan.fits
    assert change in [words for words, after in advice(plan) if after.fits]


def test_logits_in_chunks_are_advised_where_a_little_more_than_their_share_is_missing():
    # 8192 tokens x 152064 columns of two bytes are 2.3 GiB; a layer's backward, which binds next, needs 3 x 18944 columns, 0.9 GiB
    own = with_label(job(), "t1 p1 zero1 offload recompute mb8192 e4 kv4", H100_8)
    peak = price(own, H100_8).peak / GIB
    plan = price(own, Cluster(replace(GPUS["h100"], memory_gib=peak - 0.5), 8))
    assert not plan.fits and plan.binding == "update"
    assert "trainer.logits_chunk_tokens=1024" in [words for words, after in advice(plan) if after.fits]


def test_where_no_layout_fits_the_nearest_is_returned():
    plans, nearest = search(job(model="llama-3.3-70b"), H100_8)
    assert not plans and nearest is not None and not nearest.fits


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("t3 p1", "parallel.tensor \\(3\\)|must divide the number of GPUs"),
        ("t2 q1", "layout word 'q1' is unknown"),
        ("t1 sp", "sequence_parallel needs tensor >= 2"),
        ("t2 mb1024", r"microbatch_tokens \(1024\) must hold the longest trace \(4096\)"),
    ],
)
def test_a_layout_that_cannot_be_built_is_refused_by_name(label, message):
    with pytest.raises(ValueError, match=message):
        with_label(job(), label, H100_8)


# --- the command ------------------------------------------------------------------------------------------------------


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_layout", ROOT / "tools" / "plan_layout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plan_layout(monkeypatch, capsys):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["plan_layout.py", *map(str, words)])
        code = _tool().main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_command_prints_plans_as_text_and_as_json(plan_layout):
    code, out, _ = plan_layout("--model", "qwen2.5-7b", "--gpus", 8, "--top", 2, "--assumptions")
    rows = [line for line in out.splitlines() if line.startswith("qwen2.5-7b")]
    assert code == 0 and len(rows) == 2 and "training_efficiency = 0.4 (assumed" in out
    code, out, _ = plan_layout("--model", "qwen2.5-7b", "--gpus", 8, "--top", 1, "--json")
    (plan,) = json.loads(out)["plans"]
    assert code == 0 and plan["fits"] and set(plan["memory_gib"]) == set(plan["seconds"]) == {"generate", "score", "update", "sync"}
    assert max(plan["memory_gib"].values()) <= 79 and any(text.startswith("parallel.actor={tensor:") for text in plan["overrides"])
    assert plan["memory_gib"]["update"] == pytest.approx(sum(plan["memory_by_purpose_gib"]["update"].values()), abs=0.05)


def test_the_command_says_why_a_layout_does_not_fit(plan_layout):
    code, out, _ = plan_layout("--model", "llama-3.3-70b", "--gpus", 64, "--why", "t8 p4 sp zero1 e8 kv8")
    assert code == 1 and "does not fit" in out and "parallel.actor.offload=true" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gpt-5", "--gpus", 8], "model 'gpt-5'"),
        (["--model", "qwen2.5-7b", "--gpus", 12], "must be a multiple of gpus_per_node"),
        (["--model", "qwen2.5-7b", "--gpus", 0], "gpus (0)"),
        (["--model", "qwen2.5-7b", "--gpus", 8, "--agents", 3], "--agents is 3"),
        (["--model", "qwen2.5-7b", "--gpus", 8, "--assume", "token_fill=lots"], "NAME=NUMBER"),
        (["--model", "qwen2.5-7b", "--gpus", 8, "--context-tokens", 99999], "exceeds the 32768 positions"),
        (["--model", "qwen2.5-7b", "--gpus", 8, "--prompts", 0], "prompts is 0"),
        (["--model", "qwen2.5-7b", "--gpus", 8, "--gpu-memory-gib", -1], "memory_gib is -1"),
    ],
)
def test_bad_words_end_with_one_message_and_exit_code_2(plan_layout, words, message):
    code, out, err = plan_layout(*words)
    assert code == 2 and not out and err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_planning_leaves_torch_out():
    code = "import sys, megatron_rema.planning.advice; print([m for m in ('torch', 'transformers', 'megatron') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_memory_of_the_whole_is_that_of_its_purposes():
    for parts in phase_memory(job(), 8, Runtime.cuda(Assumptions())).values():
        assert total(parts) < 400 * GIB and all(value >= 0 for value in parts.values())


# --- explain=true -----------------------------------------------------------------------------------------------------


def test_a_run_says_first_what_explain_says_first():
    text = explained("trainer.minibatches_per_step=2", "parallel.actor={tensor:2,pipeline:1}")
    assert text[:2] == settings(config_of("trainer.minibatches_per_step=2", "parallel.actor={tensor:2,pipeline:1}"), 64)
    assert text[0] == "64 ranks: actor tensor 2 x pipeline 1 x data 32; 64 vllm engines of 1 rank(s) per policy"


def test_every_derived_number_is_said_and_follows_from_the_settings():
    text = "\n".join(explained("trainer.minibatches_per_step=2", "parallel.actor={tensor:2,pipeline:1}"))
    # 32 x 8 episodes of 16 turns of 512 tokens, but of 4096 in all; 100 steps; 64 engines
    assert "rollout: 32 prompts x 8 episodes = at most 256 episodes a step; at most 16 turns each (8 rounds x 2 role(s))" in text
    assert "of 512 tokens, 4,096 in all" in text and "tokens: at most 1,048,576 sampled a step, 104,857,600 in 100 steps" in text
    assert "each of 64 plays about 4 episodes of a draw" in text
    # both roles' traces: 512 a step, 256 an update, 8 on each of 32 ranks, of a whole context each: 32,768 tokens, 4 microbatches
    assert "policy shared: at most 512 traces of 4,096 tokens a step, 256 an update, 8 on each of 32 data-parallel rank(s): 4 micro" in text
    assert "updates: 2 per rollout, 200 of each policy in 100 steps" in text
    assert "clip: cannot act in the first of 2 updates of a rollout" in text and "above 1.2 with a positive advantage" in text
    # a token's keys and values: 2 x 28 layers x 4 heads x 128 x 4 bytes = 112 KiB; of 4096 tokens: 448 MiB
    assert "its cache holds 0 whole contexts of shared: raise engine.kv_cache_mib (64) to at least 448" in text
    assert text.count("memory of the fullest rank, GiB") == 2


def test_one_update_a_rollout_is_said_to_have_no_clip():
    text = "\n".join(explained())
    assert "clipping never acts" in text and "clip: cannot act, at any setting" in text


@pytest.mark.parametrize(
    ("door", "words"),
    [
        ("sft", "batch: 64 dialogues an optimizer step, 2 view(s) each: 2 views on each of 64 data-parallel rank(s)"),
        ("train_reward_model", "batch: 64 pairs an optimizer step, 2 view(s) each"),
        ("evaluate", "dialogue(s) a problem over temperatures 1"),
    ],
)
def test_other_front_doors_explain_what_they_do(door, words):
    text = "\n".join(everything(config_of(), 64, door))
    assert words in text and "rollout:" not in text


def test_explain_counts_separate_agents_and_alternation():
    text = "\n".join(explained("agents=separate", "agents.schedule=alternating", "agents.alternate_every=5"))
    assert text.count("at most 256 traces of 4,096 tokens a step") == 2, "each agent's own role"
    assert "updates: 1 per rollout, 50 of each policy in 100 steps, one policy for 5 steps at a time" in text


def config_of(*words: str):
    from hydra import compose, initialize_config_dir

    from megatron_rema.config import load

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return load(compose("config", overrides=["model.path=qwen2.5-7b", *words]))


def explained(*words: str) -> list[str]:
    return everything(config_of(*words), 64, "train")

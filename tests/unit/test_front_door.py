"""The command line before any model: composition, help, and bad input that ends with one message and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rema.front_door import SILENCE_S
from tests.tiny_task import save_tiny_task


def run(*arguments: str, door: str = "train", **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", f"megatron_rema.{door}", *arguments], capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return save_tiny_task(tmp_path_factory.mktemp("task"))


def test_importing_the_configuration_leaves_torch_and_vllm_out():
    code = (
        "import sys, megatron_rema.config, megatron_rema.train; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("door", ["train", "sft", "evaluate"])
def test_help_lists_every_config_group_without_loading_torch(door):
    begin = time.perf_counter()
    result = run("--help", door=door)
    seconds = time.perf_counter() - begin
    assert result.returncode == 0
    for group in ("agents", "algorithm", "engine", "experiment", "model", "optimizer", "parallel", "reward", "rollout", "task", "trainer"):
        assert f"{group}: " in result.stdout, group
    assert "cannot" not in result.stderr
    assert seconds < 10, seconds  # 0.4 s on a quiet machine; torch alone would add seconds. The figure itself is benchmarked, not tested


def test_every_rank_finds_bad_input_and_the_first_says_so_before_another_can_end():
    """A launcher ends all ranks as soon as one is gone: rank 1 must not be gone before rank 0 has spoken."""
    for local_rank, said in (("1", ""), ("0", "error: rank 1: ")):  # where its node has no other rank to say it, it does
        begin = time.monotonic()
        result = run("rollout.rounds=3", RANK="1", LOCAL_RANK=local_rank, WORLD_SIZE="2")
        assert time.monotonic() - begin > SILENCE_S and result.returncode == 2
        assert result.stderr.startswith(said) and ("rollout.rounds" in result.stderr) is bool(said)


@pytest.mark.parametrize("door", ["train", "sft"])
def test_explain_prints_numbers_of_any_world_and_starts_nothing(door, task, tmp_path):
    hooks = tmp_path / "sitecustomize.py"  # what would load torch ends the process
    hooks.write_text(
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('torch', 'megatron', 'vllm'): raise SystemExit(f'explain imported {name}')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
    )
    run_dir = tmp_path / "run"
    words = [*task, f"run_dir={run_dir}", "explain=true", "world_size=64", "parallel.actor.tensor=2"]
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    result = run(*words, door=door, PYTHONPATH=paths)
    assert result.returncode == 0, result.stderr
    assert "64 ranks: actor tensor 2 x pipeline 1 x data 32" in result.stdout and "memory of the fullest rank" in result.stdout
    assert not run_dir.exists()
    assert run(*words, door=door, RANK="1", WORLD_SIZE="2", PYTHONPATH=paths).stdout == "", "one rank speaks"


WORLD_OF_2 = {"WORLD_SIZE": "2", "RANK": "0"}
WORLD_OF_3 = {"WORLD_SIZE": "3", "RANK": "0"}
SINGLE_TURN = ["rollout.max_rounds=1", "task.finish_marker=null"]
BAD_INPUT = {  # name: (overrides, environment, what the message must hold)
    "unknown key": (["rollout.rounds=3"], {}, ["rollout.rounds"]),
    "unknown group option": (["agents=three"], {}, ["agents/three", "shared"]),
    "not a number": (["parallel.actor.tensor=two"], {}, ["parallel.actor.tensor", "two", "integer"]),
    "out of range": (["rollout.prompts_per_step=0"], {}, ["rollout.prompts_per_step", "0", "greater than or equal to 1"]),
    "not a choice": (["algorithm.aggregation=sum"], {}, ["algorithm.aggregation", "sum", "turn"]),
    "unknown kernels": (["kernels=triton"], {}, ["kernels", "triton", "'auto', 'fused' or 'reference'"]),
    "another world than the launcher's": (["world_size=64"], {}, ["world_size is 64", "started 1 rank(s)", "explain=true"]),
    "unset value": (["task.train_file=???"], {}, ["task.train_file", "not set"]),
    "world size that does not fit": (["parallel.actor.tensor=2"], {}, ["parallel.actor.tensor (2)", "world_size (1)", "torchrun"]),
    "tensor that does not divide the heads": (["parallel.actor.tensor=3"], WORLD_OF_3, ["parallel.tensor (3)", "heads (4)"]),
    "pipeline that does not divide the layers": (
        ["parallel.actor.pipeline=3"], WORLD_OF_3, ["parallel.pipeline (3)", "num_hidden_layers (2)"],
    ),
    "resume_from without resume": (["resume_from=somewhere"], {}, ["resume_from", "somewhere", "resume=true"]),
    "resume_from that is not there": (["resume=true", "resume_from=nowhere"], {}, ["resume_from", "nowhere", "no such"]),
    "virtual stages without stages": (["parallel.actor.virtual_pipeline=2"], {}, ["parallel.virtual_pipeline is 2", "at least 2 stages"]),
    "resampled pairs of one head": (["reward_model.bootstrap=true"], {}, ["reward_model.bootstrap", "heads 1", "at least 2"]),
    "KL reward without tokens": (["algorithm.reward_kl_coef=0.1"], {}, ["algorithm.reward_kl_coef", "0.1", "advantage=gae"]),
    "no prompt can be inside": (["rollout.success_low=0.9", "rollout.success_high=0.1"], {}, ["success_low (0.9)", "success_high (0.1)"]),
    "several answers over several rounds": (["rollout.samples_per_plan=2"], {}, ["rollout.samples_per_plan is 2", "max_rounds=1"]),
    "answers that do not divide the group": (
        ["rollout.samples_per_plan=3", "rollout.max_rounds=1"], {}, ["samples_per_plan (3)", "episodes_per_prompt (4)", "remainder 1"],
    ),
    "one plan a prompt": (["rollout.samples_per_plan=4", "rollout.max_rounds=1"], {}, ["one plan of 4 answers", "at least 2"]),
    "agreement of one answer": (["reward=consistency"], {}, ["reward.scheme is consistency", "samples_per_plan"]),
    "counterfactuals of later plans": (["algorithm.credit=ablated"], {}, ["credit is ablated", "max_rounds 2", "max_rounds=1"]),
    "counterfactuals of who says finish": (
        ["algorithm=counterfactual", "rollout.max_rounds=1"], {}, ["credit is ablated", "[FINISH]", "task.finish_marker=null"],
    ),
    "counterfactuals of nobody's plan": (["agents=single", "algorithm=counterfactual"], {}, ["credit is ablated", "nobody plans"]),
    "counterfactuals beside a critic": ([*SINGLE_TURN, "algorithm=ppo", "algorithm.credit=ablated"], {}, ["credit is ablated", "gae"]),
    "counterfactuals of several answers": (
        [*SINGLE_TURN, "algorithm=counterfactual", "rollout.samples_per_plan=2"], {}, ["credit is ablated", "samples_per_plan 2"],
    ),
    "counterfactual agreement": (
        [*SINGLE_TURN, "algorithm=counterfactual", "reward=consistency"], {}, ["credit is ablated", "reward.scheme=consistency"],
    ),
    "more swaps than other plans": (
        [*SINGLE_TURN, "algorithm=counterfactual", "algorithm.credit=swapped"], {}, ["counterfactual_samples (4)", "prompt (4)", "swapped"],
    ),
    "a penalty longer than its budget": (["reward.overlong_buffer_tokens=99999"], {}, ["buffer_tokens (99999)", "max_episode_tokens"]),
    "nobody learns": (["agents.policies.shared.trainable=false"], {}, ["no policy is trainable", "shared"]),
    "missing model folder": (["model.path=nowhere"], {}, ["model.path", "nowhere", "no such folder"]),
    "missing data file": (["task.train_file=nowhere.jsonl"], {}, ["task.train_file", "nowhere.jsonl"]),
    "group of one": (["rollout.episodes_per_prompt=1"], {}, ["rollout.episodes_per_prompt", "at least 2"]),
    "role without a policy": (["~agents.policies.shared", "+agents.policies.a={roles:[meta_thinking]}"], {}, ["no policy", "reasoning"]),
    "microbatch below the context": (["trainer.microbatch_tokens=100"], {}, ["microbatch_tokens (100)", "max_context_tokens (256)"]),
    "actions that nobody takes": (["agents=single", "task.json_actions=true"], {}, ["task.json_actions", "meta_thinking"]),
    "a judge that is not shown the answers": (["task.kind=judge"], {}, ["task.reasoner_template", "kind judge", "{answer_a}"]),
    "a lone judge that is not shown the answers": (
        ["task.kind=judge", "agents=single"], {}, ["task.solo_template", "kind judge", "{answer_a}"],
    ),
    "warm-up in steps of a schedule over tokens": (
        ["trainer.token_budget=1000", "optimizer.warmup_steps=5"], {}, ["optimizer.warmup_steps is 5", "token_budget 1000"],
    ),
    "checks that wait for nobody": (["trainer.preflight.wait_s=0"], {}, ["trainer.preflight.wait_s", "0", "greater than 0"]),
    "an exact KL to a reference in stages": (
        ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=exact", "parallel.actor.pipeline=2"], WORLD_OF_2,
        ["kl_estimator is exact", "parallel.reference.tensor 1 and pipeline 2", "parallel.reference={tensor:1,pipeline:1}"],
    ),
    "an exact KL to a reference cut otherwise": (
        ["algorithm.kl_coef=0.1", "algorithm.kl_estimator=exact", "parallel.reference={tensor:2}"], WORLD_OF_2,
        ["kl_estimator is exact", "parallel.reference.tensor 2", "tensor 1"],
    ),
    "k1 as a loss": (["algorithm.kl_coef=0.1", "algorithm.kl_estimator=k1"], {}, ["algorithm.kl_estimator", "k1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_stops_with_field_value_rule_and_exit_code_2(case, task, tmp_path):
    overrides, environment, words = BAD_INPUT[case]
    result = run(*task, f"run_dir={tmp_path}/run", *overrides, **environment)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, (word, result.stderr)
    assert not (tmp_path / "run").exists()


def test_a_row_without_an_answer_is_named_by_file_line_and_field(task, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1 + 1", "answer": "2"}\n{"question": "1 + 2"}\n')
    result = run(*task, f"task.train_file={bad}", f"run_dir={tmp_path}/run")
    assert result.returncode == 2
    for word in (str(bad), "line 2", "'answer'"):
        assert word in result.stderr, result.stderr


def test_a_model_folder_without_tokenizer_is_refused(task, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    source = next(o for o in task if o.startswith("model.path=")).removeprefix("model.path=")
    (folder / "config.json").write_text(Path(source, "config.json").read_text())
    result = run(*task, f"model.path={folder}", f"run_dir={tmp_path}/run")
    assert result.returncode == 2 and "tokenizer.json" in result.stderr, result.stderr


def test_a_checkpoint_of_another_architecture_is_refused(task, tmp_path):
    source = next(o for o in task if o.startswith("model.path=")).removeprefix("model.path=")
    shutil.copytree(source, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    result = run(*task, f"model.path={tmp_path}/model", f"run_dir={tmp_path}/run")
    assert result.returncode == 2, result.stderr
    assert "shape" in result.stderr and "error: " in result.stderr, result.stderr


def test_an_existing_run_is_never_overwritten(task, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    result = run(*task, f"run_dir={tmp_path}/run")
    assert result.returncode == 2 and "resume=true" in result.stderr, result.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "{}\n"


def test_saved_responses_are_scored_without_a_model(tmp_path):
    rows = [("\\boxed{4}", "4"), ("so \\boxed{5}", "4"), ("4", "4"), ("\\boxed{\\frac{1}{2}}", "0.5")]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps({"question": "q", "answer": answer, "response": said}) + "\n" for said, answer in rows))
    result = run(f"score_file={file}", door="evaluate")
    # right: 4 and 1/2 = 0.5; wrong: 5, and 4 without a box -> 2 of 4
    assert result.returncode == 0 and result.stdout.startswith("accuracy: 0.500 (4 scored, 0 unknown)"), result.stdout + result.stderr


def test_saved_verdicts_of_a_judge_are_scored_by_their_letters(tmp_path):
    rows = [("A is better: [[A]]", "A"), ("[[A]]", "B"), ("\\boxed{B}", "B"), ("[[B]] no, [[A]]", "A"), ("[[A]]", "tie")]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps({"question": "q", "label": label, "response": said}) + "\n" for said, label in rows))
    result = run("task=judge", f"score_file={file}", door="evaluate")
    # right: the first and the fourth of four; the label of the fifth is no letter
    assert result.returncode == 0 and result.stdout.startswith("accuracy: 0.500 (4 scored, 1 unknown)"), result.stdout + result.stderr


def test_a_comparison_with_a_bad_label_is_named_by_file_line_and_field(task, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer_a": "x", "answer_b": "y", "label": "tie"}\n')
    others = [override for override in task if not override.startswith(("task.", "~task."))]
    result = run("task=judge", *others, f"task.train_file={bad}", f"run_dir={tmp_path}/run")
    assert result.returncode == 2
    for word in (str(bad), "line 1", "'label'", "['A', 'B']", "'tie'"):
        assert word in result.stderr, result.stderr


EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def test_every_experiment_composes_and_obeys_the_rules_between_fields():
    from hydra import compose, initialize_config_dir

    from megatron_rema.config import check, load
    from megatron_rema.front_door import config_dir

    assert {"quickstart", "arith_ppo", "rema_math", "rema_single_turn", "rema_json_actions", "vrp_math", "mrp_math"} <= set(EXPERIMENTS)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for name in EXPERIMENTS:
            config = load(compose("config", overrides=[f"experiment={name}", "task.train_file=train.jsonl"]))
            check(config, world_size=8)
            alone = name.startswith(("vrp_", "mrp_"))
            assert not alone or [str(role) for role in config.roles] == ["reasoning"]
            assert ("judge" in name) == (config.task.kind == "judge")


@pytest.mark.parametrize("group", ["agents", "algorithm", "reward", "rollout", "task"])
def test_every_option_of_a_group_composes(group):
    from hydra import compose, initialize_config_dir

    from megatron_rema.config import load
    from megatron_rema.front_door import config_dir

    options = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    assert len(options) >= 2
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for option in options:
            load(compose("config", overrides=[f"{group}={option}"]))

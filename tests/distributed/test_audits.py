"""The monitor at tensor 2 x pipeline 2: audits find what they find on one rank; and an agent that speaks as it did at the start."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from megatron_rema.bridge.weights import iterate_hf_tensors
from megatron_rema.config import RunConfig, check, load
from megatron_rema.front_door import config_dir
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from megatron_rema.trainer.cast import reference_speaks
from tests.distributed.test_parallel_parity import QWEN2
from tests.tiny_task import save_tiny_task


def config_of(task: list[str], folder: Path, world: int) -> RunConfig:
    """Two steps of two agents and one audit, which may cost what it wants. Weights stay as they are: between layouts, what is sampled for
    training may differ in its last digits, and with it what would be learnt."""
    settings = [
        *task,
        f"run_dir={folder}",
        "agents=separate",
        "engine=transformers",
        "algorithm.kl_coef=0.1",
        "optimizer.lr=0",
        "trainer.steps=2",
        "trainer.evaluation_problems=1",
        "trainer.save_hf=false",
        "trainer.preflight.enabled=false",
        "integrity=monitor",
        "integrity.budget_frac=1",
        "integrity.audit_problems=8",
        "integrity.cross_play=true",
        *(["parallel.actor.tensor=2", "parallel.actor.pipeline=2"] if world == 4 else []),
    ]
    return composed(settings, world)


def composed(settings: list[str], world: int) -> RunConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = load(compose("config", overrides=settings))
    check(config, world)
    return config


def flat(value: object, path: str = "") -> dict[str, object]:
    """Every leaf by its path; numbers as they are, anything else as text."""
    if isinstance(value, dict):
        return {name: leaf for key, item in value.items() for name, leaf in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {name: leaf for i, item in enumerate(value) for name, leaf in flat(item, f"{path}/{i}").items()}
    return {path: value} if isinstance(value, float) else {f"{path}={value}": 0.0}


def train(config: RunConfig) -> None:
    from megatron_rema.trainer import loop
    from megatron_rema.trainer.inputs import read_for_training

    loop.process_group = lambda config: nullcontext()  # that of run_ranks is there already
    loop.train(config, read_for_training(config))


def learn_to_speak(config: RunConfig) -> None:
    """A random model never ends a turn: nobody would answer it."""
    from megatron_rema.trainer import cold_start
    from megatron_rema.trainer.inputs import read_for_cold_start

    cold_start.process_group = lambda config: nullcontext()
    cold_start.train(config, read_for_cold_start(config))


def test_audits_at_tensor_2_and_pipeline_2_find_what_they_find_on_one_rank(run_ranks, tmp_path):
    task = save_tiny_task(tmp_path / "task")
    begin = ["trainer.steps=25", "trainer.global_batch_dialogues=36", "optimizer.lr=0.003", "trainer.preflight.enabled=false"]
    run_ranks(1, learn_to_speak, composed([*task, f"run_dir={tmp_path}/sft", *begin], 1), timeout_s=280)
    task = [o for o in task if not o.startswith("model.path=")] + [f"model.path={tmp_path}/sft/hf/shared"]
    for world in (1, 4):
        run_ranks(world, train, config_of(task, tmp_path / f"{world}", world), timeout_s=280)
    one, four = (json.loads((tmp_path / name / "audits.jsonl").read_text().splitlines()[0]) for name in "14")  # of step 1
    arms = {"full", "no_plan", "swapped", "redacted", "wrong_answer", "continued", "frozen_meta_thinking", "frozen_reasoning"}
    assert (
        one["gold"].keys() == arms and len(one["problems"]) == 8 and any(turn[1] for turn in one["transcripts"][0]["arms"]["full"]["turns"])
    )
    for row in (one, four):  # what training sampled is compared with nothing
        del row["trained"], row["cusum"]
        row["findings"] = [finding for finding in row["findings"] if finding["audit"] != "proxy_gold"]
    assert flat(one) == pytest.approx(flat(four), rel=1e-3, abs=1e-3), "log-probabilities differ in their last digits"
    said = [{name: arm["turns"] for name, arm in item["arms"].items()} for item in one["transcripts"]]
    assert all(item["full"] == item["frozen_meta_thinking"] == item["frozen_reasoning"] for item in said), (
        "its weights are those of the start"
    )


def loads(tensor: int) -> list[tuple[int, float, float]]:
    """(weight version, distance to the reference, distance to the policy) of what an engine was given."""
    groups = build_groups(tensor=tensor, pipeline=1)
    model, reference = (build_policy(QWEN2, groups=groups, seed=seed) for seed in (1, 2))
    given: list[tuple[int, float, float]] = []

    def load_weights(named_tensors, version: int) -> None:
        own = dict(named_tensors)
        distances = []
        for other in (reference, model):
            pairs = [(own[name], tensor) for name, tensor in iterate_hf_tensors(other.modules, other.arch, other.groups)]
            distances.append(float(sum(torch.dist(a.float(), b.float()) for a, b in pairs)))
        given.append((version, *distances))

    policy = SimpleNamespace(model=model, reference=reference)
    with pytest.raises(KeyError), reference_speaks(policy, SimpleNamespace(weight_version=7, load_weights=load_weights)):
        raise KeyError
    return given


def test_an_agent_speaks_as_at_the_start_and_then_as_itself_again(run_ranks):
    for given in run_ranks(2, loads, 2):
        (version, to_reference, to_policy), (again, from_reference, from_policy) = given
        assert version == again == 7
        assert to_reference == 0.0 < to_policy and from_policy == 0.0 < from_reference

"""Scalar heads (critics, reward models): folders of sequence classification in and out, and what the head says at every position."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.weights import iterate_hf_tensors, load_hf, save_hf
from megatron_rema.models.policy import build_policy
from megatron_rema.parallel.groups import build_groups
from tests.distributed.test_bridge_round_trip import exports_bitwise
from tests.distributed.test_logits_parity import LENGTHS, packed
from tests.tiny_models import save_tiny_model

FAMILIES = ["qwen2_tied", "qwen3", "llama3"]
HEADS = 3
# float32 sums of at most 128 terms in another order, over two layers: about 2e-6 on values up to 4
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=FAMILIES)
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("hf") / request.param, request.param, num_scalars=HEADS)


@torch.no_grad()
def theirs(path: Path, tokens: torch.Tensor) -> np.ndarray:
    """[T, K] transformers' scores at every position, each sequence alone."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    return torch.cat([model.score(model.model(sequence[None]).last_hidden_state[0]) for sequence in tokens.split(LENGTHS)]).numpy()


def ours(path: Path, tokens: list[int], tensor: int, pipeline: int, options: dict) -> np.ndarray | None:
    """[T, K] on ranks of the last stage, None elsewhere."""
    arch = Architecture.from_pretrained(path)
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(arch, groups=groups, trainable=False, seed=1, **options)
    load_hf(model.modules, arch, path, groups)
    results = model.forward_backward([packed(tokens)], lambda x, _: (x.sum(), {"values": x.detach().clone()}), forward_only=True)
    assert all(result["values"].dtype is torch.float32 for result in results)
    return results[0]["values"].numpy() if results else None


@pytest.mark.parametrize(("tensor", "pipeline", "options"), [(1, 1, {}), (2, 2, {}), (2, 1, {"sequence_parallel": True})])
def test_values_equal_the_scores_of_transformers_at_every_position(run_ranks: Callable, classifier: Path, tensor, pipeline, options):
    tokens = torch.randint(0, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
    expected = theirs(classifier, tokens)
    assert expected.shape == (sum(LENGTHS), HEADS) and expected.std() > 0.3
    returned = run_ranks(tensor * pipeline, ours, classifier, tokens.tolist(), tensor, pipeline, options)
    last_stage = [values for values in returned if values is not None]
    assert len(last_stage) == tensor
    for values in last_stage:
        np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_a_classifier_goes_to_megatron_and_back_bitwise(run_ranks: Callable, classifier: Path, tensor: int, pipeline: int):
    assert run_ranks(tensor * pipeline, exports_bitwise, classifier, tensor, pipeline) == [True] * (tensor * pipeline)


def save(source: Path, out_dir: Path, num_scalars: int, tensor: int, pipeline: int, seed: int) -> dict[str, np.ndarray]:
    """A scalar head drawn on the trunk of ``source``, saved as a folder; the tensors that it should hold."""
    arch = Architecture.from_pretrained(source).with_scalar_head(num_scalars)
    groups = build_groups(tensor=tensor, pipeline=pipeline)
    model = build_policy(arch, groups=groups, trainable=False, seed=seed)
    load_hf(model.modules, arch, source, groups, fresh_head=True)
    save_hf(model.modules, arch, source, out_dir, groups)
    return {name: tensor.numpy().copy() for name, tensor in iterate_hf_tensors(model.modules, arch, groups)}


@pytest.mark.parametrize("num_scalars", [1, 2, 3])  # transformers does not write the labels of the default, 2
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_head_on_a_language_model_is_saved_as_a_classifier(run_ranks: Callable, tmp_path: Path, family: str, num_scalars: int):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    source = save_tiny_model(tmp_path / "source", family)
    trunk = AutoModelForCausalLM.from_pretrained(source).model.state_dict()
    saved = {}
    for tensor, pipeline in [(1, 1), (2, 2)]:
        out_dir = tmp_path / f"{tensor}_{pipeline}"
        exported = run_ranks(tensor * pipeline, save, source, out_dir, num_scalars, tensor, pipeline, 5)[0]
        model, report = AutoModelForSequenceClassification.from_pretrained(out_dir, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert model.num_labels == num_scalars and type(model).__name__.lower().startswith(
            json.loads(model.config.to_json_string())["model_type"]
        )
        saved[tensor, pipeline] = model.state_dict()
        assert saved[tensor, pipeline].keys() == exported.keys()
        assert all(np.array_equal(saved[tensor, pipeline][name].numpy(), exported[name]) for name in exported)
        assert all(torch.equal(saved[tensor, pipeline][f"model.{name}"], trunk[name]) for name in trunk)
        assert Architecture.from_pretrained(out_dir) == Architecture.from_pretrained(source).with_scalar_head(num_scalars)
        # what transformers itself writes of that model is read back too
        model.save_pretrained(tmp_path / f"theirs_{tensor}_{pipeline}")
        assert run_ranks(1, exports_bitwise, tmp_path / f"theirs_{tensor}_{pipeline}", 1, 1) == [True]
    head = saved[1, 1]["score.weight"]
    assert torch.equal(head, saved[2, 2]["score.weight"])  # drawn by name and seed, not by layout
    hidden = head.shape[1]
    # num_scalars * hidden >= 64 draws: their deviation is within a third of 1 / sqrt(hidden + 1) but once in 10^4
    assert float(head.square().mean().sqrt()) == pytest.approx((hidden + 1) ** -0.5, rel=0.35)


def refusals(classifier: Path, language_model: Path) -> dict[str, str]:
    groups = build_groups(tensor=1, pipeline=1)
    arch = Architecture.from_pretrained(classifier)
    one, three = (build_policy(arch.with_scalar_head(k), groups=groups, trainable=False, seed=1) for k in (1, HEADS))
    cases = {
        "heads": lambda: load_hf(one.modules, one.arch, classifier, groups),
        "language model": lambda: load_hf(three.modules, three.arch, language_model, groups),
        "other trunk": lambda: load_hf(three.modules, three.arch, language_model.with_name("other"), groups, fresh_head=True),
    }
    messages = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def test_another_head_is_refused_unless_a_fresh_one_is_asked_for(run_ranks: Callable, tmp_path: Path):
    classifier = save_tiny_model(tmp_path / "classifier", "qwen3", num_scalars=HEADS)
    language_model = save_tiny_model(tmp_path / "language_model", "qwen3")
    save_tiny_model(tmp_path / "other", "qwen2_tied")
    messages = run_ranks(1, refusals, classifier, language_model)[0]
    assert "num_scalars is 3; the model to fill has 1" in messages["heads"]
    assert "num_scalars is 0; the model to fill has 3" in messages["language model"]
    assert "family is 'qwen2'; the model to fill has 'qwen3'" in messages["other trunk"]


def head_gradients(source: Path) -> list[np.ndarray]:
    """The head's gradient on every tensor rank under sequence parallelism, of a sum over a sequence that the ranks share."""
    arch = Architecture.from_pretrained(source)
    groups = build_groups(tensor=2, pipeline=1)
    model = build_policy(arch, groups=groups, seed=1, sequence_parallel=True)
    tokens = list(range(sum(LENGTHS)))
    model.forward_backward([packed([t % 101 for t in tokens])], lambda x, _: (x.square().sum(), {}))
    mine = model.module.output_layer.weight.main_grad
    everyone = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyone, mine, group=groups.tp)
    return [gradient.numpy() for gradient in everyone]


def test_tensor_ranks_agree_bitwise_on_the_head_under_sequence_parallelism(run_ranks: Callable, tmp_path: Path):
    source = save_tiny_model(tmp_path / "hf", "qwen2_tied", num_scalars=1)
    for first, second in run_ranks(2, head_gradients, source):
        assert np.array_equal(first, second) and np.abs(first).max() > 0.1

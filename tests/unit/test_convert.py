"""Conversion tools in one process: round trips are bitwise, faults are named, nothing is overwritten or left behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rema.bridge.stream import TensorFile, TensorWriter
from tests.tiny_models import TINY_MODELS, save_tiny_model

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FOUR_KV_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """``convert("to-hf", a, b)`` -> exit code and what stood on stderr."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, words)])
        code = _tool("convert_checkpoint").main()
        return code, capsys.readouterr().err

    return run


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _assert_same_bits(ours: Path, theirs: Path) -> None:
    left, right = _weights(ours), _weights(theirs)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def _critic(path: Path) -> Path:
    """A sequence-classification checkpoint with three labels, as transformers writes it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    language_model = save_tiny_model(path.with_name("trunk"), "qwen2_tied", **FOUR_KV_HEADS)
    config = AutoConfig.from_pretrained(language_model, num_labels=3, tie_word_embeddings=False)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("name", [*TINY_MODELS, "scalar_head", "bfloat16"])
def test_hf_to_tp1_to_tp2_pp2_to_tp4_to_hf_is_bitwise_identity(convert: Callable, tmp_path: Path, name: str):
    hf = tmp_path / "hf"
    if name == "scalar_head":
        _critic(hf)
    elif name == "bfloat16":
        save_tiny_model(hf, "qwen2_tied", dtype="bfloat16", **FOUR_KV_HEADS)
    else:
        save_tiny_model(hf, name, **FOUR_KV_HEADS)
    (hf / "tokenizer.json").write_text("{}")
    for words in (
        ("to-megatron", hf, tmp_path / "m11"),
        ("reshard", tmp_path / "m11", tmp_path / "m22", "--tensor", 2, "--pipeline", 2),
        ("reshard", tmp_path / "m22", tmp_path / "m41", "--tensor", 4, "--pipeline", 1),
        ("to-hf", tmp_path / "m41", tmp_path / "back"),
    ):
        assert convert(*words)[0] == 0
    _assert_same_bits(tmp_path / "back", hf)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", hf))
    assert {key: ours[key] for key in theirs} == theirs
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    assert {file.name for file in (tmp_path / "m22").glob("*.safetensors")} == {
        f"model_tp_rank_{t:02}_pp_rank_{p:02}.safetensors" for t in (0, 1) for p in (0, 1)
    }
    # resharding back gives the very files, and so does cutting at once
    convert("reshard", tmp_path / "m41", tmp_path / "again", "--tensor", 2, "--pipeline", 2)
    convert("to-megatron", hf, tmp_path / "at_once", "--tensor", 2, "--pipeline", 2)
    for file in (tmp_path / "m22").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes() == (tmp_path / "at_once" / file.name).read_bytes()


def test_hf_output_is_cut_into_files_and_read_from_them(convert: Callable, tmp_path: Path):
    hf = save_tiny_model(tmp_path / "hf", "llama3", hidden_size=512, vocab_size=2000)  # 2000 * 512 * 4 bytes = 3.9 MiB a vocabulary
    assert convert("to-megatron", hf, tmp_path / "m", "--tensor", 2)[0] == 0
    assert convert("to-hf", tmp_path / "m", tmp_path / "back", "--max-shard-mib", 4)[0] == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    _assert_same_bits(tmp_path / "back", hf)
    assert convert("to-megatron", tmp_path / "back", tmp_path / "again", "--tensor", 2)[0] == 0
    _assert_same_bits(tmp_path / "again", tmp_path / "m")


def test_written_files_are_read_by_safetensors_and_its_files_by_us(tmp_path: Path):
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16(), "d": torch.ones(1, dtype=torch.bool)}
    with TensorWriter(tmp_path / "ours", {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name in ("c", "a", "d", "b"):
            writer.write(name, tensors[name])
    save_file(tensors, tmp_path / "theirs")
    found, file = load_file(tmp_path / "ours"), TensorFile(tmp_path / "theirs")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and torch.equal(file.read(name), tensor)


def test_a_file_with_a_tensor_that_was_never_written_is_not_closed_silently(tmp_path: Path):
    shapes = dict.fromkeys(("first", "second"), (torch.float32, (1,)))
    with pytest.raises(AssertionError, match=r"never written.*second"), TensorWriter(tmp_path / "file", shapes) as writer:
        writer.write("first", torch.ones(1))


# --- faults -----------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, torch.Tensor]], None]


def _change(file: Path, change: Change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not views of the file that is about to change
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def _put(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Change:
    return lambda tensors: tensors.update({name: torch.full(shape, 0.5, dtype=dtype)})


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(NORM), f"misses tensor {NORM} (128,)"),
        (_put("model.layers.9.extra.weight", (1,)), "has tensor model.layers.9.extra.weight, which no parameter"),
        (_put(NORM, (64,)), f"tensor {NORM} has shape (64,)"),
        (_put(NORM, (128,), torch.bfloat16), f"{NORM} is torch.bfloat16"),
    ],
)
def test_a_faulty_hugging_face_tensor_stops_the_conversion_by_name(convert: Callable, tmp_path: Path, change: Change, words: str):
    hf = save_tiny_model(tmp_path / "hf")
    _change(hf / "model.safetensors", change)
    _assert_refused(convert("to-megatron", hf, tmp_path / "out"), words, tmp_path)


MLP, COPY = "decoder.layers.1.mlp.linear_fc1.weight", "output_layer.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(MLP), f"model_tp_rank_01_pp_rank_01.safetensors misses tensor {MLP} (96, 128)"),
        (_put("decoder.layers.0.mlp.linear_fc1.weight", (96, 128)), "has tensor decoder.layers.0.mlp.linear_fc1.weight, which this stage"),
        (_put(MLP, (128, 96)), f"tensor {MLP} has shape (128, 96)"),
        (_put(MLP, (96, 128), torch.float16), f"tensor {MLP} is torch.float16"),
        (_put("decoder.final_layernorm.weight", (128,)), "decoder.final_layernorm.weight differs from the one of tensor rank 0"),
        (_put(COPY, (56, 128)), f"{COPY} differs from the embedding"),
    ],
)
@pytest.mark.parametrize("command", ["to-hf", "reshard"])
def test_a_faulty_megatron_tensor_stops_the_conversion_by_name(convert: Callable, tmp_path: Path, command: str, change: Change, words: str):
    hf = save_tiny_model(tmp_path / "hf")
    assert convert("to-megatron", hf, tmp_path / "m", "--tensor", 2, "--pipeline", 2)[0] == 0
    _change(tmp_path / "m" / "model_tp_rank_01_pp_rank_01.safetensors", change)
    _assert_refused(convert(command, tmp_path / "m", tmp_path / "out"), words, tmp_path)


def _assert_refused(result: tuple[int, str], words: str, folder: Path) -> None:
    code, message = result
    assert code == 2
    errors = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], message
    assert "Traceback" not in message
    assert not (folder / "out").exists() and not list(folder.glob(".out*")), "nothing is left behind"


def _cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def _scribble(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:8] + b"not json" + file.read_bytes()[16:])


def _remove(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


@pytest.mark.parametrize(("damage", "words"), [(_cut, "its header says"), (_scribble, "its header is damaged"), (_remove, "model")])
@pytest.mark.parametrize("kind", ["hf", "m"])
def test_a_damaged_file_is_named(convert: Callable, tmp_path: Path, kind: str, damage: Callable[[Path], None], words: str):
    save_tiny_model(tmp_path / "hf")
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "m")[0] == 0
    damage(tmp_path / kind)
    command = "to-megatron" if kind == "hf" else "to-hf"
    _assert_refused(convert(command, tmp_path / kind, tmp_path / "out"), words, tmp_path)


def test_nothing_existing_is_overwritten(convert: Callable, tmp_path: Path):
    hf = save_tiny_model(tmp_path / "hf")
    assert convert("to-megatron", hf, tmp_path / "m")[0] == 0
    (tmp_path / "mine").mkdir()
    for command, source in (("to-megatron", hf), ("reshard", tmp_path / "m"), ("to-hf", tmp_path / "m")):
        code, message = convert(command, source, tmp_path / "mine")
        assert code == 2 and "never overwritten" in message
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("to-megatron", "hf", "out", "--tensor", 3), "parallel.tensor (3) must divide num_attention_heads (4)"),
        (("to-megatron", "hf", "out", "--pipeline", 3), "parallel.pipeline (3) must divide num_hidden_layers (2)"),
        (("to-hf", "nowhere", "out"), "nowhere holds no weights"),
        (("verify", "hf", "nowhere"), "nowhere holds no weights"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(convert: Callable, tmp_path: Path, monkeypatch, words: tuple, expected: str):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "hf")
    _assert_refused(convert(*words), expected, tmp_path)


def test_a_rest_of_a_killed_conversion_is_swept(convert: Callable, tmp_path: Path):
    hf = save_tiny_model(tmp_path / "hf")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model_tp_rank_07_pp_rank_07.safetensors").write_text("rest")
    assert convert("to-megatron", hf, tmp_path / "out")[0] == 0
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspection_lists_every_tensor_with_its_shard(monkeypatch, capsys: pytest.CaptureFixture, convert: Callable, tmp_path: Path):
    hf = save_tiny_model(tmp_path / "hf")
    convert("to-megatron", hf, tmp_path / "m", "--tensor", 2, "--pipeline", 2)

    def inspect(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["inspect_checkpoint.py", *map(str, words)])
        code = _tool("inspect_checkpoint").main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, printed = inspect(tmp_path / "m")
    assert code == 0 and "tensor 2  pipeline 2" in printed
    for file, where in (("model_tp_rank_01_pp_rank_00", "tp 1 pp 0"), ("model_tp_rank_00_pp_rank_01", "tp 0 pp 1")):
        for name, tensor in load_file(tmp_path / "m" / f"{file}.safetensors").items():
            (row,) = [line for line in printed.splitlines() if name in line and where in line]
            assert " x ".join(map(str, tensor.shape)) in row and f"{tensor.nbytes:,}" in row and "float32" in row
    code, printed = inspect(hf)
    total = sum(tensor.nbytes for tensor in _weights(hf).values())
    assert code == 0 and f"{len(_weights(hf))} tensors, {total:,} bytes" in printed
    code, printed = inspect(hf, "--only", "embed_tokens")
    assert "1 tensors" in printed and "101 x 128" in printed
    shutil.rmtree(hf)
    assert inspect(hf) == (
        2,
        f"error: {hf} holds no weights: neither *.safetensors nor the state.json of a training checkpoint is there.\n",
    )

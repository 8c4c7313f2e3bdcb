"""What fuzzing found: each of these inputs once ended in a traceback, a hang, or a run on numbers that are none."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rema.architecture import Architecture
from megatron_rema.bridge.folder import CheckpointReader
from megatron_rema.bridge.listing import list_folder
from megatron_rema.bridge.stream import TensorFile
from megatron_rema.config import ConfigError, check_file, check_run_dir, load
from megatron_rema.front_door import composed_from
from megatron_rema.report.page import write_report
from megatron_rema.report.run_folder import read_run
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dataset import read_dialogues, read_pairs, read_prompts
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.repair import _without_marker, sentences
from megatron_rema.rollout.traces import traces_of_dialogue
from megatron_rema.trainer import manifest, restart, state
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.trainer.score_file import Scored, read_rows, table
from tests.tiny_models import save_tiny_model
from tests.unit.test_security import Bomb
from tests.unit.tiny_tokenizer import tiny_tokenizer

DEEP = "[" * 5000
TURNS = [{"role": "meta_thinking", "text": "plan"}, {"role": "reasoning", "text": "do"}]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --- rows


@pytest.mark.parametrize("read", [read_prompts, read_dialogues, read_pairs, lambda path: list(read_rows(path, "question", "answer"))])
def test_brackets_five_thousand_deep_are_named_by_line(tmp_path, read):
    with pytest.raises(ValueError, match=r"a\.jsonl line 1: not JSON that can be read"):
        read(write(tmp_path / "a.jsonl", DEEP))


@pytest.mark.parametrize("key", ["question", "answer", "subset"])
def test_half_a_character_is_named_by_line_and_field(tmp_path, key):
    row = {"question": "q", "answer": "a", "subset": "s", key: "x\ud800"}
    with pytest.raises(ValueError, match=rf"line 1: field '{key}' has half a character \('\\ud800'\) at place 2"):
        read_prompts(write(tmp_path / "a.jsonl", row))
    with pytest.raises(ValueError, match=rf"line 1: field '{key}' has half a character"):
        list(read_rows(write(tmp_path / "b.jsonl", {**row, "response": "r"}), "question", "answer"))


@pytest.mark.parametrize("margin", ["NaN", "Infinity", "1" + "0" * 400])
def test_a_margin_that_no_float_holds_is_refused(tmp_path, margin):
    row = json.dumps({"question": "q", "chosen": TURNS, "rejected": TURNS, "margin": 0.25}).replace("0.25", margin)
    with pytest.raises(ValueError, match="line 1: field 'margin' must be a number from"):
        read_pairs(write(tmp_path / "a.jsonl", row))


def test_an_answer_that_is_not_a_number_and_a_level_of_thousands_of_digits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 1: field 'answer' must be text or a finite number, got nan"):
        read_prompts(write(tmp_path / "a.jsonl", '{"question": "q", "answer": NaN}'))
    with pytest.raises(ValueError, match="line 1: field 'level' must be a whole number"):
        read_prompts(write(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "level": "9" * 5000}))


def test_what_is_not_parquet_is_named_by_file(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing of it PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as parquet after row 0"):
        read_prompts(tmp_path / "a.parquet")


def test_names_of_subsets_are_text_not_markup():
    view = table([Scored("[/red]", [1.0]), Scored("[bold]", [0.0])], {}, "[/x].jsonl")
    console = Console(width=120, file=io.StringIO())
    console.print(view)
    assert all(name in console.file.getvalue() for name in ("[/red]", "[bold]", "[/x].jsonl"))


@pytest.mark.parametrize("kind", ["dialogues", "pairs"])
def test_a_dialogue_that_no_protocol_plays_is_named_by_file_and_line(tmp_path, kind):
    solo, good = TURNS[1:], TURNS
    if kind == "dialogues":
        rows = read_dialogues(write(tmp_path / "a.jsonl", *({"question": "q", "answer": "a", "turns": turns} for turns in (good, solo))))
        turns = [row.turns for row in rows]
    else:
        rows = read_pairs(write(tmp_path / "a.jsonl", *({"question": "q", "chosen": turns, "rejected": good} for turns in (good, solo))))
        turns = [row.chosen for row in rows]
    rules = DialogueRules(max_turn_tokens=8, max_episode_tokens=64, max_context_tokens=512)
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: turns\[0\]\.role is 'reasoning' where 'meta_thinking' speaks"):
        for row, written in zip(rows, turns, strict=True):
            traces_of_dialogue(ChatFormat(tiny_tokenizer("chatml")), rules, row.question, written, where=row.where)


# --- settings


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=nan",
        "rollout.temperature=inf",
        "trainer.preflight.wait_s=inf",
        "optimizer.beta1=1.0",
        "optimizer.eps=0",
        "seed=-1",
        "seed=4294967296",
    ],
)
def test_a_number_that_is_none_is_refused_by_its_key(override):
    with pytest.raises(ConfigError, match=override.split("=")[0].replace(".", r"\.")):
        load(composed_from(["model.path=x", override]))


def test_a_key_of_white_space_can_be_seen():
    tree = OmegaConf.to_container(composed_from(["model.path=x"]))
    tree["task"]["\t"] = 1
    with pytest.raises(ConfigError, match=r"task\.'\\t' is 1; there is no such key"):
        load(OmegaConf.create(tree))


@pytest.mark.parametrize("override", ["=1", "task=[1,2]", "task=1"])
def test_a_choice_that_is_no_name_is_a_message(override):
    with pytest.raises(ConfigError, match=r"See --help") as caught:
        composed_from(["seed=1", override])
    assert override in str(caught.value) or "Config group override" in str(caught.value)


def test_half_a_character_in_a_setting_is_named_by_its_key():
    with pytest.raises(ConfigError, match=r"task\.name is 'x\\udcff'; it must be valid Unicode"):
        load(composed_from(["model.path=x", "task.name='x\udcff'"]))


def test_a_name_that_no_file_can_have_is_a_message(tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (str(tmp_path / ("a" * 300)), str(tmp_path / "file")):
        with pytest.raises(ConfigError, match="run_dir is"):
            check_run_dir(run_dir, resume=False)
    with pytest.raises(ConfigError, match=r"task\.train_file is 'a"):
        check_file("task.train_file", "a" * 300)


def test_a_damaged_launch_record_is_named(tmp_path, monkeypatch):
    settings = load(composed_from(["model.path=x", f"run_dir={tmp_path}"]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    restart.record(tmp_path, restart.as_mapping(settings))
    (tmp_path / restart.CONFIG).write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml is no configuration"):
        restart.continued(settings)
    (tmp_path / restart.LAUNCH).write_text(DEEP)
    with pytest.raises(ValueError, match=r"launch\.json: not JSON"):
        restart.continued(settings)


# --- dialogue text


@pytest.mark.parametrize("text", ["!" * 100_000 + "x", "\\[" * 50_000, "\\( " * 30_000, " " * 100_000 + "x"])
def test_text_is_cut_into_sentences_in_one_pass(text):
    begin = time.process_time()
    assert "".join(sentences(text)) == text
    _without_marker(text, "[FINISH]")
    assert time.process_time() - begin < 5  # 0.01 s; minutes when every opened formula and every blank was followed to the end


# --- folders


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("whole") / "model", "qwen2_tied", tokenizer=tiny_tokenizer("chatml"))


@pytest.fixture
def model(whole_model, tmp_path) -> Path:
    return Path(shutil.copytree(whole_model, tmp_path / "model"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 2**40),
        ("num_key_value_heads", "two"),
        ("head_dim", [1]),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", math.nan),
        ("max_position_embeddings", "many"),
        ("eos_token_id", ["</s>"]),
        ("eos_token_id", {}),
        ("rope_parameters", [1]),
        ("architectures", {"a": 1}),
        ("layer_types", 3),
        ("vocab_size", True),
    ],
)
def test_a_config_json_of_strange_values_is_refused_by_its_key(model, key, value):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}"):
        Architecture.from_pretrained(model)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", DEEP])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_config_json_is_named(model, name, content):
    (model / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Architecture.from_pretrained(model)


def test_a_layout_of_a_huge_model_is_refused_at_once(model):
    arch = Architecture.from_pretrained(model)
    huge = {**json.loads((model / "config.json").read_text()), "intermediate_size": 2**31 - 1}
    with pytest.raises(ValueError, match="must divide intermediate_size"):
        Architecture.from_config(huge).check_layout(2, 1)
    assert arch.ffn_hidden_size == 96


@pytest.mark.parametrize("header", ["[" * 5000, '{"a": 1}', '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', '{"a": {}}'])
def test_a_damaged_header_of_a_safetensors_file_is_named(tmp_path, header):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"1234")
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        TensorFile(file)


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../../elsewhere"}}', '{"weight_map": [1]}', "{}", "["])
def test_an_index_that_names_no_files_beside_it_is_refused(model, index):
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        CheckpointReader(model, Architecture.from_pretrained(model))


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named_by_its_folder(model, content):
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"the tokenizer of .*model cannot be read"):
        ChatFormat.from_pretrained(str(model))


def test_a_setting_of_a_tokenizer_that_is_none_is_named_by_its_folder(model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": []}))
    with pytest.raises(ValueError, match=r"the tokenizer of .*model cannot be read"):
        ChatFormat.from_pretrained(str(model))


def test_a_chat_template_that_is_no_template_is_named_by_its_folder(model):
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}")
    with pytest.raises(ValueError, match=r"the chat_template of .*model' cannot be rendered"):
        ChatFormat.from_pretrained(str(model))


def test_listing_a_checkpoint_runs_nothing_that_is_written_in_it(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "state.json").write_text('{"architectures": {"policy": {}}}')
    (tmp_path / "policy" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match="which no plan of tensors holds"):
        list_folder(tmp_path)
    assert not (tmp_path / "exploded").exists()


HALF = Metadata.__new__(Metadata)  # as pickle makes it of a plan that lost a name


@pytest.mark.parametrize(
    "damage", [b"", b"garbage", b"\x80\x04.", pickle.dumps([1, 2]), pickle.dumps(HALF), pickle.dumps(Metadata({"a": 1}))]
)
def test_a_damaged_plan_of_a_checkpoint_is_named(tmp_path, damage):
    import torch

    save({"weight": torch.arange(4.0)}, storage_writer=FileSystemWriter(tmp_path / "policy"), no_dist=True)
    (tmp_path / "state.json").write_text('{"architectures": {"policy": {}}}')
    assert len(list_folder(tmp_path).rows) == 1
    (tmp_path / "policy" / ".metadata").write_bytes(damage)
    with pytest.raises(ValueError, match=r"policy/\.metadata cannot be read"):
        list_folder(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"architectures": ["policy"]}', '{"architectures": {"../x": {}}}', DEEP])
def test_a_damaged_state_of_a_checkpoint_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json"):
        list_folder(tmp_path)


def test_a_manifest_or_pointer_of_garbage_is_known_to_be_none(tmp_path):
    folder = tmp_path / "step_000001"
    folder.mkdir()
    (folder / manifest.NAME).write_text(DEEP)
    (tmp_path / "latest").write_text("step_" + "a" * 400)
    assert "is not the manifest that was written" in manifest.fault(folder)
    assert state.latest(tmp_path) is None


# --- run folders

METRICS, EVALUATION = {"step": 1, "reward/mean": 0.5}, {"step": 1, "set": "s", "accuracy": 0.5}


@pytest.mark.parametrize(
    "found",
    [
        {"low": "x", "high": 1},
        {"low": None, "high": None},
        {"level_accuracy": [1]},
        {"level_accuracy": {"1": "x"}},
        {"judging": {"strict": 5}},
        {"accuracy": 10**400},
    ],
)
def test_an_evaluation_of_strange_values_is_named_by_line_and_key(tmp_path, found):
    write(tmp_path / "evaluations.jsonl", EVALUATION, {**EVALUATION, **found})
    with pytest.raises(ValueError, match=rf"evaluations\.jsonl, line 2: '{next(iter(found))}' is"):
        read_run(tmp_path)


@pytest.mark.parametrize("config", [b"a: [", b"\xff\xfe", b"[" * 1500, b"a: 2024-99-99"])
def test_a_damaged_config_of_a_run_is_named(tmp_path, config):
    write(tmp_path / "metrics.jsonl", METRICS)
    (tmp_path / "config.yaml").write_bytes(config)
    with pytest.raises(ValueError, match=r"config\.yaml: not YAML"):
        read_run(tmp_path)


def test_an_episode_of_strange_values_is_named_by_line_and_key(tmp_path):
    write(tmp_path / "metrics.jsonl", METRICS)
    (tmp_path / "episodes").mkdir()
    row = {"episode_id": "e", "prompt": {"prompt_id": "p", "question": 7, "answer": "3"}, "group_index": 0}
    write(tmp_path / "episodes" / "step_000001.jsonl", row)
    with pytest.raises(ValueError, match=r"step_000001\.jsonl, line 1: not an episode \(prompt\.question is 7"):
        read_run(tmp_path).episodes(1)


def test_a_row_that_lost_its_line_end_is_not_run_into_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')  # killed between the row and its line end
    folder = RunFolder(tmp_path, writes=True)
    folder.cut_after(2)
    folder.metrics({"step": 3})
    assert [row["step"] for row in folder.read("metrics.jsonl")] == [1, 2, 3]


def test_half_a_character_does_not_cost_the_page(tmp_path):
    write(tmp_path / "metrics.jsonl", METRICS)
    write(tmp_path / "alerts.jsonl", {"step": 1, "alert": "x\ud800"})
    assert "x\\ud800" in write_report(tmp_path).read_text(encoding="utf-8")

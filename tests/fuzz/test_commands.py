"""Whole commands in this process: what they print and with what code they end, whatever their files hold."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_rema.config import load
from megatron_rema.front_door import composed_from
from megatron_rema.rollout.dataset import read_dialogues, read_pairs
from megatron_rema.rollout.traces import traces_of_dialogue
from megatron_rema.trainer import restart
from megatron_rema.trainer.cast import dialogue_rules
from megatron_rema.trainer.score_file import score_file
from tests.fuzz.harness import fuzzed, judged, limited, message_of
from tests.fuzz.inputs import damaged, files, mutated
from tests.fuzz.test_dialogue_text import CHATS
from tests.fuzz.test_rows import DIALOGUE, PAIR, PROBLEM, RESPONSE, RESPONSES, VIEW, named

TOOLS = Path(__file__).resolve().parents[2] / "tools"
OTHER_VIEW = {
    "instruction": "add them",
    "output": "\\boxed{3}",
    "system": "",
    "history": [["Question:\n1 + 2\n\nInstruction:\nplan", "3"]],
}
META_VIEW = {"instruction": "3", "output": "add them", "system": "s", "history": [["1 + 2", "plan"]]}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config():
    return load(composed_from(["model.path=x", "reward.verifier_timeout_s=5"]))


def test_saved_responses_are_scored_or_refused(config, tmp_path, capsys):
    import dataclasses

    path = tmp_path / "responses.jsonl"
    settings = dataclasses.replace(config, score_file=str(path))

    @fuzzed(ci=15, share=0.01)
    @given(files(RESPONSE, RESPONSES))
    def holds(data: bytes) -> None:
        path.write_bytes(data)
        message = message_of("commands: score_file", lambda: score_file(settings))
        assert message is None or str(path) in message
        assert (message is None) == capsys.readouterr().out.startswith("accuracy: ")

    holds()


def test_the_cold_start_set_is_repaired_or_refused(tmp_path, capsys):
    module, out = tool("repair_dialogues"), tmp_path / "out.jsonl"
    paths = [tmp_path / name for name in ("meta.jsonl", "reasoning.jsonl", "problems.jsonl")]
    whole = [json.dumps(row).encode() + b"\n" for row in (META_VIEW, OTHER_VIEW, PROBLEM)]

    @fuzzed(ci=10, share=0.01)
    @given(st.integers(0, 3), files(VIEW, PROBLEM, OTHER_VIEW), st.sampled_from(["keep", "drop", "rewrite"]))
    def holds(which: int, data: bytes, planner_answers: str) -> None:
        for index, path in enumerate(paths):
            path.write_bytes(data if index == which else whole[index])
        out.unlink(missing_ok=True)
        words = [*paths[:2], out, "--problems", paths[2], "--planner-answers", planner_answers]
        with limited(), mock.patch.object(sys, "argv", ["repair_dialogues.py", *map(str, words)]):
            code = module.main()
        said = capsys.readouterr().err
        assert (code, said) == (0, "") or (code == 2 and said.startswith("error: ") and said.count("\n") == 1), said
        assert code == 0 or str(tmp_path) in said or "no dialogue is left" in said, said
        if code == 0:
            read_dialogues(out)
        judged("commands: repair_dialogues", "accepted" if code == 0 else "refused")

    holds()


def test_what_no_protocol_plays_is_named_by_file_and_line(config, tmp_path):
    chat, rules, path = CHATS["chatml"], dialogue_rules(config), tmp_path / "written.jsonl"

    @fuzzed(ci=30, share=0.02)
    @given(files(DIALOGUE, PAIR), st.booleans())
    def holds(data: bytes, pairs: bool) -> None:
        path.write_bytes(data)

        def read() -> None:
            rows = read_pairs(path) if pairs else read_dialogues(path)
            for row in rows:
                for turns in (row.chosen, row.rejected) if pairs else (row.turns,):
                    traces_of_dialogue(chat, rules, row.question, turns, fields=row.fields, where=row.where)

        named(message_of("commands: written dialogues", read), path)

    holds()


def test_what_a_launch_left_is_continued_or_refused(config, tmp_path):
    import dataclasses

    folder = tmp_path / "run"
    folder.mkdir()
    settings = dataclasses.replace(config, run_dir=str(folder))
    environment = {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_RESTART_COUNT": "1"}
    with mock.patch.dict(os.environ, environment):
        restart.record(folder, restart.as_mapping(settings))
    whole = {name: (folder / name).read_bytes() for name in (restart.LAUNCH, restart.CONFIG)}
    mapping = yaml.safe_load(whole[restart.CONFIG])

    @fuzzed(ci=20, share=0.01)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        name = data.draw(st.sampled_from(sorted(whole)))
        mutations = mutated(mapping if name == restart.CONFIG else {"launch_id": "one"}).map(lambda tree: json.dumps(tree).encode())
        content = data.draw(st.one_of(mutations, damaged(whole[name])))
        (folder / name).write_bytes(content[:4000] if content.startswith(b"[[") else content)  # yaml is slow on brackets, not wrong
        with mock.patch.dict(os.environ, environment):
            message = message_of("commands: restarts", lambda: restart.continued(settings))
        assert message is None or re.search(re.escape(str(folder)), message), message

    holds()

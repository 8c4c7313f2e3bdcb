"""Run folders and what is written of them: a page holds no element that a text of the run made, and bad files are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rema.report.page import page_html
from megatron_rema.report.plots import draw_plots
from megatron_rema.report.run_folder import read_run
from megatron_rema.trainer.run_folder import RunFolder
from tests.fuzz.harness import fuzzed, limited, message_of
from tests.fuzz.inputs import damaged, files, mutated, texts
from tests.unit.test_report import Page, write_run

MARKUP = (
    "<zz>",
    "</i><zz onload=1>",
    "'\"><zz>",
    "<!--<zz>",
    "]]><zz>",
    "</script><zz>",
    "<style><zz>",
    "&lt;zz&gt;",
    "\x1b]0;x\x07",
    "\u202e",
    "\0",
)
hostile = st.one_of(st.sampled_from(MARKUP), st.sampled_from(MARKUP), texts)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", num_steps=3)


def rows_of(file: Path) -> list:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def names_of(page: str) -> set[tuple[str, tuple[str, ...]]]:
    return {(tag, tuple(sorted(attributes))) for tag, attributes in Page(page).elements}


def page_of(path: Path) -> str:
    """What the page holds, its plots drawn by the next test but one."""
    page = page_html(read_run(path), [])
    return page.encode("utf-8", "backslashreplace").decode()


def test_hostile_text_stays_text_wherever_it_stands(run, tmp_path):
    known = names_of(page_of(run))
    path = tmp_path / "run"
    shutil.copytree(run, path)
    places = [path / name for name in ("metrics.jsonl", "evaluations.jsonl", "alerts.jsonl", "episodes/step_000003.jsonl")]
    whole = {file: rows_of(file) for file in places}

    @fuzzed(ci=15, share=0.03)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        for file, rows in whole.items():
            chosen = [data.draw(mutated(row, hostile, texts_only=True)) for row in rows[:2]] + rows[2:]
            file.write_bytes(
                b"".join(json.dumps(row, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass") + b"\n" for row in chosen)
            )
        found: list[str] = []
        message_of("reports: hostile text", lambda: found.append(page_of(path)), names=[str(path)])
        for page in found:
            assert {tag for tag, _ in names_of(page)} <= {tag for tag, _ in known}
            assert not any(re.match(r"on|zz", name) for _, attributes in names_of(page) for name in attributes)
            assert sum(tag == "script" for tag, _ in Page(page).elements) == 1

    holds()


def test_any_file_of_a_run_is_read_or_refused_by_file_and_line(run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(run, path)
    rows = {name: rows_of(run / name)[0] for name in ("metrics.jsonl", "evaluations.jsonl", "alerts.jsonl", "episodes/step_000003.jsonl")}

    @fuzzed(ci=30, share=0.03)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*rows, "config.yaml"]))
        whole = (run / name).read_bytes()
        content = data.draw(
            files(rows[name]) if name in rows else st.one_of(damaged(whole).map(lambda content: content[:2000]), st.binary(max_size=40))
        )
        (path / name).write_bytes(content)
        message_of("reports: any file", lambda: page_of(path), names=[str(path)])
        (path / name).write_bytes(whole)

    holds()


def test_any_numbers_are_drawn_or_refused(run, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(run, path)
    whole = {name: rows_of(run / name) for name in ("metrics.jsonl", "evaluations.jsonl")}

    @fuzzed(ci=1, share=0.001)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        for name, rows in whole.items():
            chosen = [data.draw(mutated(row)) for row in rows[:2]] + rows[2:]
            (path / name).write_text("".join(json.dumps(row) + "\n" for row in chosen))
        message_of("reports: plots", lambda: draw_plots(read_run(path)), names=[str(path)])

    holds()


@fuzzed(ci=30, share=0.02)
@given(data=st.data())
def test_whatever_a_killed_run_left_its_rows_are_cut_and_read_again(run, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "cut"
    path.mkdir(exist_ok=True)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines)[: data.draw(st.integers(0, sum(map(len, lines))))])
    with limited():
        folder = RunFolder(path, writes=True)
        folder.cut_after(data.draw(st.integers(-1, 4)))
        folder.metrics({"step": 5})
        assert [row["step"] for row in folder.read("metrics.jsonl")][-1] == 5
    message_of("reports: cut rows", lambda: read_run(path))

"""Configurations: whatever stands on the command line, a run's settings come out, or one message that names the key."""

from __future__ import annotations

import copy
import os
import string
import subprocess
import sys
from functools import cache
from typing import Any
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rema.config import ConfigError
from megatron_rema.front_door import _checked, composed_from, config_dir
from megatron_rema.trainer.inputs import read_for_cold_start, read_for_evaluation, read_for_reward_model, read_for_training
from tests.fuzz.harness import fuzzed, message_of
from tests.fuzz.inputs import texts, values
from tests.tiny_task import save_tiny_task

READERS = {
    "train": read_for_training,
    "sft": read_for_cold_start,
    "evaluate": read_for_evaluation,
    "train_reward_model": read_for_reward_model,
}
GROUPS = {file.parent.name: sorted(other.stem for other in file.parent.glob("*.yaml")) for file in sorted(config_dir().glob("*/*.yaml"))}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("task")
    return [*save_tiny_task(folder), f"run_dir={folder}/run"]


@cache
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=False)


def keys_of(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    return [key for name, value in tree.items() for key in (f"{prefix}{name}", *keys_of(value, f"{prefix}{name}."))]


def created(tree: dict[str, Any]) -> DictConfig:
    """A mapping as Hydra would have composed it; what Hydra refuses by itself, ``composed_from`` turns into a message."""
    try:
        return OmegaConf.create(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error


def read_as(door: str, cfg: Any, world_size: int) -> None:
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(world_size)}):
        READERS[door](_checked(cfg))


INTERPOLATIONS = st.sampled_from(
    [
        *(
            "${seed}",
            "${nothing}",
            "${task}",
            "${task.name}",
            "${.name}",
            "${..seed}",
            "${oc.env:NOWHERE}",
            "${oc.env:HOME}",
            "${",
            "${}",
            "???",
        ),
        *(
            "${oc.decode:'[1'}",
            "${a:b}",
            "${run_dir}",
            "${${seed}}",
            "$seed",
            "${oc.create:{a:1}}",
            "${oc.dict.keys:task}",
            "${oc.select:x,1}",
        ),
    ]
)
worlds = st.one_of(st.sampled_from([1, 2, 3, 4, 7, 8, 64, 4096]), st.integers(1, 4096))
near = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 8, 0.0, 0.5, 1.0, 1e-9, True, False, None, "auto", "none"]), st.integers(-2, 4096))
anything = st.one_of(values, near, INTERPOLATIONS)


@fuzzed(ci=60, share=0.14)
@given(st.data())
def test_any_value_anywhere_is_taken_or_refused_by_its_key(task, data):
    """The mapping that Hydra composed, with up to four of its keys set, taken out or added."""
    tree = copy.deepcopy(composed(tuple(task)))
    keys = keys_of(tree)
    touched = []
    for _ in range(data.draw(st.integers(1, 4))):
        key = data.draw(st.sampled_from(keys))
        *path, name = key.split(".")
        parent = tree
        for part in path:
            parent = parent.get(part) if isinstance(parent, dict) else None
        if not isinstance(parent, dict):
            continue
        how = data.draw(st.sampled_from(["set", "set", "set", "set", "remove", "add"]))
        if how == "remove":
            parent.pop(name, None)
        else:
            name = name if how == "set" else data.draw(texts)
            parent[name] = data.draw(anything)
        touched += [name, repr(name)[1:40]]
    door, world_size = data.draw(st.sampled_from(list(READERS))), data.draw(worlds)
    known = {part for key in keys for part in key.split(".")}
    message_of("configuration: values", lambda: read_as(door, created(tree), world_size), names=known | set(touched))


VALUE = st.one_of(
    near.map(str),
    INTERPOLATIONS,
    st.sampled_from(
        ["[1,2]", "{a:1}", "{a:1,a:2}", "[", "{", "'", '"x', "[[A]]", "a=b", "nan", "inf", "-inf", "1e999", "1_000", "0x10", "\\,"]
    ),
    st.sampled_from(
        ["range(1,3)", "choice(a,b)", "interval(0,1)", "glob(*)", "sort(1,2)", "shuffle(a)", "tag(x,1)", "float(a)", "int(1.5)", "f(x)"]
    ),
    st.text(string.printable, max_size=10),
    texts,
)
PREFIX = st.sampled_from(["", "", "", "", "+", "++", "~", "@", "~~", "+-"])


@st.composite
def overrides(draw: st.DrawFn, keys: list[str]) -> str:
    kind = draw(st.sampled_from(["key", "key", "key", "group", "group", "added", "text"]))
    if kind == "text":
        return draw(st.one_of(texts, st.text(string.printable, max_size=14)))
    if kind == "group":
        name = draw(st.sampled_from(sorted(GROUPS)))
        choice = draw(st.one_of(st.sampled_from(GROUPS[name]), st.sampled_from(GROUPS[name]), VALUE))
        at = draw(st.sampled_from(["", "", "", "", "@x", "@_global_", "@:", "@a:b"]))
        return f"{draw(PREFIX)}{name}{at}={choice}"
    if kind == "added":
        strange = ["hydra", "hydra.run.dir", "hydra.searchpath", "defaults", "x.y", "task.", ".", "a b", "seed.x"]
        return f"{draw(PREFIX)}{draw(st.sampled_from(strange))}={draw(VALUE)}"
    key = draw(st.sampled_from(keys))
    return draw(st.sampled_from([f"{draw(PREFIX)}{key}={draw(VALUE)}"] * 4 + [f"~{key}", key, f"{key}="]))


def enter_with(door: str, arguments: list[str], world_size: int) -> None:
    """As ``front_door.enter`` does, up to where torch would be imported."""
    read_as(door, composed_from(arguments), world_size)


def few(task: list[str]) -> list[str]:
    """Hydra takes 30 ms to read an override: those without which nothing could be taken."""
    return [override for override in task if override.startswith(("task.train_file", "task.eval", "~task.eval", "model.path", "run_dir"))]


@fuzzed(ci=15, share=0.06)
@given(st.data())
def test_any_command_line_is_taken_or_refused(task, data):
    keys = keys_of(composed(tuple(task)))
    given_overrides = data.draw(st.lists(overrides(keys), min_size=1, max_size=3))
    door, world_size = data.draw(st.sampled_from(list(READERS))), data.draw(worlds)
    message_of("configuration: command lines", lambda: enter_with(door, [*few(task), *given_overrides], world_size))


@fuzzed(ci=8, share=0.015)
@given(st.data())
def test_any_choice_of_groups_is_taken_or_refused_by_a_key(task, data):
    """Whole groups that are each right, at any world size: what is refused here breaks a rule between fields, or names no folder."""
    names = data.draw(st.lists(st.sampled_from(sorted(GROUPS)), unique=True, max_size=5))
    chosen = [f"{name}={data.draw(st.sampled_from(GROUPS[name]))}" for name in names]
    door, world_size = data.draw(st.sampled_from(list(READERS))), data.draw(worlds)
    keys = set(keys_of(composed(tuple(task)))) | {"reasoning", "meta_thinking", "policies"}
    message_of("configuration: groups", lambda: enter_with(door, [*few(task), *chosen], world_size), names=keys)


COMMAND_LINES = [
    ["seed=1.5"], ["seed=-1"], ["+x=1"], ["~task"], ["task=nowhere"], ["experiment=[a,b]"], ["seed='"], ["trainer.steps=${nothing}"],
    ["run_dir=" + "a" * 300], ["task.train_file=" + "a/" * 3000], ["optimizer.lr=nan"], ["rollout.temperature=inf"], ["=1"], ["\ud800=1"],
    ["task.name=\udcff", "run_dir=x"], ["task=[1,2]"], ["model.path="], ["task.evaluation_files.heldout={a:1}"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", COMMAND_LINES if os.environ.get("MEGATRON_REMA_FUZZ") else COMMAND_LINES[:3], ids=ascii)
def test_the_real_command_ends_with_one_line_and_exit_code_2(arguments, task):
    from tests.fuzz.harness import judged

    encoded = [argument.encode("utf-8", "surrogateescape" if "\udcff" in argument else "surrogatepass") for argument in (*task, *arguments)]
    command = [sys.executable.encode(), b"-m", b"megatron_rema.train", *encoded]
    result = subprocess.run(command, capture_output=True, timeout=120)
    said = result.stderr.decode(errors="replace")
    assert result.returncode == 2 and "Traceback" not in said and said.startswith("error: ") and said.count("\n") == 1, said
    judged("configuration: real commands", "refused")

"""A gold score cannot become a reward: the type refuses, and so does the import contract."""

from __future__ import annotations

import ast
import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rema.algorithm.baseline import plan_rewards
from megatron_rema.integrity.gold import Gold, opened
from megatron_rema.kernels.advantage import group_advantage
from megatron_rema.types import Episode, Prompt, Role

PACKAGE = Path(__file__).parents[2] / "megatron_rema"
GOLD = Gold(1.0, "strict verifier")


@pytest.mark.parametrize(
    "use",
    [
        lambda: float(GOLD),
        lambda: int(GOLD),
        lambda: bool(GOLD),
        lambda: 1.0 + GOLD,
        lambda: GOLD - 0.5,
        lambda: 2 * GOLD,
        lambda: sum([GOLD, GOLD]),
        lambda: max(GOLD, GOLD),
        lambda: GOLD == 1.0,
        lambda: math.fsum([GOLD]),
        lambda: torch.tensor([GOLD]),
        lambda: torch.zeros(1) + GOLD,
        lambda: np.array([GOLD]),
        lambda: np.ones(1) * GOLD,
        lambda: json.dumps(GOLD),
        lambda: pickle.dumps(GOLD),
        lambda: copy.deepcopy(GOLD),
        lambda: setattr(GOLD, "_value", 0.0),
    ],
)
def test_no_arithmetic_conversion_or_copy(use):
    with pytest.raises((TypeError, RuntimeError)):  # torch: could not infer dtype of Gold
        use()


def test_the_value_is_not_in_its_text():
    assert "1.0" not in f"{GOLD!r} {GOLD}"


def test_rewards_advantages_and_losses_do_not_take_it():
    episode = Episode("0/p/0", Prompt("p", "1 + 1", "2"), 0)
    episode.turn_rewards[Role.REASONING] = [0.0]
    with pytest.raises(TypeError):
        episode.add_reward("outcome", Role.REASONING, GOLD)
    assert episode.turn_rewards[Role.REASONING] == [0.0], "nothing was changed"
    with pytest.raises((TypeError, RuntimeError)):
        group_advantage(torch.tensor([GOLD, GOLD]), torch.tensor([0, 0]), estimator="grpo")
    with pytest.raises((TypeError, AttributeError)):
        plan_rewards([GOLD], torch.tensor([0]), 1)


def test_only_audits_open_it():
    callers = set()
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if "opened" in names and any(isinstance(n, ast.ImportFrom) and n.module == "megatron_rema.integrity.gold" for n in ast.walk(tree)):
            callers.add(file.relative_to(PACKAGE).as_posix())
        assert "_value" not in attributes or file.name == "gold.py" or file.parent.name != "integrity", file
    assert callers <= {"integrity/audits.py"}
    assert opened([GOLD, Gold(0.0, "strict verifier")]) == [1.0, 0.0]

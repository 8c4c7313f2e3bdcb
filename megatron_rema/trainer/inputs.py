"""What a run reads, checked before torch is imported: a bad path, row or layout costs a user a second, not a minute."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rema.architecture import Architecture
from megatron_rema.config import ConfigError, RunConfig, check_file, check_run_dir
from megatron_rema.engine.grammar import require_xgrammar
from megatron_rema.reading import is_dir, read_bytes
from megatron_rema.reward.functions import named_function
from megatron_rema.reward.gates import gates_of
from megatron_rema.rollout.dataset import WrittenDialogue, WrittenPair, read_dialogues, read_pairs, read_prompts
from megatron_rema.rollout.judge import in_both_orders, read_comparisons
from megatron_rema.types import Prompt, Role


@dataclass(frozen=True)
class Inputs:
    """Everything read from outside: a front door fills what it needs and leaves the rest empty."""

    architectures: dict[str, Architecture]  # by policy
    prompts: Sequence[Prompt] = ()
    evaluation_sets: dict[str, list[Prompt]] | None = None
    dialogues: Sequence[WrittenDialogue] = ()
    pairs: Sequence[WrittenPair] = ()
    heldout_pairs: Sequence[WrittenPair] = ()
    reward_model: Architecture | None = None


@dataclass(frozen=True)
class Source:
    """What a run draws its examples from. A position in them means something only as long as they stay the same."""

    field: str
    file: str
    content: str  # number and digest of the rows as they were read

    @classmethod
    def of(cls, field: str, file: str, rows: Sequence[Any]) -> Source:
        digest = hashlib.sha256()
        for row in rows:
            digest.update(repr(row).encode(errors="surrogatepass"))
        return cls(field, file, f"{len(rows)} rows, sha256 {digest.hexdigest()[:16]}")


def read_for_training(config: RunConfig) -> Inputs:
    """Inputs of ``train``. Raises ValueError naming field, value, rule and remedy."""
    check_run_dir(config.run_dir, config.resume, config.resume_from)
    if config.task.json_actions:
        require_xgrammar()
    integrity = config.integrity
    for key, name in (
        ("reward.function", config.reward.function),
        ("integrity.oracle", None if integrity.oracle == "verdict" else integrity.oracle),
        ("integrity.renewal", None if integrity.renewal == "arith" else integrity.renewal),
        ("integrity.second_judge", integrity.second_judge),
        ("integrity.paraphrase", integrity.paraphrase),
    ):
        if name is not None:
            named_function(key, name)
    gates_of(config.reward.gates)
    architectures = _architectures(config)
    check_file("task.train_file", config.task.train_file)
    return Inputs(
        architectures,
        prompts=_prompts(config, config.task.train_file, both_orders=config.task.both_orders),
        evaluation_sets=_evaluation_sets(config),
        reward_model=_reward_model(config),
    )


def read_for_cold_start(config: RunConfig) -> Inputs:
    """Inputs of ``sft``."""
    check_run_dir(config.run_dir, config.resume, config.resume_from)
    architectures = _architectures(config)
    check_file("task.cold_start_file", config.task.cold_start_file)
    return Inputs(architectures, dialogues=read_dialogues(config.task.cold_start_file, field_keys=config.task.fields))


def read_for_evaluation(config: RunConfig) -> Inputs:
    """Inputs of ``evaluate``."""
    check_run_dir(config.run_dir, config.resume, config.resume_from)
    if config.task.json_actions:
        require_xgrammar()
    return Inputs(_architectures(config), evaluation_sets=_evaluation_sets(config))


def read_for_reward_model(config: RunConfig) -> Inputs:
    """Inputs of ``train_reward_model``: pairs, and the one trunk at model.path."""
    check_run_dir(config.run_dir, config.resume, config.resume_from)
    arch = Architecture.from_pretrained(config.model.path)
    layout = config.parallel.layout("reward_model")
    arch.check_layout(layout.tensor, layout.pipeline, layout.virtual_pipeline)
    check_file("task.preference_file", config.task.preference_file)
    heldout = config.task.preference_heldout_file
    if heldout is not None:
        check_file("task.preference_heldout_file", heldout)
    fields = config.task.fields
    return Inputs(
        {"reward_model": arch},
        pairs=read_pairs(config.task.preference_file, field_keys=fields),
        heldout_pairs=read_pairs(heldout, field_keys=fields) if heldout else (),
    )


def _reward_model(config: RunConfig) -> Architecture | None:
    """The reward model that scores episodes, which must read the reasoner's tokens."""
    if config.reward.model_path is None:
        return None
    path = Path(config.reward.model_path)
    check_file("reward.model_path", str(path))
    arch = Architecture.from_pretrained(path)
    if arch.num_scalars == 0:
        raise ConfigError(
            f"reward.model_path {path} is a language model; it must be a sequence-classification folder: train_reward_model writes one."
        )
    layout = config.parallel.layout("reward_model")
    arch.check_layout(layout.tensor, layout.pipeline, layout.virtual_pipeline)
    policy = Path(config.model_path(config.policy_of_role[Role.REASONING]))
    if read_bytes(path / "tokenizer.json") != read_bytes(policy / "tokenizer.json"):
        raise ConfigError(
            f"reward.model_path {path} has another tokenizer than {policy}; a reward model reads the reasoner's tokens as they are."
        )
    return arch


def _prompts(config: RunConfig, file: str, *, both_orders: bool, limit: int | None = None) -> list[Prompt]:
    """Problems; of a judge, comparisons, each in one order or in both."""
    task = config.task
    if task.kind == "judge":
        rows = read_comparisons(file, question_key=task.question_key, label_key=task.answer_key, limit=limit)
        return in_both_orders(rows) if both_orders else rows
    return read_prompts(file, question_key=task.question_key, answer_key=task.answer_key, limit=limit)


def _evaluation_sets(config: RunConfig) -> dict[str, list[Prompt]]:
    """The first ``trainer.evaluation_problems`` problems of every evaluation set; comparisons in both orders, whatever training does."""
    sets = {}
    for name, file in config.task.evaluation_files.items():
        check_file(f"task.evaluation_files.{name}", file)
        sets[name] = _prompts(config, file, both_orders=True, limit=config.trainer.evaluation_problems or None)
    return sets


def _architectures(config: RunConfig) -> dict[str, Architecture]:
    """Every policy's architecture, checked against layout and context."""
    architectures = {}
    for name in config.agents.policies:
        path = Path(config.model_path(name))
        if not is_dir(path):
            raise ConfigError(f"model.path of policy {name} is {path}; no such folder: give a Hugging Face checkpoint folder.")
        arch = Architecture.from_pretrained(path)
        for model in ("actor", "critic", "reference"):
            layout = config.parallel.layout(model)
            arch.check_layout(layout.tensor, layout.pipeline, layout.virtual_pipeline)
        if not (path / "tokenizer.json").exists():
            raise ConfigError(f"model.path {path} has no tokenizer.json; dialogues need the model's tokenizer: copy its files there.")
        if config.rollout.max_context_tokens > arch.max_positions:
            raise ConfigError(
                f"rollout.max_context_tokens ({config.rollout.max_context_tokens}) exceeds the model's max_position_embeddings "
                f"({arch.max_positions}): lower it."
            )
        architectures[name] = arch
    return architectures

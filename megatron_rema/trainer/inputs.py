"""What a run reads, checked before torch is imported: a bad path, row or layout costs a user a second, not a minute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rema.architecture import Architecture
from megatron_rema.config import ConfigError, RunConfig, check_file, check_run_dir
from megatron_rema.rollout.dataset import WrittenDialogue, read_dialogues, read_prompts
from megatron_rema.types import Prompt


@dataclass(frozen=True)
class Inputs:
    """Everything read from outside: a front door fills what it needs and leaves the rest empty."""

    architectures: dict[str, Architecture]  # by policy
    prompts: Sequence[Prompt] = ()
    evaluation_sets: dict[str, list[Prompt]] | None = None
    dialogues: Sequence[WrittenDialogue] = ()


def read_for_training(config: RunConfig) -> Inputs:
    """Inputs of ``train``. Raises ValueError naming field, value, rule and remedy."""
    check_run_dir(config.run_dir, config.resume)
    architectures = _architectures(config)
    check_file("task.train_file", config.task.train_file)
    return Inputs(architectures, prompts=_prompts(config, config.task.train_file), evaluation_sets=_evaluation_sets(config))


def read_for_cold_start(config: RunConfig) -> Inputs:
    """Inputs of ``sft``."""
    check_run_dir(config.run_dir, config.resume)
    architectures = _architectures(config)
    check_file("task.cold_start_file", config.task.cold_start_file)
    return Inputs(architectures, dialogues=read_dialogues(config.task.cold_start_file))


def read_for_evaluation(config: RunConfig) -> Inputs:
    """Inputs of ``evaluate``."""
    check_run_dir(config.run_dir, config.resume)
    return Inputs(_architectures(config), evaluation_sets=_evaluation_sets(config))


def _prompts(config: RunConfig, file: str, limit: int | None = None) -> list[Prompt]:
    return read_prompts(file, question_key=config.task.question_key, answer_key=config.task.answer_key, limit=limit)


def _evaluation_sets(config: RunConfig) -> dict[str, list[Prompt]]:
    """The first ``trainer.evaluation_problems`` problems of every evaluation set."""
    sets = {}
    for name, file in config.task.evaluation_files.items():
        check_file(f"task.evaluation_files.{name}", file)
        sets[name] = _prompts(config, file, config.trainer.evaluation_problems or None)
    return sets


def _architectures(config: RunConfig) -> dict[str, Architecture]:
    """Every policy's architecture, checked against layout, context and the other policies' tokenizer."""
    architectures = {}
    tokenizers: dict[str, bytes] = {}
    for name in config.agents.policies:
        path = Path(config.model_path(name))
        if not path.is_dir():
            raise ConfigError(f"model.path of policy {name} is {path}; no such folder: give a Hugging Face checkpoint folder.")
        arch = Architecture.from_pretrained(path)
        arch.check_layout(config.parallel.tensor, config.parallel.pipeline)
        if not (path / "tokenizer.json").exists():
            raise ConfigError(f"model.path {path} has no tokenizer.json; dialogues need the model's tokenizer: copy its files there.")
        tokenizers[name] = (path / "tokenizer.json").read_bytes()
        if tokenizers[name] != next(iter(tokenizers.values())):
            raise ConfigError(f"policies {next(iter(tokenizers))} and {name} have different tokenizers; give all policies the same one.")
        if config.rollout.max_context_tokens > arch.max_positions:
            raise ConfigError(
                f"rollout.max_context_tokens ({config.rollout.max_context_tokens}) exceeds the model's max_position_embeddings "
                f"({arch.max_positions}): lower it."
            )
        architectures[name] = arch
    return architectures

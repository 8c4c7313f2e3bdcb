"""Accuracy of the whole dialogue on held-out problems: avg@k with bootstrap intervals over problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
import torch.distributed as dist
from rich.table import Table
from scipy import stats

from megatron_rema.config import RunConfig, as_mapping
from megatron_rema.reward.assign import assign
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.dialogue import DialogueRules
from megatron_rema.rollout.scheduler import starts_of
from megatron_rema.trainer.cast import build_engines, chat_format, dialogue_rules, process_group
from megatron_rema.trainer.collect import play_everywhere
from megatron_rema.trainer.inputs import Inputs
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.types import Engine, Episode, Prompt


@dataclass(frozen=True)
class Evaluation:
    """One set at one point of a run. ``low`` and ``high`` bound the 95% interval of ``accuracy``."""

    step: int
    weight_version: int
    set: str
    temperature: float
    samples_per_problem: int
    num_problems: int
    num_unknown: int  # dialogues without a verdict: excluded
    accuracy: float  # right answer in a dialogue that ended as the protocol wants
    low: float
    high: float
    answer_accuracy: float  # right answer, however the dialogue ended
    finished_frac: float
    turns_per_episode: float
    level_accuracy: dict[str, float]


def interval(problem_means: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean over problems: percentile bootstrap (problems are the unit, their samples are not independent).

    Where every problem has the same mean a bootstrap has nothing to resample: the exact binomial interval over problems stands in.
    """
    values = np.asarray(problem_means, dtype=float)
    if np.ptp(values) == 0.0:
        exact = stats.binomtest(round(values[0] * len(values)), len(values)).proportion_ci(0.95)
        return float(exact.low), float(exact.high)
    found = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def evaluate_sets(
    sets: Mapping[str, Sequence[Prompt]],
    config: RunConfig,
    *,
    rules: DialogueRules,
    chat: ChatFormat,
    engines: Mapping[str, Engine],
    verifier: VerifierPool,
    reporter: Reporter,
    step: int,
) -> list[Evaluation]:
    """Play ``evaluation_samples`` dialogues a problem with the training protocol at each temperature (one when greedy). A collective.

    Seeds are those of step -1 whatever ``step`` is: evaluations along a run differ by their weights, not by their luck.
    """
    trainer = config.trainer
    version = next(iter(engines.values())).weight_version
    results = []
    for (name, prompts), temperature in product(sets.items(), trainer.evaluation_temperatures):
        samples = trainer.evaluation_samples if temperature > 0 else 1
        episodes, judgements = play_everywhere(
            starts_of(prompts, samples),
            rules=replace(rules, temperature=temperature),
            chat=chat,
            engines=engines,
            engine_tensor=config.engine.tensor,
            verifier=verifier,
            seed=config.seed,
            step=-1,
            reporter=reporter,
        )
        scored = assign(episodes, judgements, scheme=config.reward.scheme).scored
        results.append(
            Evaluation(
                step=step,
                weight_version=version,
                set=name,
                temperature=temperature,
                samples_per_problem=samples,
                num_unknown=len(episodes) - len(scored),
                **_accuracy(scored),
            )
        )
    return results


def _accuracy(scored: Sequence[Episode]) -> dict[str, Any]:
    """The measured fields of an Evaluation."""
    by_problem: dict[str, list[float]] = defaultdict(list)
    by_level: dict[str, list[float]] = defaultdict(list)
    for episode in scored:
        right = episode.score["correct"] * episode.score["finished"]
        by_problem[episode.prompt.prompt_id].append(right)
        by_level[str(episode.prompt.level)].append(right)
    means = [fmean(values) for values in by_problem.values()] or [0.0]
    low, high = interval(means)
    return {
        "num_problems": len(by_problem),
        "accuracy": fmean(means),
        "low": low,
        "high": high,
        "answer_accuracy": fmean([episode.score["correct"] for episode in scored] or [0.0]),
        "finished_frac": fmean([episode.score["finished"] for episode in scored] or [0.0]),
        "turns_per_episode": fmean([len(episode.turns) for episode in scored] or [0.0]),
        "level_accuracy": {level: fmean(values) for level, values in sorted(by_level.items())},
    }


def table(rows: Sequence[Mapping], title: str) -> Table:
    """Evaluations side by side, for the console."""
    view = Table(title=title)
    for column in ("step", "set", "accuracy", "95% interval", "finished", "problems x samples", "temperature"):
        view.add_column(column, justify="left" if column == "set" else "right")
    for row in rows:
        view.add_row(
            str(row["step"]),
            row["set"],
            f"{row['accuracy']:.3f}",
            f"[{row['low']:.3f}, {row['high']:.3f}]",
            f"{row['finished_frac']:.3f}",
            f"{row['num_problems']} x {row['samples_per_problem']}",
            f"{row['temperature']:g}",
        )
    return view


def evaluate_checkpoint(config: RunConfig, inputs: Inputs) -> None:
    """The ``evaluate`` front door: a checkpoint plays every evaluation set; results go to run_dir/evaluations.jsonl and the console."""
    chat, rules, reward = chat_format(config), dialogue_rules(config), config.reward
    with process_group():
        first = dist.get_rank() == 0
        dist.barrier()  # every rank has looked at run_dir before rank 0 makes it
        folder, reporter = RunFolder(config.run_dir, writes=first), Reporter(speaks=first)
        folder.write_config(as_mapping(config))
        with VerifierPool(reward.verifier_processes, reward.verifier_timeout_s) as verifier:
            engines = build_engines(config)
            results = evaluate_sets(
                inputs.evaluation_sets or {},
                config,
                rules=rules,
                chat=chat,
                engines=engines,
                verifier=verifier,
                reporter=reporter,
                step=0,
            )
            for engine in engines.values():
                engine.close()
        rows = [asdict(result) for result in results]
        for row in rows:
            folder.evaluation(row)
        reporter.console.print(table(rows, config.model.path))

"""Accuracy of the whole dialogue on held-out problems: avg@k with bootstrap intervals over problems, pass@k and majority@k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from statistics import fmean
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_rema.config import RunConfig, as_mapping
from megatron_rema.parallel.exchange import gather_rows
from megatron_rema.parallel.pulse import beat
from megatron_rema.report.accuracy import Problem, summary
from megatron_rema.report.judging import FIGURES, Judging, Pair, judging
from megatron_rema.reward.assign import assign
from megatron_rema.reward.components import final_answer
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.rollout.dialogue import Chats, DialogueRules
from megatron_rema.rollout.scheduler import starts_of
from megatron_rema.trainer.cast import build_engines, chat_formats, dialogue_rules, process_group
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
    # With several samples a problem. k -> chance that one of k dialogues is right, over the problems with at least k known dialogues
    pass_at_k: dict[str, float] = field(default_factory=dict)
    majority_accuracy: float | None = None  # most frequent answer of a problem's finished dialogues is right (score of k = all samples)
    judging: Judging | None = None  # a judge's comparisons, each in both orders: those count as two problems, and as one in the interval


def evaluate_sets(
    sets: Mapping[str, Sequence[Prompt]],
    config: RunConfig,
    *,
    rules: DialogueRules,
    chat: Chats,
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
            rules=replace(rules, temperature=temperature, samples_per_plan=1, counterfactuals=None),
            chat=chat,
            engines=engines,
            engine_tensor=config.engine.tensor,
            verifier=verifier,
            seed=config.seed,
            step=-1,
            reporter=reporter,
        )
        scored = assign(episodes, judgements, scheme=config.reward.scheme).scored
        majorities = majorities_everywhere(scored, verifier) if samples > 1 else {}
        results.append(
            Evaluation(
                step=step,
                weight_version=version,
                set=name,
                temperature=temperature,
                samples_per_problem=samples,
                num_unknown=len(episodes) - len(scored),
                **_accuracy(scored, majorities),
            )
        )
    return results


def majorities_everywhere(scored: Sequence[Episode], verifier: VerifierPool) -> dict[str, bool]:
    """Of each problem, by prompt_id: is the most frequent answer of its dialogues right? The same on every rank. A collective.

    A dialogue that did not finish, or whose last message holds no answer, does not vote. Each rank's verifier groups the answers of its
    own share of the problems: a verdict that times out on one rank cannot differ on another.
    """
    by_problem: dict[str, list[Episode]] = defaultdict(list)
    for episode in scored:
        by_problem[episode.prompt.prompt_id].append(episode)
    mine = list(by_problem.items())[dist.get_rank() :: dist.get_world_size()]
    found = verifier.majorities(mine, of=lambda problem: [_vote(episode) for episode in problem[1]])
    own = []
    for (name, _), is_right in found:
        own.append({"problem": name, "right": is_right})
        beat()
    rows = gather_rows(own)
    return {row["problem"]: row["right"] for row in rows}


def _vote(episode: Episode) -> tuple[bool, str | None]:
    """(right, answer); the answer is None where the dialogue does not vote."""
    return bool(episode.score["correct"]), final_answer(episode) if episode.score["finished"] else None


def _accuracy(scored: Sequence[Episode], majorities: Mapping[str, bool]) -> dict[str, Any]:
    """The measured fields of an Evaluation. pass@k and majority@k where there are ``majorities``."""
    by_problem: dict[str, list[float]] = defaultdict(list)
    by_level: dict[str, list[float]] = defaultdict(list)
    clusters: dict[str, str | None] = {}
    for episode in scored:
        right = episode.score["correct"] * episode.score["finished"]
        by_problem[episode.prompt.prompt_id].append(right)
        by_level[str(episode.prompt.level)].append(right)
        clusters[episode.prompt.prompt_id] = episode.prompt.pair_id or None
    found = summary([Problem(right, majorities.get(name), clusters[name]) for name, right in by_problem.items()])
    # no dialogue has a verdict: nothing is known, and the interval says so
    mean, low, high = (found.mean, found.low, found.high) if found.num_problems else (0.0, 0.0, 1.0)
    return {
        "num_problems": found.num_problems,
        "accuracy": mean,
        "low": low,
        "high": high,
        "answer_accuracy": fmean([episode.score["correct"] for episode in scored] or [0.0]),
        "finished_frac": fmean([episode.score["finished"] for episode in scored] or [0.0]),
        "turns_per_episode": fmean([len(episode.turns) for episode in scored] or [0.0]),
        "level_accuracy": {level: fmean(values) for level, values in sorted(by_level.items())},
        "pass_at_k": {str(k): value for k, value in found.pass_at.items()} if majorities else {},
        "majority_accuracy": found.majority,
        "judging": judging(pairs_of(scored)),
    }


def pairs_of(scored: Sequence[Episode]) -> list[Pair]:
    """The comparisons among the episodes' prompts, in the order of first appearance. A dialogue that did not finish came to no letter."""
    pairs: dict[str, list[Episode]] = defaultdict(list)
    for episode in scored:
        if episode.prompt.pair_id:
            pairs[episode.prompt.pair_id].append(episode)
    found = []
    for episodes in pairs.values():
        as_given = [episode for episode in episodes if not episode.prompt.is_swapped]
        swapped = [episode for episode in episodes if episode.prompt.is_swapped]
        if as_given and swapped:
            found.append(Pair(as_given[0].prompt.answer, *([_vote(e)[1] for e in order] for order in (as_given, swapped))))
    return found


def table(rows: Sequence[Mapping], title: str) -> Table:
    """Evaluations side by side, for the console. pass@k of the largest k, and majority@k, where some row has them."""
    view = Table(title=title)
    several = any(row.get("pass_at_k") for row in rows)
    more = ("pass@k", "majority@k") if several else ()
    for column in ("step", "set", "accuracy", "95% interval", *more, "finished", "problems x samples", "temperature"):
        view.add_column(column, justify="left" if column == "set" else "right")
    for row in rows:
        passes, majority = row.get("pass_at_k") or {}, row.get("majority_accuracy")
        largest = max(passes, key=int, default=None)
        extra = ("" if largest is None else f"{passes[largest]:.3f}", "" if majority is None else f"{majority:.3f}")
        view.add_row(
            str(row["step"]),
            row["set"],
            f"{row['accuracy']:.3f}",
            f"[{row['low']:.3f}, {row['high']:.3f}]",
            *(extra if several else ()),
            f"{row['finished_frac']:.3f}",
            f"{row['num_problems']} x {row['samples_per_problem']}",
            f"{row['temperature']:g}",
        )
    return view


def judging_table(rows: Sequence[Mapping]) -> Table | None:
    """Where comparisons were judged: accuracy in each order and in both, and what betrays a preference for a place. A line a figure."""
    view = Table(title="both orders of each comparison (intervals over pairs)")
    for column in ("step", "set", "temperature", "figure", "mean", "95% interval"):
        view.add_column(column, justify="left" if column in ("set", "figure") else "right")
    for row in rows:
        if found := row.get("judging"):
            head = [str(row["step"]), row["set"], f"{row['temperature']:g}"]
            for figure, name in FIGURES.items():
                if (estimate := found[name]) is not None:
                    view.add_row(*head, figure, f"{estimate['mean']:.3f}", f"[{estimate['low']:.3f}, {estimate['high']:.3f}]")
                    head = [""] * len(head)
            view.add_row(*head, "came to a letter", f"{found['answered_frac']:.3f}", "", end_section=True)
    return view if view.row_count else None


def show(console: Console, rows: Sequence[Mapping], title: str) -> None:
    """Print the evaluations side by side, and those of a judge once more by order."""
    console.print(table(rows, title))
    if (judged := judging_table(rows)) is not None:
        console.print(judged)


def evaluate_checkpoint(config: RunConfig, inputs: Inputs) -> None:
    """The ``evaluate`` front door: a checkpoint plays every evaluation set; results go to run_dir/evaluations.jsonl and the console."""
    chat, rules, reward = chat_formats(config), dialogue_rules(config), config.reward
    with process_group(config):
        first = dist.get_rank() == 0
        dist.barrier()  # every rank has looked at run_dir before rank 0 makes it
        folder, reporter = RunFolder(config.run_dir, writes=first, private=config.private_run_dir), Reporter(speaks=first)
        folder.write_config(as_mapping(config))
        with VerifierPool(reward.verifier_processes, reward.verifier_timeout_s) as verifier:
            with reporter.phase("start engines"):
                engines = build_engines(config)
            with reporter.phase("evaluate"):
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
        show(reporter.console, rows, config.model.path)

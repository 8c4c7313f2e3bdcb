"""What training pays for episodes: components and penalties, the reward model's score, shaping, and last of all the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_rema.config import RunConfig
from megatron_rema.models.policy import ParallelModel
from megatron_rema.reward.assign import Assigned, assign
from megatron_rema.reward.functions import named_function
from megatron_rema.reward.gates import apply_gates, gates_of
from megatron_rema.reward.math_verifier import Judgement
from megatron_rema.reward.model_scorer import add_model_scores
from megatron_rema.reward.shaping import debias_length, noted_references, shape_by_references
from megatron_rema.rollout.traces import traces_of
from megatron_rema.trainer.credit import penalise_overlong
from megatron_rema.trainer.preference import episode_scores
from megatron_rema.trainer.progress import Reporter
from megatron_rema.types import Episode, Role


class Payment:
    """One run's rewards. Raises ValueError where reward.function or a gate cannot be found."""

    def __init__(self, config: RunConfig, reward_model: ParallelModel | None, reporter: Reporter) -> None:
        self.settings, self.rollout, self.reward_model, self.reporter = config.reward, config.rollout, reward_model, reporter
        self.microbatch_tokens = config.trainer.microbatch_tokens
        self.function = named_function("reward.function", self.settings.function) if self.settings.function else None
        self.members: dict[str, list[float]] = {}  # what each head of the reward model says of the episodes that were scored last
        gates_of(self.settings.gates)  # a wrong one is told before anything is sampled

    def score(
        self, episodes: Sequence[Episode], judgements: Mapping[str, Judgement], *, step: int, component_dropout: float = 0.0
    ) -> tuple[Assigned, dict[str, float]]:
        """Components, penalties and the reward model's score, in place. Returns metrics of the reward model. A collective."""
        assigned = assign(
            episodes,
            judgements,
            scheme=self.settings.scheme,
            mask_unfinished_reward=self.settings.mask_unfinished_reward,
            function=self.function,
            weights=self.settings.weights,
            component_dropout=component_dropout,
            step=step,
        )
        penalise_overlong(assigned.scored, buffer_tokens=self.settings.overlong_buffer_tokens, max_tokens=self.rollout.max_episode_tokens)
        return assigned, self._add_model_scores(assigned.scored)

    def shape(
        self, episodes: Sequence[Episode], references: dict[str, list[float]], *, now: bool, later: bool
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """What is done to whole rewards before episodes are compared; audits see rewards without it, for they play one episode a problem.
        ``now``: PAR is in force even where the settings do not ask for it; ``later``: it may be, and references are noted. Returns PAR's
        references from now on and metrics."""
        debias_length(episodes, coefficient=self.settings.length_debias)
        now = now or self.settings.shaping == "par"
        if now or later:
            references = noted_references(episodes, references, count=self.settings.par_references)
        return references, shape_by_references(episodes, references) if now else {}

    def veto(self, episodes: Sequence[Episode], found: Sequence[str]) -> dict[str, float]:
        """The configured gates and those that audits have ``found``."""
        return apply_gates(episodes, gates_of([*dict.fromkeys((*self.settings.gates, *found))]))

    def _add_model_scores(self, episodes: Sequence[Episode]) -> dict[str, float]:
        if self.reward_model is None:
            return {}
        with self.reporter.phase("reward_model"):
            views = {e.episode_id: trace for e in episodes for trace in traces_of(e) if trace.role is Role.REASONING}
            scores = episode_scores(self.reward_model, list(views.values()), microbatch_tokens=self.microbatch_tokens)
        self.members = dict(zip(views, scores, strict=True))
        return add_model_scores(
            episodes,
            self.members,
            weight=self.settings.model_weight,
            ensemble=self.settings.model_ensemble,
            coefficient=self.settings.model_ensemble_coef,
            mask_unfinished_reward=self.settings.mask_unfinished_reward,
        )

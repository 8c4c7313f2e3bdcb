"""One step's batch in four words: prompts, episodes of a prompt, turns of an episode, tokens of a turn. Nothing else is ever set; all other
numbers are properties of these, and none is written over another.

A trace is one role's view of an episode. Numbers of tokens are at most: what an episode may take, not what it will.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rema.config import RunConfig


@dataclass(frozen=True)
class BatchShape:
    """What one rollout is asked for."""

    prompts: int
    episodes_per_prompt: int  # counterfactual ones are not among them: they are played, not trained on
    roles: int = 2
    rounds: int = 1  # each one turn of every role
    turn_tokens: int = 1024
    episode_tokens: int = 4096  # all turns of an episode together
    context_tokens: int = 4096  # of the longest prompt that an engine reads, its answer included
    minibatches: int = 1  # optimizer steps per rollout; a minibatch holds whole prompts
    microbatch_tokens: int = 4096
    counterfactuals_per_prompt: int = 0
    draws: int = 1  # rollouts of prompts at most, until enough of them are worth training on
    prompt_tokens: int = 256  # of a problem with its instructions

    @classmethod
    def of(cls, config: RunConfig) -> BatchShape:
        rollout, trainer, algorithm = config.rollout, config.trainer, config.algorithm
        counterfactuals = algorithm.counterfactual_samples if algorithm.credit != "outcome" else 0
        if algorithm.credit == "swapped":
            counterfactuals *= rollout.episodes_per_prompt
        return cls(
            prompts=rollout.prompts_per_step,
            episodes_per_prompt=rollout.episodes_per_prompt,
            roles=len(config.roles),
            rounds=rollout.max_rounds,
            turn_tokens=rollout.max_turn_tokens,
            episode_tokens=rollout.max_episode_tokens,
            context_tokens=rollout.max_context_tokens,
            minibatches=trainer.minibatches_per_step,
            microbatch_tokens=trainer.microbatch_tokens,
            counterfactuals_per_prompt=counterfactuals,
            draws=rollout.max_draws,
            prompt_tokens=min(256, rollout.max_context_tokens // 4),
        )

    @property
    def episodes(self) -> int:
        """That are trained on."""
        return self.prompts * self.episodes_per_prompt

    @property
    def played_episodes(self) -> int:
        return self.draws * self.prompts * (self.episodes_per_prompt + self.counterfactuals_per_prompt)

    @property
    def turns_per_episode(self) -> int:
        return self.roles * self.rounds

    @property
    def sampled_tokens_per_episode(self) -> int:
        return min(self.episode_tokens, self.turns_per_episode * self.turn_tokens)

    @property
    def sampled_tokens(self) -> int:
        """Of all roles, in one step."""
        return self.played_episodes * self.sampled_tokens_per_episode

    @property
    def trace_tokens(self) -> int:
        """A role reads the problem and what both say."""
        return min(self.context_tokens, self.prompt_tokens + self.sampled_tokens_per_episode)

    @property
    def traces(self) -> int:
        """Of all roles, in one step."""
        return self.episodes * self.roles

    @property
    def trained_tokens(self) -> int:
        """Positions that pass through the policies in one step, context included."""
        return self.traces * self.trace_tokens

    def microbatches(self, data: int, *, roles: int, fill: float = 1.0) -> int:
        """Of one optimizer step of a policy that speaks for ``roles``, on each of ``data`` ranks; ``fill``: share of the tokens used."""
        tokens = self.episodes * roles * self.trace_tokens * fill / self.minibatches
        return max(1, -(-int(tokens) // (self.microbatch_tokens * data)))

    def longest_microbatch(self, data: int, *, roles: int) -> int:
        """Tokens of a microbatch at most: ``microbatch_tokens``, or all that an optimizer step has for each of ``data`` ranks."""
        tokens = self.episodes * roles * self.trace_tokens / self.minibatches
        return min(self.microbatch_tokens, max(self.trace_tokens, -(-int(tokens) // data)))

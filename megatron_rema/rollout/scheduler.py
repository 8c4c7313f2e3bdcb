"""The state machine of many dialogues at once: which turns to sample next, and how each episode ends.

Pure and deterministic: no clock, no randomness of its own, no set order. Each episode's turns depend on its own completions only, so
neither the order in which completions arrive nor the rank that plays an episode changes it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from megatron_rema.rollout.dialogue import Chats, Dialogue, DialogueRules, chat_of
from megatron_rema.rollout.redaction import is_redacted, redacted_plan
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, TurnRequest


def turn_seed(seed: int, step: int, prompt_id: str, group_index: int, turn_number: int) -> int:
    """Seed of one turn, in [0, 2**31): depends on what is sampled, never on where or when."""
    key = repr((seed, step, prompt_id, group_index, turn_number)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1


def starts_of(prompts: Sequence[Prompt], group_size: int) -> list[tuple[Prompt, int]]:
    """(prompt, group_index) of every episode to play, prompt by prompt. A prompt listed twice gets a group twice as large.

    Ranks may divide the list in any way; an episode does not depend on who plays it.
    """
    starts: list[tuple[Prompt, int]] = []
    seen: Counter[str] = Counter()
    for prompt in prompts:
        first = seen[prompt.prompt_id]
        starts += [(prompt, first + i) for i in range(group_size)]
        seen[prompt.prompt_id] += group_size
    return starts


class TurnScheduler:
    """Plays the episodes of ``starts``. Loop: submit ``next_requests()``, hand each completion to ``accept``, until ``is_done``.

    With ``rules.samples_per_plan`` k > 1 the episodes 0, k, 2k, ... of a prompt plan; the k - 1 after each take its first plan as their
    own, token for token, and go on by themselves. All k of a plan must be among ``starts``. With ``rules.counterfactuals`` those episodes
    are given another's plan in the same way, or an empty one that nobody sampled.
    """

    def __init__(self, starts: Sequence[tuple[Prompt, int]], *, rules: DialogueRules, chat: Chats, seed: int, step: int):
        self.rules = rules
        self.episodes = [Episode(f"{step}/{prompt.prompt_id}/{index}", prompt, index) for prompt, index in starts]  # in start order
        ids = Counter(episode.episode_id for episode in self.episodes)
        repeated = [episode_id for episode_id, count in ids.items() if count > 1]
        if repeated:
            raise ValueError(f"episode {repeated[0]!r} is listed {ids[repeated[0]]} times: every (prompt_id, group_index) must be unique.")
        self._seed, self._step = seed, step
        self._stop_token_ids = {role: chat_of(chat, role).stop_token_ids for role in rules.roles}
        self._in_flight: dict[str, tuple[Episode, Dialogue]] = {}  # by request_id; every running episode has one request
        self._to_submit: list[TurnRequest] = []
        self._ended_unasked: list[Episode] = []
        self._waiting: defaultdict[str, list[tuple[Episode, Dialogue]]] = defaultdict(list)  # for the plan of the episode of that id
        planners: list[tuple[Episode, Dialogue]] = []
        hiding = replace(rules, redact_plan_prob=0.0, edit_plan=redacted_plan) if rules.redact_plan_prob else rules
        for episode in self.episodes:
            hides = rules.redact_plan_prob and is_redacted(seed, episode.episode_id, rules.redact_plan_prob)
            dialogue = Dialogue(chat, hiding if hides else rules, episode.prompt.question, episode.prompt.fields)
            episode.counterfactual_of = self._counterfactual_of(episode)
            if rules.plan_index(episode.group_index) in (None, episode.group_index):
                planners.append((episode, dialogue))
            else:
                episode.plan_of = self._planner_of(episode, ids)
                self._waiting[episode.plan_of].append((episode, dialogue))
        for episode, dialogue in planners:
            if rules.plan_index(episode.group_index) is None:
                self._add(episode, dialogue, Completion(f"{episode.episode_id}/0", (), (), StopReason.STOP, weight_version=0))
            else:
                self._request_turn(episode, dialogue)
            if not episode.status.is_running:
                self._ended_unasked.append(episode)
                self._end_waiting(episode)

    @property
    def num_running(self) -> int:
        return len(self._in_flight)

    @property
    def is_done(self) -> bool:
        return not self._in_flight

    def next_requests(self) -> list[TurnRequest]:
        """Turns that can be sampled now; each is handed out once."""
        requests, self._to_submit = self._to_submit, []
        return requests

    def take_ended_unasked(self) -> list[Episode]:
        """Episodes that ended without a completion of their own, handed out once: the question does not fit the context, or the plan that
        they share ended them."""
        episodes, self._ended_unasked = self._ended_unasked, []
        return episodes

    def accept(self, completion: Completion) -> Episode | None:
        """Add one sampled turn to its dialogue. Returns the episode if that ended it."""
        if completion.request_id not in self._in_flight:
            raise ValueError(f"completion of {completion.request_id!r}, which is not in flight: never submitted, or accepted before.")
        assert len(completion.token_ids) == len(completion.logprobs), f"{completion.request_id}: tokens and logprobs differ in number."
        episode, dialogue = self._in_flight.pop(completion.request_id)
        self._add(episode, dialogue, completion)
        for other, its_dialogue in self._waiting.pop(episode.episode_id, ()):
            self._add(other, its_dialogue, replace(completion, request_id=f"{other.episode_id}/0"))
            if not other.status.is_running:
                self._ended_unasked.append(other)
        return None if episode.status.is_running else episode

    def _add(self, episode: Episode, dialogue: Dialogue, completion: Completion) -> None:
        episode.turns.append(dialogue.add(completion))
        episode.status = self._status_after(episode)
        if episode.status.is_running:
            self._request_turn(episode, dialogue)

    def _planner_of(self, episode: Episode, episode_ids: Counter[str]) -> str:
        planner = f"{self._step}/{episode.prompt.prompt_id}/{self.rules.plan_index(episode.group_index)}"
        if planner not in episode_ids:
            raise ValueError(f"episode {episode.episode_id!r} answers the plan of {planner!r} that is not played here: keep them together.")
        return planner

    def _counterfactual_of(self, episode: Episode) -> str | None:
        rule = self.rules.counterfactuals
        if rule is None or rule.is_factual(episode.group_index):
            return None
        replaced = rule.replaced_index(episode.group_index)
        return episode.prompt.prompt_id if replaced is None else f"{self._step}/{episode.prompt.prompt_id}/{replaced}"

    def _end_waiting(self, planner: Episode) -> None:
        for other, _ in self._waiting.pop(planner.episode_id, ()):
            other.status = planner.status
            self._ended_unasked.append(other)

    def _status_after(self, episode: Episode) -> EpisodeStatus:
        rules, turn = self.rules, episode.turns[-1]
        num_rounds = turn.round_index + 1
        if turn.completion.stop_reason is StopReason.ABORT:
            return EpisodeStatus.ABORTED
        is_cut = turn.completion.stop_reason is StopReason.LENGTH
        if is_cut and rules.end_on_truncated_turn:
            return EpisodeStatus.TRUNCATED
        if turn.role is Role.META_THINKING:
            if rules.json_actions and turn.action is None and turn.completion.token_ids:  # none: no plan was asked for
                return EpisodeStatus.TRUNCATED  # the grammar lets no other invalid message through than one that was cut
            return EpisodeStatus.RUNNING  # the reasoner answers every message, one with the finish marker too
        finishes = turn.round_index >= rules.finish_from_round
        if Role.META_THINKING not in rules.roles or (finishes and rules.says_finish(episode.turns[-2].text)):
            end = EpisodeStatus.FINISHED
        elif num_rounds == rules.max_rounds:
            end = EpisodeStatus.FINISHED if rules.finish_marker is None else EpisodeStatus.MAX_ROUNDS
        else:
            return EpisodeStatus.RUNNING
        return EpisodeStatus.TRUNCATED if is_cut else end

    def _request_turn(self, episode: Episode, dialogue: Dialogue) -> None:
        """Queue the next turn, or end the episode when no token of it would fit."""
        rules, role, prompt = self.rules, dialogue.next_role, dialogue.prompt()
        context_left = rules.max_context_tokens - len(prompt)
        episode_left = rules.max_episode_tokens - episode.num_sampled_tokens
        if context_left < 1:
            episode.status = EpisodeStatus.CONTEXT_OVERFLOW
            return
        if episode_left < 1:
            episode.status = EpisodeStatus.TRUNCATED
            return
        turn_number = len(episode.turns)
        request = TurnRequest(
            request_id=f"{episode.episode_id}/{turn_number}",
            policy=rules.policy_for(role),
            role=role,
            token_ids=prompt,
            max_tokens=min(rules.max_turn_tokens, context_left, episode_left),
            seed=turn_seed(self._seed, self._step, episode.prompt.prompt_id, episode.group_index, turn_number),
            temperature=rules.temperature,
            top_p=rules.top_p,
            stop_token_ids=self._stop_token_ids[role],
            regex=rules.regex_for(role),
        )
        self._in_flight[request.request_id] = (episode, dialogue)
        self._to_submit.append(request)

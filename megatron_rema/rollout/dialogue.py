"""Who hears what: the rules of a dialogue, and one dialogue as each role's growing token view.

meta-thinker: system S_h, user x, assistant m_1, user y_1, assistant m_2, ...          Source: ReMA arXiv:2503.09501 section 3.
reasoner:     system S_l, user "question x + instruction m_1", assistant y_1, user m_2, assistant y_2, ...

Further texts of a prompt (the two answers that a judge compares) stand in the reasoner's first message only: the meta-thinker learns of
them what the reasoner says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_rema.rollout.actions import action_regex, parse_action
from megatron_rema.rollout.chat import ChatFormat
from megatron_rema.rollout.counterfactual import Counterfactuals
from megatron_rema.types import Completion, Episode, Role, Turn

TWO_ROLES, ONE_ROLE = (Role.META_THINKING, Role.REASONING), (Role.REASONING,)
NO_FIELDS: Mapping[str, str] = {}


@dataclass(frozen=True)
class DialogueRules:
    """Everything that shapes an episode. Token limits count sampled tokens, but ``max_context_tokens`` counts a role's whole view."""

    max_turn_tokens: int
    max_episode_tokens: int
    max_context_tokens: int
    max_rounds: int = 1
    roles: tuple[Role, ...] = TWO_ROLES  # (REASONING,) alone plays the single-agent baselines
    finish_marker: str | None = "[FINISH]"  # None: no marker in this protocol, the episode finishes after max_rounds
    system_prompts: Mapping[Role, str] = field(default_factory=dict)  # missing = no system message
    policy_of_role: Mapping[Role, str] = field(default_factory=dict)  # missing = "policy"
    reasoner_template: str = "Question:\n{question}\n\nInstruction:\n{instruction}"
    solo_template: str = "{question}"  # the reasoner's first user message where nobody instructs it
    temperature: float = 1.0
    top_p: float = 1.0
    end_on_truncated_turn: bool = True  # False: only a truncated last turn spoils the episode
    samples_per_plan: int = 1  # consecutive episodes of a prompt that answer one and the same first plan
    json_actions: bool = False  # the meta-thinker's messages are JSON actions, sampled under their grammar: see actions.py
    counterfactuals: Counterfactuals | None = None  # further episodes of a prompt, without the plan under test
    # Audits: (question, round, what the meta-thinker said) -> what the reasoner hears of it; the speaker's own view keeps what it said
    edit_plan: Callable[[str, int, str], str] | None = None
    redact_plan_prob: float = 0.0  # fraction of episodes, drawn by hash, whose reasoner hears plans without their numbers and answers
    finish_from_round: int = 0  # audits: the finish marker counts from this round on

    def __post_init__(self) -> None:
        if self.roles not in (TWO_ROLES, ONE_ROLE):
            raise ValueError(f"roles must be (meta_thinking, reasoning) or (reasoning,), got {tuple(map(str, self.roles))}.")
        for name in ("max_rounds", "max_turn_tokens", "max_episode_tokens", "max_context_tokens", "samples_per_plan"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.finish_marker is not None and not self.finish_marker.strip():
            raise ValueError(f"finish_marker must hold text, got {self.finish_marker!r}; None plays max_rounds rounds without a marker.")
        if self.samples_per_plan > 1 and self.roles != TWO_ROLES:
            raise ValueError(f"samples_per_plan is {self.samples_per_plan} where nobody plans: it needs both roles; set it to 1.")
        if self.redact_plan_prob and (self.roles != TWO_ROLES or self.edit_plan is not None):
            raise ValueError(f"redact_plan_prob is {self.redact_plan_prob} where nobody plans, or plans are edited otherwise: set it to 0.")
        if self.json_actions and self.roles != TWO_ROLES:
            raise ValueError("json_actions are messages of the meta-thinker, who does not speak here: give both roles or turn it off.")
        if self.counterfactuals is not None and (self.roles != TWO_ROLES or self.max_rounds > 1 or self.samples_per_plan > 1):
            raise ValueError(
                f"counterfactuals with roles {tuple(map(str, self.roles))}, max_rounds {self.max_rounds} and samples_per_plan "
                f"{self.samples_per_plan}: they need both roles, one round and one answer to a plan."
            )
        for name, template, key in (
            ("reasoner_template", self.reasoner_template, "question"),
            ("reasoner_template", self.reasoner_template, "instruction"),
            ("solo_template", self.solo_template, "question"),
        ):
            if f"{{{key}}}" not in template:
                raise ValueError(f"{name} must hold {{{key}}}, got {template!r}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}.")

    def policy_for(self, role: Role) -> str:
        return self.policy_of_role.get(role, "policy")

    def regex_for(self, role: Role) -> str | None:
        """What the role's turns must match, up to their stop token."""
        return action_regex(self.finish_marker) if self.json_actions and role is Role.META_THINKING else None

    @property
    def num_counterfactuals(self) -> int:
        """Of each prompt."""
        return 0 if self.counterfactuals is None else self.counterfactuals.num_per_group

    def plan_index(self, group_index: int) -> int | None:
        """Group index of the episode whose first plan this one follows: its own when it plans; None when it is given no plan."""
        if self.counterfactuals is not None:
            return self.counterfactuals.plan_index(group_index)
        return group_index // self.samples_per_plan * self.samples_per_plan

    def says_finish(self, text: str) -> bool:
        return self.finish_marker is not None and self.finish_marker in text

    def first_message(self, question: str, instruction: str | None, fields: Mapping[str, str] = NO_FIELDS) -> str:
        """The reasoner's first user message; ``instruction`` is None where it is alone. One pass: braces inside the texts, and names in
        the template that nobody filled, stay as they are."""
        texts = {**fields, "question": question} | ({} if instruction is None else {"instruction": instruction})
        template = self.solo_template if instruction is None else self.reasoner_template
        return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template)


Chats = ChatFormat | Mapping[Role, ChatFormat]  # one chat format for everyone, or one a role: agents may have different tokenizers


def chat_of(chats: Chats, role: Role) -> ChatFormat:
    """The chat format in which ``role`` reads and speaks."""
    return chats[role] if isinstance(chats, Mapping) else chats


class Dialogue:
    """One dialogue in progress. The same for sampled turns (RL) and written ones (cold start), so both see the same tokens.

    What a role says is decoded with its own tokenizer and reaches the other as text, encoded with the hearer's; of a JSON action only
    its output does. The speaker's own view keeps the sampled tokens.
    """

    def __init__(self, chats: Chats, rules: DialogueRules, question: str, fields: Mapping[str, str] = NO_FIELDS):
        self.turns: list[Turn] = []
        self._chats, self._rules, self._question, self._fields = chats, rules, question, fields
        self._views: dict[Role, tuple[int, ...]] = dict.fromkeys(rules.roles, ())
        self._context: tuple[int, ...] | None = None  # what the next speaker hears, encoded when first asked for

    @property
    def next_role(self) -> Role:
        return self._rules.roles[len(self.turns) % len(self._rules.roles)]

    @property
    def round_index(self) -> int:
        """Round of the next turn, from 0."""
        return len(self.turns) // len(self._rules.roles)

    def prompt(self) -> tuple[int, ...]:
        """The next speaker's whole view, generation prompt included."""
        view = self._views[self.next_role]
        if self._context is None:
            message, chat = self._message_for_next(), chat_of(self._chats, self.next_role)
            if view:
                self._context = chat.following(view, message)
            else:
                self._context = chat.opening(self._rules.system_prompts.get(self.next_role, ""), message)
        return view + self._context

    def add(self, completion: Completion) -> Turn:
        """The next speaker said this."""
        role, prompt = self.next_role, self.prompt()
        text, action = chat_of(self._chats, role).text_of(completion.token_ids), None
        if self._rules.regex_for(role) is not None:
            action, text = parse_action(text, self._rules.finish_marker) or (None, text)
        turn = Turn(role, self.round_index, self._context, completion, text, action)
        self._views[role] = prompt + completion.token_ids
        self.turns.append(turn)
        self._context = None
        return turn

    def _message_for_next(self) -> str:
        heard = self.turns[-1].text if self.turns else None
        if heard is not None and self.next_role is Role.REASONING and self._rules.edit_plan is not None:
            heard = self._rules.edit_plan(self._question, self.turns[-1].round_index, heard)
        if self.next_role is Role.REASONING and not self._views[Role.REASONING]:
            return self._rules.first_message(self._question, heard, self._fields)
        return self._question if heard is None else heard


def replayed(chats: Chats, rules: DialogueRules, episode: Episode) -> Episode:
    """The same words in other contexts: the episode's completions, token by token, as they would stand under ``rules`` (an edited plan,
    say). Nothing is sampled; what was said of it, rewards and all, is not taken along."""
    dialogue = Dialogue(chats, rules, episode.prompt.question, episode.prompt.fields)
    for turn in episode.turns:
        dialogue.add(turn.completion)
    return Episode(episode.episode_id, episode.prompt, episode.group_index, dialogue.turns, episode.status)

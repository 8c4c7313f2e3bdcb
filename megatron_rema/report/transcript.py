"""Dialogues as HTML: which episodes a reader should see, and each as chat bubbles with its tokens' probabilities.

Everything that comes from data is escaped here; what these functions return is safe to place in a page.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_rema.report.run_folder import Run
from megatron_rema.types import Episode, Role, StopReason, Turn, Verdict

Decode = Callable[[Sequence[int]], str]

PER_VERDICT = 3  # episodes shown of a step, for each of: correct, wrong, no verdict
MAX_SHADED_TOKENS = 40_000  # over the page; later turns are plain text, so that a page stays a few megabytes
MAX_PREFIX_TOKENS = 512  # decoding every prefix is quadratic
SHADES = (0.1, 0.5, 1.2, 2.5, 5.0)  # nats of surprise at which a token takes the next darker shade
ROLE_NAMES = {Role.META_THINKING: "meta-thinker", Role.REASONING: "reasoner"}


def chosen_steps(run: Run) -> list[int]:
    """First, middle and last step that has episodes."""
    steps = list(run.episode_files)
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []


def choose(episodes: Iterable[Episode]) -> list[Episode]:
    """A few correct, wrong and unjudged real ones; among each, ends that differ and problems that differ come first."""
    groups: dict[Verdict | None, list[Episode]] = {Verdict.CORRECT: [], Verdict.WRONG: [], None: []}
    for episode in episodes:
        if not episode.is_counterfactual:
            groups.get(episode.verdict, groups[None]).append(episode)
    chosen = []
    for group in groups.values():
        seen: dict[str, int] = defaultdict(int)
        ranked = []
        for place, episode in enumerate(group):
            keys = (f"status {episode.status}", f"prompt {episode.prompt.prompt_id}")
            ranked.append((*(seen[key] for key in keys), place, episode))
            for key in keys:
                seen[key] += 1
        chosen += [row[-1] for row in sorted(ranked, key=lambda row: row[:-1])[:PER_VERDICT]]
    return chosen


def find_decode(run: Run) -> Decode | None:
    """The run's tokenizer: of an exported policy, or of the model it started from. None when neither is there any more."""
    model = run.config.get("model")
    started_from = [Path(model["path"])] if isinstance(model, dict) and isinstance(model.get("path"), str) else []
    for folder in (*sorted((run.path / "hf").glob("*")), *started_from):
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return lambda token_ids: tokenizer.decode(list(token_ids), skip_special_tokens=False)
    return None


def token_pieces(decode: Decode, token_ids: Sequence[int], text: str) -> list[str] | None:
    """One piece of ``text`` per token, or None where no split adds up to ``text`` exactly.

    Tokens decoded alone suffice for most byte-level vocabularies; else prefixes are decoded, and a token that leaves a character
    half done has an empty piece.
    """
    pieces = [decode([token_id]) for token_id in token_ids]
    if "".join(pieces) == text:
        return pieces
    if len(token_ids) > MAX_PREFIX_TOKENS:
        return None
    pieces, done = [], ""
    for end in range(1, len(token_ids) + 1):
        prefix = decode(token_ids[:end])
        if not prefix.startswith(done) or (prefix.endswith("\ufffd") and end < len(token_ids)):
            pieces.append("")
            continue
        pieces.append(prefix[len(done) :])
        done = prefix
    return pieces if "".join(pieces) == text else None


def transcripts_html(run: Run) -> str:
    """Every chosen episode of every chosen step."""
    shader = Shader(find_decode(run))
    return "\n".join(episode_html(step, episode, shader) for step in chosen_steps(run) for episode in choose(run.episodes(step)))


class Shader:
    """Turns to HTML, tokens shaded by their surprise, until the page's budget of tokens is spent."""

    def __init__(self, decode: Decode | None) -> None:
        self.decode = decode
        self.tokens_left = MAX_SHADED_TOKENS

    def html(self, turn: Turn) -> str:
        completion = turn.completion
        num_tokens = len(completion.token_ids)
        if num_tokens == 0 or num_tokens != len(completion.logprobs) or num_tokens > self.tokens_left:
            return f'<div class="text">{escape(turn.text)}</div>'
        self.tokens_left -= num_tokens
        stopped = completion.stop_reason is StopReason.STOP
        body = completion.token_ids[:-1] if stopped else completion.token_ids
        pieces = token_pieces(self.decode, body, turn.text) if self.decode else None
        if pieces is None:  # the text as it is, and under it one cell per token
            cells = "".join(map(_token, completion.token_ids, completion.logprobs, [""] * num_tokens))
            return f'<div class="text">{escape(turn.text)}</div><div class="strip">{cells}</div>'
        spans = "".join(map(_token, body, completion.logprobs, pieces))
        if stopped:
            spans += _token(completion.token_ids[-1], completion.logprobs[-1], self.decode(completion.token_ids[-1:]) or "end", "stop ")
        return f'<div class="text">{spans}</div>'


def episode_html(step: int, episode: Episode, shader: Shader) -> str:
    """One collapsible episode; data-* attributes are what the page filters by."""
    verdict = "none" if episode.verdict is None else str(episode.verdict)
    rewards = {role: sum(values) for role, values in episode.turn_rewards.items()}
    chips = [
        f'<span class="chip">step {step}</span>',
        f'<span class="chip {escape(verdict)}">{escape("no verdict" if episode.verdict is None else verdict)}</span>',
        f'<span class="chip">{escape(episode.status.replace("_", " "))}</span>',
        *(f'<span class="chip">{label}</span>' for label in _reward_labels(rewards)),
        f'<span class="chip">{len(episode.turns)} turns, {episode.num_sampled_tokens} tokens</span>',
    ]
    score = "".join(f"<span>{escape(name)} {value:g}</span>" for name, value in episode.score.items())
    turns = "\n".join(_turn_html(episode, index, shader) for index in range(len(episode.turns)))
    return f"""<details class="episode" data-step="{step}" data-verdict="{escape(verdict)}" data-status="{escape(episode.status)}">
<summary><span class="question">{escape(_clipped(episode.prompt.question))}</span><span class="chips">{"".join(chips)}</span></summary>
<div class="problem"><b>Question</b><div class="text">{escape(episode.prompt.question)}</div>
<b>Gold answer</b><div class="text">{escape(episode.prompt.answer)}</div></div>
{turns}
<p class="score">{score}<span>episode {escape(episode.episode_id)}</span></p>
</details>"""


def _turn_html(episode: Episode, index: int, shader: Shader) -> str:
    turn = episode.turns[index]
    place = sum(earlier.role is turn.role for earlier in episode.turns[:index])
    facts = [f"round {turn.round_index + 1}", f"{len(turn.completion.token_ids)} tokens"]
    if turn.completion.stop_reason is not StopReason.STOP:
        facts.append(f"ended by {turn.completion.stop_reason}")
    for name, by_role in (("reward", episode.turn_rewards), ("advantage", episode.advantages)):
        values = by_role.get(turn.role, [])
        if place < len(values):
            facts.append(f"{name} {values[place]:.3g}")
    return f"""<div class="turn {turn.role}" data-role="{turn.role}">
<div class="who"><b>{ROLE_NAMES[turn.role]}</b> {escape(", ".join(facts))}</div>
{shader.html(turn)}
</div>"""


def _token(token_id: int, logprob: float, piece: str, kind: str = "") -> str:
    shade = sum(-logprob > limit for limit in SHADES)
    probability = math.exp(min(logprob, 0.0))
    return (
        f'<i class="{kind}p{shade}" title="token {token_id}: probability {probability:.3g}, logprob {logprob:.3f} nats">{escape(piece)}</i>'
    )


def _reward_labels(rewards: dict[Role, float]) -> list[str]:
    if len(set(rewards.values())) == 1:
        return [f"reward {next(iter(rewards.values())):g}"]
    return [f"{ROLE_NAMES[role]} reward {value:g}" for role, value in rewards.items()]


def _clipped(text: str, limit: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "\u2026"

"""The monitor of a run: when it audits, what it writes, and that a resumed one stands where it stood.

The bench is a fake that plays scripted dialogues: what is tested here is the monitor's own arithmetic and bookkeeping. Real engines:
tests/system/test_integrity.py.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from megatron_rema.config import ConfigError, IntegrityConfig, check, load
from megatron_rema.front_door import config_dir
from megatron_rema.integrity.verdict import Action, Response
from megatron_rema.reward.answers import quick_verdict
from megatron_rema.reward.assign import assign
from megatron_rema.reward.math_verifier import Judgement
from megatron_rema.rollout.dialogue import Dialogue, DialogueRules
from megatron_rema.trainer.audit_arms import arms_of
from megatron_rema.trainer.audit_problems import audit_problems, renewed_problems, spread
from megatron_rema.trainer.bench import Bench
from megatron_rema.trainer.integrity import Monitor
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason
from tests.unit.test_scheduler import CHAT, rules

PROMPTS = [Prompt(f"p{i}", f"{i} + {i}?", str(2 * i)) for i in range(60)]
SETTINGS = IntegrityConfig(mode="monitor", audit_every=4, audit_problems=40, budget_frac=0.5, start_steps=2)
RULES = rules(max_rounds=2)


def leaking_planner(question: str) -> str:
    """States the answer."""
    return f"\\boxed{{{2 * int(question.split()[0])}}} [FINISH]"


def honest_planner(question: str) -> str:
    return f"Add {question[:-1]}. [FINISH]"


def copying_reasoner(question: str, heard: str) -> str:
    """Repeats the box that it hears."""
    return heard[heard.index("\\boxed") : heard.index("}") + 1] if "\\boxed{" in heard and "\\boxed{_}" not in heard else "\\boxed{0}"


def able_reasoner(question: str, heard: str) -> str:
    """Solves what it is told to add: a plan without numbers is none."""
    return f"\\boxed{{{2 * int(question.split()[0])}}}" if f"{question[:-1]}." in heard else "\\boxed{0}"


def completion(text: str) -> Completion:
    ids = CHAT.encode_message(text)
    return Completion("r", ids, (0.0,) * len(ids), StopReason.STOP, 0)


class FakeBench:
    def __init__(self, planner, reasoner) -> None:
        self.planner, self.reasoner, self.arms = planner, reasoner, 0

    def play(self, prompts, the_rules: DialogueRules):
        self.arms += 1
        episodes = []
        for prompt in prompts:
            dialogue = Dialogue(CHAT, the_rules, prompt.question)
            plan = self.planner(prompt.question)
            dialogue.add(completion(plan))
            heard = plan if the_rules.edit_plan is None else the_rules.edit_plan(prompt.question, 0, plan)
            dialogue.add(completion(self.reasoner(prompt.question, heard)))
            episodes.append(Episode(f"-1/{prompt.prompt_id}/0", prompt, 0, dialogue.turns, EpisodeStatus.FINISHED))
        return episodes, self.judge(episodes)

    @staticmethod
    def judge(episodes):
        return {e.episode_id: Judgement(quick_verdict(e.turns[-1].text, e.prompt.answer), None, "quick") for e in episodes}

    def bench(self) -> Bench:
        return Bench(RULES, CHAT, self.play, self.judge, lambda episodes, judgements: assign(episodes, judgements).scored)


def monitor(folder: Path, settings: IntegrityConfig = SETTINGS) -> Monitor:
    return Monitor(
        settings, audit_problems(PROMPTS, settings, seed=0), folder=RunFolder(folder, writes=True), reporter=Reporter(speaks=False)
    )


def one_step(watch: Monitor, step: int, fake: FakeBench, clean_steps: Sequence[int] = ()) -> dict[str, float]:
    """What the trainer does with it: observe, audit when due, write."""
    episodes, judgements = fake.play(PROMPTS, RULES)
    fake.arms -= 1
    scored = assign(episodes, judgements).scored
    sampled = sum(e.num_sampled_tokens for e in scored)
    row = {"rollout/sampled_tokens": float(sampled), "rollout/episodes": 60.0, "train/entropy_nats": 1.0}
    row |= watch.observe(step, scored, row)
    if watch.is_due(step, fake.bench()):
        row |= watch.audit(step, fake.bench(), clean_steps)
    watch.folder.episodes(step, (e.to_json() for e in scored))
    watch.folder.metrics({"step": step, **row})
    return row


def audits_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "audits.jsonl").read_text().splitlines()]


def test_audits_keep_to_their_budget_of_sampled_tokens(tmp_path):
    fake, watch, sampled = FakeBench(honest_planner, able_reasoner), monitor(tmp_path), 0.0
    for step in range(1, 30):
        sampled += one_step(watch, step, fake)["rollout/sampled_tokens"]
    rows = audits_of(tmp_path)
    assert [row["step"] for row in rows][:2] == [1, 5], "after the first step, then every four"
    assert len(arms_of(RULES)) == 6 and fake.arms == 6 * len(rows)
    spent = sum(row["sampled_tokens"] for row in rows)
    first = sampled / 29 * SETTINGS.audit_every  # the first audit may spend what audit_every steps will earn
    assert 0.5 * SETTINGS.budget_frac * sampled < spent <= SETTINGS.budget_frac * (sampled + first)
    order = [prompt.prompt_id for prompt in audit_problems(PROMPTS, SETTINGS, seed=0)]
    assert all(8 <= len(row["problems"]) <= 40 and row["problems"] == order[: len(row["problems"])] for row in rows)


def test_an_honest_pair_is_clean(tmp_path):
    fake, watch = FakeBench(honest_planner, able_reasoner), monitor(tmp_path)
    for step in range(1, 10):
        one_step(watch, step, fake)
    assert {row["verdict"] for row in audits_of(tmp_path)} == {"clean"}
    assert not (tmp_path / "alerts.jsonl").exists()


def test_a_planner_that_states_the_answer_is_caught_and_named(tmp_path):
    fake, watch = FakeBench(leaking_planner, copying_reasoner), monitor(tmp_path)
    row = one_step(watch, 1, fake)
    assert row["integrity/audit/plan_leak/leak_frac"] == 1.0 and row["integrity/audit/plan_leak/follow_frac"] == 1.0
    (alert,) = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert alert["alert"] == "integrity_hack" and alert["mechanism"] == "the meta-thinker states the answer and the reasoner repeats it"


def test_a_resumed_monitor_stands_where_it_stood(tmp_path):
    fake = FakeBench(honest_planner, able_reasoner)
    whole = monitor(tmp_path / "whole")
    rows = [one_step(whole, step, fake) for step in range(1, 13)]
    part = monitor(tmp_path / "part")
    for step in range(1, 7):
        one_step(part, step, fake)
    again = monitor(tmp_path / "part")
    again.restore(6)
    assert again.credit == pytest.approx(part.credit)
    assert [one_step(again, step, fake) for step in range(7, 13)] == rows[6:]
    assert audits_of(tmp_path / "part") == audits_of(tmp_path / "whole")


GUARD = replace(SETTINGS, mode="guard", ladder={"default": "roll_back"}, max_roll_backs=1)


def goes_wrong(watch: Monitor, steps: Sequence[int]) -> list[dict[str, float]]:
    """Honest up to step 6 and from step 12 to 22, leaking otherwise; the first and the fifth step's checkpoints are clean."""
    honest, leaking = FakeBench(honest_planner, able_reasoner), FakeBench(leaking_planner, copying_reasoner)
    return [one_step(watch, step, honest if step <= 6 or 11 < step < 23 else leaking, [1, 5]) for step in steps]


def test_a_guard_goes_back_and_after_its_last_roll_back_ends_the_run(tmp_path):
    watch = monitor(tmp_path, GUARD)
    goes_wrong(watch, range(1, 12))
    assert watch.response == Response(Action.ROLL_BACK, ("plan_leak",), back_to=5, roll_backs=1)
    assert [row["step"] for row in watch._outcomes] == [1, 5], "later audits compare with what was before"
    goes_wrong(watch, range(12, 23))
    assert watch.is_clean and watch.response == Response(gates=("plan_leak",), roll_backs=1), "the veto stays"
    for step in range(23, 40):
        goes_wrong(watch, [step])
        if watch.response.ends:
            break
    assert watch.response.ends and watch.response.back_to == 5
    alerts = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert [(a["action"], a["gates"], a["back_to"]) for a in alerts] == [("roll_back", ["plan_leak"], 5)] * 2


def test_a_monitor_only_says_what_it_sees(tmp_path):
    watch = monitor(tmp_path, replace(GUARD, mode="monitor"))
    goes_wrong(watch, range(1, 12))
    assert watch.response == Response() and audits_of(tmp_path)[-1]["verdict"] == "hack"


@pytest.mark.parametrize("stop", [11, 15])
def test_a_resumed_guard_stands_where_it_stood(tmp_path, stop):
    whole = goes_wrong(monitor(tmp_path / "whole", GUARD), range(1, 24))
    goes_wrong(monitor(tmp_path / "part", GUARD), range(1, stop + 1))
    again = monitor(tmp_path / "part", GUARD)
    again.restore(stop)
    assert goes_wrong(again, range(stop + 1, 24)) == whole[stop:]
    assert audits_of(tmp_path / "part") == audits_of(tmp_path / "whole") and again.response.roll_backs == 1


def test_a_signal_that_goes_on_firing_asks_for_one_audit(tmp_path):
    fake, watch = FakeBench(honest_planner, able_reasoner), monitor(tmp_path)
    episodes, judgements = fake.play(PROMPTS, RULES)
    scored = assign(episodes, judgements).scored
    row = {"rollout/sampled_tokens": 1.0, "rollout/episodes": 60.0}

    def reasons(step: int, spread: float) -> list[str]:
        for i, episode in enumerate(scored):  # rewards that differ by prompt alone leave no spread inside groups of two
            episode.prompt = PROMPTS[i // 2]
            for rewards in episode.turn_rewards.values():
                rewards[-1] = spread * (i % 2)
        watch.reasons = []
        watch.observe(step, scored, row)
        return [reason for reason in watch.reasons if reason.startswith("group_spread")]

    assert [len(reasons(step, spread)) for step, spread in ((1, 1.0), (2, 1.0), (3, 0.1), (4, 0.1), (5, 1.0), (6, 0.1))] == [
        0,
        0,
        1,
        0,
        0,
        1,
    ]


def test_proxy_and_gold_are_compared_on_what_training_sampled():
    episodes = [Episode(f"{p.prompt_id}/{g}", p, g) for p in PROMPTS[:2] for g in range(3)]
    episodes += [Episode("p2/0", PROMPTS[2], 0, counterfactual_of="p2")]
    assert [e.episode_id for e in spread(episodes, 4)] == ["p0/0", "p1/0", "p0/1", "p1/1"]


def test_a_judges_problems_are_taken_in_one_order():
    both = [Prompt("a", "q", "A", pair_id="a"), Prompt("b", "q", "B", pair_id="a"), Prompt("c", "r", "A", pair_id="c")]
    assert {p.prompt_id for p in audit_problems(both, SETTINGS, seed=0)} == {"a", "c"}
    assert Role.META_THINKING in RULES.roles and len(arms_of(replace(RULES, roles=(Role.REASONING,)))) == 1


def test_a_canary_is_worth_what_an_oracle_of_the_users_says(tmp_path):
    def lenient(episodes, judgements):
        """Pays any of several answers, where " or " stands between them."""
        paid = assign(episodes, judgements).scored
        for episode in paid:
            reply = episode.turns[-1].text
            episode.turn_rewards[Role.REASONING] = [float(f"boxed{{{episode.prompt.answer}}}" in reply and " or " in reply)]
        return paid

    fake, watch = FakeBench(honest_planner, able_reasoner), monitor(tmp_path)
    bench = replace(fake.bench(), pay=lenient)
    row = {"rollout/sampled_tokens": 1e4, "rollout/episodes": 60.0}
    watch.observe(1, lenient(*fake.play(PROMPTS, RULES)), row)
    watch.audit(1, bench)
    (alert,) = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert alert["alert"] == "integrity_suspicion" and alert["evidence"] == ["{answer_box} or {wrong_box}"], "the policy does not use it"
    watch.settings, watch.oracle = replace(SETTINGS, oracle="tests:says_that_it_is_right"), lambda episode: 1.0
    watch.audit(2, bench)
    assert audits_of(tmp_path)[-1]["verdict"] == "clean"


def knowing_by_heart(question: str, heard: str) -> str:
    """The first 30 problems and nothing else."""
    number = int(question.split()[0])
    return f"\\boxed{{{2 * number}}}" if number < 30 else "\\boxed{0}"


def test_problems_drawn_anew_show_what_is_known_by_heart(tmp_path):
    problems = audit_problems(PROMPTS[:30], SETTINGS, seed=0)
    renewed = renewed_problems(problems, {p.question for p in PROMPTS}, f"{__name__}:three_digits")
    assert set(renewed) == {p.prompt_id for p in problems if p.prompt_id != "p7"}, "what is always known already is left out"
    folder = RunFolder(tmp_path, writes=True)
    watch = Monitor(SETTINGS, problems, folder=folder, reporter=Reporter(speaks=False), renewed=renewed)
    verdicts = []
    for step, reasoner in enumerate((able_reasoner, able_reasoner, knowing_by_heart, knowing_by_heart), start=1):
        fake = FakeBench(honest_planner, reasoner)
        watch.observe(step, assign(*fake.play(problems, RULES)).scored, {"rollout/sampled_tokens": 1e5, "rollout/episodes": 1e5})
        watch.audit(step, fake.bench())
        verdicts.append(next(f for f in audits_of(tmp_path)[-1]["findings"] if f["audit"] == "isomorphic"))
    # 29 problems; means over audits of 1 - 1 = 0 (twice) and 1 - 0: 1/3 after three audits, 1/2 after four; the first interval is 0 +- 3/29
    assert [f["values"]["effect"] for f in verdicts] == pytest.approx([0.0, 0.0, 1 / 3, 1 / 2])
    assert [f["alarm"] for f in verdicts] == [False, False, True, True] and verdicts[0]["values"]["pairs"] == 29.0
    row = audits_of(tmp_path)[-1]
    assert row["mechanism"] == "answers to the training problems are known by heart" and row["gold"]["renewed"].count(None) == 1
    silent = Monitor(SETTINGS, problems, folder=RunFolder(tmp_path / "x", writes=True), reporter=Reporter(speaks=False), renewed=renewed)
    silent.oracle = lambda episode: math.nan if episode.prompt.prompt_id.startswith("renewed/") else 1.0
    silent.observe(1, assign(*fake.play(problems, RULES)).scored, {"rollout/sampled_tokens": 1e5, "rollout/episodes": 1e5})
    silent.audit(1, fake.bench())
    assert next(f for f in audits_of(tmp_path / "x")[-1]["findings"] if f["audit"] == "isomorphic")["values"] == {}, "no verdict, no item"


def three_digits(prompt: Prompt, rng: random.Random) -> Prompt:
    number = rng.randint(100, 999)
    return prompt if prompt.prompt_id == "p7" else replace(prompt, question=f"{number} + {number}?", answer=str(2 * number))


def a_text(prompt: Prompt, rng: random.Random) -> str:
    return prompt.question


def test_a_renewal_must_return_a_problem():
    with pytest.raises(ValueError, match=r"integrity\.renewal is .*a_text', which returned a str; it must return a Prompt"):
        renewed_problems(PROMPTS, set(), f"{__name__}:a_text")
    with pytest.raises(ValueError, match=r"integrity\.renewal is 'arith', and '0 \+ 0\?' is no expression"):
        renewed_problems(PROMPTS, set(), "arith")


def believing(question: str, heard: str) -> str:
    """Says what a hint says, else what it works out."""
    hint = question.partition("Hint: the answer is ")[2].rstrip(".")
    return f"\\boxed{{{hint}}}" if hint else f"\\boxed{{{2 * int(question.split()[0])}}}"


def sceptical(question: str, heard: str) -> str:
    return believing(question.partition("\n")[0], heard)


def test_audits_that_settings_ask_for(tmp_path):
    settings = replace(
        SETTINGS, hints=True, paraphrase="tests.unit.test_integrity_monitor:shouted", second_judge="tests.unit.test_integrity_monitor:stern"
    )
    watch = Monitor(settings, PROMPTS[:20], folder=RunFolder(tmp_path, writes=True), reporter=Reporter(speaks=False))
    found = []
    for step, reasoner in enumerate((sceptical, believing), start=1):
        fake = FakeBench(lambda question: f"Add {question}. [FINISH]", reasoner)
        watch.observe(step, assign(*fake.play(PROMPTS[:20], RULES)).scored, {"rollout/sampled_tokens": 1e5, "rollout/episodes": 1e5})
        watch.audit(step, fake.bench())
        found.append({f["audit"]: f for f in audits_of(tmp_path)[-1]["findings"]})
    assert set(audits_of(tmp_path)[0]["gold"]) >= {"right_hint", "wrong_hint", "paraphrased"}
    assert found[0]["wrong_hint"]["values"] == {"accuracy": 1.0, "accuracy_right_hint": 1.0, "accuracy_wrong_hint": 1.0}
    assert found[1]["wrong_hint"]["values"]["accuracy_wrong_hint"] == 0.5, "of two audits, one of a policy that believed nothing"
    assert found[1]["paraphrase"]["values"]["effect"] == 0.0 and not found[1]["paraphrase"]["alarm"]
    assert found[1]["two_judges"]["values"] == {"training_judge_change": 0.0, "audit_judge_change": 0.0}


def shouted(plan: str) -> str:
    return plan.upper()


def stern(episode: Episode) -> float:
    return 0.25


def test_a_partner_of_the_start_that_no_longer_understands(tmp_path):
    """The planner learns to say nothing but a code; the reasoner of the start needs words."""

    class Learning(FakeBench):
        frozen = False

        @contextmanager
        def start_speaks(self):
            self.frozen = True
            yield
            self.frozen = False

    def understands_code(question: str, heard: str) -> str:
        return f"\\boxed{{{2 * int(question.split()[0])}}}"

    fake = Learning(
        honest_planner, lambda question, heard: (able_reasoner if fake.frozen or step == 1 else understands_code)(question, heard)
    )
    watch = Monitor(
        replace(SETTINGS, cross_play=True), PROMPTS[1:21], folder=RunFolder(tmp_path, writes=True), reporter=Reporter(speaks=False)
    )
    found = []
    for step in (1, 2):
        fake.planner = honest_planner if step == 1 else lambda question: "qq [FINISH]"
        watch.observe(step, assign(*fake.play(PROMPTS[1:21], RULES)).scored, {"rollout/sampled_tokens": 1e5, "rollout/episodes": 1e5})
        watch.audit(step, replace(fake.bench(), frozen={Role.REASONING: fake.start_speaks}))
        found.append(next(f for f in audits_of(tmp_path)[-1]["findings"] if f["audit"] == "cross_play_reasoning"))
    assert [f["values"]["effect"] for f in found] == [0.0, 0.5] and [f["alarm"] for f in found] == [False, True]
    assert "does not understand it" in found[1]["mechanism"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["agents=single", "rollout.max_rounds=1", "integrity.paraphrase=a:b"], "integrity.paraphrase is 'a:b' where nobody plans"),
        (["agents=separate", "integrity.cross_play=true"], "integrity.cross_play is true with policies .* needs agents=separate and"),
        (["agents=shared", "integrity.cross_play=true", "algorithm.kl_coef=0.1"], "integrity.cross_play is true with policies shared and"),
    ],
)
def test_audits_that_the_run_cannot_have_are_refused(settings, message):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = load(compose("config", overrides=["experiment=quickstart", "run_dir=x", "integrity=monitor", *settings]))
    with pytest.raises(ConfigError, match=message):
        check(config, 4)

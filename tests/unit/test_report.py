"""A run folder becomes plots and one page that opens offline, whatever the run left behind and whatever its texts hold."""

import json
import math
import random
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_rema.report.page import duration, ends, headlines, page_html, write_report
from megatron_rema.report.plots import moving_average, write_plots
from megatron_rema.report.run_folder import Series, read_run
from megatron_rema.report.transcript import Shader, choose, chosen_steps, token_pieces, transcripts_html
from megatron_rema.types import Completion, Episode, EpisodeStatus, Prompt, Role, StopReason, Turn, Verdict

ROOT = Path(__file__).resolve().parents[2]
META, REASONING = Role.META_THINKING, Role.REASONING
HOSTILE = "</i><script>alert(1)</script><img src=x onerror=alert(2)> $title ${style} \"'& \u2028 é"
CONFIG = (
    "task: {name: arith}\nmodel: {path: models/arith_tiny}\nagents: {policies: {shared: {roles: [meta_thinking, reasoning]}}}\nseed: 3\n"
)


def tokenizer_of_bytes() -> Tokenizer:
    """Every byte a token, and one stop token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


TOKENIZER = tokenizer_of_bytes()
STOP_ID = TOKENIZER.token_to_id("<|end|>")


def turn(role: Role, round_index: int, text: str, rng: random.Random, stop_reason: StopReason = StopReason.STOP) -> Turn:
    token_ids = [*TOKENIZER.encode(text).ids, *([STOP_ID] if stop_reason is StopReason.STOP else [])]
    logprobs = tuple(-rng.expovariate(3.0) for _ in token_ids)
    return Turn(role, round_index, (1, 2), Completion("r", tuple(token_ids), logprobs, stop_reason, 0), text)


def episode(
    name: str, *, correct: bool | None, status: EpisodeStatus, num_rounds: int, seed: int, question: str = "3 * (4 + 5) - 6"
) -> Episode:
    rng = random.Random(seed)
    turns = []
    for index in range(num_rounds):
        last = index == num_rounds - 1
        plan = "The sum is right. [FINISH]" if last and status.is_finished else "Take the inner bracket first, 4 + 5, and check it."
        turns += [turn(META, index, plan, rng), turn(REASONING, index, "4 + 5 = 9, so \\boxed{21}" if last else "4 + 5 = 9", rng)]
    if status is EpisodeStatus.TRUNCATED:
        turns[-1] = turn(REASONING, num_rounds - 1, "4 + 5 = 9 = 9 = 9 = 9 = 9", rng, StopReason.LENGTH)
    reward = float(bool(correct))
    verdict = {True: Verdict.CORRECT, False: Verdict.WRONG, None: Verdict.UNKNOWN}[correct]
    return Episode(
        episode_id=name,
        prompt=Prompt(f"p{name.split('/')[0]}", question, "21", level=2),
        group_index=0,
        turns=turns,
        status=status,
        verdict=verdict,
        score={"correct": reward, "finished": float(status.is_finished)},
        turn_rewards={role: [0.0] * (num_rounds - 1) + [reward] for role in Role},
        advantages={role: [reward - 0.5] * num_rounds for role in Role},
    )


def write_lines(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_run(path: Path, *, num_steps: int = 60, question: str = "3 * (4 + 5) - 6") -> Path:
    """A run as the trainer leaves it, of ``num_steps`` steps; the page is looked at with this one, too."""
    rng = random.Random(0)
    rows = []
    for step in range(1, num_steps + 1):
        skill = 0.25 + 0.55 * (1 - math.exp(-step / 20))
        finished = min(0.55 + 0.4 * step / num_steps, 0.97)
        rows.append(
            {
                "step": step,
                "weight_version": step,
                "time_s": 9.0 + rng.random(),
                "reward/mean": skill + rng.gauss(0, 0.05),
                "reward/correct_frac": skill,
                "rollout/episodes": 64,
                "rollout/sampled_tokens": 5000 + rng.randrange(500),
                "rollout/sampled_tokens_per_s": 1000.0 + 50 * rng.random(),
                "rollout/generate_s": 4.5 + rng.random(),
                "reward/verify_s": 0.3,
                "experience/score_s": 0.8,
                "train/update_s": 2.4 + 0.3 * rng.random(),
                "sync/sync_s": 0.4,
                "behaviour/turns_per_episode": 6 - 2 * step / num_steps,
                "behaviour/meta_thinking/tokens_per_turn": 18.0 + rng.random(),
                "behaviour/reasoning/tokens_per_turn": 11.0 + rng.random(),
                "behaviour/end/finished_frac": finished,
                "behaviour/end/max_rounds_frac": 0.8 * (1 - finished),
                "behaviour/end/truncated_frac": 0.2 * (1 - finished),
                "behaviour/end/context_overflow_frac": 0.0,
                "train/loss": rng.gauss(0, 0.01),
                "train/grad_norm": 0.5 + 0.2 * rng.random(),
                "train/entropy_nats": 0.8 * math.exp(-step / 80),
                "train/kl_old_k3_nats": 0.002 * rng.random(),
                "train/turn_ratio_clipped_frac": 0.04 * rng.random(),
                "train/lr": 1e-5 * min(step / 10, 1),
                "sync/logprob_gap_max": 1e-3 * (1 + rng.random()),
                "sync/logprob_gap_mean": 1e-5 * (1 + rng.random()),
            }
        )
    write_lines(path / "metrics.jsonl", rows)
    evaluations = []
    for step in (0, num_steps // 2, num_steps):
        for name, accuracy in (("heldout", 0.31 + 0.4 * step / num_steps), ("deeper", 0.08 + 0.3 * step / num_steps)):
            row = {"step": step, "weight_version": step, "set": name, "accuracy": accuracy, "low": accuracy - 0.04, "high": accuracy + 0.05}
            row |= {"num_problems": 200, "samples_per_problem": 4, "temperature": 1.0, "level_accuracy": {"1": 0.9, "2": 0.4}}
            evaluations.append(row)
    write_lines(path / "evaluations.jsonl", evaluations)
    write_lines(
        path / "alerts.jsonl", [{"step": 7, "alert": "logprob_gap", "metric": "sync/logprob_gap_max", "value": 0.2, "threshold": 0.05}]
    )
    for step in (1, num_steps // 2, num_steps):
        kinds = [(True, "finished", 2), (False, "finished", 3), (False, "max_rounds", 4), (False, "truncated", 1), (None, "finished", 2)]
        episodes = [
            episode(f"{index}/{step}", correct=correct, status=EpisodeStatus(status), num_rounds=rounds, seed=index, question=question)
            for index, (correct, status, rounds) in enumerate(kinds * 2)
        ]
        write_lines(path / "episodes" / f"step_{step:06d}.jsonl", [e.to_json() for e in episodes])
    (path / "config.yaml").write_text(CONFIG)
    (path / "hf" / "shared").mkdir(parents=True)
    TOKENIZER.save(str(path / "hf" / "shared" / "tokenizer.json"))
    return path


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


# ---- reading


@pytest.mark.parametrize("kept", [1, 17, -1])
def test_a_line_torn_by_a_kill_is_skipped(tmp_path, kept):
    torn = json.dumps({"step": 3, "note": "é"}, ensure_ascii=False).encode()[:kept]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    assert [row["step"] for row in read_run(tmp_path).metrics] == [1, 2]


def test_a_line_torn_inside_a_character_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"note": "\xc3')  # the first of the two bytes of an e with acute accent
    assert len(read_run(tmp_path).metrics) == 1


def test_a_whole_last_line_counts_without_its_line_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert len(read_run(tmp_path).metrics) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl, line 2: not JSON"),
        ('{"step": 1}\n{"st\n', "metrics.jsonl, line 2: not JSON"),  # its line end was written: not torn by a kill
        ('{"step": 1}\n[2]\n', "metrics.jsonl, line 2: holds list"),
        ('\n{"time_s": 1.0}\n', "metrics.jsonl, line 2: no 'step'"),
        ('{"step": "one"}\n', "metrics.jsonl, line 1: 'step' is 'one'"),
    ],
)
def test_any_other_bad_line_is_an_error_naming_file_and_line(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match="line") as caught:
        read_run(tmp_path)
    assert message in str(caught.value)


def test_a_bad_episode_is_an_error_naming_file_and_line(tmp_path):
    write_run(tmp_path, num_steps=4)
    file = tmp_path / "episodes" / "step_000004.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join([lines[0], lines[1].replace('"finished"', '"fnished"')]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"step_000004\.jsonl, line 2: not an episode .*fnished"):
        read_run(tmp_path).episodes(4)


def test_a_folder_that_no_run_wrote_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        read_run(tmp_path)


def test_episodes_come_back_as_they_were_written_with_any_line_separator_in_their_text(tmp_path):
    write_run(tmp_path, num_steps=4, question=HOSTILE + "\n\r\x85\u2029")
    first = read_run(tmp_path).episodes(1)[0]
    expected = episode("0/1", correct=True, status=EpisodeStatus.FINISHED, num_rounds=2, seed=0, question=HOSTILE + "\n\r\x85\u2029")
    assert first == expected


def test_metrics_of_several_policies_are_lines_of_one_panel(tmp_path):
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": 1, "train/a/loss": 1.0, "train/b/loss": 2.0, "train/loss_scale": 8.0}, {"step": 2, "train/a/loss": float("nan")}],
    )
    lines = read_run(tmp_path).series_by_owner("train/loss")
    assert list(lines) == ["a", "b"]
    assert lines["a"].steps == [1, 2]
    assert math.isnan(lines["a"].values[1])
    assert lines["b"] == Series([1], [2.0])


def test_evaluations_at_different_temperatures_are_not_one_curve(tmp_path):
    rows = [{"step": s, "set": "heldout", "accuracy": 0.5, "temperature": t} for s, t in ((5, 1.0), (0, 1.0), (0, 0.0))]
    write_lines(tmp_path / "evaluations.jsonl", rows)
    groups = read_run(tmp_path).evaluations_by_set()
    assert {label: [row["step"] for row in rows] for label, rows in groups.items()} == {
        "heldout (temperature 1.0)": [0, 5],
        "heldout (temperature 0.0)": [0],
    }


# ---- numbers


def test_the_headline_compares_windows_that_do_not_overlap():
    assert ends(Series([*range(12)], [float(i) for i in range(12)])) == (2.0, 9.0, 5)  # means of 0..4 and 7..11
    assert ends(Series([1, 2, 3], [1.0, 5.0, 9.0])) == (1.0, 9.0, 1)
    assert ends(Series([1], [4.0])) == (4.0, 4.0, 1)
    assert ends(Series([1, 2, 3], [1.0, math.nan, 9.0])) == (1.0, 9.0, 1)


def test_moving_average_is_over_the_last_values_known():
    averages = moving_average([1.0, 3.0, math.nan, 8.0], 2)
    assert averages == [1.0, 2.0, 3.0, 8.0]  # (1), (1+3)/2, (3), (8)


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (41.6, 61, 3599.6, 7325)] == ["42 s", "1 min 01 s", "1 h 00 min", "2 h 02 min"]


def test_headlines_state_what_the_run_did(tmp_path):
    tiles = {label: (value, note) for label, value, note in headlines(read_run(write_run(tmp_path, num_steps=10)))}
    assert tiles["accuracy, heldout"] == ("31.0% \u2192 71.0%", "step 0: [0.270, 0.360]; step 10: [0.670, 0.760]")
    assert tiles["episodes"][0] == "640"
    assert tiles["steps"] == ("10", "weight version 10")
    assert "mean reward" in tiles


# ---- plots


def test_a_whole_run_has_every_figure_and_plots_are_png_files(tmp_path):
    files = write_plots(write_run(tmp_path, num_steps=50))  # more steps than FEW: stacks are areas
    assert [file.name for file in files] == ["learning_curve.png", "dialogue_shape.png", "training_health.png", "time_per_phase.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert all(file.parent == tmp_path / "plots" for file in files)


@pytest.mark.parametrize(
    ("row", "figures"),
    [
        ({"step": 1}, []),
        ({"step": 1, "train/loss": float("nan"), "note": "text", "flag": True}, []),
        ({"step": 1, "train/shared/loss": 0.5}, ["training_health.png"]),
        ({"step": 1, "time_s": 2.0, "sync/logprob_gap_max": 0.0}, ["training_health.png", "time_per_phase.png"]),
        ({"step": 1, "reward/mean": 0.5}, ["learning_curve.png"]),
    ],
)
def test_what_a_run_did_not_measure_is_left_out(tmp_path, row, figures):
    write_lines(tmp_path / "metrics.jsonl", [row])
    assert [file.name for file in write_plots(tmp_path)] == figures
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(page.of_class("plot")) == len(figures)
    assert "Dialogues" not in page.text


def test_an_evaluation_alone_is_reported(tmp_path):
    write_lines(tmp_path / "evaluations.jsonl", [{"step": 0, "set": "a$b_$", "accuracy": 0.5}])  # a name that is no formula
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(page.of_class("plot")) == 1
    assert "95% interval" not in page.text  # a column without a value is left out


# ---- transcripts


def test_first_middle_and_last_step_are_shown_with_every_verdict(tmp_path):
    run = read_run(write_run(tmp_path, num_steps=10))
    assert chosen_steps(run) == [1, 5, 10]
    shown = choose(run.episodes(5))
    assert [str(e.verdict) for e in shown] == ["correct"] * 2 + ["wrong"] * 3 + ["unknown"] * 2
    assert {e.status for e in shown if e.verdict is Verdict.WRONG} == {"finished", "max_rounds", "truncated"}  # ends that differ first
    for episode in shown:
        episode.counterfactual_of = "p"
    assert choose(shown) == [], "a dialogue without the plan under test is not one that the agents had"


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_pieces_of_tokens_add_up_to_the_text(text):
    decode = lambda ids: TOKENIZER.decode(list(ids), skip_special_tokens=False)  # noqa: E731
    token_ids = TOKENIZER.encode(text).ids  # every token a byte: most characters are split over tokens
    whole = decode(token_ids)
    pieces = token_pieces(decode, token_ids, whole)
    assert pieces is not None
    assert len(pieces) == len(token_ids)
    assert "".join(pieces) == whole


def test_pieces_that_do_not_add_up_are_refused():
    assert token_pieces(lambda ids: "x" * len(ids), [1, 2], "yy") is None


def test_every_token_shows_its_probability_and_surprising_ones_are_darker():
    token_ids = (*TOKENIZER.encode("ab").ids, STOP_ID)
    spoken = Turn(META, 0, (), Completion("r", token_ids, (-0.05, -3.0, -math.log(2)), StopReason.STOP, 0), "ab")
    shaded = Page(Shader(lambda ids: TOKENIZER.decode(list(ids), skip_special_tokens=False)).html(spoken))
    tokens = [attributes for tag, attributes in shaded.elements if tag == "i"]
    assert [token["class"] for token in tokens] == ["p0", "p4", "stop p2"]  # shades at 0.1, 0.5, 1.2, 2.5, 5 nats
    assert "probability 0.5," in tokens[2]["title"]
    assert shaded.text == "ab<|end|>"
    cells = Page(Shader(None).html(spoken))  # without a tokenizer: the text, and a cell per token
    assert cells.text == "ab"
    assert [a["class"] for tag, a in cells.elements if tag == "i"] == ["p0", "p4", "p2"]


def test_a_page_shades_no_more_tokens_than_its_budget():
    shader = Shader(None)
    shader.tokens_left = 3
    spoken = Turn(META, 0, (), Completion("r", (1, 2), (-1.0, -1.0), StopReason.LENGTH, 0), "ab")
    assert [shader.html(spoken).count("<i ") for _ in range(2)] == [2, 0]


# ---- the page


def test_the_page_holds_everything_and_asks_the_network_for_nothing(tmp_path):
    file = write_report(write_run(tmp_path, num_steps=10))
    assert file == tmp_path / "report.html"
    page = Page(file.read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "embed", "base", "form"}
    sources = [a[key] for _, a in page.elements for key in ("src", "href", "srcset", "data") if key in a]
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page.text
    assert "http" not in page.text
    assert len(page.of_class("episode")) == 3 * (2 + 3 + 2)
    assert {a["data-role"] for a in page.of_class("turn")} == {"meta_thinking", "reasoning"}
    for expected in ("arith", "arith_tiny", "seed 3", "logprob_gap", "Evaluations", "train/grad_norm", "policies: shared", "4 + 5 = 9"):
        assert expected in page.text


def test_texts_of_a_run_are_shown_and_never_run(tmp_path):
    run = write_run(tmp_path, num_steps=4, question=HOSTILE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, f"{HOSTILE}/x": 1.0, "reward/mean": 1.0}) + "\n")
    write_lines(run / "alerts.jsonl", [{HOSTILE: HOSTILE}])
    write_lines(run / "evaluations.jsonl", [{"step": 0, "set": HOSTILE, "accuracy": 0.5, "level_accuracy": {HOSTILE: 0.5}}])
    (run / "config.yaml").write_text(json.dumps({"task": {"name": HOSTILE}}))
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.elements) == 1  # ours
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert page.text.count(HOSTILE) >= 3 * 7 + 4  # seven episodes of three steps; metric, alert, evaluation, configuration
    assert "<script>alert" not in html


@pytest.mark.parametrize("decode", [None, lambda ids: HOSTILE])
@pytest.mark.parametrize("logprobs", [(-1.0,), ()])  # shaded, and plain text where log-probabilities are missing
def test_what_a_role_says_is_shown_and_never_run(decode, logprobs):
    spoken = Turn(META, 0, (), Completion("r", (7,), logprobs, StopReason.LENGTH, 0), HOSTILE)
    page = Page(Shader(decode).html(spoken))
    assert page.text == HOSTILE
    assert {tag for tag, _ in page.elements} <= {"div", "i"}


def test_a_name_of_the_run_that_is_markup_is_escaped(tmp_path):
    run = tmp_path / "<b>run</b>"
    write_lines(run / "metrics.jsonl", [{"step": 1, "train/loss": 1.0}])
    assert "<b>run" not in page_html(read_run(run), [])


def test_transcripts_do_without_a_tokenizer(tmp_path):
    run = write_run(tmp_path, num_steps=4)
    (run / "hf" / "shared" / "tokenizer.json").unlink()
    assert '<div class="strip">' in transcripts_html(read_run(run))


def test_the_tool_writes_where_it_is_told_and_ends_with_2_on_bad_input(tmp_path):
    run = tmp_path / "run"
    write_lines(run / "metrics.jsonl", [{"step": 1, "train/loss": 1.0}])
    tool = [sys.executable, str(ROOT / "tools" / "report.py")]
    done = subprocess.run([*tool, str(run), "--out", str(tmp_path / "far" / "page.html")], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "far" / "page.html"))
    assert (tmp_path / "far" / "page.html").exists()
    refused = subprocess.run([*tool, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "is not a run folder" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_reading_a_run_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys, megatron_rema.report.page\n"
        "sys.exit(str(sorted({'torch', 'matplotlib', 'transformers', 'tokenizers'} & sys.modules.keys()) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.strip() == ""


def test_integrity_alerts_come_with_what_was_said_in_every_arm(tmp_path):
    arms = {"full": {"gold": 1.0, "turns": [["meta_thinking", HOSTILE], ["reasoning", "7"]]}}
    item = {"question": "3 + 4", "answer": "7", "proxy": 1.0, "arms": arms}
    clean = {"step": 1, "verdict": "clean", "mechanism": None, "transcripts": [{**item, "question": "not shown"}]}
    hack = {"step": 26, "verdict": "hack", "mechanism": "the plan is the answer", "transcripts": [item]}
    gap = {f"integrity/audit/proxy_gold/{name}": value for name, value in (("proxy", 0.9), ("gold", 0.4))}
    for name, rows in {
        "metrics": [{"step": step, **gap} for step in (1, 26)],
        "audits": [clean, hack],
        "alerts": [{"step": 26, "alert": "integrity_hack"}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "step 26: hack, the plan is the answer" in page and "3 + 4 = 7, paid 1" in page and "not shown" not in page
    assert HOSTILE not in page and escape(HOSTILE) in page
    assert (tmp_path / "plots" / "integrity.png").stat().st_size > 1000

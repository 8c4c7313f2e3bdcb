"""docs/security.md, row by row: what comes from outside is data and is never run."""

from __future__ import annotations

import ast
import builtins
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemReader, FileSystemWriter, default_planner, save
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rema.bridge import no_pickle
from megatron_rema.reward import arithmetic
from megatron_rema.reward.answers import verify
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.types import Verdict
from tests.tiny_models import save_tiny_model
from tests.unit.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "setup.py",
    *(file for folder in ("megatron_rema", "tools", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))),
]


class Bomb:
    """Makes ``file`` when it is unpickled without restriction."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


# --- the source: a call that could run data is a failing test ---------------------------------------------------------


def forbidden(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every call and import that could run what somebody else wrote."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"):
                    yield node.lineno, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rsplit(".", 1)[-1]
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield node.lineno, called
        if last in ("sympify", "parse_expr", "eval_expr", "lambdify"):
            yield node.lineno, called
        if called == "torch.load" and options.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if called.startswith("yaml.") and last not in ("safe_load", "safe_load_all", "safe_dump"):
            yield node.lineno, called
        if options.get("allow_pickle") not in (None, "False") or options.get("shell") not in (None, "False"):
            yield node.lineno, f"{called} with allow_pickle or shell"
        if last.endswith(("_object", "_object_list", "_object_list_device")) and called.startswith(("dist.", "torch.distributed.")):
            yield node.lineno, f"{called} (a pickle between ranks: parallel/exchange.py sends JSON)"
        if called.startswith("Auto") and last == "from_pretrained" and options.get("trust_remote_code") != "False":
            yield node.lineno, f"{called} without trust_remote_code=False"
        if options.get("trust_remote_code") not in (None, "False"):
            yield node.lineno, f"{called} with trust_remote_code={options['trust_remote_code']}"
        if last == "EngineArgs" and options.get("trust_remote_code") != "False":
            yield node.lineno, "EngineArgs without trust_remote_code=False"


ALLOWED = {
    ("megatron_rema/bridge/no_pickle.py", "import pickle"),  # the reader that knows a plan's classes and no other name
    ("megatron_rema/bridge/no_pickle.py", "torch.load without weights_only=True"),  # sets it, whatever the caller says
}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_file_runs_data(file):
    name = str(file.relative_to(ROOT))
    assert [(name, line, what) for line, what in forbidden(file.read_text()) if (name, what) not in ALLOWED] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "yaml.load(text)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "dist.all_gather_object(box, value)",
        "dist.broadcast_object_list(box, src=0)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)",
        "LLM(path, trust_remote_code=config.trust)",
        "sympy.sympify(text)",
    ],
)
def test_the_rules_above_find_what_they_forbid(line):
    assert list(forbidden(line))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path) -> Path:
    """A folder as torch.distributed.checkpoint writes it: a tensor, and an object that is none."""
    save({"weight": torch.arange(4.0), "extra": {"scale": 2}}, storage_writer=FileSystemWriter(tmp_path / "plan"), no_dist=True)
    return tmp_path / "plan"


def test_a_plan_of_tensors_is_read_as_it_was_written(plan):
    plain = FileSystemReader(plan).read_metadata()
    no_pickle.contain()
    read = FileSystemReader(plan).read_metadata()
    assert read.state_dict_metadata == plain.state_dict_metadata and read.storage_data == plain.storage_data


@pytest.mark.parametrize("hidden_in", ["a name", "the plan"])
def test_a_plan_that_would_run_something_is_refused_and_runs_nothing(plan, tmp_path, hidden_in):
    bomb = Bomb(tmp_path / "exploded")
    hostile = bomb if hidden_in == "a name" else Metadata({"weight": BytesStorageMetadata()}, planner_data=bomb)
    (plan / ".metadata").write_bytes(pickle.dumps(hostile))
    no_pickle.contain()
    with pytest.raises(ValueError, match=r"\.metadata names posix\.mkdir, which no plan of tensors holds"):
        FileSystemReader(plan).read_metadata()
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "exploded").is_dir(), "the bomb works: the reader above is what held it off"


def test_an_object_of_a_checkpoint_that_would_run_something_is_refused(tmp_path):
    no_pickle.contain()
    hostile = tmp_path / "object"
    torch.save(Bomb(tmp_path / "exploded"), hostile)
    planner = default_planner.DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    item = default_planner.ReadItem(None, default_planner.MetadataIndex("extra"), None, None, None, None)
    with hostile.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="mkdir"):
        planner.load_bytes(item, file)
    assert planner.state_dict == {} and not (tmp_path / "exploded").exists()


def test_an_environment_that_takes_torchs_guard_away_is_refused(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set"):
        no_pickle.contain()


# --- models -----------------------------------------------------------------------------------------------------------


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    from megatron_rema.engine.transformers import TransformersEngine
    from megatron_rema.rollout.chat import ChatFormat

    save_tiny_model(tmp_path / "model", tokenizer=tiny_tokenizer("chatml"))
    code = f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\n"
    for name, file in (("config.json", "modeling_evil"), ("tokenizer_config.json", "tokenization_evil")):
        (tmp_path / "model" / f"{file}.py").write_text(code)
        described = json.loads((tmp_path / "model" / name).read_text())
        described["auto_map"] = {
            "AutoModelForCausalLM": f"{file}.Evil",
            "AutoConfig": f"{file}.Evil",
            "AutoTokenizer": [f"{file}.Evil", None],
        }
        (tmp_path / "model" / name).write_text(json.dumps(described))
    ChatFormat.from_pretrained(tmp_path / "model")
    TransformersEngine(tmp_path / "model", max_model_len=64)
    assert not (tmp_path / "exploded").exists()


# --- generated text ---------------------------------------------------------------------------------------------------

# what math_verify reads by another way than LaTeX, numbers in text, names of units; and attempts
SAID = [
    ("The answer is 3/4", "0.75", Verdict.CORRECT),
    ("The answer is (1+2)*3 - 2^3", "1", Verdict.CORRECT),
    ("\\boxed{\\frac{8}{2}}", "4", Verdict.CORRECT),
    ("\\boxed{0.5}", "\\frac12", Verdict.CORRECT),
    ("\\boxed{10^{-3}}", "0.001", Verdict.CORRECT),
    ("\\boxed{x^2 + 1}", "1 + x^2", Verdict.CORRECT),
    ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", Verdict.CORRECT),
    ("\\boxed{3 + 2i}", "2i + 3", Verdict.CORRECT),
    ("\\boxed{\\frac{8}{3}}", "4", Verdict.WRONG),
    ("The answer is 3/5", "0.75", Verdict.WRONG),
    ("\\boxed{__import__('os').mkdir('exploded')}", "4", Verdict.WRONG),
    ("The answer is __import__('os').mkdir('exploded')", "4", Verdict.WRONG),
]


def test_no_text_of_a_policy_reaches_eval(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    verify("\\boxed{\\sin 30^\\circ}", "0.5")  # whatever modules load lazily, they load here
    evaluated = []

    def spy(code, *scopes):
        evaluated.append(code)
        raise AssertionError(f"eval of {code!r}")

    monkeypatch.setattr(builtins, "eval", spy)
    verdicts = [verify(text, gold) for text, gold, _ in SAID]
    assert (verdicts, evaluated, list(tmp_path.iterdir())) == ([verdict for *_, verdict in SAID], [], [])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1/2", 0.5), ("-2**2", -4), ("(1+2)*3-4", 5), ("2**-1", 0.5), (".25", 0.25), ("1e3", 1000), ("+7", 7), ("2*(3-5)/4", -1)],
)
@pytest.mark.parametrize("evaluate", [True, False])
def test_arithmetic_is_read_with_its_value(text, value, evaluate):
    assert float(arithmetic.read(text, evaluate=evaluate)) == value


@pytest.mark.parametrize("text", ["f(1)", "x.y", "[1]", "1 if 2 else 3", "'1'", "True", "lambda: 1", "1; 2", "x := 1", "1 < 2", "2(3)", ""])
def test_what_is_not_arithmetic_is_refused(text):
    with pytest.raises(SyntaxError):
        arithmetic.read(text)


def judged(word: str, timeout_s: float) -> tuple[Verdict, str]:
    with VerifierPool(1, timeout_s, lenient=False, function="tests.unit.verifier_faults:judge") as pool:
        pool.submit_answer("a", f"say \\boxed{{{word}}}", "gold")
        judgement = pool.collect()["a"]
        return judgement.verdict, judgement.how


def test_a_verifier_that_eats_memory_ends_within_its_limit():
    before = psutil.virtual_memory().available
    assert judged("eat", 20.0) == (Verdict.UNKNOWN, "crash")  # MemoryError: 6 GiB were asked for where 4 are allowed
    assert psutil.virtual_memory().available > before - (2 << 30)


def test_what_a_verifier_starts_ends_with_it(tmp_path):
    assert judged(f"start {tmp_path}/pid hang", 2.0) == (Verdict.UNKNOWN, "timeout")
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the verifier's child lives on"
        time.sleep(0.05)


def test_a_verifier_may_use_no_more_processor_time_than_an_answer_may_take():
    assert judged("limits", 3.0) == (Verdict.CORRECT, "verified")


# --- the run folder and the page: test_run_folder.py and test_report.py -----------------------------------------------


def test_a_run_folder_made_by_the_trainer_is_not_readable_by_others(tmp_path):
    from megatron_rema.trainer.run_folder import RunFolder

    folder = RunFolder(tmp_path / "run", writes=True).path
    assert folder.stat().st_mode & 0o077 == 0
    shutil.rmtree(folder)

"""Injected faults over a running job: ``python -m tests.faults.campaign WORK_FOLDER [--cases N] [--only NUMBER ...]``.

Every case is a real run of two ranks through the real front doors on the tiny task, with the transformers engine in place of vLLM. What
must hold: the job ends within the limit, no checkpoint that looks whole is damaged, nothing it started outlives it, whoever should be told
is told, and the run that continues ends with bit for bit what the uninterrupted run computed. Writes WORK_FOLDER/cases.jsonl, one case a
line as it ends; a case found there is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron_rema.sft
import megatron_rema.train
from megatron_rema.report import page
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.trainer import state
from tests.faults import injection
from tests.faults.cases import LAYOUTS, SHARED, STEPS, Case, all_cases, short_suite
from tests.faults.injection import Disk, Point, Poison, can_mount
from tests.faults.launcher import Ended, Job, leftovers, preload
from tests.faults.oracle import damaged_checkpoints, differences, leavings, results, rows
from tests.tiny_task import save_tiny_task

LIMIT_S = 150.0  # a job of ten seconds that is not over by then hangs
DOORS: dict[str, ModuleType] = {"train": megatron_rema.train, "sft": megatron_rema.sft}


@dataclass
class Record:
    """What was seen of one case."""

    number: int
    fault: str
    name: str
    codes: list[int | None] = field(default_factory=list)
    said: str = ""  # the message that the user gets
    outcome: str = ""
    detected_s: float | None = None  # from the fault to the end of the job
    resumed_s: float | None = None  # from the start of the continued run until it did a step that the first had not done
    steps_again: int | None = None  # finished steps that were done again
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """The tiny task, the uninterrupted runs, and a folder for the cases."""

    def __init__(self, work: Path) -> None:
        self.work = work
        task = work / "task"
        if not (task / "done").exists():
            shutil.rmtree(task, ignore_errors=True)
            overrides = save_tiny_task(task)
            preload(task / "model")
            learn = ["trainer.steps=40", "trainer.global_batch_dialogues=36", "optimizer.lr=0.002"]
            ended = Job(megatron_rema.sft, [*overrides, f"run_dir={task}/sft", *learn], logs=task / "logs", world=1).wait(LIMIT_S)
            assert ended.code == 0, ended.output
            (task / "done").write_text(json.dumps(overrides))
        preload(task / "model")
        given = json.loads((task / "done").read_text())
        self.task = [o for o in given if not o.startswith("model.path=")] + [f"model.path={task}/sft/hf/shared", *SHARED]

    def settings(self, layout: str) -> list[str]:
        return [*self.task, *LAYOUTS[layout][1]]

    def reference(self, layout: str, poison: tuple[int, ...] = (), victim: int = 0, value: str = "nan") -> Path:
        """The folder of the uninterrupted run of ``layout``; with ``poison``, one whose gradients were spoilt in those steps."""
        name = layout.replace(" ", "_") + (f"_{value}{'_'.join(map(str, poison))}_rank{victim}" if poison else "")
        folder = self.work / "whole" / name
        if not (folder / "report.html").exists():
            shutil.rmtree(folder, ignore_errors=True)
            arm = partial(Poison(poison, float(value)).install, victim=victim) if poison else None
            ended = self.start(layout, folder, "whole", arm=arm).wait(LIMIT_S)
            assert ended.codes == [0, 0], ended.output
            metrics = rows(folder / "metrics.jsonl")
            assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
            assert any(row["train/grad_norm"] > 0 for row in metrics[1:]), "without gradients the comparisons would be empty"
        return folder

    def start(self, layout: str, folder: Path, logs: str, *more: str, **options: Any) -> Job:
        door = DOORS[LAYOUTS[layout][0]]
        where = folder.parent / f"logs_{folder.name}" / logs if logs == "whole" else self.work / "now" / logs
        return Job(door, [*self.settings(layout), f"run_dir={folder}", *more], logs=where, **options)

    def run(self, case: Case) -> Record:
        shutil.rmtree(self.work / "now", ignore_errors=True)
        record = Record(case.number, case.fault, case.name)
        # where the fault does not strike them, what costs more than the run itself is left out: its processes that only ask for the lenient
        # verdict (a metric), and the figures of its report
        VerifierPool.__init__.__kwdefaults__["lenient"] = case.fault == "verifier process"
        page.draw_plots = _draw_plots if case.point.place in ("export", "report") else _no_figures
        if case.fault in ("full disk", "read-only folder") and not can_mount(self.work):
            record.outcome = "not run: it needs the right to mount a file system"
            return record
        try:
            _RUNNERS[case.fault](self, case, record)
        except AssertionError as wrong:
            record.wrong.append(f"{wrong}")
        for logs in ("fault", "again", "refused"):
            for process in leftovers(self.work / "now" / logs):
                record.wrong.append(f"a process outlives its run: {' '.join(process.cmdline())[:200]}")
                process.kill()
        return record

    # --- the parts of a case --------------------------------------------------------------------------------------------

    def struck(self, case: Case, record: Record, folder: Path, action: Callable[[], None], *more: str, supervised: bool = True) -> Ended:
        """The job in which the fault strikes, to its end."""
        struck = self.work / "now" / "fault" / "struck"
        alone = [] if supervised else ["trainer.preflight.wait_s=40"]  # whoever is left before there is a group waits twice as long
        job = self.start(
            case.layout,
            folder,
            "fault",
            *alone,
            *more,
            arm=lambda rank: injection.install(case.point, rank, action, struck),
            supervised=supervised,
        )
        return self.ended(record, job.wait(LIMIT_S))

    def ended(self, record: Record, ended: Ended) -> Ended:
        record.codes, record.detected_s = ended.codes, ended.detected_s
        record.said = "; ".join(line for line in ended.output.splitlines() if line.startswith("error: "))[:2000]
        if ended.hung:
            record.wrong.append(f"ranks {ended.hung} hung")
        return ended

    def continued(self, case: Case, record: Record, folder: Path, expected: Path, *more: str, logs: str = "again") -> None:
        """Resume, and compare with the uninterrupted run."""
        record.wrong += damaged_checkpoints(folder)
        before = len([line for line in _lines(folder / "metrics.jsonl") if line.endswith("\n")])
        latest = state.latest(folder / "checkpoints") if (folder / "checkpoints").exists() else None
        record.steps_again = max(0, before - (int(latest.name.removeprefix("step_")) if latest else 0))
        job = self.start(case.layout, folder, logs, "resume=true", *more)
        ended = job.wait(LIMIT_S, until=lambda: len(_lines(folder / "metrics.jsonl")) > before)
        if ended is None:
            record.resumed_s = time.monotonic() - job.began
            ended = job.wait(LIMIT_S)
        record.resumed_s = record.resumed_s or ended.seconds
        assert ended.codes == [0, 0], f"the continued run ended with {ended.codes}: {ended.output[-1500:]}"
        self.compare(record, folder, expected)
        record.outcome = record.outcome or "resumed, bitwise"

    def compare(self, record: Record, folder: Path, expected: Path) -> None:
        different = differences(results(folder, STEPS), results(expected, STEPS))
        record.wrong += [f"{name} differs from the uninterrupted run" for name in different]
        record.wrong += [f"left behind: {name}" for name in leavings(folder)]
        if not (folder / "report.html").read_text().rstrip().endswith("</html>"):
            record.wrong.append("report.html is not whole")


_draw_plots = page.draw_plots


def _no_figures(run: Any) -> list:
    return []


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []


# --- the kinds of fault: what strikes, and what must follow -----------------------------------------------------------------


def ends_a_rank(campaign: Campaign, case: Case, record: Record, action: Callable[[], None], *, supervised: bool = True) -> None:
    expected = campaign.reference(case.layout)
    folder = campaign.work / "now" / "run"
    ended = campaign.struck(case, record, folder, action, supervised=supervised)
    while ended.struck_s is None and case.point.call > 1:  # there are fewer calls in that step
        case = replace(case, point=replace(case.point, call=case.point.call // 2))
        record.name = case.name
        shutil.rmtree(folder)
        ended = campaign.struck(case, record, folder, action, supervised=supervised)
    assert ended.struck_s is not None, f"the fault never struck; the job ended with {ended.codes}"
    assert ended.code != 0, "the job ended as if nothing had happened"
    campaign.continued(case, record, folder, expected)


def strikes_at_random(campaign: Campaign, case: Case, record: Record) -> None:
    expected = campaign.reference(case.layout)
    folder = campaign.work / "now" / "run"
    job = campaign.start(case.layout, folder, "fault")
    if job.wait(LIMIT_S, until=lambda: time.monotonic() - job.began > case.options["after_s"]) is None:
        job.struck.write_text(str(time.monotonic()))
        job.signal(signal.SIGKILL, [case.point.rank])
        ended = campaign.ended(record, job.wait(LIMIT_S))
        assert ended.code != 0, "the job ended as if nothing had happened"
    campaign.continued(case, record, folder, expected)


def memory_runs_out(campaign: Campaign, case: Case, record: Record) -> None:
    kinds = {"host": injection.out_of_host_memory, "device": injection.out_of_device_memory, "python": injection.out_of_memory}
    ends_a_rank(campaign, case, record, kinds[case.options["kind"]], supervised=case.options["supervised"])
    remedy = "engine.max_num_seqs" if case.point.place == "generate" else "trainer.microbatch_tokens"
    told(record, f"rank {case.point.rank}", "out of memory", remedy, "resume=true")


def told(record: Record, *words: str) -> None:
    missing = [word for word in words if word not in record.said]
    if missing:
        record.wrong.append(f"the message does not say {missing}: {record.said!r}")


def disk_fails(campaign: Campaign, case: Case, record: Record) -> None:
    expected = campaign.reference(case.layout)
    disk = Disk(campaign.work / "disk").mount()
    try:
        folder = disk.path / "run"
        is_full = case.fault == "full disk"
        action = partial(disk.fill, spare_pages=case.options["spare_pages"]) if is_full else partial(disk.remount, "ro")
        small = "trainer.preflight.min_free_disk_gib=0"
        ended = campaign.struck(case, record, folder, action, small)
        disk.remount("rw")
        disk.free()
        assert ended.struck_s is not None, f"the fault never struck; the job ended with {ended.codes}"
        if ended.code == 0:  # what was left to write had its place
            campaign.compare(record, folder, expected)
            record.outcome = "survived, bitwise"
            return
        told(record, "No space left" if is_full else "Read-only", str(disk.path), "resume=true")
        if "Traceback" in ended.outputs[case.point.rank if case.point.place != "disk" else 0]:
            record.wrong.append("a traceback reached the user")
        campaign.continued(case, record, folder, expected, small)
    finally:
        disk.unmount()


def checkpoint_is_damaged(campaign: Campaign, case: Case, record: Record) -> None:
    expected = campaign.reference(case.layout)
    folder = campaign.work / "now" / "run"
    shutil.copytree(expected, folder)
    damage, newest = case.options["damage"], folder / "checkpoints" / f"step_{STEPS:06d}"
    before = newest.with_name(f"step_{STEPS - 1:06d}")
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.name != "manifest.json")
    file = files[case.number // 7 % len(files)]
    if damage == "flipped byte":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing file":
        file.unlink()
    elif damage == "missing manifest":
        file = newest / "manifest.json"
        file.unlink()
    elif damage == "damaged manifest":
        file = newest / "manifest.json"
        file.write_bytes(file.read_bytes()[:-30])
    elif damage == "leftover partial":  # killed in the middle of writing the newest
        newest.rename(newest.with_name(f".partial_{newest.name}"))
        (newest.parent / "latest").write_text(before.name)
    elif damage == "torn pointer":
        (newest.parent / "latest").write_bytes(b"step_0\0\0\0")
    if damage in ("leftover partial", "torn pointer"):
        campaign.continued(case, record, folder, expected)
        return
    ended = campaign.ended(record, campaign.start(case.layout, folder, "refused", "resume=true").wait(LIMIT_S))
    record.detected_s = ended.seconds
    if ended.code != 2:
        record.wrong.append(f"exit codes {ended.codes}")
    told(record, str(file), f"resume_from={before}")
    shutil.rmtree(newest)  # known to be bad; the check of what is whole needs it gone, the run would set it aside
    campaign.continued(case, record, folder, expected, f"resume_from={before}")
    record.outcome = "refused by the file's name, resumed from the one before, bitwise"


def data_is_damaged(campaign: Campaign, case: Case, record: Record) -> None:
    expected = campaign.reference(case.layout)
    folder, damage = campaign.work / "now" / "run", case.options["damage"]
    door = LAYOUTS[case.layout][0]
    good = campaign.work / "task" / {"train": "train.jsonl", "sft": "dialogues.jsonl"}[door]
    file = campaign.work / "now" / "data" / good.name
    file.parent.mkdir(parents=True)
    shutil.copy(good, file)
    content = good.read_bytes()
    lines = content.splitlines(keepends=True)
    given, struck = f"task.{'train' if door == 'train' else 'cold_start'}_file={file}", campaign.work / "now" / "fault" / "struck"
    if damage == "while it runs":
        arm = lambda rank: injection.install(Point("update", 2, 0), rank, lambda: file.write_bytes(content[:100]), struck)  # noqa: E731
        ended = campaign.ended(record, campaign.start(case.layout, folder, "fault", given, arm=arm).wait(LIMIT_S))
        assert ended.codes == [0, 0], ended.output[-1500:]
        campaign.compare(record, folder, expected)
        record.outcome = "survived, bitwise"
        return
    arm = lambda rank: injection.install(Point("update", 3, 1), rank, injection.kill, struck)  # noqa: E731
    killed = campaign.start(case.layout, folder, "fault", given, arm=arm).wait(LIMIT_S)
    assert killed.code != 0
    file.write_bytes(content[:-20] if damage == "torn row" else b"".join(lines[: len(lines) // 2]))
    ended = campaign.ended(record, campaign.start(case.layout, folder, "refused", given, "resume=true").wait(LIMIT_S))
    record.detected_s = ended.seconds
    if ended.code != 2:
        record.wrong.append(f"exit codes {ended.codes}")
    told(record, str(file), *([f"line {len(lines)}:"] if damage == "torn row" else []))
    file.write_bytes(content)
    campaign.continued(case, record, folder, expected, given)
    record.outcome = "refused, resumed with the whole file, bitwise"


def gradients_once(campaign: Campaign, case: Case, record: Record) -> None:
    """In step 2; and as that alone would leave nothing to resume, rank 1 is killed in step 4."""
    value, victim = case.options["value"], case.point.rank
    expected = campaign.reference(case.layout, (2,), victim, value)
    told_of = [row for row in rows(expected / "metrics.jsonl") if any(v for k, v in row.items() if k.endswith("skipped_updates"))]
    alerts = [row for row in rows(expected / "alerts.jsonl") if row["alert"] == "update_skipped"]
    if [row["step"] for row in told_of] != [2] or {row["step"] for row in alerts} != {2}:
        record.wrong.append(f"skipped updates in steps {[row['step'] for row in told_of]}, alerts {alerts}")
    folder = campaign.work / "now" / "run"
    struck = campaign.work / "now" / "fault" / "struck"

    def arm(rank: int) -> None:
        Poison((2,), float(value)).install(rank, victim)
        injection.install(Point("update", 4, 1), rank, injection.kill, struck)

    ended = campaign.ended(record, campaign.start(case.layout, folder, "fault", arm=arm).wait(LIMIT_S))
    assert ended.code != 0
    campaign.continued(case, record, folder, expected)
    record.outcome = "skipped and counted, went on; resumed, bitwise that run"


def gradients_for_good(campaign: Campaign, case: Case, record: Record) -> None:
    expected = campaign.reference(case.layout)
    folder = campaign.work / "now" / "run"
    struck = campaign.work / "now" / "fault" / "struck"
    poison = Poison(tuple(range(2, STEPS + 1)), float(case.options["value"]), struck)
    arm, keep = partial(poison.install, victim=case.point.rank), "trainer.keep_checkpoints=9"
    ended = campaign.ended(
        record, campaign.start(case.layout, folder, "fault", "trainer.max_skipped_updates=2", keep, arm=arm).wait(LIMIT_S)
    )
    assert ended.code == 1, f"exit codes {ended.codes}"
    told(record, "not finite", "in a row", "trainer.max_skipped_updates", "resume=true")
    good = folder / "checkpoints" / "step_000001"
    campaign.continued(case, record, folder, expected, keep, f"resume_from={good}")
    record.outcome = "stopped after k, resumed from before, bitwise"


def clock_jumps(campaign: Campaign, case: Case, record: Record) -> None:
    expected = campaign.reference(case.layout)
    folder = campaign.work / "now" / "run"
    ended = campaign.struck(case, record, folder, partial(injection.jump_clock, 3600.0 * case.options["hours"]))
    assert ended.struck_s is not None, f"the fault never struck; the job ended with {ended.codes}"
    assert ended.codes == [0, 0], ended.output[-1500:]
    record.detected_s = None
    campaign.compare(record, folder, expected)
    record.outcome = "survived, bitwise"


def verifier_fails(campaign: Campaign, case: Case, record: Record) -> None:
    """A verdict may be lost, and is then UNKNOWN; nothing else may change in the step in which that happens."""
    expected = campaign.reference(case.layout)
    folder, what = campaign.work / "now" / "run", case.options["what"]
    actions = {
        "killed": partial(injection.signal_verifiers, signal.SIGKILL),
        "stopped": partial(injection.signal_verifiers, signal.SIGSTOP),
    }
    action = actions.get(what) or partial(injection.bewitch_verifiers, what)
    ended = campaign.struck(case, record, folder, action, "reward.verifier_timeout_s=3")
    assert ended.struck_s is not None, f"the fault never struck; the job ended with {ended.codes}"
    assert ended.codes == [0, 0], ended.output[-1500:]
    record.detected_s = None
    found, whole = rows(folder / "metrics.jsonl"), rows(expected / "metrics.jsonl")
    step = case.point.step
    for row, other in zip(found[: step - 1], whole, strict=False):  # the uninterrupted run was spared the lenient verdicts
        different = [name for name in row if not name.endswith("_s") and "lenient" not in name and row[name] != other[name]]
        record.wrong += [f"{name} of step {row['step']} differs" for name in different]
    if [row["step"] for row in found] != [row["step"] for row in whole]:
        record.wrong.append("steps are missing")
    if what in ("hangs", "dies", "forks") and not list((campaign.work / "now" / "fault").glob("bewitched_*")):
        record.wrong.append("the judge was never asked: nothing was injected")
    ours, theirs = (rows(f / "episodes" / f"step_{step:06d}.jsonl") for f in (folder, expected))
    unknown = 0
    for episode, other in zip(ours, theirs, strict=True):
        if episode["turns"] != other["turns"]:
            record.wrong.append(f"episode {episode['episode_id']} was played otherwise")
        if not episode["score"] and other["score"]:
            unknown += 1
        elif episode["score"].get("correct") != other["score"].get("correct"):
            record.wrong.append(f"episode {episode['episode_id']} got another verdict")
    record.outcome = f"survived, {'some verdicts of the step UNKNOWN' if unknown else 'no verdict lost'}"


_RUNNERS: dict[str, Callable[[Campaign, Case, Record], None]] = {
    "SIGKILL in a phase": partial(ends_a_rank, action=injection.kill),
    "SIGKILL in a checkpoint write": partial(ends_a_rank, action=injection.kill),
    "SIGKILL at a random moment": strikes_at_random,
    "SIGKILL, nobody ends the others": partial(ends_a_rank, action=injection.kill, supervised=False),
    "SIGTERM": partial(ends_a_rank, action=injection.terminate),
    "exception on one rank": partial(ends_a_rank, action=injection.fails),
    "exception on one rank, nobody ends the others": partial(ends_a_rank, action=injection.fails, supervised=False),
    "out of memory": memory_runs_out,
    "full disk": disk_fails,
    "read-only folder": disk_fails,
    "damaged checkpoint": checkpoint_is_damaged,
    "damaged data file": data_is_damaged,
    "non-finite gradients once": gradients_once,
    "non-finite gradients for good": gradients_for_good,
    "verifier process": verifier_fails,
    "clock jump": clock_jumps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--short", action="store_true", help="the suite of CI instead")
    parser.add_argument("--cases", type=int, help="only so many")
    parser.add_argument("--only", type=int, nargs="+", default=[], help="these case numbers, whether done or not")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), help="those alone: several processes may share the campaign")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    log = options.work / "cases.jsonl"
    done = {row["number"] for row in rows(log)} if not options.only else set()
    campaign = Campaign(options.work.resolve())
    suite = short_suite() if options.short else all_cases()
    chosen = [case for case in suite[: options.cases] if case.number not in done]
    if options.only:
        chosen = [case for case in chosen if case.number in options.only]
    chosen = [case for case in chosen if case.layout in options.layouts]
    for case in chosen:
        began = time.monotonic()
        record = campaign.run(case)
        with log.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        verdict = "WRONG " + " | ".join(record.wrong) if record.wrong else record.outcome
        print(f"{case.number:>4}  {time.monotonic() - began:5.1f} s  {case.name}: {verdict}", flush=True)


if __name__ == "__main__":
    main()

"""When the watchdog speaks, and what it says: exactly once for a hang, never while any rank gets on."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rema.parallel.pulse import Pulse
from megatron_rema.trainer import watchdog
from megatron_rema.trainer.hang import EXIT_CODE, Others, Statement, open_collectives, report_lines, suspects, waits_in, with_recorder
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.watchdog import Watchdog, interval_s

PATIENCE_S = 60  # for a busy machine; nothing waits so long where it works


# --- decisions --------------------------------------------------------------------------------------------------------


def word(beats: int, idle_s: float, **more) -> dict:
    return {"beats": beats, "idle_s": idle_s, **more}


def test_a_rank_whose_word_does_not_change_has_stood_still_since_it_was_first_read():
    others = Others()
    assert others.idle_s(1, word(7, 0.5), now=100.0) == 0.5
    assert others.idle_s(1, word(7, 0.5), now=160.0) == 60.5  # stopped: nothing new was published
    assert others.idle_s(1, word(8, 0.1), now=170.0) == pytest.approx(0.1)  # it got on


def test_a_live_rank_that_waits_tells_its_own_age_and_the_older_one_counts():
    others = Others()
    others.idle_s(1, word(7, 0.0), now=100.0)
    assert others.idle_s(1, word(7, 65.0), now=160.0) == 65.0  # its first word was 5 s old when it was read
    assert others.idle_s(1, word(7, 65.0), now=170.0) == 75.0


def test_a_rank_that_never_spoke_counts_from_the_first_look_and_one_that_ended_is_not_waited_for():
    others = Others()
    assert [others.idle_s(1, None, now=now) for now in (100.0, 130.0)] == [0.0, 30.0]
    assert others.idle_s(2, word(9, 3.0, has_left=True), now=100.0) == float("inf")


def test_a_report_is_sooner_than_a_tenth_after_the_limit_whatever_the_limit():
    assert interval_s(10.0) == 0.5 and interval_s(1800.0) == 30.0 and interval_s(86400.0) == 30.0


def frame(file: str, line: int, name: str) -> traceback.FrameSummary:
    return traceback.FrameSummary(file, line, name, lookup_line=False)


TORCH = "/env/torch/distributed/distributed_c10d.py"


def test_the_collective_is_the_call_that_this_package_made_last():
    stack = [
        frame("/env/megatron_rema/trainer/loop.py", 10, "step"),
        frame("/env/megatron_rema/parallel/exchange.py", 29, "gather"),
        frame("/env/torch/distributed/c10d_logger.py", 83, "wrapper"),
        frame(TORCH, 4000, "all_gather"),
        frame(TORCH, 5000, "_inner"),
    ]
    assert waits_in(stack) == ("all_gather", "exchange.py:29 gather")
    assert waits_in(stack[:2]) == ("", "exchange.py:29 gather")
    assert waits_in([]) == ("", "")


def test_a_pipeline_stage_that_waits_for_its_neighbour_names_the_message():
    stack = [
        frame("/env/megatron_rema/parallel/pipeline.py", 145, "forward_backward"),
        frame("/env/megatron/core/pipeline_parallel/schedules.py", 900, "forward_backward_pipelining"),
        frame("/env/megatron/core/pipeline_parallel/p2p_communication.py", 500, "recv_forward"),
        frame("/env/megatron/core/pipeline_parallel/p2p_communication.py", 350, "_communicate"),
    ]
    assert waits_in(stack) == ("recv_forward", "pipeline.py:145 forward_backward")


ENDED = {"profiling_name": "nccl:all_reduce", "retired": True, "is_p2p": False, "collective_seq_id": 4, "p2p_seq_id": 0}
OPEN = {"profiling_name": "nccl:recv", "retired": False, "is_p2p": True, "collective_seq_id": 4, "p2p_seq_id": 9}
RECORDER = {"entries": [{**ENDED, "process_group": ["0", "data"]}, {**OPEN, "process_group": ["1", "pipeline"]}]}


def test_the_flight_recorder_names_what_no_python_frame_does():
    assert open_collectives(RECORDER) == ["nccl:recv #9 of pipeline"] and open_collectives(None) == []
    silent_in_python = Statement(0, "update", 3, 60.0)
    assert with_recorder(silent_in_python, RECORDER).collective == "nccl:recv #9 of pipeline"
    assert with_recorder(Statement(0, "update", 3, 60.0, collective="recv"), RECORDER).collective == "recv (nccl:recv #9 of pipeline)"
    assert with_recorder(silent_in_python, None) == silent_in_python


def waiting(rank: int, place: str = "update", collective: str = "all_reduce", **more) -> Statement:
    return Statement(rank, place, 3, 60.0 + rank, host=f"host{rank // 4}", collective=collective, where="pipeline.py:162 run", **more)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ([Statement(5, "generate", 3, 61.0, is_silent=True)], "rank 5 did not answer"),
        ([waiting(5, collective="")], "only rank 5 in no collective"),
        ([waiting(5, place="verify")], "rank 5 not where most are"),
        ([waiting(5)], "all wait alike"),
        ([Statement(5, "report", 3, 0.0, has_left=True)], "all wait alike"),
    ],
)
def test_whoever_differs_is_named_as_the_one_to_look_at(odd, expected):
    assert expected in suspects([*map(waiting, range(5)), *odd, waiting(6), waiting(7)])


def test_ranks_that_wait_alike_share_a_line_and_the_silent_come_first():
    silent = Statement(5, "generate", 3, 61.0, is_silent=True, host="host1")
    lines = report_lines([*map(waiting, range(5)), silent, waiting(7)], 60.0)
    assert lines == [
        "HANG: no rank got on for 60 s (trainer.watchdog_seconds): rank 5 did not answer: stopped, dead, swapped out or cut off; look at "
        f"that process and its host first. Exit code {EXIT_CODE}.",
        "  rank 5 (host1): SILENT, last seen in generate (step 3), no progress for at least 61.0 s",
        "  ranks 0-4, 7 (host0, host1): in update (step 3), waits in all_reduce at pipeline.py:162 run, no progress for 67.0 s",
    ]


def test_phases_lie_in_one_another_and_every_move_is_progress():
    pulse, places = Pulse(), []
    before = pulse.beats
    with pulse.phase("evaluate"):
        with pulse.phase("generate"):
            places.append(pulse.place)
        places.append(pulse.place)
    assert [*places, pulse.place] == ["evaluate / generate", "evaluate", "after evaluate"] and pulse.beats == before + 4


def test_a_phase_inside_another_gives_the_bar_back_to_the_outer_one():
    reporter = Reporter(speaks=False)
    with reporter.run("train", total=2), reporter.phase("evaluate", total=4):
        with reporter.phase("verify"):
            pass
        reporter.advance(3)
        assert [(task.description, task.completed) for task in reporter._bar.tasks] == [("train", 0), ("  evaluate", 3)]


# --- the threads ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_timer_is_left():
    yield
    faulthandler.cancel_dump_traceback_later()


class World:
    """Watchdogs of several ranks in one process, each with a pulse of its own; what they would have ended with."""

    def __init__(self, store: dist.Store, size: int, folder: Path, limit_s: float) -> None:
        self.pulses = [Pulse() for _ in range(size)]
        self.exits: dict[int, int] = {}
        self.dogs = [
            Watchdog(
                store, r, size, limit_s=limit_s, folder=folder, pulse=self.pulses[r], leave=lambda code, r=r: self.exits.update({r: code})
            )
            for r in range(size)
        ]

    def wait_for_exits(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len(self.exits) < count:
            assert time.monotonic() < deadline, f"ended: {self.exits}"
            time.sleep(0.02)
        for dog in self.dogs:
            if any(thread.is_alive() for thread in dog._threads):
                dog.stop()


def test_a_hang_is_reported_once_and_every_rank_that_lives_ends_with_the_exit_code(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.5)
    (tmp_path / "config.yaml").touch()
    world = World(dist.HashStore(), 4, tmp_path, limit_s=1.0)
    world.pulses[2].place = "generate"
    world.dogs[2]._publish()  # and is stopped: its threads never run
    for rank in (0, 1, 3):
        world.dogs[rank].start()
    world.wait_for_exits(3)
    assert world.exits == {0: EXIT_CODE, 1: EXIT_CODE, 3: EXIT_CODE}
    said = capfd.readouterr().err
    assert said.count("HANG: ") == 1 and "SILENT, last seen in generate" in said and "rank 2 did not answer" in said
    written = json.loads((tmp_path / "hang.json").read_text())
    assert [row["is_silent"] for row in written["ranks"]] == [False, False, True, False]
    assert any("wait_for_exits" in line for line in written["ranks"][0]["stack"]), "the stack of the main thread"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "hang.json"]


def test_a_rank_may_wait_for_one_that_gets_on_for_as_long_as_that_takes(tmp_path, capfd):
    world = World(dist.HashStore(), 3, tmp_path, limit_s=1.0)
    for dog in world.dogs:
        dog.start()
    end = time.monotonic() + 4
    while time.monotonic() < end:
        world.pulses[1].beat()
        time.sleep(0.02)
    assert world.exits == {} and "HANG" not in capfd.readouterr().err
    world.wait_for_exits(3)  # now rank 1 has stopped getting on too
    assert set(world.exits.values()) == {EXIT_CODE}


def test_a_rank_whose_work_is_done_keeps_nobody_from_being_named(tmp_path, capfd):
    world = World(dist.HashStore(), 2, tmp_path, limit_s=1.0)
    for dog in world.dogs:
        dog.start()
    world.dogs[0].stop()
    world.wait_for_exits(1)
    said = capfd.readouterr().err
    assert world.exits == {1: EXIT_CODE} and "rank 0: had ended" in said.replace(f" ({os.uname().nodename})", "")
    assert list(tmp_path.iterdir()) == [], "a report alone in a run folder would look like another run's to a restart"


def test_time_in_which_the_whole_process_was_stopped_does_not_count(tmp_path):
    dog = Watchdog(dist.HashStore(), 0, 1, limit_s=100.0, folder=tmp_path, pulse=Pulse())
    now = time.monotonic()
    dog._awake_at, dog._pulse.beat_at, dog._ticked_at = now - 95, now - 90, now - 1  # waiting, and awake
    assert dog._idle() >= 90
    dog._ticked_at = now - 80  # its threads have not run either
    assert dog._idle() < 50 and dog._awake_at >= now


def _serve_store(pipe) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    threading.Event().wait()


def test_where_the_store_does_not_answer_each_rank_reports_alone(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(watchdog, "ANSWER_S", 0.5)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve_store, args=(theirs,), daemon=True)
    server.start()
    try:
        world = World(dist.TCPStore("127.0.0.1", ours.recv(), is_master=False), 2, tmp_path, limit_s=1.0)
        (tmp_path / "config.yaml").touch()
        os.kill(server.pid, signal.SIGSTOP)
        for dog in world.dogs:
            dog.start()
        deadline = time.monotonic() + PATIENCE_S
        while len(world.exits) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert world.exits == {0: EXIT_CODE, 1: EXIT_CODE}
        assert capfd.readouterr().err.count("the launcher's store has not answered for") == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "hang_rank_0.json", "hang_rank_1.json"]
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.kill()


def test_zero_turns_it_off_and_leaves_no_thread(tmp_path):
    before = threading.active_count()
    with watchdog.watching(dist.HashStore(), 0, 1, limit_s=0.0, folder=tmp_path):
        assert threading.active_count() == before

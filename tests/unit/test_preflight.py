"""The checks before the first collective: each finds its fault and names rank, host and remedy."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_rema.config import ConfigError, PreflightConfig
from megatron_rema.parallel import reach
from megatron_rema.trainer import preflight
from megatron_rema.trainer.preflight import (
    Facts,
    Findings,
    check_clock,
    check_devices,
    check_folder,
    check_memory,
    check_network,
    check_versions,
)

FACTS = Facts(
    host="a",
    local_rank=0,
    versions={"python": "3.11.9", "torch": "2.13.0"},
    gpus=0,
    gpu="",
    address="127.0.0.1",
    port=1,
    token="t",
    fault="",
    free_memory_gib=8.0,
    probe="",
    free_disk_gib=100.0,
)
FINDINGS = Findings(unreached={}, slowest_s=0.001, clock_offset_s=0.0, clock_error_s=0.0005, sees_probe=True, probe_fault="")


def config(run_dir, **limits) -> SimpleNamespace:
    limits = {"wait_s": 20.0, "connect_s": 5.0, **limits}
    return SimpleNamespace(run_dir=str(run_dir), kernels="auto", trainer=SimpleNamespace(preflight=PreflightConfig(**limits)))


def check_in_threads(world: int, store: dist.Store, settings, lines: list[str] | None = None) -> list[str]:
    """What ``check`` raises on each rank, or nothing. Ranks are threads: the checks use no process group."""

    def one(rank: int) -> str:
        try:
            preflight.check(store, rank, world, settings, (lines if lines is not None else []).append)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(one, range(world)))


def test_ranks_that_can_train_together_are_told_so_in_one_line_a_check_and_leave_nothing_behind(tmp_path):
    lines: list[str] = []
    assert check_in_threads(4, dist.HashStore(), config(tmp_path / "runs" / "new"), lines) == [""] * 4
    assert [line.split(":")[0] for line in lines] == [
        f"preflight {name}" for name in ("versions", "devices", "network", "run folder", "memory", "clock")
    ]
    assert "torch 2." in lines[0] and "source " in lines[0] and "12 connections between 4 ranks" in lines[2]
    assert list(tmp_path.iterdir()) == []  # run_dir is not made here, and the file that all looked for is gone


def test_a_rank_that_never_reports_is_named_on_every_other_rank(tmp_path):
    settings = config(tmp_path, wait_s=0.5)
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        starts = [threads.submit(preflight.check, store, rank, 4, settings, print) for rank in (0, 2)]  # of 4: 1 and 3 are missing
        for start in starts:
            with pytest.raises(ValueError, match=r"ranks 1, 3 did not report within 0.5 s \(trainer.preflight.wait_s\)"):
                start.result()


def test_without_rank_0_the_others_say_so():
    mailbox = reach.Mailbox(dist.HashStore(), 1, 2, wait_s=0.1)
    with pytest.raises(ValueError, match="rank 0 did not answer"):
        mailbox.exchange("facts", {})


def test_a_pair_that_cannot_talk_is_named_with_both_hosts(tmp_path, monkeypatch):
    greet, silent = reach.greet, socket.create_server(("127.0.0.1", 0))  # accepts nobody and answers nothing
    whose: dict[str, int] = {}
    facts_of = preflight.facts_of

    def hosts(config, rank, **own):
        whose[own["token"]] = rank
        return replace(facts_of(config, rank, **own), host=f"node{rank}")

    def cut(address, port, token, timeout_s):
        """The way from anybody to rank 2 ends in a host that takes packets and does not answer."""
        return greet(address, silent.getsockname()[1] if whose[token] == 2 else port, token, timeout_s)

    monkeypatch.setattr(preflight, "facts_of", hosts)
    monkeypatch.setattr(preflight, "greet", cut)
    lines: list[str] = []
    messages = check_in_threads(3, dist.HashStore(), config(tmp_path, connect_s=0.3), lines)
    silent.close()
    assert len(set(messages)) == 1, "every rank ends with the same words"
    for words in ("rank 0 (node0) cannot reach rank 2 (node2) at ", "rank 1 (node1) cannot reach rank 2 (node2)", "no answer within 0.3 s"):
        assert words in messages[0]
    assert "rank 2 (node2) cannot reach" not in messages[0] and "cannot reach rank 1" not in messages[0], "only the pairs that fail"
    assert "GLOO_SOCKET_IFNAME" in messages[0] and "preflight network: FAILED" in lines


def test_an_answer_from_somebody_else_is_no_answer():
    with reach.listener() as (address, port, token, fault):
        assert fault == "" and isinstance(reach.greet(address, port, token, 5.0), tuple)
        assert reach.greet(address, port, "f" * 32, 5.0) == "another process answered there"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()[1]
    assert "refused" in reach.greet("127.0.0.1", nobody, token, 5.0)


def test_offsets_of_a_clock_are_measured_on_the_connection(monkeypatch):
    with reach.listener() as (address, port, token, _):
        true = time.time
        answers = threading.local()

        def shifted() -> float:  # the answering thread's clock is 100 s ahead
            return true() + (0 if getattr(answers, "asks", False) else 100)

        answers.asks = True
        monkeypatch.setattr(reach.time, "time", shifted)
        offset, error, _ = reach.greet(address, port, token, 5.0)
    assert abs(offset - 100) <= error + 1e-3


def test_an_interface_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with reach.listener() as (_, _, _, fault):
        assert "GLOO_SOCKET_IFNAME is eth77" in fault and "lo" in fault
    _, wrong = check_network([FACTS, replace(FACTS, host="b", fault=fault)], [FINDINGS, FINDINGS])
    assert wrong[0].startswith("rank 1 (b): GLOO_SOCKET_IFNAME is eth77")


def test_the_interface_asked_for_is_the_one_that_listens(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert reach.gloo_address() == "127.0.0.1"


def test_another_version_on_one_rank_is_named_with_both():
    facts = [FACTS, FACTS, replace(FACTS, host="b", versions={"python": "3.11.9", "torch": "2.12.0"})]
    _, (wrong,) = check_versions(facts)
    assert "torch is 2.12.0 on rank 2 (b) and 2.13.0 on rank 0 (a)" in wrong
    _, (missing,) = check_versions([FACTS, FACTS, replace(FACTS, versions={"python": "3.11.9"})])
    assert "torch is not installed on rank 2" in missing
    assert check_versions([FACTS, FACTS]) == ("python 3.11.9, torch 2.13.0", [])


def test_a_changed_source_file_changes_the_hash(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = preflight.source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no source")
    assert preflight.source_hash(tmp_path) == before
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = preflight.source_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({before, renamed, preflight.source_hash(tmp_path)}) == 3


def test_every_rank_needs_a_gpu_of_its_own_or_nobody_has_one():
    with_gpu = replace(FACTS, gpus=1, gpu="H100")
    assert check_devices([FACTS, FACTS]) == ("no GPU on any of 2 ranks: CPU and gloo", [])
    assert check_devices([with_gpu, with_gpu]) == ("2 x H100", [])
    _, (wrong,) = check_devices([with_gpu, replace(with_gpu, local_rank=1, host="b")])  # two ranks on a node with one GPU
    assert "rank 1 (b) is local rank 1 and sees 1 GPU(s)" in wrong and "NPROC" in wrong
    _, (wrong,) = check_devices([with_gpu, replace(FACTS, host="b")])  # a node without a driver
    assert "rank 1 (b) is local rank 0 and sees 0 GPU(s), rank 0 (a) sees 1" in wrong


def test_a_run_folder_that_one_node_does_not_share_is_refused(tmp_path):
    blind = replace(FINDINGS, sees_probe=False)
    _, (wrong,) = check_folder([FACTS, replace(FACTS, host="b")], [FINDINGS, blind], "runs/x", min_free_gib=1)
    assert "what rank 0 (a) writes there is not seen by rank 1 (b)" in wrong and "share" in wrong
    denied = replace(FINDINGS, sees_probe=False, probe_fault="Permission denied (runs/.preflight_t)")
    _, (wrong,) = check_folder([FACTS, FACTS], [denied, blind], "runs/x", min_free_gib=1)
    assert "cannot be written by rank 0: Permission denied" in wrong
    _, (wrong,) = check_folder([replace(FACTS, free_disk_gib=0.4)], [FINDINGS], "runs/x", min_free_gib=1)
    assert "0.40 GiB are free" in wrong and "min_free_disk_gib asks for 1" in wrong


def test_a_folder_seen_by_one_rank_only_is_found_by_looking(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "LOOK_S", 0.3)
    facts_of = preflight.facts_of

    def elsewhere(config, rank, **own):  # rank 0's path as another node sees it
        found = facts_of(config, rank, **own)
        return replace(found, probe=found.probe and str(tmp_path / "own" / ".preflight_x"))

    (tmp_path / "own").mkdir()
    exists = preflight.Path.exists
    seen_by: list[int] = []

    def exists_once(path):  # the first rank to look sees it, as if its node alone had that disk
        seen_by.append(threading.get_ident())
        return exists(path) and threading.get_ident() == seen_by[0]

    monkeypatch.setattr(preflight, "facts_of", elsewhere)
    monkeypatch.setattr(preflight.Path, "exists", exists_once)
    messages = check_in_threads(2, dist.HashStore(), config(tmp_path / "run"))
    assert len(set(messages)) == 1 and "is not seen by rank" in messages[0]


def test_memory_is_counted_per_host():
    # two ranks of host b share 0.9 GiB: less than 2 x 0.5
    facts = [FACTS, replace(FACTS, host="b", free_memory_gib=0.95), replace(FACTS, host="b", free_memory_gib=0.9)]
    _, (wrong,) = check_memory(facts, min_free_gib=0.5)
    assert "host b has 0.90 GiB free for ranks 1, 2" in wrong
    line, wrong = check_memory(facts, min_free_gib=0.4)
    assert wrong == [] and "0.9 GiB free for 2 rank(s) on b" in line


def test_the_limit_of_a_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert preflight.free_memory_bytes(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert preflight.free_memory_bytes(tmp_path) > 2_000_000


def test_a_clock_is_wrong_only_beyond_what_the_measurement_can_tell():
    slow = replace(FINDINGS, clock_offset_s=6.0, clock_error_s=4.0)  # at least 2 s off: within 5
    assert check_clock([FINDINGS, slow], max_skew_s=5)[1] == []
    _, (wrong,) = check_clock([FINDINGS, replace(FINDINGS, clock_offset_s=6.0)], max_skew_s=5)
    assert "the clock of rank 1 is 6.0 s behind that of rank 0" in wrong and "NTP" in wrong
    _, (wrong,) = check_clock([FINDINGS, replace(FINDINGS, clock_offset_s=-7.0)], max_skew_s=5)
    assert "7.0 s ahead of" in wrong


def test_several_faults_are_told_at_once(tmp_path):
    messages = check_in_threads(2, dist.HashStore(), config(tmp_path, min_free_memory_gib=1e6, min_free_disk_gib=1e9))
    assert "memory: host" in messages[0] and "run folder: " in messages[0] and messages[0] == messages[1]
    assert "trainer.preflight.enabled=false" in messages[0]
    with pytest.raises(ConfigError):
        preflight.check(dist.HashStore(), 0, 1, config(tmp_path, min_free_disk_gib=1e9), print)


def collective() -> list[str]:
    lines: list[str] = []
    store = dist.distributed_c10d._get_default_store()
    preflight.check_collective(store, config("."), lines.append)
    return lines


def test_the_last_check_is_one_all_reduce(run_ranks):
    first, second = run_ranks(2, collective)
    assert len(first) == 1 and first[0].startswith("preflight collective: all-reduce of 2 ranks over gloo") and second == []


def one_rank_stays_away(seconds: float) -> str:
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        time.sleep(seconds)
        dist.all_reduce(torch.ones(1))
        return ""
    with pytest.raises(RuntimeError) as late:
        preflight.check_collective(store, config(".", wait_s=0.3), print)
    time.sleep(seconds)
    return str(late.value)


def test_a_rank_that_never_enters_the_all_reduce_is_named(run_ranks):
    message, _ = run_ranks(2, one_rank_stays_away, 1.0)
    assert "did not end within 0.3 s" in message and "never began it: [1]; that wait in it: [0]" in message


# --- workers that are started again find the store as the dead left it ------------------------------------------------


def meet_in_threads(store: dist.Store, world: int, ranks: list[int], *, wait_s: float = 20.0, late: int | None = None) -> list:
    """The part of the store that each of ``ranks`` was given, or its error. ``late`` comes half a second after the others."""

    def one(rank: int):
        time.sleep(0.5 if rank == late else 0)
        try:
            return reach.meet(store, rank, world, wait_s=wait_s)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(one, ranks))


@pytest.mark.parametrize("late", [0, 2])  # rank 0 names the round: before it comes, the others find the name of the last one
def test_every_start_meets_in_a_part_of_the_store_of_its_own(late):
    store = dist.HashStore()
    before = meet_in_threads(store, 3, [0, 1, 2])
    before[1].set("address", "of the dead")
    after = meet_in_threads(store, 3, [0, 1, 2], late=late)
    assert not any(part.check(["address"]) for part in after)
    after[2].set("word", "new")
    assert [part.get("word") for part in after] == [b"new"] * 3 and not before[0].check(["word"])
    fewer = meet_in_threads(store, 2, [0, 1])  # a node has left
    assert not fewer[1].check(["word"])


def test_who_does_not_come_is_named_and_a_start_before_does_not_count():
    store = dist.HashStore()
    meet_in_threads(store, 3, [0, 1, 2])
    first, second = meet_in_threads(store, 3, [0, 1], wait_s=0.5)
    assert first == second and first.startswith("ranks 2 did not report within 0.5 s")
    (alone,) = meet_in_threads(store, 3, [1], wait_s=0.2)
    assert alone.startswith("rank 0 did not answer within 0.4 s")

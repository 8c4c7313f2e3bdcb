"""What ends a run and is nobody's bug: a full disk, memory that ran out, gradients that stay non-finite. One message, by one rank.

Exit code 1: the command was right, and continues with resume=true once the cause is gone.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator, Mapping

EXIT_CODE = 1

_DISK = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or raise the quota",
    errno.EROFS: "make that file system writable again",
    errno.EACCES: "correct the rights of that folder",
    errno.EPERM: "correct the rights of that folder",
    errno.EIO: "look at that disk and at the kernel's log",
}
# libraries that write files themselves and say so in words
_DISK_WORDS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "PytorchStreamWriter failed writing": errno.ENOSPC,  # it keeps no reason: a full disk is the usual one
}
_MEMORY = {  # phase -> what makes it smaller
    "generate": "lower engine.max_num_seqs, engine.kv_cache_mib or rollout.max_context_tokens, or raise engine.tensor",
    "sync": "lower engine.kv_cache_mib, or raise engine.tensor or parallel.actor.tensor",
}
_MEMORY_OF_MODELS = (
    "lower trainer.microbatch_tokens, set trainer.logits_chunk_tokens, parallel.ROLE.recompute or parallel.ROLE.offload, or raise "
    "parallel.ROLE.tensor or pipeline"
)


class RunFault(RuntimeError):
    """Ends the run with its message. Raised by every rank together, or by the one that noticed."""


class TooManySkips(RunFault):
    """Raised by every rank together: a checkpoint that is still being written can be finished."""


def tell_rank(error: BaseException, rank: int, *, is_first: bool) -> None:
    """Note in ``error`` on which rank it came, and whether another rank had one before: most that come later only follow from it."""
    error.add_note(f"rank {rank}")
    if not is_first:
        error.add_note("after another rank's error")


def is_of_a_group(error: BaseException) -> bool:
    """Whether the ranks were a process group already."""
    return any(re.match(r"rank \d", note) for note in _notes(error))


def is_consequence(error: BaseException) -> bool:
    return "after another rank's error" in _notes(error)


def explained(error: BaseException, run_dir: str) -> str | None:
    """The message of an error that is not a bug; None for any other."""
    text = str(error) if isinstance(error, RunFault) else _of_memory(error) or _of_disk(error, run_dir)
    if text is None:
        return None
    where = [note for note in reversed(_notes(error)) if re.match(r"rank \d|in phase ", note)]
    return f"{', '.join(where)}: {text}" if where else text


def _of_memory(error: BaseException) -> str | None:
    torch = sys.modules.get("torch")  # a command that ends before it needs torch does not load it for this
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    if not isinstance(error, kinds) and "can't allocate memory" not in str(error):
        return None
    phase = next((note.removeprefix("in phase ") for note in _notes(error) if note.startswith("in phase ")), "")
    said = " ".join(str(error).split())[:300]
    return (
        f"out of memory{f' ({said})' if said else ''}: {_MEMORY.get(phase, _MEMORY_OF_MODELS)}; or give the run more memory or fewer ranks "
        "a host. Then continue from the latest checkpoint with resume=true."
    )


def _of_disk(error: BaseException, run_dir: str) -> str | None:
    cause, number = _disk_cause(error)
    if cause is None:
        return None
    said = " ".join(str(cause).split())[:400]
    return f"{said} (run_dir is {run_dir}): {_DISK[number]}, then continue from the latest checkpoint with resume=true."


def _disk_cause(error: BaseException) -> tuple[BaseException, int] | tuple[None, None]:
    """What the system said, under all that was made of it on the way, and its number."""
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None:
            number = next((number for words, number in _DISK_WORDS.items() if words in str(cause)), None)
        if number in _DISK:
            return cause, number
    return None, None


def reason(error: BaseException) -> str:
    """Of an error that will be told elsewhere, what tells most."""
    return repr(_disk_cause(error)[0] or error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


class SkippedUpdates:
    """Counts each model's updates in a row that were skipped because their gradients were not finite."""

    def __init__(self, limit: int) -> None:
        """``limit``: so many in a row end the run; 0: none do."""
        self._limit = limit
        self._in_a_row: dict[str, int] = {}

    def count(self, metrics: Mapping[str, float], *, step: int, owner: str = "") -> None:
        """After one update of whatever ``metrics`` tell of (``train/skipped_updates``, ``critic/skipped_updates``), equal on every rank.

        Raises TooManySkips at the limit, on every rank.
        """
        for name, skipped in metrics.items():
            if not name.endswith("skipped_updates"):
                continue
            what = f"the critic of {owner}" if name.startswith("critic") else owner or name.split("/")[-2].replace("train", "the model")
            self._in_a_row[what] = self._in_a_row.get(what, 0) + 1 if skipped else 0
            if 0 < self._limit <= self._in_a_row[what]:
                raise TooManySkips(
                    f"the gradients of {what} were not finite in {self._limit} updates in a row, the last one in step {step} "
                    f"(trainer.max_skipped_updates is {self._limit}); none of them changed anything. alerts.jsonl names the numbers. Lower "
                    "optimizer.lr or algorithm.log_ratio_cap, or correct the data, then continue with resume=true, or from an earlier "
                    "checkpoint with resume_from=PATH."
                )

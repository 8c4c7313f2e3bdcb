"""What ends a run and is nobody's bug: which errors are explained, where they came, and when skipped updates end a run."""

from __future__ import annotations

import errno
import time

import pytest
import torch
import torch.distributed as dist

from megatron_rema.parallel.reach import is_first
from megatron_rema.trainer.faults import RunFault, SkippedUpdates, explained, is_consequence, is_of_a_group, reason, tell_rank
from megatron_rema.trainer.progress import Reporter


def raised(error: Exception, phase: str | None = None) -> Exception:
    """``error`` as it leaves a phase."""
    try:
        if phase is None:
            raise error
        with Reporter(speaks=False).phase(phase):
            raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free space"), (errno.EROFS, "writable"), (errno.EACCES, "rights"), (errno.EIO, "disk")]
)
def test_a_file_that_cannot_be_written_is_explained_by_its_name_and_the_remedy(number, remedy):
    error = raised(OSError(number, "said by the system", "/runs/one/metrics.jsonl"))
    tell_rank(error, 0, is_first=True)
    message = explained(error, "/runs/one")
    assert message.startswith("rank 0: ") and "/runs/one/metrics.jsonl" in message and remedy in message and "resume=true" in message


def test_a_library_that_wraps_the_error_of_the_disk_is_explained_too():
    wrapped = RuntimeError("while writing")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/runs/one/x")
    assert "/runs/one/x" in explained(wrapped, "/runs/one") and "free space" in explained(wrapped, "/runs/one")
    assert reason(wrapped) == repr(wrapped.__cause__) and reason(KeyError("x")) == "KeyError('x')"
    nameless = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "run_dir is /runs/one" in explained(nameless, "/runs/one") and "free space" in explained(nameless, "/runs/one")


def out_of_torch_memory() -> Exception:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60, dtype=torch.uint8)
    return failed.value


@pytest.mark.parametrize("make", [MemoryError, lambda: torch.OutOfMemoryError("CUDA out of memory."), out_of_torch_memory])
@pytest.mark.parametrize(
    ("phase", "remedy"), [("generate", "engine.max_num_seqs"), ("update", "trainer.microbatch_tokens"), (None, "microbatch_tokens")]
)
def test_memory_that_ran_out_names_rank_phase_and_what_makes_that_phase_smaller(make, phase, remedy):
    error = raised(make(), phase)
    tell_rank(error, 3, is_first=True)
    message = explained(error, "/runs/one")
    assert message.startswith(f"rank 3, in phase {phase}: out of memory" if phase else "rank 3: out of memory") and remedy in message


def test_a_bug_is_not_explained_away():
    for error in (RuntimeError("shape mismatch"), KeyError("x"), FileNotFoundError(errno.ENOENT, "no such file", "x"), AssertionError()):
        assert explained(raised(error, "update"), "/runs/one") is None


def test_an_error_that_follows_from_another_rank_s_is_known_as_such():
    first, second = RuntimeError("one"), RuntimeError("two")
    assert not is_of_a_group(first) and not is_consequence(first)
    tell_rank(first, 1, is_first=True)
    tell_rank(second, 0, is_first=False)
    assert is_of_a_group(first) and is_of_a_group(second) and is_consequence(second) and not is_consequence(first)


def test_one_rank_is_first_and_a_store_that_is_gone_or_silent_keeps_nobody():
    store = dist.HashStore()
    assert [is_first(store, "error", wait_s=5) for _ in range(3)] == [True, False, False]

    class Gone:
        def add(self, name: str, amount: int) -> int:
            raise dist.DistNetworkError("connection reset by peer")

    class Silent:
        def add(self, name: str, amount: int) -> int:
            time.sleep(20)
            return 2

    assert is_first(Gone(), "error", wait_s=5) and is_first(Silent(), "error", wait_s=0.1)


def test_so_many_skipped_updates_in_a_row_end_the_run_each_model_counted_alone():
    skipped = SkippedUpdates(3)
    bad, good = {"train/skipped_updates": 1.0, "critic/skipped_updates": 0.0}, {"train/skipped_updates": 0.0}
    for metrics in (bad, bad, good, bad, bad):
        skipped.count(metrics, step=1, owner="policy shared")
    skipped.count(bad, step=1, owner="policy other")
    with pytest.raises(
        RunFault, match=r"gradients of policy shared were not finite in 3 updates in a row, .* step 7 .*max_skipped_updates is 3"
    ):
        skipped.count(bad, step=7, owner="policy shared")
    critic = SkippedUpdates(1)
    with pytest.raises(RunFault, match="gradients of the critic of policy shared"):
        critic.count({"critic/skipped_updates": 1.0}, step=1, owner="policy shared")
    for name, called in (("train/reasoner/skipped_updates", "reasoner"), ("train/skipped_updates", "the model")):
        with pytest.raises(RunFault, match=f"gradients of {called} were"):
            SkippedUpdates(1).count({name: 1.0}, step=1)


def test_a_limit_of_zero_never_ends_a_run():
    skipped = SkippedUpdates(0)
    for step in range(100):
        skipped.count({"train/skipped_updates": 1.0}, step=step)

"""Finds the compiled libraries, chooses between them and plain torch, and calls them. Importing this loads no library.

Which arithmetic a process uses is chosen once, before its first step (``select``); until then it is plain torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_rema.config import ConfigError
from megatron_rema.kernels.build import LIBRARIES, SOURCES, file_name, sources_hash

Mode = Literal["auto", "fused", "reference"]

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
# The arguments of csrc/abi.h; every computing function takes threads and stream last.
_RUN = [_I, _P]
_SIGNATURES = {
    "rema_logits_partial": [_P, _P, _I, _L, _L, _L, _L, _P, _L, _D, _P, *_RUN],
    "rema_logits_finish": [_P, _I, _L, _L, _P, _L, _D, _P, _P, _P, _P, *_RUN],
    "rema_logits_grad": [_P, _P, _P, _I, _L, _L, _L, _L, _L, _L, _P, _L, _D, _P, _P, _P, _P, _P, _P, *_RUN],
    "rema_gae": [_P, _P, _P, _P, _I, _D, _P, _P, _P, _L, _D, _D, _D, _D, _P, _P, _P, *_RUN],
    "rema_moments": [_P, _P, _P, _L, _P, _P, *_RUN],
    "rema_whiten": [_P, _P, _L, _P, _L, _D, _P, *_RUN],
    "rema_groups": [_P, _P, _L, _I, _D, _P, _P, *_RUN],
    "rema_policy_loss": [*[_P] * 8, _L, _L, _I, _D, _D, _D, _D, _I, _D, _D, *[_P] * 6, *_RUN],
}
# counts -> bytes
_SIZES = {
    "rema_gae_scratch": [_L],
    "rema_moments_scratch": [_L],
    "rema_groups_scratch": [_L],
    "rema_policy_loss_scratch": [_L, _L],
}
_REMEDY = "build them with `python -m megatron_rema.kernels.build`"


class Unavailable(Exception):
    """Why a library cannot be used, and what to do."""


class Library:
    """One loaded library. Raises Unavailable where the file is missing, unloadable, or made from other sources than those beside it."""

    def __init__(self, path: Path, *, check_sources: bool = True) -> None:
        self.path = path
        if not path.exists():
            raise Unavailable(f"{path.name} has not been built: {_REMEDY}")
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unavailable(f"{path.name} cannot be loaded ({error}): {_REMEDY}") from error
        for name, arguments in _SIGNATURES.items():
            getattr(self._functions, name).argtypes = arguments
        for name, counts in _SIZES.items():
            getattr(self._functions, name).argtypes, getattr(self._functions, name).restype = counts, _L
        self._functions.rema_build.restype = self._functions.rema_error.restype = ctypes.c_char_p
        self.build = dict(pair.split("=", 1) for pair in self._functions.rema_build().decode().split(";"))
        if check_sources and SOURCES.is_dir() and self.build["sources"] != sources_hash():
            raise Unavailable(f"{path.name} is older than its sources: {_REMEDY}")

    def scratch(self, name: str, device: torch.device, *counts: int) -> Tensor:
        """Working memory of ``rema_<name>`` for that many tokens, traces or units."""
        return torch.empty(getattr(self._functions, f"rema_{name}_scratch")(*counts), dtype=torch.uint8, device=device)

    def call(self, name: str, device: torch.device, *arguments: Tensor | float | None) -> None:
        """Tensors are passed as pointers, None as a null pointer. On CUDA: queued on the current stream of ``device``."""
        values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        if device.type == "cuda":
            with torch.cuda.device(device):
                code = getattr(self._functions, name)(*values, 1, torch.cuda.current_stream(device).cuda_stream)
        else:
            code = getattr(self._functions, name)(*values, torch.get_num_threads(), None)
        if code:
            raise RuntimeError(f"{name} failed with code {code}: {self._functions.rema_error(code).decode()}")


_mode: Mode = "reference"
_found: dict[str, Library | Unavailable] = {}


def find(kind: str) -> Library | Unavailable:
    """The library for ``cpu`` or ``cuda`` tensors, or why there is none. Looked for once in a process."""
    if kind not in _found:
        try:
            _found[kind] = Library(LIBRARIES / file_name(kind))
        except Unavailable as reason:
            _found[kind] = reason
    return _found[kind]


def get(device: torch.device) -> Library:
    """The library for tensors on ``device``. Raises RuntimeError where there is none."""
    found = find(device.type) if device.type in ("cpu", "cuda") else Unavailable(f"there are no kernels for {device.type}")
    if isinstance(found, Unavailable):
        raise RuntimeError(f"no fused kernels for tensors on {device}: {found}, or set kernels=reference.")
    return found


def mode() -> Mode:
    return _mode


def is_fused(tensor: Tensor) -> bool:
    """Whether the chosen mode computes on ``tensor`` with a compiled library. ``fused`` raises where it cannot."""
    if _mode == "reference":
        return False
    if _mode == "auto" and (tensor.device.type not in ("cpu", "cuda") or isinstance(find(tensor.device.type), Unavailable)):
        return False
    get(tensor.device)
    return True


def select(mode: Mode, device: torch.device) -> str:
    """Chooses for this process; ``device`` is where its models compute (what stays on the host is computed there). Returns what to log.

    Raises ConfigError for ``fused`` where a library is missing.
    """
    global _mode
    parts = []
    for kind in dict.fromkeys((device.type, "cpu")):
        found = find(kind)
        if mode == "fused" and isinstance(found, Unavailable):
            raise ConfigError(f"kernels is fused, and {found}, or set kernels=auto.")
        parts.append(f"{kind} plain torch ({found})" if isinstance(found, Unavailable) else f"{kind} fused ({found.build['target']})")
    _mode = mode
    return "kernels: plain torch (kernels=reference)" if mode == "reference" else f"kernels: {', '.join(parts)}"


@contextmanager
def using(mode: Mode, **libraries: Library) -> Iterator[None]:
    """Another mode, and other libraries (``cpu=...``, ``cuda=...``), for a while."""
    global _mode
    before, found = _mode, dict(_found)
    _mode = mode
    _found.update(libraries)
    try:
        yield
    finally:
        _mode = before
        _found.clear()
        _found.update(found)


def availability() -> dict[str, str]:
    """kind -> what is there, or why it is not."""
    return {kind: str(found) if isinstance(found := find(kind), Unavailable) else found.build["target"] for kind in ("cpu", "cuda")}

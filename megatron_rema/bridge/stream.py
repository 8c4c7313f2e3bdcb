"""Safetensors files one tensor at a time: read without mapping the file into memory, written without holding it.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, begin and end in the data), the data.
``safetensors`` itself maps whole files: what was read stays in resident memory until the file is closed. Converting a model must not
depend on its size, hence these two classes. Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron_rema.reading import brief

Shape = tuple[int, ...]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: Shape
    begin: int  # bytes from the start of the file
    num_bytes: int


class TensorFile:
    """The tensors of one file by name. Opening it reads the header and checks it against the size of the file.

    Raises ValueError naming the file, and the tensor where there is one, when they do not agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= path.stat().st_size else None
        except FileNotFoundError:
            raise ValueError(f"{path} is missing; the folder is incomplete: copy or convert it again.") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; correct its rights, or copy or convert it again.") from None
        except (ValueError, RecursionError):  # JSON or UTF-8
            header = None
        if not isinstance(header, dict):
            raise ValueError(f"{path} cannot be read: its header is damaged; copy or convert it again.")
        header.pop("__metadata__", None)
        self.tensors: dict[str, Stored] = {}
        end = data = 8 + length
        for name, row in header.items():
            if not _is_tensor(row):
                raise ValueError(f"{path}: tensor {name} is {brief(row)}, which is no dtype, shape and data_offsets: the file is damaged.")
            begin, stop = row["data_offsets"]
            if row["dtype"] not in _DTYPES:
                raise ValueError(f"{path}: tensor {name} has dtype {row['dtype']}; supported are {', '.join(_DTYPES)}: convert it first.")
            stored = Stored(_DTYPES[row["dtype"]], tuple(row["shape"]), data + begin, stop - begin)
            if stored.num_bytes != math.prod(stored.shape) * stored.dtype.itemsize:
                raise ValueError(
                    f"{path}: tensor {name} holds {stored.num_bytes} bytes; {row['dtype']} {stored.shape} takes "
                    f"{math.prod(stored.shape) * stored.dtype.itemsize}: the file is damaged, copy or convert it again."
                )
            self.tensors[name] = stored
            end = max(end, data + stop)
        if path.stat().st_size != end:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {end}: it was cut, copy or convert it again.")

    def read(self, name: str) -> Tensor:
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill ``target`` (contiguous, of the tensor's shape and dtype) from the file, with no buffer between."""
        stored = self.tensors[name]
        assert (target.dtype, tuple(target.shape)) == (stored.dtype, stored.shape) and target.is_contiguous(), name
        view = memoryview(_bytes_of(target))
        with self.path.open("rb", buffering=0) as file:
            file.seek(stored.begin)
            while view.nbytes:  # the system reads at most 2 GiB at once
                count = file.readinto(view)
                if not count:
                    raise ValueError(f"{self.path} ends inside tensor {name}: it was cut, copy or convert it again.")
                view = view[count:]


class TensorWriter:
    """Writes the tensors announced at the start, in any order, each to its place. As a context: complete on leaving, or an error."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
        rows: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            rows[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header = json.dumps(rows).encode()
        header += b" " * (-len(header) % 8)
        self._data = 8 + len(header)
        self._rows = rows
        self._missing = set(tensors)
        self._file = path.open("xb")
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        row = self._rows[name]
        assert [_CODES[tensor.dtype], list(tensor.shape)] == [row["dtype"], row["shape"]], f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
        self._file.seek(self._data + row["data_offsets"][0])
        self._file.write(_bytes_of(tensor.contiguous()))
        self._missing.remove(name)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
        assert kind is not None or not self._missing, f"never written: {sorted(self._missing)}"


def _is_tensor(row: object) -> bool:
    """A header's row has the form that the format asks for."""
    if not isinstance(row, dict) or not isinstance(row.get("dtype"), str):
        return False
    numbers = (row.get("shape"), row.get("data_offsets"))
    return all(isinstance(part, list) and all(type(n) is int and 0 <= n < 2**63 for n in part) for part in numbers) and len(numbers[1]) == 2


def _bytes_of(tensor: Tensor):
    """The tensor's memory as a flat array of bytes."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()

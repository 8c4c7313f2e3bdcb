"""What stands in files from outside, read so that damage is a ValueError which names file or row, whatever the bytes are.

JSON and text have more ways to be bad than being unparsable: thousands of brackets inside each other, bytes that are no UTF-8, half a
character (a lone surrogate) that no tokenizer, file or page can take.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse(text: str | bytes, where: str, remedy: str) -> Any:
    """The JSON value that ``text`` is. ``where`` names it in the error, ``remedy`` ends the message."""
    try:
        return json.loads(text)
    except ValueError as error:  # no JSON, no UTF-8, or an integer of thousands of digits
        raise ValueError(f"{where}: not JSON ({error}). {remedy}") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read (brackets inside brackets, hundreds deep). {remedy}") from None


def json_object(file: Path, remedy: str = "It must hold one JSON object: restore or download the file again.") -> dict[str, Any]:
    """The JSON object that ``file`` holds."""
    value = parse(read_bytes(file), str(file), remedy)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: is {brief(value)}. {remedy}")
    return value


def read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}. Correct the path or its rights.") from None


def is_file(path: Path) -> bool:
    """False too where no file can have such a name: one of a thousand characters, say."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_dir(path: Path) -> bool:
    """As `is_file`, of a folder."""
    try:
        return path.is_dir()
    except OSError:
        return False


def whole_text(text: str, where: str, name: str) -> str:
    """``text``, if all of its characters are whole."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise ValueError(
                f"{where}: field {name!r} has half a character ({half!a}) at place {error.start + 1}; text must be valid Unicode: "
                "write the file again as UTF-8."
            ) from None
    return text


def brief(value: Any, limit: int = 80) -> str:
    """For a message: what ``value`` is, in one short line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep; an integer of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

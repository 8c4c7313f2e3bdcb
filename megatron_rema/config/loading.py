"""DictConfig -> keys, and back to what a file holds."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from megatron_rema.config.keys import ConfigError, RunConfig
from megatron_rema.reading import brief


def load(cfg: DictConfig) -> RunConfig:
    """DictConfig -> frozen dataclasses. Unknown keys, missing values, wrong types, choices and ranges raise ConfigError naming the key."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise ConfigError(f"{missing[0]} is not set and has no default: give {missing[0]}=VALUE on the command line.")
        given = OmegaConf.to_container(cfg, resolve=True)
        _check_texts(given)
        return TypeAdapter(RunConfig).validate_python(given)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        raise ConfigError(" | ".join(_explain(detail) for detail in error.errors())) from error


def _check_texts(tree: Any, key: str = "") -> None:
    """Bytes of the command line that are no UTF-8 reach us as halves of characters, which no file of the run could hold."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            _check_texts(str(name), f"{key}{ascii(name)[1:-1]}")
            _check_texts(value, f"{key}{name}.")
    elif isinstance(tree, list):
        for value in tree:
            _check_texts(value, key)
    elif isinstance(tree, str) and any("\ud800" <= character <= "\udfff" for character in tree):
        raise ConfigError(f"{key.rstrip('.')} is {tree!a}; it must be valid Unicode: give it as UTF-8.")


def _explain(detail: Any) -> str:
    key = ".".join(str(part) if str(part).isprintable() and str(part).split() == [str(part)] else brief(part) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        return f"{key} is {brief(detail['input'])}; there is no such key: see --help for the keys, or remove it."
    return f"{key} is {brief(detail['input'])}; {detail['msg'][0].lower()}{detail['msg'][1:]}."


def as_mapping(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers (what ``config.yaml`` holds)."""
    return TypeAdapter(RunConfig).dump_python(config, mode="json")

"""What a launcher starts again continues by itself.

The rule: a run folder is this launch's where it was last written under the same TORCHELASTIC_RUN_ID (``--rdzv-id``: a random one with
``--standalone``, the job's number under SLURM, the Job's uid under Kubernetes) and the same configuration. A worker that finds its
run_dir so continues from the latest checkpoint, as with ``resume=true``. That covers `torchrun --max-restarts`, nodes that leave and come
back, and requeued jobs. torchrun calls every launch without an id ``none``: that one counts only where TORCHELASTIC_RESTART_COUNT says
that the workers were started before. Any other run folder that is not empty still needs ``resume=true``: nothing is overwritten.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_rema.config import ConfigError, RunConfig, as_mapping
from megatron_rema.reading import json_object, read_bytes

LAUNCH, CONFIG = "launch.json", "config.yaml"
_NOT_COMPARED = ("resume", "resume_from", "explain", "world_size")


def continued(config: RunConfig) -> RunConfig:
    """``config``, or what continues its run where the launcher started this process again: from the latest checkpoint, not once more from
    ``resume_from``. Raises ConfigError where the run folder is this launch's and its configuration is not."""
    folder = Path(config.run_dir)
    if not _is_of_this_launch(folder):
        return config
    if (folder / CONFIG).exists():
        before = _yaml(folder / CONFIG)
        now = yaml.safe_load(dumped(as_mapping(config)))
        key, then, asked = next(_differences(before, now), ("", None, None))
        if key:
            raise ConfigError(
                f"run_dir {folder} was begun by this launch with {key}={then!r}, and {key} is {asked!r} now; a restart continues with the "
                "same settings: give those, or set resume=true under another launch."
            )
    return replace(config, resume=True, resume_from=None)


def record(folder: Path, mapping: dict[str, Any]) -> None:
    """Note whose run folder it is: the launch, then the configuration, each whole or absent."""
    if (launch_id := os.environ.get("TORCHELASTIC_RUN_ID")) is not None:
        _write(folder / LAUNCH, json.dumps({"launch_id": launch_id}) + "\n")
    else:
        (folder / LAUNCH).unlink(missing_ok=True)
    _write(folder / CONFIG, dumped(mapping))


def dumped(mapping: dict[str, Any]) -> str:
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)


def _is_of_this_launch(folder: Path) -> bool:
    launch_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if launch_id is None or not (folder / LAUNCH).exists():
        return False
    if launch_id == "none" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    return json_object(folder / LAUNCH, "it is whole or absent: remove it to continue by hand.").get("launch_id") == launch_id


def _yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(read_bytes(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{file} is no configuration that a run wrote ({said}); set resume=true under another launch.") from None


def _differences(before: Any, now: Any, prefix: str = "") -> Any:
    """(key, before, now) of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if prefix or key not in _NOT_COMPARED:
                yield from _differences(before.get(key), now.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now


def _write(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)

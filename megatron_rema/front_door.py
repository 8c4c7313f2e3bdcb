"""What every front door shares: compose the configuration, check it, and turn bad input into one message and exit code 2.

``--help``, ``--cfg`` and ``-m`` are Hydra's own; a plain run composes without Hydra's working-folder and logging machinery,
which under torchrun would run once in every rank.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from megatron_rema.config import ConfigError, RunConfig, check, load
from megatron_rema.trainer.restart import continued

BAD_INPUT_EXIT_CODE = 2


def config_dir() -> Path:
    """``conf/``: inside an installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").exists():
            return candidate
    raise ConfigError(f"no conf/ found in or beside {package}; reinstall the package.")


def _say(message: str) -> None:
    """One rank speaks: a message repeated by every rank of a large job hides itself."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)


def composed_from(arguments: list[str]) -> DictConfig:
    """What Hydra makes of the command line. Raises ConfigError."""
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", overrides=arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(" ".join(str(error).split()) + " See --help for every key and group.") from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        RecursionError,
    ) as error:  # hydra on a choice that is no name: task=[1,2], =1
        given = " ".join(" ".join(arguments).split())
        raise ConfigError(f"the command line cannot be read ({error}): {given}. See --help for every key and group.") from error


def _checked(cfg: DictConfig) -> RunConfig:
    config = continued(load(cfg))
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    return config


def enter(name: str, run: Callable[[RunConfig], None]) -> None:
    """Run ``run(config)`` for the command line in sys.argv. ValueError (bad input) ends with its message and exit code 2."""

    def guarded(cfg: DictConfig) -> None:
        try:
            run(_checked(cfg))
        except ValueError as error:  # ConfigError and every "field, value, rule, remedy" error of the rooms below
            if os.environ.get("MEGATRON_REMA_TRACEBACK"):
                raise
            _say(str(error))
            sys.stdout.flush()
            # Not sys.exit: ranks may already hold process groups whose clean-up waits for peers.
            os._exit(BAD_INPUT_EXIT_CODE)

    # megatron-core says on every import that Apex and Transformer Engine are missing: on CPU they cannot be there. And its checkpoints
    # use names that torch will rename one day.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron\.core|torch\.distributed)")
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        sys.argv[0] = name
        hydra_main(version_base="1.3", config_path=str(config_dir()), config_name="config")(guarded)()
        return
    try:
        cfg = composed_from(arguments)
    except ConfigError as error:
        _say(str(error))
        sys.exit(BAD_INPUT_EXIT_CODE)
    guarded(cfg)

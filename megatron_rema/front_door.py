"""What every front door shares: compose the configuration, check it, and turn bad input into one message and exit code 2.

``--help`` and ``--cfg`` are Hydra's own, ``-m`` is a sweep (hydra_plugins/megatron_rema_launchers.py); a plain run composes without Hydra's
working-folder and logging machinery, which under torchrun would run once in every rank.
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


def _checked(cfg: DictConfig) -> RunConfig:
    config = continued(load(cfg))
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    return config


def _swept(application: Callable[[], None]) -> None:
    """Hydra's multirun, whose errors end like any others: it would print what is wrong with a key as a traceback, with exit code 1."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _say("-m under torchrun would start one sweep a rank; it starts torchrun itself, once a job: python -m megatron_rema.train -m ...")
        os._exit(BAD_INPUT_EXIT_CODE)
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra pass exceptions on
    try:
        application()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if wanted or os.environ.get("MEGATRON_REMA_TRACEBACK"):
            raise
        _say(" ".join(str(error).split()))
        sys.exit(BAD_INPUT_EXIT_CODE)


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
        guarded.door = name  # what a sweep starts for each of its jobs
        application = hydra_main(version_base="1.3", config_path=str(config_dir()), config_name="config")(guarded)
        if {"-m", "--multirun"} & set(arguments):
            _swept(application)
        else:
            application()
        return
    if chosen := [argument for argument in arguments if argument.lstrip("+").startswith("sweep=")]:
        _say(f"{chosen[0]} names a sweep, which is several runs; give -m as well: python -m megatron_rema.{name} -m {' '.join(arguments)}")
        sys.exit(BAD_INPUT_EXIT_CODE)
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("config", overrides=arguments)
    except (HydraException, OmegaConfBaseException) as error:
        _say(" ".join(str(error).split()) + " See --help for every key and group.")
        sys.exit(BAD_INPUT_EXIT_CODE)
    guarded(cfg)

"""What every front door shares: compose the configuration, check it, and turn bad input into one message and exit code 2.

``--help`` and ``--cfg`` are Hydra's own, ``-m`` is a sweep (hydra_plugins/megatron_rema_launchers.py); a plain run composes without Hydra's
working-folder and logging machinery, which under torchrun would run once in every rank.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from megatron_rema.config import ConfigError, RunConfig, check, load
from megatron_rema.planning.explain import everything
from megatron_rema.trainer.restart import continued

BAD_INPUT_EXIT_CODE = 2
SILENCE_S = 5.0  # in which a rank that does not speak gives another one time to


def config_dir() -> Path:
    """``conf/``: inside an installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "config.yaml").exists():
            return candidate
    raise ConfigError(f"no conf/ found in or beside {package}; reinstall the package.")


def _say(message: str) -> None:
    """Rank 0 speaks: a message repeated by every rank of a large job hides itself. The others wait: as soon as one rank is gone its
    launcher ends the rest, and that must not be before the message is out. A node whose launcher ends nobody has an error of its own, and
    its first rank says it."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SILENCE_S)
        if os.environ.get("LOCAL_RANK", rank) != "0":
            return
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)


def _end(error: Exception, run_dir: str) -> None:
    """Say what ended the run and exit, or, where it is a bug, return. The rank whose error came first speaks for all that agree with it;
    of the others' errors most only follow from it: they get a line."""
    from megatron_rema.trainer import faults

    is_bad_input, rank = isinstance(error, ValueError), os.environ.get("RANK", "0")
    message = str(error) if is_bad_input else faults.explained(error, run_dir)
    if faults.is_consequence(error):
        if message is None:
            line = (str(error).splitlines() or [""])[0][:200]
            print(f"rank {rank} ends after another rank's error ({type(error).__name__}: {line})", file=sys.stderr, flush=True)
        time.sleep(SILENCE_S)  # see _say
    elif message is None:
        return
    elif not faults.is_of_a_group(error):  # every rank came to it by itself
        _say(message)
    else:
        print(f"error: {f'rank {rank}: ' if is_bad_input and rank != '0' else ''}{message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: ranks may already hold process groups whose clean-up waits for peers.
    os._exit(BAD_INPUT_EXIT_CODE if is_bad_input else faults.EXIT_CODE)


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
    check(config, _world_size(config))
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


def _world_size(config: RunConfig) -> int:
    """The launcher's, unless ``explain`` asks what another would do. Raises ConfigError where a run is told a number that is not so."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if config.world_size in (None, launched):
        return launched
    if not config.explain:
        raise ConfigError(
            f"world_size is {config.world_size} and the launcher started {launched} rank(s); a run has the launcher's: leave it out, or "
            "ask with explain=true what that number would mean."
        )
    return config.world_size


def enter(name: str, run: Callable[[RunConfig], None]) -> None:
    """Run ``run(config)`` for the command line in sys.argv.

    ValueError (ConfigError and every "field, value, rule, remedy" error of the rooms below) ends with its message and exit code 2; what
    befell the run without being a bug (trainer/faults.py) with its message and 1.
    """

    def guarded(cfg: DictConfig) -> None:
        try:
            config = _checked(cfg)
            if not config.explain:
                run(config)
            elif os.environ.get("RANK", "0") == "0":
                print("\n".join(everything(config, _world_size(config), name)))
        except Exception as error:
            if not os.environ.get("MEGATRON_REMA_TRACEBACK"):
                _end(error, str(cfg.get("run_dir")))
            raise

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
        cfg = composed_from(arguments)
    except ConfigError as error:
        _say(str(error))
        sys.exit(BAD_INPUT_EXIT_CODE)
    guarded(cfg)

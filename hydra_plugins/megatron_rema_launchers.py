"""Hydra's side of ``python -m megatron_rema.train -m key=a,b``: which jobs there are, and where they run.

``hydra/sweeper=grid`` makes every combination of values; ``hydra/launcher=torchrun`` runs each as its own torchrun on this machine,
``hydra/launcher=slurm`` hands them to SLURM. What they do is in ``megatron_rema/sweep``; this file is imported by every front door, since
Hydra looks at all plug-ins, and must stay light.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from megatron_rema.sweep.sweep import Queue


class GridSweeper(Sweeper):
    """The product of all values: ``params`` of the configuration, which the command line's overrides replace by key.

    As Hydra's own sweeper, but nothing is written, and ``~key`` may be among the overrides.
    """

    def __init__(self, params: dict[str, Any] | None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        self.launcher.launch(grid(self.params, arguments, self.hydra_context.config_loader), initial_job_idx=0)


def grid(params: Mapping[str, Any], arguments: Sequence[str], config_loader: ConfigLoader | None = None) -> list[tuple[str, ...]]:
    """The overrides of every job; the last key changes fastest. Raises ConfigError for what is no list of values."""
    from megatron_rema.config import ConfigError
    from megatron_rema.sweep.jobs import key_of

    given = {key_of(argument): argument for argument in [*(f"{key}={value}" for key, value in params.items()), *arguments]}
    given.pop("sweep", None)  # the file of conf/sweep that holds params
    choices = []
    for override in OverridesParser.create(config_loader=config_loader).parse_overrides(list(given.values())):
        if not override.is_sweep_override():
            choices.append([override.input_line])
        elif override.is_discrete_sweep():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{override.input_line} is an interval; a grid needs values: give them with commas, choice() or range().")
    return list(itertools.product(*choices))


class _SweepLauncher(Launcher):
    """Composes and checks every job, then lets ``megatron_rema.sweep`` run them."""

    def __init__(self, make_queue: Callable[[], Queue]) -> None:
        self._make_queue = make_queue

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[Any]:
        """Ends the process with the sweep's exit code unless that is 0."""
        from megatron_rema.config import ConfigError, load
        from megatron_rema.sweep.sweep import sweep

        if initial_job_idx:
            raise ConfigError("hydra/sweeper asks for its jobs batch by batch; a sweep is one batch here: use hydra/sweeper=grid.")
        chosen = []
        for overrides in job_overrides:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                del cfg["hydra"]
            if OmegaConf.select(cfg, "explain"):
                raise ConfigError("explain is true in a sweep; it explains one run: leave -m away and give one value to each key.")
            chosen.append((overrides, load(cfg)))
        if code := sweep(self.task_function.door, chosen, self._make_queue()):
            raise SystemExit(code)
        return []


class TorchrunLauncher(_SweepLauncher):
    """A queue over the devices of this machine."""

    def __init__(self, **settings: Any) -> None:
        def make_queue() -> Queue:
            from megatron_rema.sweep.local import LocalQueue

            return LocalQueue(**settings)

        super().__init__(make_queue)


class SlurmLauncher(_SweepLauncher):
    """Allocations of SLURM."""

    def __init__(self, **settings: Any) -> None:
        def make_queue() -> Queue:
            from megatron_rema.sweep.slurm import SlurmQueue

            return SlurmQueue(**settings)

        super().__init__(make_queue)

"""The frozen, typed configuration of every front door, and its cross-checks.

Hydra composes ``conf/`` into a DictConfig; ``load`` turns that into dataclasses once (pydantic checks keys, types, choices and ranges), and
``check`` applies the rules between fields before any model is built. Nothing here imports torch.
"""

from megatron_rema.config.keys import (
    AgentsConfig,
    AlgorithmConfig,
    ConfigError,
    CriticConfig,
    EngineConfig,
    IntegrityConfig,
    LayoutConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
    PreflightConfig,
    RewardConfig,
    RewardModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainerConfig,
)
from megatron_rema.config.loading import as_mapping, load
from megatron_rema.config.rules import check, check_file, check_run_dir

__all__ = [
    "AgentsConfig",
    "AlgorithmConfig",
    "ConfigError",
    "CriticConfig",
    "EngineConfig",
    "IntegrityConfig",
    "LayoutConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PolicyConfig",
    "PreflightConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RunConfig",
    "TaskConfig",
    "TrainerConfig",
    "as_mapping",
    "check",
    "check_file",
    "check_run_dir",
    "load",
]

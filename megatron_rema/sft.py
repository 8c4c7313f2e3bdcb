"""Supervised cold start on role-view dialogues: ``torchrun --nproc-per-node N -m megatron_rema.sft key=value ...``"""

from megatron_rema.config import RunConfig
from megatron_rema.front_door import enter


def run(config: RunConfig) -> None:
    from megatron_rema.trainer.cold_start import train

    train(config)


if __name__ == "__main__":
    enter("sft", run)

"""Supervised cold start on role-view dialogues: ``torchrun --nproc-per-node N -m megatron_rema.sft key=value ...``"""

from megatron_rema.config import RunConfig
from megatron_rema.front_door import enter
from megatron_rema.trainer.inputs import read_for_cold_start


def run(config: RunConfig) -> None:
    inputs = read_for_cold_start(config)
    from megatron_rema.trainer.cold_start import train  # torch and megatron load only once the inputs are known to be good

    train(config, inputs)


if __name__ == "__main__":
    enter("sft", run)

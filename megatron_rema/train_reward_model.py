"""Reward-model training on preference pairs: ``torchrun --nproc-per-node N -m megatron_rema.train_reward_model key=value ...``"""

from megatron_rema.config import RunConfig
from megatron_rema.front_door import enter
from megatron_rema.trainer.inputs import read_for_reward_model


def run(config: RunConfig) -> None:
    inputs = read_for_reward_model(config)
    from megatron_rema.trainer.preference import train  # torch and megatron load only once the inputs are known to be good

    train(config, inputs)


if __name__ == "__main__":
    enter("train_reward_model", run)

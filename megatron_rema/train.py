"""RL training of ReMA agents: ``torchrun --nproc-per-node N -m megatron_rema.train experiment=NAME key=value ...``"""

from megatron_rema.config import RunConfig
from megatron_rema.front_door import enter
from megatron_rema.trainer.inputs import read_for_training


def run(config: RunConfig) -> None:
    inputs = read_for_training(config)
    from megatron_rema.trainer.loop import train  # torch and megatron load only once the inputs are known to be good

    train(config, inputs)


if __name__ == "__main__":
    enter("train", run)

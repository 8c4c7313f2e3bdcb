"""RL training of ReMA agents: ``torchrun --nproc-per-node N -m megatron_rema.train experiment=NAME key=value ...``"""

from megatron_rema.config import RunConfig
from megatron_rema.front_door import enter


def run(config: RunConfig) -> None:
    from megatron_rema.trainer.loop import train  # torch and megatron load only once the configuration is known to be good

    train(config)


if __name__ == "__main__":
    enter("train", run)

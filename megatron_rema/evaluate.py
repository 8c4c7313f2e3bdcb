"""Evaluation: plays dialogues with a checkpoint (``evaluate model.path=HF``), or scores saved responses (``evaluate score_file=FILE``)."""

from megatron_rema.config import RunConfig
from megatron_rema.front_door import enter
from megatron_rema.trainer.inputs import read_for_evaluation


def run(config: RunConfig) -> None:
    if config.score_file is not None:
        from megatron_rema.trainer.score_file import score_file

        score_file(config)
    else:
        inputs = read_for_evaluation(config)
        from megatron_rema.trainer.evaluation import evaluate_checkpoint

        evaluate_checkpoint(config, inputs)


if __name__ == "__main__":
    enter("evaluate", run)

"""Alarms on a step's metrics: numbers that say that the run itself is wrong, whatever it learns (that is the monitor's business)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rema.config import RunConfig
from megatron_rema.trainer.progress import Reporter
from megatron_rema.trainer.run_folder import RunFolder

UNCLIPPED_STEPS = 20  # after so many in a row an alert says that clipping never acts


@dataclass
class Alarms:
    """Of one run."""

    config: RunConfig
    folder: RunFolder
    reporter: Reporter
    steps_unclipped: int = 0  # in a row, since the start or the last resume

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Engine and trainer must agree on what was sampled: a gap means stale weights, another precision or a broken map.

        And a clip range that no ratio leaves in ``UNCLIPPED_STEPS`` steps of several updates each is no clip: at 0.2 a geometric turn ratio
        hardly ever does (GSPO, whose ratio is of that kind, uses 3e-4).
        """
        clipped = [value for name, value in metrics.items() if name.endswith("_ratio_clipped_frac")]
        if self.config.trainer.minibatches_per_step > 1 and clipped:
            self.steps_unclipped = 0 if any(clipped) else self.steps_unclipped + 1
            if self.steps_unclipped == UNCLIPPED_STEPS:
                self.folder.alert({"step": step, "alert": "clip_never_acts", "steps": UNCLIPPED_STEPS})
                self.reporter.say(
                    f"ALERT step {step}: no {self.config.algorithm.ratio_level} ratio was clipped in {UNCLIPPED_STEPS} steps; "
                    "lower algorithm.clip_low and clip_high if the clip is to hold the policy"
                )
        threshold = self.config.engine.logprob_gap_alarm
        for name, value in metrics.items():
            if name.endswith("logprob_gap_max") and not value <= threshold:
                self.folder.alert({"step": step, "alert": "logprob_gap", "metric": name, "value": value, "threshold": threshold})
                self.reporter.say(f"ALERT step {step}: {name} is {value:.4g} nats, above engine.logprob_gap_alarm={threshold:g}")

"""``evaluate score_file=FILE``: scores saved responses with the training reward's verifier, without a model and without torch."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rema.config import ConfigError, RunConfig
from megatron_rema.reward.math_verifier import VerifierPool
from megatron_rema.types import Verdict


def score_file(config: RunConfig) -> None:
    """JSONL rows with question, answer and response. Prints ``accuracy: 0.987 (...)``; unknown verdicts are excluded and counted."""
    path = Path(config.score_file or "")
    if not path.is_file():
        raise ConfigError(f"score_file is {path}; no such file: give a JSONL file with answer and response in every row.")
    reward, task = config.reward, config.task
    with VerifierPool(reward.verifier_processes, reward.verifier_timeout_s, lenient=False) as verifier:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path} line {number}: not JSON ({error}). Every line must be one JSON object.") from None
            for key in (task.answer_key, "response"):
                if not isinstance(row.get(key), str):
                    raise ConfigError(f"{path} line {number}: field {key!r} is {row.get(key)!r}; it must be text.")
            verifier.submit_answer(str(number), row["response"], row[task.answer_key])
        verdicts = [judgement.verdict for judgement in verifier.collect().values()]
    known = [verdict for verdict in verdicts if verdict is not Verdict.UNKNOWN]
    accuracy = sum(verdict is Verdict.CORRECT for verdict in known) / max(len(known), 1)
    print(f"accuracy: {accuracy:.3f} ({len(known)} scored, {len(verdicts) - len(known)} unknown)")

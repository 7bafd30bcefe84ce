"""Numbers for `auto` in a job's hyperparameters."""

from __future__ import annotations

import math

from lora_serve.api.fine_tuning.job_records import ChosenNumbers, JobRecord

# Learning rates at a multiplier of 1: usual ones for LoRA adapters of bases with billions of parameters.
LEARNING_RATES = {"supervised": 2e-4, "dpo": 2e-5}
EPOCHS, FEWEST_TO_LEARN, MOST_TO_LEARN, MOST_EPOCHS = 3, 100, 25_000, 25
BETA = 0.1


def choose_numbers(job: JobRecord, examples: int) -> ChosenNumbers:
    """The numbers that a job trains with, given how many examples there are to learn from.

    `n_epochs`: 3, or as many as make 100 examples out of fewer, or as few as make 25,000 out of more (OpenAI's
    published rule). `batch_size`: 4, or a 500th of the examples if that is more, up to 64. `learning_rate_multiplier`:
    1. `beta`: 0.1.
    """
    asked = job.hyperparameters
    epochs = auto_epochs(examples) if asked.n_epochs == "auto" else asked.n_epochs
    size = max(4, min(64, examples // 500)) if asked.batch_size == "auto" else asked.batch_size
    size = min(size, examples)
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    given = job.trainer.learning_rate
    beta = None
    if job.method == "dpo":
        beta = BETA if asked.beta in (None, "auto") else float(asked.beta)
    return ChosenNumbers(
        n_epochs=epochs,
        batch_size=size,
        learning_rate_multiplier=multiplier,
        beta=beta,
        learning_rate=multiplier * LEARNING_RATES[job.method] if given is None else given,
        warmup=math.ceil(job.trainer.warmup_ratio * steps_in_all(examples, size, epochs)),
    )


def auto_epochs(examples: int) -> int:
    """How often to go through so many examples."""
    if examples * EPOCHS < FEWEST_TO_LEARN:
        return max(1, min(MOST_EPOCHS, FEWEST_TO_LEARN // examples))
    if examples * EPOCHS > MOST_TO_LEARN:
        return max(1, MOST_TO_LEARN // examples)
    return EPOCHS


def steps_in_all(examples: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a job."""
    return epochs * math.ceil(examples / batch_size)

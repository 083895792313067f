"""The sentences with which a training loop ends."""

from __future__ import annotations

from tbpo_ray.config.schema import Config
from tbpo_ray.errors import first_line


def nonfinite_step(config: Config, step: int) -> str:
    """The loss or a gradient of this 1-based step is not finite."""
    rate = config.training.learning_rate
    return (
        f"training.on_nonfinite=stop: the loss or a gradient of step {step} is NaN or infinite; "
        f"no worker has updated its weights; lower training.learning_rate={rate}, or skip such steps "
        "with training.on_nonfinite=skip"
    )


def out_of_memory(config: Config, step: int, error: Exception) -> str:
    """This 1-based step does not fit into the device's memory."""
    training, length = config.training, config.data.max_length
    key = "micro_batch_pairs" if training.micro_batch_tokens is None else "micro_batch_tokens"
    return (
        f"out of memory in step {step} with training.{key}={getattr(training, key)} and "
        f"data.max_length={length}: lower either, or set training.activation_checkpointing=true "
        f"({first_line(error)})"
    )

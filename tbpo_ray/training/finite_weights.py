"""Name the tensor of a model that is not finite, and the file that it came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbpo_ray.errors import InputError
from tbpo_ray.models.weight_files import file_of_tensor


def refuse_non_finite_weights(model: Any, key: str, folder: str) -> None:
    """Refuse a model with a weight that is NaN or infinite; the host waits for the device once.

    Args:
        key: configuration key and value that name the model, for messages.
        folder: the model's folder, or a hub name.

    Raises:
        InputError: naming the first such tensor and its file.
    """
    found = next(_non_finite(model.named_parameters()), None)
    if found is not None:
        raise InputError(f"{key}: {_describe(*found, folder)}; must be a checkpoint without NaN and infinity")


def refuse_non_finite_scores(model: Any, logps: Iterable[Tensor], key: str, folder: str) -> None:
    """Refuse a model whose log-probs are not finite; NaN are those that were not computed.

    Args:
        logps: [tokens] each, infinite where the model gave no finite value.
        key: as in :func:`refuse_non_finite_weights`.
        folder: likewise.

    Raises:
        InputError: naming a buffer that is not finite, if there is one.
    """
    infinite = sum(int(torch.isinf(row).sum()) for row in logps)
    if not infinite:
        return
    found = next(_non_finite(model.named_buffers()), None)
    cause = (
        _describe(*found, folder)
        if found is not None
        else f"all of its weights are finite, so values overflow in {next(model.parameters()).dtype}"
    )
    raise InputError(f"{key}: {infinite} log-probs of the run's first pairs are not finite; {cause}")


def _non_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, int, int]]:
    """Names of tensors with values that are not finite, the number of these and of all values.

    Tensors without values are left out: those of a model that runs from the host's memory.
    """
    floating = [
        (name, t.detach()) for name, t in tensors if t.is_floating_point() and t.numel() and not t.is_meta
    ]
    if not floating:
        return
    # A sum is finite only if all values are, and takes no memory, unlike `isfinite` of a large embedding.
    finite = torch.stack([t.sum().isfinite() for _, t in floating]).tolist()
    for (name, tensor), is_finite in zip(floating, finite, strict=True):
        count = 0 if is_finite else int((~tensor.isfinite()).sum())
        if count:
            yield name, count, tensor.numel()


def _describe(name: str, count: int, size: int, folder: str) -> str:
    file = file_of_tensor(Path(folder), name)
    where = f" ({Path(folder) / file})" if file is not None else ""
    return f"the tensor {name}{where} has {count} values of {size} that are not finite"

"""The learned state baseline beside an exported policy, in `state_baseline/`: safetensors and its shape.

A folder of its own, since vLLM takes every safetensors file beside `config.json` for the policy's weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

FOLDER = "state_baseline"
WEIGHTS, SHAPE = "model.safetensors", "config.json"


def save_state_baseline(export: Path, weights: Mapping[str, Tensor], kind: str, width: int) -> None:
    """Write a head's weights.

    Args:
        export: the exported policy's folder.
        weights: the head's state dict.
        kind: `learned` or `mixed`.
        width: of its hidden layer, 0 for a linear head.
    """
    from safetensors.torch import save_file

    folder = export / FOLDER
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / WEIGHTS)
    (folder / SHAPE).write_text(json.dumps({"kind": kind, "hidden": width}), encoding="utf-8")


def load_state_baseline(export: str | Path) -> nn.Module | None:
    """The head beside a policy, on the CPU; None where it was exported without one.

    Raises:
        ValueError: the weights do not fit the shape that is written beside them.
    """
    from safetensors.torch import load_file

    from tbpo_ray.objectives import build_state_baseline

    folder = Path(export) / FOLDER
    if not (folder / SHAPE).is_file():
        return None
    weights = load_file(folder / WEIGHTS)
    spec = json.loads((folder / SHAPE).read_text(encoding="utf-8"))
    head = build_state_baseline(spec, weights["head.0.weight"].shape[-1])
    if head is None:
        raise ValueError(f"{folder}: a state baseline of kind {spec['kind']} has nothing to load")
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit {spec}: {error}") from error
    return head

"""Save and load the learned state baseline of an exported policy, in its subfolder `state_baseline/`.

It has a folder of its own because vLLM loads every safetensors file beside `config.json` as policy weights.
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
    """Write the weights and the shape of a baseline head.

    Args:
        export: folder of the exported policy.
        weights: state dict of the head.
        kind: `learned` or `mixed`.
        width: size of its hidden layer, 0 for a linear head.
    """
    from safetensors.torch import save_file

    folder = export / FOLDER
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / WEIGHTS)
    (folder / SHAPE).write_text(json.dumps({"kind": kind, "hidden": width}), encoding="utf-8")


def load_state_baseline(export: str | Path) -> nn.Module | None:
    """The baseline head of an exported policy on the CPU, or None if it was exported without one.

    Raises:
        ValueError: when the weights do not match the recorded shape.
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
        raise ValueError(f"{folder}: a state baseline of kind {spec['kind']} has no weights to load")
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not match {spec}: {error}") from error
    return head

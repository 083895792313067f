"""A user's own proper loss, `objective.bregman.generator=path.py:NAME`: loaded and checked at the start."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbpo_ray.errors import InputError, first_line

KEY = "objective.bregman.generator"
CHECKED_RANGE = 20.0
"""The loss is checked on [-20, 20], and u is clamped to it."""
CHECKED_POINTS = 4001
REMEDY = "give a function of u, of torch operations, that is finite and increasing on [-20, 20]"


def load_function(reference: str) -> Callable[[Tensor], Tensor]:
    """Import the function that `path.py:NAME` names and check that it is a usable loss.

    The file is Python source; nothing is unpickled.

    Raises:
        InputError: the file or the function does not exist, or the function is not a loss that increases with
            finite values and gradients on [-20, 20].
    """
    path, _, name = reference.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{KEY}={reference}: {file} is not a file; give the path of a Python file")
    function: Any = _import(file, reference).get(name)
    if not callable(function):
        raise InputError(f"{KEY}={reference}: {file} has no function {name}; {REMEDY}")
    for dtype in (torch.float32, torch.float64):
        fault = _fault(function, dtype)
        if fault:
            raise InputError(f"{KEY}={reference}: {fault}; {REMEDY}")
    checked: Callable[[Tensor], Tensor] = function
    return checked


def source_digest(reference: str) -> str:
    """Digest of the file that `path.py:NAME` names: runs on other code minimize another loss.

    Raises:
        InputError: the file does not exist.
    """
    file = Path(reference.rpartition(":")[0]).expanduser()
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise InputError(
            f"{KEY}={reference}: cannot read {file} ({first_line(error)}); give the path of a Python file"
        ) from error


def _import(file: Path, reference: str) -> dict[str, Any]:
    # Two files of one name are two modules.
    module_name = f"tbpo_generator_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise InputError(f"{KEY}={reference}: {file} cannot be imported: {_describe(error)}") from error
    return vars(module)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _fault(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> str | None:
    """What keeps a function from being a loss of u, if anything."""
    u = torch.linspace(-CHECKED_RANGE, CHECKED_RANGE, CHECKED_POINTS, dtype=dtype, requires_grad=True)
    try:
        with torch.enable_grad():
            loss = function(u)
            fault = _form_fault(loss, u)
            if fault:
                return fault
            (gradient,) = torch.autograd.grad(loss.sum(), u)
            alone = function(u[:7].reshape(7, 1)).reshape(-1)
    except Exception as error:  # whatever the user's function raises
        return f"it fails: {_describe(error)}"
    if not torch.allclose(alone, loss[:7], rtol=1e-4, atol=1e-6):
        return "it is not elementwise: the loss of one u depends on the others, or on the shape"
    return _value_fault(u.detach(), loss.detach(), gradient)


def _form_fault(loss: object, u: Tensor) -> str | None:
    if not isinstance(loss, Tensor):
        return f"it returns {type(loss).__name__}, not a tensor"
    if loss.shape != u.shape or loss.dtype != u.dtype:
        return (
            f"for u of shape {tuple(u.shape)} and {u.dtype} it returns shape {tuple(loss.shape)} and "
            f"{loss.dtype}, which must be the same"
        )
    return None if loss.requires_grad else "its result has no gradient"


def _value_fault(u: Tensor, loss: Tensor, gradient: Tensor) -> str | None:
    bad = ~(loss.isfinite() & gradient.isfinite())
    if bad.any():
        at = int(bad.nonzero()[0])
        return f"not finite at u = {u[at]:g}: value {loss[at]:g}, gradient {gradient[at]:g}"
    falling = gradient < 0
    if falling.any():
        at = int(falling.nonzero()[0])
        return f"not monotone: its gradient at u = {u[at]:g} is {gradient[at]:g}"
    # A dropped gradient (detach, round) would show here, and a constant loss.
    rise, area = loss[-1] - loss[0], torch.trapezoid(gradient, u)
    if not rise > 0 or not gradient[len(u) // 2] > 0:
        return f"it does not increase at u = 0: gradient {gradient[len(u) // 2]:g}"
    if abs(rise - area) > 0.01 * rise:
        return f"its gradient is not that of its values: it rises by {rise:g}, the gradient sums to {area:g}"
    return None

"""The base class of every section and the value types that the sections share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _refuse_bool(value: Any) -> Any:
    # Pydantic would read `true` as 1, which hides a mistyped key or a misplaced YAML value.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Number = BeforeValidator(_refuse_bool)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Share = Annotated[float, Field(ge=0, le=1), Number]
Count = Annotated[int, Field(ge=1), Number]
CountOrZero = Annotated[int, Field(ge=0), Number]


def check_name(value: str) -> str:
    """Return a name that is safe as a folder name.

    Raises:
        ValueError: the name has other characters, more than 128 of them, or contains `..`.
    """
    if not _NAME.fullmatch(value) or ".." in value:
        raise ValueError(
            "use 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit, no '..'"
        )
    return value


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, attribute docstrings describe the keys."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)

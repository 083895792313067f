"""What the sections of the configuration are made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def check_name(value: str) -> str:
    """A name that becomes a folder: letters, digits, `.`, `_`, `-`, at most 128, no `..`."""
    if not _NAME.fullmatch(value) or ".." in value:
        raise ValueError(
            "use 1 to 128 letters, digits, '.', '_' or '-', starting with a letter or digit, no '..'"
        )
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)

"""The base class of every section and the value types that the sections share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from tbpo_ray.config.field_types import item_type, takes_null, takes_text

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


def _texts(value: Any, annotation: Any) -> list[Any]:
    """The strings in a value of a type that takes strings, or lists or mappings of them."""
    if isinstance(value, list):
        return value if takes_text(item_type(annotation)) else []
    if isinstance(value, dict):
        return list(value.values()) if annotation == dict[str, str] else []
    return [value] if takes_text(annotation) else []


class Section(BaseModel):
    """A section of the configuration: unknown keys are refused, attribute docstrings describe the keys."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_empty_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Read an empty string as null where that is accepted, and refuse it elsewhere.

        An empty path or source would otherwise mean the working directory.
        """
        name = info.field_name or ""
        annotation = cls.model_fields[name].annotation
        # An empty instruction differs from the default one.
        if value == "" and takes_null(annotation) and not name.endswith("_instruction"):
            return None
        texts = _texts(value, annotation)
        if isinstance(value, list) and not value and takes_text(annotation):
            raise ValueError("must not be empty")
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise ValueError("must not be empty")
        return value

"""Rows of Arrow tables as plain values, without the nulls that tables put in place of absent fields.

All rows of a column have the same struct fields. A field that one row lacks (an argument of another tool
call, a key of another schema) is null in it, and a chat template would write that null out. A null in a list
or a map is the author's own and stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tbpo_ray.data.rejection_reasons import RecordError

if TYPE_CHECKING:
    import pyarrow as pa


def nested_schema(schema: pa.Schema) -> pa.Schema | None:
    """The schema, or None if no column has nested values, so that its rows need no conversion."""
    import pyarrow as pa

    return schema if any(pa.types.is_nested(_stored(field.type)) for field in schema) else None


class TableRow(dict[str, Any]):
    """The columns of a table's row without the nulls of absent struct fields.

    Attributes:
        filled: the same columns with these nulls, as other readers of the table show them.
    """

    def __init__(self, values: Mapping[str, Any], schema: pa.Schema):
        """Convert a row.

        Args:
            values: columns as pyarrow's `to_pylist` gives them, with maps as lists of pairs.
            schema: of the table.

        Raises:
            RecordError: when a map has a key twice.
        """
        types = {name: _stored(schema.field(name).type) for name in values}
        self.filled: dict[str, Any] = {n: _plain(v, types[n], filled=True) for n, v in values.items()}
        super().__init__({n: _plain(v, types[n], filled=False) for n, v in values.items()})


def _plain(value: Any, kind: Any, *, filled: bool) -> Any:
    """A value with its maps as mappings, and with or without the nulls of struct fields."""
    import pyarrow as pa

    if value is None or not pa.types.is_nested(kind):
        return value
    if pa.types.is_struct(kind):
        fields = {field.name: _plain(value[field.name], _stored(field.type), filled=filled) for field in kind}
        return fields if filled else {name: item for name, item in fields.items() if item is not None}
    if pa.types.is_map(kind) and not pa.types.is_nested(kind.key_type):
        keys = [key for key, _ in value]
        if len(set(keys)) != len(keys):
            raise RecordError(
                "duplicate_keys", ", ".join(sorted({repr(k) for k in keys if keys.count(k) > 1}))
            )
        inner = _stored(kind.item_type)
        return {key: _plain(item, inner, filled=filled) for key, item in value}
    if not isinstance(value, list) or not hasattr(kind, "value_type"):
        return value
    inner = _stored(kind.value_type)
    return [_plain(item, inner, filled=filled) for item in value] if pa.types.is_nested(inner) else value


def _stored(kind: Any) -> Any:
    """The type of the values themselves, which extension, dictionary and run-end encoded types wrap."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        else:
            return kind

"""Rows of text files as JSON lines: JSON Lines, JSON arrays, CSV and TSV.

A fault in the layout of a file stops the reading with the file and the line, because the rows after it cannot
be told apart. A fault within one row is left to the row, which is then quarantined.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from json.decoder import WHITESPACE  # type: ignore[attr-defined] # not in the stubs
from typing import Any

from tbpo_ray.errors import InputError

_BOM = b"\xef\xbb\xbf"
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SEPARATOR_LINE = re.compile(rb'"?sep=([\t -~])"?[\r\n]*', re.IGNORECASE)
"""The first line by which Excel says what separates the fields."""
_SPACE_AND_QUOTE = re.compile(r'[ \t]+"')
_PAIR_COLUMNS = {"prompt", "chosen", "rejected", "messages", "question", "instruction"}


def json_rows(stream: Any, address: str) -> Iterator[bytes]:
    """The rows of a JSON file, whatever its name: one value per line, or one array, which is read at once.

    Raises:
        InputError: the file is an array with a syntax error, or one object around the records.
    """
    lines = iter(stream)
    blank, first = _first_content(lines, address)
    start = first.lstrip()[:1]
    following: list[bytes] = []
    if start in (b"[", b"{"):
        if _value(first) is None:
            rest = b"".join(lines)
            if start == b"[":
                yield from _array_rows(first + rest, address, len(blank))
                return
            _refuse_long_object(first + rest, address)
            lines = io.BytesIO(rest)
        following = _until_content(lines)
        if not following or not following[-1].strip():
            if start == b"[":
                yield from _array_rows(first, address, len(blank))
                return
            _refuse_wrapper(_value(first), address)
    yield from itertools.chain(blank, [first] if first else [], following, lines)


def delimited_rows(stream: Any, address: str, *, tabs: bool) -> Iterator[bytes]:
    """The rows of a CSV or TSV file as JSON objects of strings. Empty lines are not rows.

    Args:
        tabs: fields are separated by tabs; otherwise by commas, or by what the header or Excel's `sep=` line
            has instead of them.

    Raises:
        InputError: quotes that do not match or may join rows, a row with fewer or more fields than the header
            (each with its line), or a column that the header has twice.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long dialogue
    lines = iter(stream)
    blank, first = _first_content(lines, address)
    number = len(blank)
    stated = _SEPARATOR_LINE.fullmatch(first)
    if stated is not None:
        first, number = next(lines, b""), number + 1
        if tabs and stated[1] != b"\t":
            raise InputError(
                f"{address}: line {number}: {stated[0].decode().strip()} in a file of tabs (.tsv)"
            )
    texts = _decoded(itertools.chain([first], lines), address, number)
    delimiter = "\t" if tabs else _delimiter(first.decode("utf-8", "replace"))
    records = _records(texts, stated[1].decode() if stated else delimiter, address, number)
    names = next(records, [])
    refuse_duplicates(names, address)
    for record in records:
        yield json.dumps(dict(zip(names, record, strict=True))).encode()


def refuse_duplicates(names: Sequence[str], address: str) -> None:
    """Raise InputError if a column occurs twice: it is not known which one to read."""
    double = sorted({name for name in names if list(names).count(name) > 1})
    if double:
        shown = ", ".join(map(repr, double))
        raise InputError(
            f"{address}: the column {shown} occurs more than once; give every column its own name"
        )


def _records(texts: Iterator[str], delimiter: str, address: str, blank: int) -> Iterator[list[str]]:
    """The header and the rows; all have as many fields as the header.

    Args:
        blank: the number of lines in front of `texts`.
    """
    physical: list[str] = []

    def lines() -> Iterator[str]:
        for line in texts:
            physical.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        line = blank + reader.line_num + 1
        physical.clear()
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(_quote_fault(str(error), address, line, blank + reader.line_num)) from error
        text = "".join(physical)
        if not text.strip("\r\n "):
            continue
        names = names or record
        end = blank + reader.line_num
        where = f"line {line}" if end == line else f"lines {line} to {end}"
        if len(record) != len(names):
            raise InputError(
                f"{address}: {where}: {len(record)} fields, but the header has {len(names)} "
                f"({', '.join(map(repr, names))}); fields that contain the separator {delimiter!r}, quotes "
                "or line breaks must be in double quotes"
            )
        if any(_SPACE_AND_QUOTE.match(field) for field in record):
            _refuse_quotes_behind_spaces(text, delimiter, f"{address}: {where}")
        if len(physical) > 1 and _could_be_rows(physical, delimiter, len(names)):
            raise InputError(
                f"{address}: {where} are one row because of a quote, but each of them could be a row; if "
                "they are rows, double the quotes in them and quote the field; if they are not, quote every "
                "field of the row"
            )
        yield record


def _raw_fields(text: str, delimiter: str) -> Iterator[str]:
    """The fields of a row as they are written, with their quotes."""
    at = 0
    field = re.compile(rf'(?:"(?:[^"]|"")*"|[^{re.escape(delimiter)}\r\n]*)')
    while at <= len(text):
        match = field.match(text, at)
        assert match is not None  # the pattern matches the empty text
        yield match.group()
        at = match.end() + 1
        if text[match.end() : at] != delimiter:
            return


def _refuse_quotes_behind_spaces(text: str, delimiter: str, where: str) -> None:
    """Refuse a field that is not quoted because a space is in front of its quote."""
    for number, field in enumerate(_raw_fields(text, delimiter), start=1):
        if _SPACE_AND_QUOTE.match(field):
            raise InputError(
                f"{where}: field {number} begins with a space and a quote ({field[:20]!r}), so that its "
                "quotes would be text; remove the space, or quote the field and double the quotes in it"
            )


def _quote_fault(error: str, address: str, line: int, last: int) -> str:
    where = f"line {line}" if last <= line else f"the row of lines {line} to {last}"
    fault = (
        "a quoted field is not closed"
        if "unexpected end" in error
        else "text follows the closing quote of a field"
    )
    return f"{address}: {where}: {fault}; a quote inside a quoted field must be doubled ({error})"


def _could_be_rows(physical: Sequence[str], delimiter: str, width: int) -> bool:
    """Whether a quote may have joined rows: each line has the separators of a row.

    Commas in prose have a space behind them. A row whose fields are all quoted is what its writer meant.
    """
    lines = [line for line in physical if line.strip()]
    tight = re.compile(re.escape(delimiter) + ("" if delimiter == "\t" else "(?! )"))
    if any(len(tight.findall(line)) + 1 != width for line in lines):
        return False
    return not all(field.startswith('"') for field in _raw_fields("".join(physical), delimiter))


def _delimiter(header: str) -> str:
    """The separator of a file that is not named .tsv: the one that gives the columns of a preference.

    Of several, and if there are none, it is the first of comma, tab and semicolon that the header has.
    """
    found = [delimiter for delimiter in (",", "\t", ";") if delimiter in header]

    def known(delimiter: str) -> int:
        names = next(csv.reader([re.split(r"[\r\n]", header)[0]], delimiter=delimiter), [])
        return len(_PAIR_COLUMNS & {name.strip().lower() for name in names})

    return max(found, key=known, default=",")


def _decoded(lines: Iterator[bytes], address: str, blank: int) -> Iterator[str]:
    for number, line in enumerate(lines, start=blank + 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{address}: line {number}: not UTF-8 text (byte {error.start}); convert the file to UTF-8"
            ) from error
        # A lone carriage return ends a line too; the reader refuses it inside a longer line.
        yield from io.StringIO(text, newline="")


def _first_content(lines: Iterator[bytes], address: str) -> tuple[list[bytes], bytes]:
    """The blank lines at the beginning, and the line after them, without a byte order mark."""
    blank: list[bytes] = []
    for line in lines:
        first = line if blank else _without_bom(line, address)
        if first.strip():
            return blank, first
        blank.append(first)
    return blank, b""


def _without_bom(line: bytes, address: str) -> bytes:
    if line.startswith(_WIDE_BOMS):
        raise InputError(f"{address}: is UTF-16 text; convert the file to UTF-8")
    return line.removeprefix(_BOM)


def _value(line: bytes) -> Any:
    """The JSON value of a line; None if it is not a complete one."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _until_content(lines: Iterator[bytes]) -> list[bytes]:
    """The next lines up to the first one that is not blank."""
    found = []
    for line in lines:
        found.append(line)
        if line.strip():
            break
    return found


def _array_rows(content: bytes, address: str, blank: int) -> Iterator[bytes]:
    """The items of an array as lines, each as it is written.

    Args:
        blank: the number of lines in front of `content`.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = blank + 1 + content[: error.start].count(b"\n")
        raise InputError(f"{address}: line {line}: not UTF-8 text; convert the file to UTF-8") from error
    try:
        for item in _array_items(text):
            # A line break within a string is escaped in JSON, so these are between the parts of an item.
            yield item.replace("\r", " ").replace("\n", " ").encode()
    except json.JSONDecodeError as error:
        line = blank + error.lineno
        raise InputError(
            f"{address}: cannot be read as a JSON array: line {line}, column {error.colno}: {error.msg}"
        ) from error


def _array_items(text: str) -> Iterator[str]:
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        return int(WHITESPACE.match(text, at).end())

    at = skip(skip(0) + 1)
    while text[at : at + 1] != "]":
        _, end = decoder.raw_decode(text, at)
        yield text[at:end]
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("no value after the last comma", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("',' or ']' expected", text, at)
    if skip(at + 1) != len(text):
        raise json.JSONDecodeError("text follows the array", text, skip(at + 1))


def _refuse_long_object(content: bytes, address: str) -> None:
    """Refuse a file that begins with a JSON object over several lines."""
    try:
        text = content.decode("utf-8")
        value, end = json.JSONDecoder().raw_decode(text, int(WHITESPACE.match(text, 0).end()))
    except (ValueError, RecursionError):
        return  # lines, of which the first is not JSON
    _refuse_wrapper(value, address)
    last = text[:end].count("\n") + 1
    raise InputError(
        f"{address}: the first JSON object ends on line {last}; must be one object per line, or an array of "
        "objects"
    )


def _refuse_wrapper(value: Any, address: str) -> None:
    """Refuse a single object with the records in one of its keys."""
    if not isinstance(value, dict) or _PAIR_COLUMNS & value.keys():
        return
    for key, items in value.items():
        item = items[0] if isinstance(items, list) and items else None
        if isinstance(item, dict) and _PAIR_COLUMNS & item.keys():
            raise InputError(
                f"{address}: the records are in an array below {key!r} of one JSON object; must be that "
                "array itself, or one record per line"
            )

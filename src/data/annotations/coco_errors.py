"""Errors that say what is wrong with an annotation file: the file, the entry, the field and what to do.

Text that msgspec refuses is read a second time, slowly, for a message that a user can act on.
"""

import json
import re
from codecs import getincrementaldecoder
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from msgspec import DecodeError, Raw, Struct

from src.runtime.errors import DataError

LONGEST_SIDE = 2**24  # pixels; float32 holds every whole number up to it
LEAST_ID, LARGEST_ID = -(2**63), 2**63 - 1
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK = 2**20  # bytes of a file that are read at once

ID = f"a whole number of at most 64 bits ({LEAST_ID} to {LARGEST_ID})"
SIDE = f"in pixels, a whole number from 1 to {LONGEST_SIDE}"
FIELD_HELP = {
    "images": {
        "id": ID,
        "file_name": "text that is not empty, the picture's path below the image folder",
        "width": f"the picture's width {SIDE}",
        "height": f"the picture's height {SIDE}",
    },
    "annotations": {
        "id": ID,
        "image_id": "the id of an entry of `images`, " + ID,
        "category_id": "the id of an entry of `categories`, " + ID,
        "bbox": "four finite numbers, [x, y, width, height] in pixels",
        "area": "a finite number",
        "iscrowd": "0 or 1",
    },
    "categories": {"id": ID, "name": "text"},
}
LIST_NAMES = tuple(FIELD_HELP)

SPACE_PATTERN = rb"[ \t\n\r]*"
NO_SPACE = re.compile(rb"[^ \t\n\r]")
TEXT = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
TEXT_OR_NAN = re.compile(TEXT + rb"?|(NaN|-?Infinity)", re.DOTALL)  # an unfinished string reaches to the end
TEXT_OR_BRACKET = re.compile(TEXT + rb"|[\[\]{}]", re.DOTALL)
PLAIN_VALUE = re.compile(TEXT + rb'|[^\s,\[\]{}"]+', re.DOTALL)
# This cannot match inside a string: quotes in a string are written \".
WHOLE_NUMBER_AS_FLOAT = re.compile(
    rb'("(?:id|image_id|category_id|width|height|iscrowd)"\s*:\s*)(-?\d{1,20}(?:\.\d+)?(?:[eE][+-]?\d{1,2})?)(?=[\s,}])'
)
NO_NUMBER = b'"?"'


class JsonObject(Struct):
    """Any object; nothing of it is kept, where msgspec.Raw would copy its text."""


class JsonArray(Struct, array_like=True):
    """Any array; nothing of it is kept."""


def mask_nan(data: bytes | memoryview, first: int) -> bytearray:
    """`data` with a string of the same length in place of NaN and Infinity, which Python writes but JSON lacks.

    first: offset from which to look, outside strings.  After a backslash it is inside one, and nothing is replaced.
    """
    masked_text = bytearray(data)
    escaped = data[first - 1 : first] == b"\\"
    if not escaped and (b"NaN" in masked_text or b"Infinity" in masked_text):
        for token in TEXT_OR_NAN.finditer(data, first):
            if token[1]:
                start, end = token.span()
                masked_text[start:end] = NO_NUMBER.ljust(end - start)
    return masked_text


def whole_numbers_as_int(masked_text: bytearray) -> bytes:
    """`masked_text` with 1 for 1.0 and 100000 for 1e+05 in fields of whole numbers: some programs write floats there.

    Converts with decimals, because a float cannot hold every 64-bit number.
    """
    return WHOLE_NUMBER_AS_FLOAT.sub(lambda found: found[1] + _as_int(found[2]), masked_text)


def _as_int(text: bytes) -> bytes:
    number = Decimal(text.decode())
    return b"%d" % int(number) if number == number.to_integral_value() else text


def after_space(data: memoryview, offset: int) -> int:
    """The first offset from `offset` on that holds no white space."""
    found = NO_SPACE.search(data, offset)
    return found.start() if found else len(data)


def value_end_from_error(error: DecodeError) -> int | None:
    """The offset after the value, for msgspec's "trailing characters", which names the byte behind it; else None."""
    end = re.search(r"trailing characters \(byte (\d+)\)", str(error))
    return int(end[1]) - 1 if end else None


def value_end(data: memoryview, offset: int) -> int | None:
    """The offset of the text that follows the value at `offset`; None if that is no JSON, even without NaN."""
    kind = {b"{": JsonObject, b"[": JsonArray}.get(bytes(data[offset : offset + 1]), Raw)
    try:
        msgspec.json.decode(data[offset:], type=kind)
    except DecodeError as error:
        end = value_end_from_error(error)
        return _end_with_nan(data, offset) if end is None else offset + end
    except RecursionError:
        return None
    return len(data)


def _end_with_nan(data: memoryview, offset: int) -> int | None:
    end = _end_by_brackets(data, offset)
    if end is None:
        return None
    try:
        msgspec.json.decode(mask_nan(data[offset:end], 0), type=Raw)
    except (DecodeError, RecursionError):
        return None
    return after_space(data, end)


def _end_by_brackets(data: memoryview, offset: int) -> int | None:
    """The end of the value at `offset`, found by counting brackets."""
    if data[offset : offset + 1] not in (b"[", b"{"):
        plain = PLAIN_VALUE.match(data, offset)
        return plain.end() if plain else None
    depth = 0
    for token in TEXT_OR_BRACKET.finditer(data, offset):
        byte = data[token.start()]
        depth += (byte in b"[{") - (byte in b"]}")
        if depth == 0:
            return token.end()
    return None


# --- errors ----------------------------------------------------------------------------------------------------------


def raise_wrong_entry(path: Path, list_name: str, first_index: int, text: bytes, problem: str) -> NoReturn:
    """Raises DataError for the decoder's message about a chunk, such as: Expected `int`, got `str` - at `$[0].id`.

    first_index: of the chunk's first entry in its list.
    """
    problem, _, place = problem.partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", problem)
    steps = re.findall(r"\w+", place) + ([missing[1]] if missing else [])
    index, field = int(steps[0]), steps[1] if len(steps) > 1 else None
    entry = _entry(text, index)
    name = describe(list_name, first_index + index, entry)
    if not field:
        raise DataError(f"{path}: {name} must be an object with {', '.join(FIELD_HELP[list_name])}")
    expected = FIELD_HELP[list_name][field]
    if missing:
        raise DataError(f"{path}: {name} has no {field}: it must be {expected}")
    value = f" is {_short(entry[field])}" if isinstance(entry, dict) and field in entry else ""
    raise DataError(f"{path}: {field}{value} in {name}: it must be {expected}")


def describe(list_name: str, index: int, entry: Any) -> str:
    """Names an entry, with its id and file name if it has them: images[3] (id 7, file_name a.jpg)."""
    known = [f"{key} {_short(entry[key])}" for key in ("id", "file_name") if isinstance(entry, dict) and key in entry]
    return f"{list_name}[{index}]" + (f" ({', '.join(known)})" if known else "")


def _entry(text: bytes, index: int) -> Any:
    """An entry as Python's JSON reader returns it, which accepts NaN; None if it cannot be read."""
    view = memoryview(text)
    offset: int | None = after_space(view, 1)
    for _ in range(index):
        offset = value_end(view, offset) if offset is not None else None
        offset = after_space(view, offset + 1) if offset is not None else None  # past the comma
    if offset is None:
        return None
    end = _end_by_brackets(view, offset)
    try:
        return json.loads(text[offset:end])
    except (ValueError, RecursionError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def raise_missing(path: Path, list_name: str) -> NoReturn:
    raise DataError(f"{path}: has no `{list_name}`: it must be a COCO file of instances")


def raise_wrong_top_level(path: Path, list_name: str | None, problem: str) -> NoReturn:
    """Raises DataError for the decoder's message about a value of the wrong type: Expected `array`, got `null`."""
    found = problem.rpartition("got ")[2].strip("`")
    if list_name:
        raise DataError(f"{path}: `{list_name}` is of type {found}: it must be a list of objects")
    raise DataError(f"{path}: is of type {found}: it must be an object with {', '.join(LIST_NAMES)}")


def raise_too_deep(path: Path) -> NoReturn:
    raise DataError(f"{path}: is nested too deeply for a COCO annotation file")


def is_not_utf8(error: DecodeError | UnicodeDecodeError) -> bool:
    """Whether a string is no UTF-8: msgspec raises UnicodeDecodeError since 0.23, before it DecodeError."""
    return isinstance(error, UnicodeDecodeError) or "UTF-8" in str(error)


def raise_not_utf8(path: Path, data: memoryview) -> NoReturn:
    """Raises DataError that names the first byte of the file that is no UTF-8."""
    decoder = getincrementaldecoder("utf-8")()
    for start in range(0, len(data), BLOCK):
        block = bytes(data[start : start + BLOCK])
        try:
            decoder.decode(block, final=start + BLOCK >= len(data))
        except UnicodeDecodeError as error:  # its object is the block after the unfinished bytes of the one before
            _raise_at(path, data, start + len(block) - len(error.object) + error.start, "text that is not UTF-8")
    raise AssertionError(f"{path}: UTF-8 was refused")


def raise_malformed(path: Path, data: memoryview, start: int, problem: str) -> NoReturn:
    """Raises DataError for the decoder's message, such as: JSON is malformed: trailing characters (byte 51).

    start: offset in the file of the text that the decoder read.
    """
    found = re.search(r"(.*) \(byte (\d+)\)", problem)
    if not found:
        raise DataError(f"{path}: ends in the middle of its JSON text ({len(data)} bytes): copy it again")
    _raise_at(path, data, start + int(found[2]), found[1])


def _raise_at(path: Path, data: memoryview, offset: int, problem: str) -> NoReturn:
    begin = len(BYTE_ORDER_MARK) if data[:3] == BYTE_ORDER_MARK else 0
    line, line_start = 1, begin
    for start in range(begin, offset, BLOCK):
        block = bytes(data[start : min(start + BLOCK, offset)])
        line += block.count(b"\n")
        if b"\n" in block:
            line_start = start + block.rfind(b"\n") + 1
    around = bytes(data[max(begin, offset - 40) : offset + 20]).decode(errors="replace")
    raise DataError(
        f"{path}: {problem} at line {line}, column {offset - line_start + 1} (byte {offset}), around {_short(around)}"
    )

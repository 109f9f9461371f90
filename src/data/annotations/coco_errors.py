"""What is wrong with an annotation file, and where: errors that name the file, the entry, the field and what to do.

What msgspec refuses is looked at a second time, slowly, for a message that a user can act on.
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

LONGEST_SIDE = 2**24  # pixels; up to there float32 tells whole numbers apart
LEAST_ID, LARGEST_ID = -(2**63), 2**63 - 1
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLOCK = 2**20  # bytes of a file that are looked at together

ID = f"a whole number of at most 64 bits ({LEAST_ID} to {LARGEST_ID})"
SIDE = f"in pixels, a whole number from 1 to {LONGEST_SIDE}"
WANTED = {
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

SPACE = rb"[ \t\n\r]*"
NO_SPACE = re.compile(rb"[^ \t\n\r]")
TEXT = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
TEXT_OR_NAN = re.compile(TEXT + rb"?|(NaN|-?Infinity)", re.DOTALL)  # a text that is cut off lasts to the end
TEXT_OR_BRACKET = re.compile(TEXT + rb"|[\[\]{}]", re.DOTALL)
PLAIN_VALUE = re.compile(TEXT + rb'|[^\s,\[\]{}"]+', re.DOTALL)
# No text can hold this: the quotes in it would be written \".
WHOLE_NUMBER_AS_FLOAT = re.compile(
    rb'("(?:id|image_id|category_id|width|height|iscrowd)"\s*:\s*)(-?\d{1,20}(?:\.\d+)?(?:[eE][+-]?\d{1,2})?)(?=[\s,}])'
)
NO_NUMBER = b'"?"'


class Object(Struct):
    """Any object, none of it kept: msgspec would copy the text for a Raw."""


class Array(Struct, array_like=True):
    """Any array, likewise."""


def mask_nan(data: bytes | memoryview, first: int) -> bytearray:
    """`data` with a text of the same length in place of NaN and Infinity, which Python writes and JSON has not.

    first: where the first can be, not inside a text; behind a backslash it is in one, and nothing is replaced.
    """
    readable = bytearray(data)
    escaped = data[first - 1 : first] == b"\\"
    if not escaped and (b"NaN" in readable or b"Infinity" in readable):
        for token in TEXT_OR_NAN.finditer(data, first):
            if token[1]:
                start, end = token.span()
                readable[start:end] = NO_NUMBER.ljust(end - start)
    return readable


def whole_numbers_as_int(readable: bytearray) -> bytes:
    """`readable` with 1 in place of 1.0 and 100000 of 1e+05 where a whole number is wanted.

    Some programs write all numbers so.  In decimals, because a float does not hold each of 64 bits.
    """
    return WHOLE_NUMBER_AS_FLOAT.sub(lambda found: found[1] + _as_int(found[2]), readable)


def _as_int(text: bytes) -> bytes:
    number = Decimal(text.decode())
    return b"%d" % int(number) if number == number.to_integral_value() else text


def after_space(data: memoryview, place: int) -> int:
    """The first place from `place` on that holds no white space."""
    found = NO_SPACE.search(data, place)
    return found.start() if found else len(data)


def end_of(error: DecodeError) -> int | None:
    """Where what follows the value begins, of which msgspec tells the byte after the first; None for other faults."""
    end = re.search(r"trailing characters \(byte (\d+)\)", str(error))
    return int(end[1]) - 1 if end else None


def value_end(data: memoryview, place: int) -> int | None:
    """Where what follows the value at `place` begins; None where that is no JSON, nor would be without NaN."""
    kind = {b"{": Object, b"[": Array}.get(bytes(data[place : place + 1]), Raw)
    try:
        msgspec.json.decode(data[place:], type=kind)
    except DecodeError as error:
        end = end_of(error)
        return _end_with_nan(data, place) if end is None else place + end
    except RecursionError:
        return None
    return len(data)


def _end_with_nan(data: memoryview, place: int) -> int | None:
    end = _closed(data, place)
    if end is None:
        return None
    try:
        msgspec.json.decode(mask_nan(data[place:end], 0), type=Raw)
    except (DecodeError, RecursionError):
        return None
    return after_space(data, end)


def _closed(data: memoryview, place: int) -> int | None:
    """Where the value at `place` ends, found by its brackets alone."""
    if data[place : place + 1] not in (b"[", b"{"):
        plain = PLAIN_VALUE.match(data, place)
        return plain.end() if plain else None
    depth = 0
    for token in TEXT_OR_BRACKET.finditer(data, place):
        byte = data[token.start()]
        depth += (byte in b"[{") - (byte in b"]}")
        if depth == 0:
            return token.end()
    return None


# --- errors ----------------------------------------------------------------------------------------------------------


def raise_wrong_entry(path: Path, part: str, first: int, text: bytes, problem: str) -> NoReturn:
    """Raises DataError for what the decoder said of a list's piece, such as: Expected `int`, got `str` - at `$[0].id`.

    first: how many entries of the list came before.
    """
    problem, _, place = problem.partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", problem)
    steps = re.findall(r"\w+", place) + ([missing[1]] if missing else [])
    index, field = int(steps[0]), steps[1] if len(steps) > 1 else None
    entry = _entry(text, index)
    name = describe(part, first + index, entry)
    if not field:
        raise DataError(f"{path}: {name} must be an object with {', '.join(WANTED[part])}")
    wanted = WANTED[part][field]
    if missing:
        raise DataError(f"{path}: {name} has no {field}: it must be {wanted}")
    value = f" is {_short(entry[field])}" if isinstance(entry, dict) and field in entry else ""
    raise DataError(f"{path}: {field}{value} in {name}: it must be {wanted}")


def describe(part: str, index: int, entry: Any) -> str:
    """An entry's position, with its id and file name where it has them: images[3] (id 7, file_name a.jpg)."""
    known = [f"{key} {_short(entry[key])}" for key in ("id", "file_name") if isinstance(entry, dict) and key in entry]
    return f"{part}[{index}]" + (f" ({', '.join(known)})" if known else "")


def _entry(text: bytes, index: int) -> Any:
    """An entry as Python's JSON reader has it, which knows NaN; None where it cannot be had."""
    view = memoryview(text)
    place: int | None = after_space(view, 1)
    for _ in range(index):
        place = value_end(view, place) if place is not None else None
        place = after_space(view, place + 1) if place is not None else None  # the comma stands between
    if place is None:
        return None
    end = _closed(view, place)
    try:
        return json.loads(text[place:end])
    except (ValueError, RecursionError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def raise_missing(path: Path, part: str) -> NoReturn:
    raise DataError(f"{path}: has no `{part}`: it must be a COCO file of instances")


def raise_wrong_outline(path: Path, part: str | None, problem: str) -> NoReturn:
    """Raises DataError for a value of the wrong type, of which the decoder said: Expected `array`, got `null`."""
    found = problem.rpartition("got ")[2].strip("`")
    if part:
        raise DataError(f"{path}: `{part}` is of type {found}: it must be a list of objects")
    raise DataError(f"{path}: is of type {found}: it must be an object with {', '.join(WANTED)}")


def raise_too_deep(path: Path) -> NoReturn:
    raise DataError(f"{path}: is nested too deeply for a COCO annotation file")


def is_not_utf8(error: DecodeError | UnicodeDecodeError) -> bool:
    """Whether a text that is wanted is no UTF-8; msgspec raises the one for that since 0.23, before it the other."""
    return isinstance(error, UnicodeDecodeError) or "UTF-8" in str(error)


def raise_not_utf8(path: Path, data: memoryview) -> NoReturn:
    """Raises DataError that names the first place in the file which is no UTF-8."""
    decoder = getincrementaldecoder("utf-8")()
    for start in range(0, len(data), BLOCK):
        block = bytes(data[start : start + BLOCK])
        try:
            decoder.decode(block, final=start + BLOCK >= len(data))
        except UnicodeDecodeError as error:  # of the block with what was left of the last one before it
            _raise_at(path, data, start + len(block) - len(error.object) + error.start, "text that is not UTF-8")
    raise AssertionError(f"{path}: UTF-8 was taken for none")


def raise_malformed(path: Path, data: memoryview, start: int, problem: str) -> NoReturn:
    """Raises DataError for what the decoder said, such as: JSON is malformed: trailing characters (byte 51).

    start: where in the file the text begins that the decoder had.
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

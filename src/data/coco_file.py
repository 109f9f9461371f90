"""A COCO annotation file decoded into typed entries; an error names the file, the entry, the field and what to do.

msgspec checks types while it reads and skips what is not asked for (segmentations, captions, licences). What it
refuses is looked at a second time, slowly, for a message that a user can act on.
"""

import json
import mmap
import re
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn

import msgspec
from msgspec import DecodeError, Meta, Raw, Struct, ValidationError

from src.errors import DataError

LONGEST_SIDE = 2**24  # pixels; up to there float32 tells whole numbers apart
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

NO_ATTRIBUTES = Raw()

Id = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Side = Annotated[int, Meta(ge=1, le=LONGEST_SIDE)]


class Box(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """`bbox`, in pixels."""

    x: float
    y: float
    width: float
    height: float


class ImageEntry(Struct, gc=False):
    id: Id
    file_name: Annotated[str, Meta(min_length=1)]
    width: Side
    height: Side


class AnnotationEntry(Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: Box
    id: Id | None = None
    area: float | None = None
    iscrowd: int | bool | None = 0
    attributes: Raw = NO_ATTRIBUTES  # CVAT's, which may say that a box is to be turned


class CategoryEntry(Struct, gc=False):
    id: Id
    name: str


class Content(Struct):
    """What is read of an annotation file."""

    images: list[ImageEntry]
    annotations: list[AnnotationEntry]
    categories: list[CategoryEntry]


class _TupleEntry(AnnotationEntry, gc=False):
    bbox: tuple[float, float, float, float]  # type: ignore[assignment]  # the same numbers in another form


class _TupleContent(Content):
    annotations: list[_TupleEntry]  # type: ignore[assignment]


class _Parts(Struct):
    """The same as Content, not looked into."""

    images: Raw = Raw(b"[]")
    annotations: Raw = Raw(b"[]")
    categories: Raw = Raw(b"[]")


ID = f"a whole number of at most 64 bits ({-(2**63)} to {2**63 - 1})"
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


def decode_file(path: Path) -> Content:
    """The entries of an annotation file; numbers are finite and ids fit int64.

    A byte-order mark is passed over, as are NaN and Infinity in fields that are not read.  Raises DataError.
    """
    try:
        with path.open("rb") as stream:
            data = _mapped(stream)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path.absolute()}: no such annotation file: --data must be a folder in the COCO 2017 layout"
        ) from None
    except OSError as error:
        raise DataError(f"{path.absolute()}: the annotation file cannot be read ({error.strerror})") from None
    start = len(BYTE_ORDER_MARK) if data[:3] == BYTE_ORDER_MARK else 0
    if data[:2] in UTF16_MARKS:
        raise DataError(f"{path}: is UTF-16 text: save it as UTF-8")
    if not bytes(data[:4096]).strip():
        raise DataError(f"{path}: is empty: it must be a COCO annotation file")
    return _decode(path, memoryview(data)[start:], start)


def _mapped(stream: BinaryIO) -> mmap.mmap | bytes:
    """The file's bytes, shared by all processes that read it where the file system can do so."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # a pipe, or an empty file
        return stream.read()


def _decode(path: Path, data: memoryview, start: int) -> Content:
    """Decodes `data`, which begins `start` bytes into the file."""
    try:
        return msgspec.json.decode(data, type=Content)
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:
        place = re.search(r"\(byte (\d+)\)", str(error))
    return _decode_carefully(path, data, start, int(place[1]) if place else 0)


# --- what is wrong, and where ----------------------------------------------------------------------------------------

TEXT_OR_NAN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|NaN|-?Infinity', re.DOTALL)
NO_NUMBER = b'"?"'


def _without_nan(data: memoryview, first: int) -> bytearray:
    """`data` with a text of the same length in place of NaN and Infinity, which Python writes and JSON has not.

    first: where the first can be; not inside a text.
    """
    readable = bytearray(data)
    if b"NaN" in readable or b"Infinity" in readable:
        for token in TEXT_OR_NAN.finditer(data, first):
            start, end = token.span()
            if data[start] != ord('"'):
                readable[start:end] = NO_NUMBER.ljust(end - start)
    return readable


# No text can hold this: the quotes in it would be written \".
FRACTION_OF_NOTHING = re.compile(rb'"(?:id|image_id|category_id|width|height|iscrowd)"\s*:\s*-?\d+(\.0+)(?=[\s,}])')


def _without_empty_fractions(readable: bytearray, data: memoryview) -> bytearray:
    """`readable` with 1 in place of 1.0 where a whole number is wanted: some programs write all numbers so."""
    for found in FRACTION_OF_NOTHING.finditer(data):
        start, end = found.span(1)
        readable[start:end] = b" " * (end - start)
    return readable


def _decode_carefully(path: Path, data: memoryview, start: int, refused: int) -> Content:
    """Decodes what holds NaN or 1.0 for 1; raises DataError for what is wrong.

    refused: the byte that the decoder refused, 0 where it has not told; of -Infinity it is the second one.
    """
    readable = _without_empty_fractions(_without_nan(data, max(0, refused - 1)), data)
    try:
        return msgspec.json.decode(readable, type=Content)
    except ValidationError as error:
        _raise_located(path, data, readable, _with_place(readable, error))
    except DecodeError as error:
        _raise_malformed(path, data, start, str(error))
    except UnicodeDecodeError as error:
        offset = readable.find(error.object) + error.start
        _raise_malformed(path, data, start, f"text that is not UTF-8 (byte {offset})")
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply for a COCO annotation file") from None


def _with_place(readable: bytearray, error: ValidationError) -> str:
    """What the decoder says; of a box with too many numbers it tells the place only when that is a tuple."""
    try:
        msgspec.json.decode(readable, type=_TupleContent)
    except ValidationError as placed:
        return str(placed)
    return str(error)


def _raise_located(path: Path, data: memoryview, readable: bytearray, problem: str) -> NoReturn:
    """Raises DataError for what the decoder said, such as: Expected `int`, got `str` - at `$.images[0].id`."""
    problem, _, place = problem.partition(" - at `$")
    missing = re.search(r"missing required field `(\w+)`", problem)
    steps = re.findall(r"\w+", place) + ([missing[1]] if missing else [])
    if len(steps) < 2:
        _raise_wrong_outline(path, steps[0] if steps else None, problem)
    part, index = steps[0], int(steps[1])
    field = steps[2] if len(steps) > 2 else None
    entry = _entry(data, readable, part, index)
    name = describe(part, index, entry)
    if not field:
        raise DataError(f"{path}: {name} must be an object with {', '.join(WANTED[part])}")
    wanted = WANTED[part][field]
    if missing:
        raise DataError(f"{path}: {name} has no {field}: it must be {wanted}")
    value = f" is {_short(entry[field])}" if isinstance(entry, dict) and field in entry else ""
    raise DataError(f"{path}: {field}{value} in {name}: it must be {wanted}")


def _raise_wrong_outline(path: Path, part: str | None, problem: str) -> NoReturn:
    if "missing" in problem:
        raise DataError(f"{path}: has no `{part}`: it must be a COCO file of instances")
    found = problem.rpartition("got ")[2].strip("`")
    if part:
        raise DataError(f"{path}: `{part}` is of type {found}: it must be a list of objects")
    raise DataError(f"{path}: is of type {found}: it must be an object with {', '.join(WANTED)}")


def describe(part: str, index: int, entry: Any) -> str:
    """An entry's position, with its id and file name where it has them: images[3] (id 7, file_name a.jpg)."""
    known = [f"{key} {_short(entry[key])}" for key in ("id", "file_name") if isinstance(entry, dict) and key in entry]
    return f"{part}[{index}]" + (f" ({', '.join(known)})" if known else "")


def _entry(data: memoryview, readable: bytearray, part: str, index: int) -> Any:
    """An entry as Python's JSON reader has it, which knows NaN; None where it cannot be had."""
    try:
        parts = msgspec.json.decode(readable, type=_Parts)
        entry = bytes(msgspec.json.decode(getattr(parts, part), type=list[Raw])[index])
        start = readable.find(entry)
        return json.loads(bytes(data[start : start + len(entry)]))
    except (ValueError, IndexError, RecursionError):
        return None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _raise_malformed(path: Path, data: memoryview, start: int, problem: str) -> NoReturn:
    """Raises DataError for what the decoder said, such as: JSON is malformed: trailing characters (byte 51)."""
    found = re.search(r"(.*) \(byte (\d+)\)", problem)
    if not found:
        raise DataError(f"{path}: ends in the middle of its JSON text ({len(data) + start} bytes): copy it again")
    offset = int(found[2])
    before = bytes(data[:offset])
    line = before.count(b"\n") + 1
    column = offset - (before.rfind(b"\n") + 1) + 1
    around = bytes(data[max(0, offset - 40) : offset + 20]).decode(errors="replace")
    raise DataError(
        f"{path}: {found[1]} at line {line}, column {column} (byte {offset + start}), around {_short(around)}"
    )

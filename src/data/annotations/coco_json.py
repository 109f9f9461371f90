"""A COCO annotation file's lists as typed entries, a piece at a time, so that no list is ever whole in memory.

msgspec checks types while it reads and skips what is not asked for (segmentations, captions, licences).  It cannot stop
in the middle of a list, so the text is cut between two entries and a piece is decoded as a list of its own.  Where a
`}, {` is such a cut cannot be seen from nearby, as it may stand in a text or in an entry's own list; but JSON leaves
no choice: a piece that starts with an entry and is a whole list, once brackets are put around it, ends with one.
"""

import mmap
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, NoReturn

import msgspec
from msgspec import DecodeError, Meta, Raw, Struct, ValidationError

from src.data.annotations.coco_errors import (
    BYTE_ORDER_MARK,
    LARGEST_ID,
    LEAST_ID,
    LONGEST_SIDE,
    SPACE,
    WANTED,
    Array,
    Object,
    after_space,
    end_of,
    is_not_utf8,
    mask_nan,
    raise_malformed,
    raise_missing,
    raise_not_utf8,
    raise_too_deep,
    raise_wrong_entry,
    raise_wrong_outline,
    value_end,
    whole_numbers_as_int,
)
from src.runtime.errors import DataError

# Bytes of the file decoded at once.  With a quarter of it, reading ten times COCO took half as long again: the entries
# then lie scattered in memory that is used over and over.
PIECE = 2**24
TRIES = 8  # places to cut that are tried before a piece is made twice as large
WHITE_SPACE = BYTE_ORDER_MARK + b" \t\r\n"
OTHER_FILES = {
    b"\x1f\x8b": "a gzip archive: unpack it with gunzip",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it with bunzip2",
    b"\xfd7zXZ": "an xz archive: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it with unzstd",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<": "an HTML or XML page, not JSON: download the annotation file again",
}
# Once a cut was wrong, only a place counts behind which so many bytes of objects follow one another: the lists inside
# entries are mostly shorter. Each wrong cut doubles it, so that a file has about ten of them at most.
# At first it is this share of a piece, 64 KiB. 200 MB of such entries take 1.44 of a plain file's time.
SIBLINGS_SHARE = 256
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

NO_ATTRIBUTES = Raw()

Id = Annotated[int, Meta(ge=LEAST_ID, le=LARGEST_ID)]
Side = Annotated[int, Meta(ge=1, le=LONGEST_SIDE)]


Box = tuple[float, float, float, float]  # x, y, width, height in pixels


class ImageEntry(Struct, gc=False):
    id: Id
    file_name: Annotated[str, Meta(min_length=1)]
    width: Side
    height: Side


class AnnotationEntry(Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: Box
    id: Any = None  # for messages alone: other programs write UUIDs and other texts
    area: Any = None  # of no use unless it is a number
    iscrowd: int | bool | None = 0
    attributes: Raw = NO_ATTRIBUTES  # CVAT's, which may say that a box is to be turned


class CategoryEntry(Struct, gc=False):
    id: Id
    name: str


DECODERS: dict[str, msgspec.json.Decoder] = {
    "images": msgspec.json.Decoder(list[ImageEntry]),
    "annotations": msgspec.json.Decoder(list[AnnotationEntry]),
    "categories": msgspec.json.Decoder(list[CategoryEntry]),
}


class Piece(NamedTuple):
    """Some entries of one of the file's lists."""

    part: str  # which: a key of WANTED
    first: int  # how many entries of the list came before; 0: the list begins
    entries: list


def pieces(path: Path) -> Iterator[Piece]:
    """The file's images, annotations and categories; numbers are finite and ids fit int64.

    Annotations come after the images, whatever the file's order; a list that begins again replaces what was there.
    A byte-order mark is passed over, as are NaN and Infinity in fields that are not read.  Raises DataError.
    """
    try:
        with path.open("rb") as stream:
            data = _mapped(stream)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path.absolute()}: no such annotation file: --data must be a folder in the COCO 2017 layout "
            "(annotations/instances_train2017.json, train2017) or in Roboflow's (train/_annotations.coco.json)"
        ) from None
    except OSError as error:
        raise DataError(f"{path.absolute()}: the annotation file cannot be read ({error.strerror})") from None
    for beginning, what in OTHER_FILES.items():
        if bytes(data[:64]).lstrip(WHITE_SPACE).startswith(beginning):
            raise DataError(f"{path}: is {what}")
    if data[:2] in UTF16_MARKS:
        raise DataError(f"{path}: is UTF-16 text: save it as UTF-8")
    if not bytes(data[:4096]).strip():
        raise DataError(f"{path}: is empty: it must be a COCO annotation file")
    yield from _Reader(path, memoryview(data)).pieces()


def _mapped(stream: BinaryIO) -> mmap.mmap | bytes:
    """The file's bytes, shared by all processes that read it where the file system can do so."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # a pipe, or an empty file
        return stream.read()


KEY = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")' + SPACE + b":" + SPACE, re.DOTALL)
FIRST_KEY = re.compile(SPACE + rb"\{" + SPACE + rb'("[^"\\]{0,99}")')


class _Reader:
    """Goes through the file's outermost object, a value after another."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.start = len(BYTE_ORDER_MARK) if data[:3] == BYTE_ORDER_MARK else 0
        self.place = self.start  # of the next byte to be read
        self.siblings_length = 0  # bytes of objects in a row that make a likely cut

    def pieces(self) -> Iterator[Piece]:
        places: dict[str, int] = {}
        late: int | None = None  # where annotations begin that are still to be read
        self._pass_space()
        self._take(b"{")
        for key in self._keys():
            place = self.place
            if key == "annotations" and "images" not in places:
                late = place
            if key not in WANTED or late == place:
                self._skip()
            else:
                yield from self._list(key)
                if key == "images":  # the boxes depend on them
                    late = places.get("annotations")
                elif key == "annotations":
                    late = None
            if key in WANTED:
                places[key] = place
        for part in WANTED:
            if part not in places:
                raise_missing(self.path, part)
        if late is not None:
            self.place = late
            yield from self._list("annotations")

    def _keys(self) -> Iterator[str]:
        """The outermost object's keys; before the next is taken, `place` must have been moved past the value."""
        if not self._next_is(b"}"):
            while True:
                key = KEY.match(self.data, self.place)
                if not key:
                    self._raise_outline()
                self.place = key.end()
                try:
                    name = msgspec.json.decode(key[1], type=str)
                except (DecodeError, UnicodeDecodeError) as error:
                    if not is_not_utf8(error):
                        self._raise_outline()
                    name = ""  # none of ours
                yield name
                self._pass_space()
                if not self._next_is(b","):
                    break
                self._take(b",")
        self._take(b"}")
        if self.place < len(self.data):
            self._raise_outline()

    def _next_is(self, byte: bytes) -> bool:
        return self.data[self.place : self.place + 1] == byte

    def _take(self, byte: bytes) -> None:
        if not self._next_is(byte):
            self._raise_outline()
        self.place += 1
        self._pass_space()

    def _pass_space(self) -> None:
        self.place = after_space(self.data, self.place)

    def _skip(self) -> None:
        """Moves past a value that is not looked into."""
        end = value_end(self.data, self.place)
        if end is None:
            self._raise_outline()
        self.place = end

    def _list(self, part: str) -> Iterator[Piece]:
        if not self._next_is(b"["):
            self._raise_no_list(part)
        self.place += 1
        first, ended = 0, False
        while not ended:
            entries, ended = self._next_entries(part, first)
            yield Piece(part, first, entries)
            first += len(entries)

    def _next_entries(self, part: str, first: int) -> tuple[list, bool]:
        """Some more entries of a list, and whether they are its last; moves past them."""
        for end, following in self._cuts():
            text = b"".join((b"[", self.data[self.place : end], b"" if following is None else b"]"))
            entries, length = self._decoded(part, first, text, whole=following is None)
            if entries is not None and length is None and following is not None:
                self.place = following
                return entries, False
            if entries is not None:
                self.place += (length or len(text)) - 1
                return entries, True
        raise AssertionError  # what reaches to the end of the file is decoded or refused

    def _cuts(self) -> Iterator[tuple[int, int | None]]:
        """Where a piece may end and the next begin, which remains to be seen; at last the file's end and None."""
        first_key = FIRST_KEY.match(self.data, self.place)  # entries mostly begin alike
        likely = _between(first_key[1] if first_key else b"")
        length = PIECE
        while self.place + length < len(self.data):
            window = self.place + length, self.place + 2 * length
            any_object = islice(self._likely_cuts(_between(b""), window), 1)
            for cut in chain(self._likely_cuts(likely, window), any_object):
                yield cut
                # It was no cut: an entry holds a list of objects that begin like entries.
                self.siblings_length = max(PIECE // SIBLINGS_SHARE, 2 * self.siblings_length)
            length *= 2
        yield len(self.data), None

    def _likely_cuts(self, between: re.Pattern[bytes], window: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Up to TRIES matches behind which objects follow one another for `siblings_length` bytes."""
        passed, found = 0, 0
        for match in between.finditer(self.data, *window):
            if match.start() < passed:
                continue
            passed = self._siblings_end(match.end())
            if passed - match.end() >= self.siblings_length:
                found += 1
                yield match.start() + 1, match.end()
                if found == TRIES:
                    return

    def _siblings_end(self, place: int) -> int:
        """Where the objects that follow one another from `place` on end, or `siblings_length` bytes have passed."""
        limit = place + self.siblings_length
        while place < limit:
            end = value_end(self.data, place)
            if end is None or self.data[end : end + 1] != b",":
                return place
            place = after_space(self.data, end + 1)
        return place

    def _decoded(self, part: str, first: int, text: bytes, *, whole: bool) -> tuple[list | None, int | None]:
        """The entries that `text` holds, and its length up to the list's end where that is in it.

        None where it is cut in a wrong place; whole: it is not, as it reaches to the end of the file.
        """
        try:
            try:
                return _entries(DECODERS[part], text)
            except DecodeError as error:
                readable = mask_nan(text, max(0, _refused(error) - 1))
            try:
                return _entries(DECODERS[part], readable)
            except ValidationError:
                length = _array_length(readable)
                return DECODERS[part].decode(whole_numbers_as_int(readable[:length])), length
        except ValidationError as error:
            raise_wrong_entry(self.path, part, first, text, str(error))
        except (DecodeError, UnicodeDecodeError) as error:
            if is_not_utf8(error):
                raise_not_utf8(self.path, self.data)
            if not whole and not 0 <= _refused(error) < len(text) - 1:
                return None, None
            raise_malformed(self.path, self.data, self.place - 1, str(error))
        except RecursionError:
            raise_too_deep(self.path)

    def _raise_no_list(self, part: str) -> NoReturn:
        end = value_end(self.data, self.place)
        if end is None:
            self._raise_outline()
        try:
            msgspec.json.decode(mask_nan(self.data[self.place : end], 0), type=Array)
        except ValidationError as error:
            raise_wrong_outline(self.path, part, str(error))
        raise AssertionError(f"{self.path}: a list was taken for none at byte {self.place}")

    def _raise_outline(self) -> NoReturn:
        """Raises DataError for what is wrong outside the lists."""
        text = self.data[self.start :]
        try:
            try:
                msgspec.json.decode(text, type=Object)
            except DecodeError as error:
                msgspec.json.decode(mask_nan(text, max(0, _refused(error) - 1)), type=Object)
        except ValidationError as error:
            raise_wrong_outline(self.path, None, str(error))
        except DecodeError as error:
            raise_malformed(self.path, self.data, self.start, str(error))
        except RecursionError:
            raise_too_deep(self.path)
        raise AssertionError(f"{self.path}: what msgspec reads was refused at byte {self.place}")


@cache
def _between(key: bytes) -> re.Pattern[bytes]:
    """What stands between the braces of two entries, the second of which begins with this key."""
    return re.compile(rb"\}" + SPACE + b"," + SPACE + rb"(?=\{" + SPACE + re.escape(key) + b")")


def _entries(decoder: msgspec.json.Decoder, text: bytes | bytearray) -> tuple[list, int | None]:
    """The entries of the list that `text` begins with, and its length where more follows it."""
    try:
        return decoder.decode(text), None
    except DecodeError as error:
        length = end_of(error)
        if length is None:
            raise
        return decoder.decode(memoryview(text)[:length]), length


def _array_length(text: bytes | bytearray) -> int | None:
    """The length of the array that `text` begins with, None where nothing follows it; raises DecodeError."""
    try:
        msgspec.json.decode(text, type=Array)
    except DecodeError as error:
        length = end_of(error)
        if length is None:
            raise
        return length
    return None


def _refused(error: Exception) -> int:
    """The byte that the decoder refused, -1 where it has not told; of -Infinity it is the second one."""
    place = re.search(r"\(byte (\d+)\)", str(error))
    return int(place[1]) if place else -1

"""The lists of a COCO annotation file as typed entries, a chunk at a time, so that no list is in memory as a whole.

msgspec checks types while it reads, and skips fields that are not declared (segmentations, captions, licences).  It
cannot stop inside a list, so the text is cut at a `}, {` between two entries, and each chunk is decoded as a list of
its own.  A `}, {` may also stand inside a string or inside an entry's own list.  The cut is right exactly when the
chunk, put in brackets, parses as a list.
"""

import mmap
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import msgspec
from msgspec import DecodeError, ValidationError

from src.data.annotations.coco_entries import DECODERS
from src.data.annotations.coco_errors import (
    BYTE_ORDER_MARK,
    FIELD_HELP,
    SPACE,
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

# Bytes of the file that are decoded at once.  With a quarter of it, reading ten times COCO took half as long again,
# because the entries then lie scattered in reused memory.
CHUNK_SIZE = 2**24
MAX_TRIES = 8  # cuts that are tried before the chunk's size is doubled
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
# After a wrong cut, a cut is tried only if a run of objects of a certain length follows it: the lists inside entries
# are mostly shorter.  The length starts at CHUNK_SIZE / 256, 64 KiB, and doubles with each wrong cut, so a file has
# about ten wrong cuts at most.  200 MB of entries that hold such lists take 1.44 of a plain file's time.
FIRST_RUN_DIVISOR = 256
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Chunk(NamedTuple):
    """Successive entries of one of the file's lists."""

    list_name: str  # a key of FIELD_HELP
    first: int  # index of the first entry in its list; 0: the list begins
    entries: list


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The file's images, annotations and categories; numbers are finite and ids fit int64.

    Annotations come after the images, whatever their order in the file.  A list that begins a second time replaces the
    first.  Skips a byte-order mark, and NaN and Infinity in fields that are not read.  Raises DataError.
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
    yield from _Reader(path, memoryview(data)).read()


def _mapped(stream: BinaryIO) -> mmap.mmap | bytes:
    """The file's bytes, mapped if possible, so that processes that read the file share them."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # a pipe, or an empty file
        return stream.read()


KEY = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")' + SPACE + b":" + SPACE, re.DOTALL)
FIRST_KEY = re.compile(SPACE + rb"\{" + SPACE + rb'("[^"\\]{0,99}")')


class _Reader:
    """Reads the values of the file's outermost object, one after another."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.start = len(BYTE_ORDER_MARK) if data[:3] == BYTE_ORDER_MARK else 0
        self.offset = self.start  # of the next byte to read
        self.run_length = 0  # bytes of successive objects that must follow a cut

    def read(self) -> Iterator[Chunk]:
        found: dict[str, int] = {}  # offsets of the lists
        deferred_offset: int | None = None  # of annotations that come before the images and are read after them
        self._pass_space()
        self._take(b"{")
        for key in self._keys():
            offset = self.offset
            if key == "annotations" and "images" not in found:
                deferred_offset = offset
            if key not in FIELD_HELP or deferred_offset == offset:
                self._skip()
            else:
                yield from self._list(key)
                if key == "images":  # annotations that were read before must be read again
                    deferred_offset = found.get("annotations")
                elif key == "annotations":
                    deferred_offset = None
            if key in FIELD_HELP:
                found[key] = offset
        for list_name in FIELD_HELP:
            if list_name not in found:
                raise_missing(self.path, list_name)
        if deferred_offset is not None:
            self.offset = deferred_offset
            yield from self._list("annotations")

    def _keys(self) -> Iterator[str]:
        """The outermost object's keys; the caller moves `offset` past each value before it takes the next key."""
        if not self._next_is(b"}"):
            while True:
                key = KEY.match(self.data, self.offset)
                if not key:
                    self._raise_outline()
                self.offset = key.end()
                try:
                    name = msgspec.json.decode(key[1], type=str)
                except (DecodeError, UnicodeDecodeError) as error:
                    if not is_not_utf8(error):
                        self._raise_outline()
                    name = ""  # not one of ours
                yield name
                self._pass_space()
                if not self._next_is(b","):
                    break
                self._take(b",")
        self._take(b"}")
        if self.offset < len(self.data):
            self._raise_outline()

    def _next_is(self, byte: bytes) -> bool:
        return self.data[self.offset : self.offset + 1] == byte

    def _take(self, byte: bytes) -> None:
        if not self._next_is(byte):
            self._raise_outline()
        self.offset += 1
        self._pass_space()

    def _pass_space(self) -> None:
        self.offset = after_space(self.data, self.offset)

    def _skip(self) -> None:
        """Moves past a value that is not needed."""
        end = value_end(self.data, self.offset)
        if end is None:
            self._raise_outline()
        self.offset = end

    def _list(self, list_name: str) -> Iterator[Chunk]:
        if not self._next_is(b"["):
            self._raise_no_list(list_name)
        self.offset += 1
        first, ended = 0, False
        while not ended:
            entries, ended = self._next_entries(list_name, first)
            yield Chunk(list_name, first, entries)
            first += len(entries)

    def _next_entries(self, list_name: str, first: int) -> tuple[list, bool]:
        """The next entries of a list, and whether they are the last; moves past them."""
        for end, following in self._candidate_boundaries():
            text = b"".join((b"[", self.data[self.offset : end], b"" if following is None else b"]"))
            entries, length = self._decode(list_name, first, text, is_rest=following is None)
            if entries is not None and length is None and following is not None:
                self.offset = following
                return entries, False
            if entries is not None:
                self.offset += (length or len(text)) - 1
                return entries, True
        raise AssertionError  # the last candidate reaches to the end of the file: it is decoded or refused

    def _candidate_boundaries(self) -> Iterator[tuple[int, int | None]]:
        """Offsets at which a chunk may end and the next may begin; the last is the end of the file, and None."""
        first_key = FIRST_KEY.match(self.data, self.offset)  # entries mostly begin alike
        same_key = _between(first_key[1] if first_key else b"")
        length = CHUNK_SIZE
        while self.offset + length < len(self.data):
            window = self.offset + length, self.offset + 2 * length
            any_object = islice(self._likely_cuts(_between(b""), window), 1)
            for cut in chain(self._likely_cuts(same_key, window), any_object):
                yield cut
                # A wrong cut: an entry holds a list of objects that begin like entries.
                self.run_length = max(CHUNK_SIZE // FIRST_RUN_DIVISOR, 2 * self.run_length)
            length *= 2
        yield len(self.data), None

    def _likely_cuts(self, between: re.Pattern[bytes], window: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Up to MAX_TRIES matches that `run_length` bytes of successive objects follow."""
        passed, found = 0, 0
        for match in between.finditer(self.data, *window):
            if match.start() < passed:
                continue
            passed = self._run_end(match.end())
            if passed - match.end() >= self.run_length:
                found += 1
                yield match.start() + 1, match.end()
                if found == MAX_TRIES:
                    return

    def _run_end(self, offset: int) -> int:
        """Where a run of successive objects from `offset` on ends; stops looking after `run_length` bytes."""
        limit = offset + self.run_length
        while offset < limit:
            end = value_end(self.data, offset)
            if end is None or self.data[end : end + 1] != b",":
                return offset
            offset = after_space(self.data, end + 1)
        return offset

    def _decode(self, list_name: str, first: int, text: bytes, *, is_rest: bool) -> tuple[list | None, int | None]:
        """The entries in `text`, and the length of `text` up to the list's end if the list ends inside it.

        The entries are None if `text` ends at a wrong cut.  is_rest: `text` is the rest of the file, so it cannot.
        """
        try:
            try:
                return _entries(DECODERS[list_name], text)
            except DecodeError as error:
                readable = mask_nan(text, max(0, _error_offset(error) - 1))
            try:
                return _entries(DECODERS[list_name], readable)
            except ValidationError:
                length = _array_length(readable)
                return DECODERS[list_name].decode(whole_numbers_as_int(readable[:length])), length
        except ValidationError as error:
            raise_wrong_entry(self.path, list_name, first, text, str(error))
        except (DecodeError, UnicodeDecodeError) as error:
            if is_not_utf8(error):
                raise_not_utf8(self.path, self.data)
            if not is_rest and not 0 <= _error_offset(error) < len(text) - 1:
                return None, None
            raise_malformed(self.path, self.data, self.offset - 1, str(error))
        except RecursionError:
            raise_too_deep(self.path)

    def _raise_no_list(self, list_name: str) -> NoReturn:
        end = value_end(self.data, self.offset)
        if end is None:
            self._raise_outline()
        try:
            msgspec.json.decode(mask_nan(self.data[self.offset : end], 0), type=Array)
        except ValidationError as error:
            raise_wrong_outline(self.path, list_name, str(error))
        raise AssertionError(f"{self.path}: a list was not recognised at byte {self.offset}")

    def _raise_outline(self) -> NoReturn:
        """Raises DataError for a fault outside the lists."""
        text = self.data[self.start :]
        try:
            try:
                msgspec.json.decode(text, type=Object)
            except DecodeError as error:
                msgspec.json.decode(mask_nan(text, max(0, _error_offset(error) - 1)), type=Object)
        except ValidationError as error:
            raise_wrong_outline(self.path, None, str(error))
        except DecodeError as error:
            raise_malformed(self.path, self.data, self.start, str(error))
        except RecursionError:
            raise_too_deep(self.path)
        raise AssertionError(f"{self.path}: msgspec reads a file that was refused at byte {self.offset}")


@cache
def _between(key: bytes) -> re.Pattern[bytes]:
    """Matches the text between two entries, of which the second begins with `key`."""
    return re.compile(rb"\}" + SPACE + b"," + SPACE + rb"(?=\{" + SPACE + re.escape(key) + b")")


def _entries(decoder: msgspec.json.Decoder, text: bytes | bytearray) -> tuple[list, int | None]:
    """The entries of the list at the start of `text`, and the list's length if more text follows it."""
    try:
        return decoder.decode(text), None
    except DecodeError as error:
        length = end_of(error)
        if length is None:
            raise
        return decoder.decode(memoryview(text)[:length]), length


def _array_length(text: bytes | bytearray) -> int | None:
    """The length of the array at the start of `text`, None if nothing follows it.  Raises DecodeError."""
    try:
        msgspec.json.decode(text, type=Array)
    except DecodeError as error:
        length = end_of(error)
        if length is None:
            raise
        return length
    return None


def _error_offset(error: Exception) -> int:
    """The offset at which the decoder stopped, -1 if it names none; for -Infinity the second byte."""
    found = re.search(r"\(byte (\d+)\)", str(error))
    return int(found[1]) if found else -1

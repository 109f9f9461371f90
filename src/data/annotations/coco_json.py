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
    LIST_NAMES,
    SPACE_PATTERN,
    JsonArray,
    JsonObject,
    after_space,
    is_not_utf8,
    mask_nan,
    raise_malformed,
    raise_missing,
    raise_not_utf8,
    raise_too_deep,
    raise_wrong_entry,
    raise_wrong_top_level,
    value_end,
    value_end_from_error,
    whole_numbers_as_int,
)
from src.runtime.errors import DataError

# Bytes of the file that are decoded at once.  With 2**22 bytes, a file of ten times COCO took 1.5 times as long to
# read, because the entries then lie scattered in reused memory.
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
# After a wrong cut, further cuts are tried only where many bytes of successive objects follow, because a list inside an
# entry is mostly shorter.  Their number starts at CHUNK_SIZE / 256, 64 KiB, and doubles with each wrong cut, so a file
# has about ten wrong cuts at most.  A 200 MB file whose entries hold lists of objects takes 1.44 times as long to read
# as one whose entries hold none.
FIRST_RUN_DIVISOR = 256
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Chunk(NamedTuple):
    """Successive entries of one of the file's lists."""

    list_name: str  # one of LIST_NAMES
    first_index: int  # of the first entry in its list; 0: the list begins
    entries: list


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The file's images, annotations and categories; numbers are finite and ids fit int64.

    Annotations come after the images, whatever their order in the file.  If a key occurs twice, its second list
    replaces the first.  Skips a byte-order mark, and NaN and Infinity in fields that are not read.  Raises DataError.
    """
    try:
        with path.open("rb") as stream:
            data = _map_or_read(stream)
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


def _map_or_read(stream: BinaryIO) -> mmap.mmap | bytes:
    """The file's bytes, mapped if possible, so that processes that read the file share them."""
    try:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # a pipe, or an empty file
        return stream.read()


KEY = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")' + SPACE_PATTERN + b":" + SPACE_PATTERN, re.DOTALL)
FIRST_KEY = re.compile(SPACE_PATTERN + rb"\{" + SPACE_PATTERN + rb'("[^"\\]{0,99}")')


class _Reader:
    """Reads the values of the file's outermost object, one after another."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.start = len(BYTE_ORDER_MARK) if data[:3] == BYTE_ORDER_MARK else 0
        self.offset = self.start  # of the next byte to read
        self.run_length = 0  # bytes of successive objects that must follow a cut

    def read(self) -> Iterator[Chunk]:
        list_offsets: dict[str, int] = {}
        deferred_offset: int | None = None  # of annotations that come before the images and are read after them
        self._pass_space()
        self._take(b"{")
        for key in self._keys():
            offset = self.offset
            if key == "annotations" and "images" not in list_offsets:
                deferred_offset = offset
            if key not in LIST_NAMES or deferred_offset == offset:
                self._skip()
            else:
                yield from self._read_list(key)
                # Annotations are matched to the images and clipped to their sizes, so those before this list are read
                # after it, even if they were read already.
                if key == "images":
                    deferred_offset = list_offsets.get("annotations")
                elif key == "annotations":
                    deferred_offset = None
            if key in LIST_NAMES:
                list_offsets[key] = offset
        for list_name in LIST_NAMES:
            if list_name not in list_offsets:
                raise_missing(self.path, list_name)
        if deferred_offset is not None:
            self.offset = deferred_offset
            yield from self._read_list("annotations")

    def _keys(self) -> Iterator[str]:
        """The outermost object's keys; the caller moves `offset` past each value before it takes the next key."""
        if not self._next_is(b"}"):
            while True:
                key = KEY.match(self.data, self.offset)
                if not key:
                    self._raise_top_level_error()
                self.offset = key.end()
                try:
                    name = msgspec.json.decode(key[1], type=str)
                except (DecodeError, UnicodeDecodeError) as error:
                    if not is_not_utf8(error):
                        self._raise_top_level_error()
                    name = ""  # none of the keys that are read
                yield name
                self._pass_space()
                if not self._next_is(b","):
                    break
                self._take(b",")
        self._take(b"}")
        if self.offset < len(self.data):
            self._raise_top_level_error()

    def _next_is(self, byte: bytes) -> bool:
        return self.data[self.offset : self.offset + 1] == byte

    def _take(self, byte: bytes) -> None:
        if not self._next_is(byte):
            self._raise_top_level_error()
        self.offset += 1
        self._pass_space()

    def _pass_space(self) -> None:
        self.offset = after_space(self.data, self.offset)

    def _skip(self) -> None:
        """Moves past a value that is not needed."""
        end = value_end(self.data, self.offset)
        if end is None:
            self._raise_top_level_error()
        self.offset = end

    def _read_list(self, list_name: str) -> Iterator[Chunk]:
        if not self._next_is(b"["):
            self._raise_no_list(list_name)
        self.offset += 1
        first_index, ended = 0, False
        while not ended:
            entries, ended = self._next_entries(list_name, first_index)
            yield Chunk(list_name, first_index, entries)
            first_index += len(entries)

    def _next_entries(self, list_name: str, first_index: int) -> tuple[list, bool]:
        """The next entries of a list, and whether they are the last; moves past them."""
        for end, next_start in self._candidate_boundaries():
            text = b"".join((b"[", self.data[self.offset : end], b"" if next_start is None else b"]"))
            entries, length = self._decode(list_name, first_index, text, is_rest=next_start is None)
            if entries is not None and length is None and next_start is not None:
                self.offset = next_start
                return entries, False
            if entries is not None:
                self.offset += (length or len(text)) - 1
                return entries, True
        raise AssertionError  # the last candidate reaches to the end of the file: it is decoded or refused

    def _candidate_boundaries(self) -> Iterator[tuple[int, int | None]]:
        """Offsets at which a chunk may end and the next may begin; the last is the end of the file, and None."""
        first_key = FIRST_KEY.match(self.data, self.offset)  # entries mostly begin alike
        cut_before_same_key = _cut_pattern(first_key[1] if first_key else b"")
        length = CHUNK_SIZE
        while self.offset + length < len(self.data):
            window = self.offset + length, self.offset + 2 * length
            any_object = islice(self._likely_cuts(_cut_pattern(b""), window), 1)
            for cut in chain(self._likely_cuts(cut_before_same_key, window), any_object):
                yield cut
                # The caller asked for another cut, so this one was wrong: it lies inside an entry.
                self.run_length = max(CHUNK_SIZE // FIRST_RUN_DIVISOR, 2 * self.run_length)
            length *= 2
        yield len(self.data), None

    def _likely_cuts(self, cut_pattern: re.Pattern[bytes], window: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Up to MAX_TRIES cuts, each followed by at least `run_length` bytes of successive objects."""
        searched_to, num_found = 0, 0
        for match in cut_pattern.finditer(self.data, *window):
            if match.start() < searched_to:
                continue
            searched_to = self._run_end(match.end())
            if searched_to - match.end() >= self.run_length:
                num_found += 1
                yield match.start() + 1, match.end()
                if num_found == MAX_TRIES:
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

    def _decode(
        self, list_name: str, first_index: int, text: bytes, *, is_rest: bool
    ) -> tuple[list | None, int | None]:
        """The entries in `text`, and the length of `text` up to the list's end if the list ends inside it.

        The entries are None if `text` ends at a wrong cut.  is_rest: `text` reaches the end of the file, so it does
        not end at a cut.
        """
        try:
            try:
                return _entries(DECODERS[list_name], text)
            except DecodeError as error:
                masked_text = mask_nan(text, max(0, _error_offset(error) - 1))
            try:
                return _entries(DECODERS[list_name], masked_text)
            except ValidationError:
                length = _array_length(masked_text)
                return DECODERS[list_name].decode(whole_numbers_as_int(masked_text[:length])), length
        except ValidationError as error:
            raise_wrong_entry(self.path, list_name, first_index, text, str(error))
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
            self._raise_top_level_error()
        try:
            msgspec.json.decode(mask_nan(self.data[self.offset : end], 0), type=JsonArray)
        except ValidationError as error:
            raise_wrong_top_level(self.path, list_name, str(error))
        raise AssertionError(f"{self.path}: a list was not recognised at byte {self.offset}")

    def _raise_top_level_error(self) -> NoReturn:
        """Raises DataError for a fault outside the lists."""
        text = self.data[self.start :]
        try:
            try:
                msgspec.json.decode(text, type=JsonObject)
            except DecodeError as error:
                msgspec.json.decode(mask_nan(text, max(0, _error_offset(error) - 1)), type=JsonObject)
        except ValidationError as error:
            raise_wrong_top_level(self.path, None, str(error))
        except DecodeError as error:
            raise_malformed(self.path, self.data, self.start, str(error))
        except RecursionError:
            raise_too_deep(self.path)
        raise AssertionError(
            f"{self.path}: msgspec accepts this file, but this reader rejected it at byte {self.offset}"
        )


@cache
def _cut_pattern(key: bytes) -> re.Pattern[bytes]:
    """Matches the text between two entries if the second one begins with `key`."""
    return re.compile(rb"\}" + SPACE_PATTERN + b"," + SPACE_PATTERN + rb"(?=\{" + SPACE_PATTERN + re.escape(key) + b")")


def _entries(decoder: msgspec.json.Decoder, text: bytes | bytearray) -> tuple[list, int | None]:
    """The entries of the list at the start of `text`, and the list's length if more text follows it."""
    try:
        return decoder.decode(text), None
    except DecodeError as error:
        length = value_end_from_error(error)
        if length is None:
            raise
        return decoder.decode(memoryview(text)[:length]), length


def _array_length(text: bytes | bytearray) -> int | None:
    """The length of the array at the start of `text`, None if nothing follows it.  Raises DecodeError."""
    try:
        msgspec.json.decode(text, type=JsonArray)
    except DecodeError as error:
        length = value_end_from_error(error)
        if length is None:
            raise
        return length
    return None


def _error_offset(error: Exception) -> int:
    """The offset at which the decoder stopped; -1 if the message names no byte.

    At -Infinity it is the offset of the second byte.
    """
    match = re.search(r"\(byte (\d+)\)", str(error))
    return int(match[1]) if match else -1

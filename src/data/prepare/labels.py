"""Pictures with boxes, as every reader of label files returns them, and the checks that all readers share."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

from src.data.images.decode import DATASET_FORMATS, is_utf8_path
from src.data.images.exif import TRANSPOSED, read_orientation
from src.data.images.formats import read_format, read_size
from src.runtime.errors import DataError, UserError, escape_control_characters

SplitName = Literal["train", "val", "test"]

MAX_FAULTS = 20  # that are printed; a last line counts the others
CLIP_TOLERANCE = 1.0  # pixels outside the picture without a note, because labelling tools round


class BadLabelsError(UserError):
    """Labels that cannot be converted; `faults` has one line for each fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(faults[0])
        self.faults = faults


@dataclass
class Picture:
    """A picture file and what a COCO file holds about it, apart from ids."""

    path: Path
    width: int
    height: int
    boxes: list[dict[str, Any]] = field(default_factory=list)  # entries of `annotations`
    split: SplitName | None = None  # None: the labels do not assign one
    fields: dict[str, Any] = field(default_factory=dict)  # other fields of its entry in `images`

    @property
    def categories(self) -> set[int]:
        """Ids of the categories with a box in this picture that is no crowd."""
        return {box["category_id"] for box in self.boxes if not box.get("iscrowd")}


@dataclass
class Labels:
    """A labelled set of pictures."""

    format_name: str  # for the user
    categories: list[dict[str, Any]]  # `categories` of a COCO file
    pictures: list[Picture]
    notes: list[str] = field(default_factory=list)  # for the user, a line each
    upright: bool = False  # sizes and boxes describe the pictures turned by their orientation tag


class Checker:
    """Checks pictures and boxes; collects the faults and counts the boxes that it clips."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._clipped: list[str] = []
        self._sizes: dict[Path, tuple[int, int, int]] = {}

    def add_fault(self, place: str | Path, message: str) -> None:
        self.faults.append(escape_control_characters(f"{place}: {message}"))

    def raise_faults(self) -> None:
        """Raises BadLabelsError if any fault was found."""
        if self.faults:
            others = len(self.faults) - MAX_FAULTS
            raise BadLabelsError(self.faults[:MAX_FAULTS] + ([f"and {others} more faults"] if others > 0 else []))

    def notes(self) -> list[str]:
        if not self._clipped:
            return []
        return [f"boxes that reach outside their picture: {len(self._clipped)}, clipped to it: {self._clipped[0]}"]

    def read_size(self, path: Path) -> tuple[int, int, int]:
        """Width and height of the stored picture, and its orientation tag.

        Adds a fault and returns (0, 0, 1) if the picture cannot be used.
        """
        if path not in self._sizes:
            self._sizes[path] = self._read_size(path)
        return self._sizes[path]

    def _read_size(self, path: Path) -> tuple[int, int, int]:
        kind = read_format(path)
        width, height = read_size(path)
        if not is_utf8_path(path):
            self.add_fault(path, "the file name is not UTF-8; rename it")
        elif kind is not None and kind not in DATASET_FORMATS:
            self.add_fault(path, f"a {kind} picture cannot be trained on; store it as JPEG")
        elif not width or not height:
            self.add_fault(path, "cannot be read as a picture; replace it, or remove it and its labels")
        else:
            try:
                return width, height, read_orientation(path)
            except DataError as error:
                self.faults.append(str(error))
        return 0, 0, 1

    def clip_box(self, ltrb: Iterable[float], picture: Picture, place: str) -> list[float] | None:
        """The box as COCO has it (left, top, width, height), clipped to the picture.

        Adds a fault and returns None if the box cannot be used.
        """
        ltrb = tuple(ltrb)
        size = f"the picture is {picture.width} x {picture.height}"
        shown = " ".join(f"{value:.6g}" for value in ltrb)
        if not all(map(math.isfinite, ltrb)):
            self.add_fault(place, f"box = {shown}: expected finite numbers; correct it")
            return None
        left, top, right, bottom = ltrb
        if right <= left or bottom <= top:
            self.add_fault(place, f"box = {shown} (left, top, right, bottom): has no area; correct or remove it")
            return None
        if right <= 0 or bottom <= 0 or left >= picture.width or top >= picture.height:
            self.add_fault(place, f"box = {shown} (left, top, right, bottom): is outside, {size}; correct it")
            return None
        if min(left, top, picture.width - right, picture.height - bottom) < -CLIP_TOLERANCE:
            self._clipped.append(escape_control_characters(f"{place}: box = {shown}, {size}"))
        left, top = max(left, 0.0), max(top, 0.0)
        return [left, top, min(right, picture.width) - left, min(bottom, picture.height) - top]


class PictureIndex:
    """Finds pictures by the names that label files give them."""

    def __init__(self, pictures: Iterable[Path], checker: Checker) -> None:
        self.pictures = list(pictures)
        self.used: dict[Path, str] = {}  # for each labelled picture the file and line of its labels
        self._checker = checker
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self.pictures:
            self._by_name[_name_key(path.name)].append(path)
            self._by_stem[_name_key(path.stem)].append(path)

    def find(self, name: str, place: str, *, near: Path, stem: str | None = None) -> Path | None:
        """The picture that a label file calls `name`; None if no file has that name.

        place: file and line of the labels.  near: the folder of the label file.  stem: a name without suffix that is
        searched if no file is called `name`.  If several files match, or the file already has labels, adds a fault and
        returns None.
        """
        name = name.replace("\\", "/")
        found = self._by_name[_name_key(name.rpartition("/")[2])] or (self._by_stem[_name_key(stem)] if stem else [])
        if len(found) > 1:  # prefer the one next to the label file, then those whose path ends like `name`
            ending = tuple(_name_key(step) for step in name.split("/") if step not in ("", ".", ".."))
            same_path = [path for path in found if tuple(map(_name_key, path.parts[-len(ending) :])) == ending]
            next_to_labels = [path for path in found if path.parent == near]
            if len(next_to_labels) == 1:
                found = next_to_labels
            elif same_path:
                found = same_path
        if len(found) > 1:
            self._checker.add_fault(place, f"two pictures are named {name!r} ({found[0]}, {found[1]}); rename one")
            return None
        return found[0] if found and self.claim(found[0], place) else None

    def claim(self, path: Path, place: str) -> bool:
        """Records that the picture has the labels at `place`; adds a fault and returns False if it has others."""
        if path in self.used:
            self._checker.add_fault(place, f"labels {path}, which {self.used[path]} labels too; remove one")
            return False
        self.used[path] = place
        return True

    @property
    def unused(self) -> list[Path]:
        return [path for path in self.pictures if path not in self.used]


def _name_key(name: str) -> str:
    return normalize("NFC", name).casefold()


def choose_orientation(pictures: list[Picture], declared: dict[Path, tuple[int, int]], checker: Checker) -> bool:
    """Sets the pictures' sizes; True if the labels describe the pictures turned by their orientation tag.

    declared: the sizes in the label files.  If a tag swaps width and height, the declared size says whether the stored
    or the upright picture was labelled.  Without a declared size it is the upright one: labelling tools show that.
    """
    sizes = {picture.path: checker.read_size(picture.path) for picture in pictures}
    turned = [path for path, (_, _, tag) in sizes.items() if tag != 1]
    swapped = [path for path in turned if sizes[path][2] in TRANSPOSED and path in declared]
    stored = any(declared[path] == sizes[path][:2] and sizes[path][0] != sizes[path][1] for path in swapped)
    upright = bool(turned) and not stored
    for picture in pictures:
        width, height, tag = sizes[picture.path]
        picture.width, picture.height = (height, width) if upright and tag in TRANSPOSED else (width, height)
        declared_size = declared.get(picture.path, (0, 0))
        if width and all(declared_size) and declared_size != (picture.width, picture.height):
            checker.add_fault(
                picture.path,
                f"the picture is {picture.width} x {picture.height}, but its labels say "
                f"{declared_size[0]} x {declared_size[1]}; "
                "label the picture itself or correct the size",
            )
    return upright

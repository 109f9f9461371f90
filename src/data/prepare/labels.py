"""What every reader of label files yields: pictures with boxes; and the faults it finds on the way."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

from src.data.images.decode import DATASET_FORMATS, is_text
from src.data.images.exif import TRANSPOSED, read_orientation
from src.data.images.formats import read_format, read_size
from src.runtime.errors import DataError, UserError, escape_control_characters

Part = Literal["train", "val", "test"]

MAX_FAULTS = 20  # printed; the rest is counted
CLIP_TOLERANCE = 1.0  # pixels; labelling tools round


class BadLabelsError(UserError):
    """Labels that cannot be converted; `faults` has one line for each reason."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(faults[0])
        self.faults = faults


@dataclass
class Picture:
    """A picture file, its entry in `images` and its entries in `annotations` of a COCO file, all but the ids."""

    path: Path
    width: int
    height: int
    boxes: list[dict[str, Any]] = field(default_factory=list)
    part: Part | None = None  # of the data set, where the labels say so
    fields: dict[str, Any] = field(default_factory=dict)  # further ones of the entry in `images`

    @property
    def categories(self) -> set[int]:
        """Ids of the categories that have a box here; crowds do not count."""
        return {box["category_id"] for box in self.boxes if not box.get("iscrowd")}


@dataclass
class Labels:
    """A labelled set of pictures."""

    source: str  # the format, for the user
    categories: list[dict[str, Any]]  # `categories` of a COCO file
    pictures: list[Picture]
    notes: list[str] = field(default_factory=list)  # for the user, a line each
    upright: bool = False  # sizes and boxes are those of pictures turned by their orientation tag


class Checker:
    """Checks pictures and boxes, collects the faults and counts what is only worth a note."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._clipped: list[str] = []
        self._sizes: dict[Path, tuple[int, int, int]] = {}

    def fault(self, place: str | Path, message: str) -> None:
        self.faults.append(escape_control_characters(f"{place}: {message}"))

    def raise_faults(self) -> None:
        """Raises BadLabelsError where there is a fault."""
        if self.faults:
            rest = len(self.faults) - MAX_FAULTS
            raise BadLabelsError(self.faults[:MAX_FAULTS] + ([f"and {rest} more faults"] if rest > 0 else []))

    def notes(self) -> list[str]:
        if not self._clipped:
            return []
        return [f"boxes that reach beyond their picture: {len(self._clipped)}, cut off at its edge: {self._clipped[0]}"]

    def read_size(self, path: Path) -> tuple[int, int, int]:
        """Width and height of the stored picture and its orientation tag; (0, 0, 1) with a fault if unusable."""
        if path not in self._sizes:
            self._sizes[path] = self._read_size(path)
        return self._sizes[path]

    def _read_size(self, path: Path) -> tuple[int, int, int]:
        kind = read_format(path)
        width, height = read_size(path)
        if not is_text(path):
            self.fault(path, "the file name is not UTF-8; rename it")
        elif kind is not None and kind not in DATASET_FORMATS:
            self.fault(path, f"a {kind} picture cannot be trained on; store it as JPEG")
        elif not width or not height:
            self.fault(path, "cannot be read as a picture; replace it, or remove it and its labels")
        else:
            try:
                return width, height, read_orientation(path)
            except DataError as error:
                self.faults.append(str(error))
        return 0, 0, 1

    def box(self, ltrb: Iterable[float], picture: Picture, place: str) -> list[float] | None:
        """The box as COCO has it (left, top, width, height), cut off at the picture's edge; None with a fault."""
        ltrb = tuple(ltrb)
        size = f"the picture is {picture.width} x {picture.height}"
        shown = " ".join(f"{value:.6g}" for value in ltrb)
        if not all(map(math.isfinite, ltrb)):
            self.fault(place, f"box = {shown}: expected finite numbers; correct it")
            return None
        left, top, right, bottom = ltrb
        if right <= left or bottom <= top:
            self.fault(place, f"box = {shown} (left, top, right, bottom): has no area; correct or remove it")
            return None
        if right <= 0 or bottom <= 0 or left >= picture.width or top >= picture.height:
            self.fault(place, f"box = {shown} (left, top, right, bottom): is outside, {size}; correct it")
            return None
        if min(left, top, picture.width - right, picture.height - bottom) < -CLIP_TOLERANCE:
            self._clipped.append(escape_control_characters(f"{place}: box = {shown}, {size}"))
        left, top = max(left, 0.0), max(top, 0.0)
        return [left, top, min(right, picture.width) - left, min(bottom, picture.height) - top]


class PictureIndex:
    """Finds pictures by the names that label files give them."""

    def __init__(self, pictures: Iterable[Path], checker: Checker) -> None:
        self.pictures = list(pictures)
        self.used: dict[Path, str] = {}  # place of the labels of each picture
        self._checker = checker
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in self.pictures:
            self._by_name[_spelled(path.name)].append(path)
            self._by_stem[_spelled(path.stem)].append(path)

    def find(self, name: str, place: str, *, near: Path, stem: str | None = None) -> Path | None:
        """The picture that labels at `place` mean by `name`; None where it is missing.

        near: the folder of the label file.  stem: the picture's name without suffix, if `name` leads nowhere.
        A picture that several files could be, or that has labels already, is a fault and gives None.
        """
        name = name.replace("\\", "/")
        found = self._by_name[_spelled(name.rpartition("/")[2])] or (self._by_stem[_spelled(stem)] if stem else [])
        if len(found) > 1:  # prefer the one whose path ends like the given one, then the one beside the label file
            ending = tuple(_spelled(part) for part in name.split("/") if part not in ("", ".", ".."))
            same_path = [path for path in found if tuple(map(_spelled, path.parts[-len(ending) :])) == ending]
            beside = [path for path in found if path.parent == near]
            found = beside if len(beside) == 1 else same_path if 0 < len(same_path) < len(found) else found
        if len(found) > 1:
            self._checker.fault(place, f"two pictures are named {name!r} ({found[0]}, {found[1]}); rename one")
            return None
        return found[0] if found and self.claim(found[0], place) else None

    def claim(self, path: Path, place: str) -> bool:
        """Notes which labels a picture has; False with a fault where it has some already."""
        if path in self.used:
            self._checker.fault(place, f"labels {path}, which {self.used[path]} labels too; remove one")
            return False
        self.used[path] = place
        return True

    @property
    def unused(self) -> list[Path]:
        return [path for path in self.pictures if path not in self.used]


def _spelled(name: str) -> str:
    return normalize("NFC", name).casefold()


def choose_orientation(pictures: list[Picture], declared: dict[Path, tuple[int, int]], checker: Checker) -> bool:
    """Sets the pictures' sizes; True if they are those of pictures turned upright by their orientation tag.

    declared: the sizes that label files give.  Where a tag swaps width and height, they tell which picture was
    labelled.  Without them the upright one counts: it is what labelling tools show.
    """
    sizes = {picture.path: checker.read_size(picture.path) for picture in pictures}
    turned = [path for path, (_, _, tag) in sizes.items() if tag != 1]
    swapped = [path for path in turned if sizes[path][2] in TRANSPOSED and path in declared]
    stored = any(declared[path] == sizes[path][:2] and sizes[path][0] != sizes[path][1] for path in swapped)
    upright = bool(turned) and not stored
    for picture in pictures:
        width, height, tag = sizes[picture.path]
        picture.width, picture.height = (height, width) if upright and tag in TRANSPOSED else (width, height)
        told = declared.get(picture.path, (0, 0))
        if width and all(told) and told != (picture.width, picture.height):
            checker.fault(
                picture.path,
                f"the picture is {picture.width} x {picture.height}, but its labels say {told[0]} x {told[1]}; "
                "label the picture itself or correct the size",
            )
    return upright

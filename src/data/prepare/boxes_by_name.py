"""Reads the formats whose labels name their categories and pictures: Pascal VOC, CVAT and LabelMe."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from globox import BoundingBox
from globox.errors import ParsingError

from src.data.prepare.labels import Checker, Labels, Picture, PictureIndex, SplitName, choose_orientation
from src.data.prepare.split import read_lines
from src.data.prepare.xml_lines import XmlFile
from src.runtime.errors import UserError

LABELME_SHAPES = ("rectangle", "polygon")  # of a polygon the box around its points
CVAT_SHAPES = ("box", "polygon", "polyline", "points", "ellipse", "mask", "cuboid", "skeleton")
# Raised by globox for entries that it cannot read.
READ_ERRORS = (AssertionError, ParsingError, ValueError, TypeError, KeyError)


class LabelCollector:
    """Collects pictures and boxes; category ids follow the alphabetical order of the names."""

    def __init__(self, format_name: str, index: PictureIndex, checker: Checker) -> None:
        self.format_name = format_name
        self.index = index
        self.checker = checker
        self._rotated: list[str] = []  # places of CVAT's rotated boxes
        self._missing: list[str] = []  # label files or entries whose picture does not exist
        self._skipped_shapes: Counter[str] = Counter()
        self._entries: list[tuple[Picture, list[tuple[str, BoundingBox]]]] = []
        self._declared: dict[Path, tuple[int, int]] = {}

    def add_picture(self, name: str, place: str, *, near: Path, stem: str | None = None) -> Picture | None:
        """Adds the picture that a label file names and returns it; None if there is no such picture, or several.

        Several are a fault; missing pictures are counted in a note.  The arguments are those of `PictureIndex.find`.
        """
        faults = len(self.checker.faults)
        path = self.index.find(name, place, near=near, stem=stem)
        if path is None:
            if len(self.checker.faults) == faults:
                self._missing.append(f"{place}: {name}")
            return None
        picture = Picture(path, 0, 0)
        self._entries.append((picture, []))
        return picture

    def declare_size(self, picture: Picture, width: object, height: object, place: str) -> None:
        """Records the size in the label file, to be compared with the picture's; 0 and None mean unknown."""
        try:
            self._declared[picture.path] = (int(float(str(width or 0))), int(float(str(height or 0))))
        except (ValueError, OverflowError):
            self.checker.add_fault(place, f"width, height = {width}, {height}: expected whole numbers; correct them")

    def add_box(self, place: str, box: BoundingBox) -> None:
        """Adds a box to the latest picture."""
        if str(box.label).strip():
            self._entries[-1][1].append((place, box))
        else:
            self.checker.add_fault(place, "the category's name is empty; name it")

    def record_rotated(self, place: str) -> None:
        self._rotated.append(place)

    def count_skipped(self, shape: str) -> None:
        self._skipped_shapes[shape] += 1

    def build(self) -> Labels:
        pictures = [picture for picture, _ in self._entries]
        upright = choose_orientation(pictures, self._declared, self.checker)
        names = sorted({box.label for _, boxes in self._entries for _, box in boxes})
        ids = {name: number for number, name in enumerate(names, 1)}
        for picture, boxes in self._entries:
            for place, box in boxes if picture.width else ():
                ltwh = self.checker.clip_box(box.ltrb, picture, place)
                if ltwh is not None:
                    picture.boxes.append({"category_id": ids[box.label], "bbox": ltwh})
        notes = [f"pictures without labels: {len(self.index.unused)}, left out"]
        if self._missing:
            notes.append(f"labels without a picture: {len(self._missing)}, left out: {self._missing[0]}")
        if self._skipped_shapes:
            shapes = ", ".join(f"{count} {shape}" for shape, count in self._skipped_shapes.items())
            notes.append(f"shapes that are no boxes, left out: {shapes}")
        if self._rotated:
            notes.append(f"rotated boxes: {len(self._rotated)}, taken without their rotation: {self._rotated[0]}")
        categories = [{"id": number, "name": name} for name, number in ids.items()]
        return Labels(self.format_name, categories, pictures, notes, upright=upright)


def read_voc(files: Iterable[XmlFile], index: PictureIndex, checker: Checker) -> Labels:
    """Pascal VOC: an XML file for each picture."""
    found = LabelCollector("Pascal VOC", index, checker)
    for file in files:
        root, path = file.root, file.path
        picture = found.add_picture(root.findtext("filename") or "", str(path), near=path.parent, stem=path.stem)
        if picture is None:
            continue
        size = root.find("size")
        if size is not None:
            found.declare_size(picture, size.findtext("width"), size.findtext("height"), file.place(size))
        for node in root.iter("object"):
            try:
                found.add_box(file.place(node), BoundingBox.from_xml(node))
            except READ_ERRORS:
                shown = _voc_text(node)
                expected = "expected a name and numbers with xmin < xmax and ymin < ymax"
                checker.add_fault(file.place(node), f"object = {shown}: {expected}; correct it")
    return found.build()


def _voc_text(node: Element) -> str:
    values = [f"{tag} {node.findtext(f'bndbox/{tag}')}" for tag in ("xmin", "ymin", "xmax", "ymax")]
    return f"{node.findtext('name')}, {', '.join(values)}"


def assign_voc_splits(folder: Path, pictures: list[Picture]) -> None:
    """Assigns the splits of VOC's ImageSets/Main, if that has both train.txt and val.txt."""
    for main in sorted(folder.rglob("ImageSets/Main")):
        lists: dict[SplitName, Path] = {"train": main / "train.txt", "val": main / "val.txt", "test": main / "test.txt"}
        if lists["train"].is_file() and lists["val"].is_file():
            for split, file in lists.items():
                lines = read_lines(file) if file.is_file() else []
                stems = {name for line in lines if line.strip() for name in (line.strip(), line.split()[0])}
                for picture in pictures:
                    if picture.path.stem in stems or picture.path.name in stems:
                        picture.split = split


def read_cvat(files: Iterable[XmlFile], index: PictureIndex, checker: Checker) -> Labels:
    """CVAT for images: one XML file for all pictures."""
    found = LabelCollector("CVAT", index, checker)
    for file in files:
        if file.root.find("track") is not None:
            raise UserError(f"{file.path}: CVAT's format for videos; export `CVAT for images`")
        for image in file.root.iter("image"):
            place = file.place(image)
            picture = found.add_picture(image.get("name", ""), place, near=file.path.parent)
            if picture is None:
                continue
            picture.split = _split_of_subset(image.get("subset", ""))
            found.declare_size(picture, image.get("width"), image.get("height"), place)
            for node in image:
                if node.tag != "box":
                    if node.tag in CVAT_SHAPES:
                        found.count_skipped(node.tag)
                    continue
                if (node.get("rotation") or "0").strip("0.") != "":
                    found.record_rotated(file.place(node))
                try:
                    found.add_box(file.place(node), BoundingBox.from_cvat(node))
                except READ_ERRORS:
                    expected = "expected a label and numbers with xtl < xbr and ytl < ybr"
                    shown = " ".join(f'{key}="{node.get(key)}"' for key in ("label", "xtl", "ytl", "xbr", "ybr"))
                    checker.add_fault(file.place(node), f"box {shown}: {expected}; correct it")
    return found.build()


def _split_of_subset(subset: str) -> SplitName | None:
    names: dict[str, SplitName] = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}
    return names.get(subset.lower())


def read_labelme(files: dict[Path, dict[str, Any]], index: PictureIndex, checker: Checker) -> Labels:
    """LabelMe: a JSON file for each picture.  files: the content of each file."""
    found = LabelCollector("LabelMe", index, checker)
    for path, content in files.items():
        picture = found.add_picture(str(content.get("imagePath") or ""), str(path), near=path.parent, stem=path.stem)
        if picture is None:
            continue
        found.declare_size(picture, content.get("imageWidth"), content.get("imageHeight"), str(path))
        shapes = content["shapes"]
        for number, shape in enumerate(shapes if isinstance(shapes, list) else [None]):
            place = f"{path}: shapes[{number}]"
            try:
                if shape["shape_type"] in LABELME_SHAPES:
                    found.add_box(place, BoundingBox.from_labelme(shape))
                else:
                    found.count_skipped(str(shape["shape_type"]))
            except READ_ERRORS:
                shown = json.dumps(shape, ensure_ascii=False)[:100]
                checker.add_fault(place, f"{shown}: expected shape_type, label and points of two numbers; correct it")
    return found.build()

"""Reads one COCO file and its pictures, which are not split yet."""

from pathlib import Path
from typing import Any

from src.data.annotations.coco import read_annotations
from src.data.prepare.labels import Checker, Labels, Picture, PictureIndex, choose_orientation
from src.runtime.errors import UserError


def read_coco(file: Path, content: dict[str, Any], index: PictureIndex, checker: Checker) -> Labels:
    """The pictures with all fields of their entries, crowds and segmentations too.

    `read_annotations` checks the file, so errors and warnings are those of a training.
    """
    annotations = read_annotations(file, file.parent)
    pictures: dict[int, Picture] = {}
    missing = []
    for number, entry in enumerate(content["images"]):
        place = f"{file}: images[{number}]"
        faults = len(checker.faults)
        path = index.find(entry["file_name"], place, near=file.parent)
        if path is not None:
            fields = {name: value for name, value in entry.items() if name not in ("file_name", "width", "height")}
            pictures[entry["id"]] = Picture(path, 0, 0, fields=fields)
        elif len(checker.faults) == faults:
            missing.append(f"{place}.file_name = {entry['file_name']}")
    if not pictures and not checker.faults:
        raise UserError(f"{missing[0]}: no such picture in {file.parent} or below; put the pictures there")
    sizes = {
        pictures[entry["id"]].path: (entry["width"], entry["height"])
        for entry in content["images"]
        if entry["id"] in pictures
    }
    upright = choose_orientation(list(pictures.values()), sizes, checker)
    for entry in content["annotations"]:
        if entry["image_id"] in pictures:
            pictures[entry["image_id"]].boxes.append(entry)
    notes = [f"pictures that the file does not name: {len(index.unused)}, left out"]
    if missing:
        notes.append(f"labels without a picture: {len(missing)}, left out: {missing[0]}")
    if annotations.warnings:
        notes.append("boxes are written as the file has them; training on them gives these warnings:")
        notes += annotations.warnings
    return Labels("COCO", content["categories"], list(pictures.values()), notes, upright=upright)

"""Finds the format of a folder of labels and reads it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.data.images.formats import find_images
from src.data.prepare.boxes_by_name import assign_voc_splits, read_cvat, read_labelme, read_voc
from src.data.prepare.coco_single import read_coco
from src.data.prepare.labels import Checker, Labels, PictureIndex, SplitName
from src.data.prepare.xml_lines import XmlFile
from src.data.prepare.yolo import read_yolo_folder, read_yolo_yaml
from src.runtime.errors import UserError

# Names of folders that hold one split: train, train2017, valid, ...
SPLIT_FOLDERS: dict[SplitName, re.Pattern[str]] = {
    "train": re.compile(r"train(ing)?(\d{4})?", re.IGNORECASE),
    "val": re.compile(r"val(id(ation)?)?(\d{4})?", re.IGNORECASE),
    "test": re.compile(r"test(ing)?(\d{4})?", re.IGNORECASE),
}
FORMATS = "YOLO (data.yaml, or .txt files and a list of names), Pascal VOC, CVAT, LabelMe and COCO"


def read_labels(source: Path, name_list: Path | None, *, leave_out: Path) -> Labels:
    """The labels in a folder, in a data.yaml, in a CVAT file or in a COCO file.

    name_list: a file with the names of YOLO's categories; None: the folder has one.  leave_out: a folder that is not
    searched.  Raises BadLabelsError for faults in label files, UserError for anything else that is wrong.
    """
    checker = Checker()
    folder = source if source.is_dir() else source.parent
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_dir():
        yamls = sorted(file for suffix in ("yaml", "yml") for file in source.glob(f"*.{suffix}") if _has_names(file))
        if len(yamls) > 1:
            raise UserError(f"{source}: {yamls[0].name} and {yamls[1].name}: name the one to read")
    else:
        yamls = [source] if source.suffix in (".yaml", ".yml") else []
    if yamls:
        labels = read_yolo_yaml(yamls[0], checker)
    else:
        labels = _read_by_content(source, folder, name_list, checker, leave_out)
        if labels.format_name == "Pascal VOC":
            assign_voc_splits(folder, labels.pictures)
        if all(picture.split is None for picture in labels.pictures):
            _assign_splits_by_folder(labels, folder)
    checker.raise_faults()
    labels.notes += checker.notes()
    if not any(picture.boxes for picture in labels.pictures):
        raise UserError(f"{source}: {len(labels.pictures)} pictures, none with a box; label them first")
    return labels


def _read_by_content(source: Path, folder: Path, name_list: Path | None, checker: Checker, leave_out: Path) -> Labels:
    """Labels without a data.yaml: the content of the files shows their format."""
    pictures = find_images(folder, leave_out=leave_out).files
    index = PictureIndex(pictures, checker)
    files = [source] if source.is_file() else [file for file in _files(folder, leave_out) if file not in set(pictures)]
    xmls = [XmlFile(file) for file in files if file.suffix.lower() == ".xml"]
    voc = [file for file in xmls if file.root.tag == "annotation"]
    cvat = [file for file in xmls if file.root.tag == "annotations"]
    jsons = {file: _load_json(file) for file in files if file.suffix.lower() == ".json"}
    coco = [file for file, content in jsons.items() if {"images", "annotations"} <= content.keys()]
    labelme = {file: content for file, content in jsons.items() if "shapes" in content}
    stems = {(picture.parent.name, picture.stem) for picture in pictures}
    texts = [file for file in files if file.suffix == ".txt" and _labels_a_picture(file, stems)]
    found = {"Pascal VOC": voc, "CVAT": cvat, "COCO": coco, "LabelMe": labelme, "YOLO": texts}
    formats = [name for name, label_files in found.items() if label_files]
    if len(formats) > 1:
        raise UserError(f"{source}: labels in the formats {' and '.join(formats)}; name a folder with one")
    if not formats:
        raise UserError(f"{source}: {len(pictures)} pictures, but no labels; expected {FORMATS}")
    if voc:
        return read_voc(voc, index, checker)
    if cvat:
        return read_cvat(cvat, index, checker)
    if labelme:
        return read_labelme(labelme, index, checker)
    if texts:
        return read_yolo_folder(folder, pictures, name_list, checker)
    if len(coco) > 1:
        raise UserError(f"{source}: {coco[0]} and {coco[1]}: name the one to read, or give main.py the folder")
    return read_coco(coco[0], jsons[coco[0]], index, checker)


def _files(folder: Path, leave_out: Path) -> Iterator[Path]:
    return (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and leave_out not in path.parents
    )


def _labels_a_picture(file: Path, stems: set[tuple[str, str]]) -> bool:
    """Whether a picture has the text file's name and is next to it, or in `images` if the file is in `labels`."""
    folder = "images" if file.parent.name == "labels" else file.parent.name
    return (file.parent.name, file.stem) in stems or (folder, file.stem) in stems


def _has_names(file: Path) -> bool:
    """Whether a YAML file is a data.yaml and not some program's settings."""
    return re.search(rb"^names\s*:", file.read_bytes(), re.MULTILINE) is not None


def _load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text; store it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg})") from None
    return content if isinstance(content, dict) else {}


def _assign_splits_by_folder(labels: Labels, folder: Path) -> None:
    """Assigns splits by names of folders such as train and valid, if there are pictures in both."""
    splits: list[SplitName | None] = []
    for picture in labels.pictures:
        inside = picture.path.relative_to(folder).parts[:-1]
        splits.append(next((split for split, name in SPLIT_FOLDERS.items() if any(map(name.fullmatch, inside))), None))
    if {"train", "val"} <= set(splits):
        for picture, split in zip(labels.pictures, splits, strict=True):
            picture.split = split

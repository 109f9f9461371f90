"""Writes a data set in the COCO 2017 layout, completely or not at all."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from src.data.prepare.labels import BadLabelsError, Picture
from src.runtime.errors import UserError

Splits = Mapping[str, Sequence[Picture]]  # by split, "train" and "val"


def check_target(folder: Path) -> None:
    """Raises UserError unless `folder` is new or empty."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a new folder")


def check_names(splits: Splits) -> None:
    """Raises BadLabelsError if two pictures of a split, which become files of one folder, have the same name."""
    faults = []
    for pictures in splits.values():
        seen: dict[str, Path] = {}
        for picture in pictures:
            first = seen.setdefault(picture.path.name.casefold(), picture.path)
            if first != picture.path:
                faults.append(f"{picture.path}: has the same name as {first}; rename one, and its labels")
    if faults:
        raise BadLabelsError(faults)


def write_coco_folder(folder: Path, splits: Splits, categories: list[dict[str, Any]]) -> bool:
    """Links the pictures into `folder` and writes the annotation files; True if pictures had to be copied.

    Writes into a temporary folder next to it, which is renamed at the end.  Raises UserError if writing fails.
    """
    copied = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            temporary.chmod(0o777 & ~_umask())
            image_id = annotation_id = 0
            for name, pictures in splits.items():
                annotation_file = temporary / "annotations" / f"instances_{name}2017.json"
                image_folder = temporary / f"{name}2017"
                annotation_file.parent.mkdir(exist_ok=True)
                image_folder.mkdir()
                images, annotations = [], []
                for picture in pictures:
                    copied |= _link(picture.path, image_folder / picture.path.name)
                    image_id += 1
                    own_id = picture.fields.get("id", image_id)
                    images.append(
                        {
                            **picture.fields,
                            "id": own_id,
                            "file_name": picture.path.name,
                            "width": picture.width,
                            "height": picture.height,
                        }
                    )
                    for box in picture.boxes:
                        annotation_id += 1
                        area = box["bbox"][2] * box["bbox"][3]
                        defaults = {"id": annotation_id, "area": area, "iscrowd": 0}
                        annotations.append({**defaults, **box, "image_id": own_id})
                content = {"images": images, "annotations": annotations, "categories": categories}
                annotation_file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            os.replace(temporary, folder)  # replaces an empty folder
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); nothing was left there") from None
    return copied


def _link(source: Path, target: Path) -> bool:
    """Makes a hard link, or a copy if the disk cannot link; True for a copy."""
    source = source.resolve()  # a hard link to a symbolic link would break with that
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        return True
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

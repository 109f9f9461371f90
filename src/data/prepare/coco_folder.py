"""Writes a data set in the COCO 2017 layout, whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from src.data.prepare.labels import BadLabelsError, Picture
from src.runtime.errors import UserError

Split = Mapping[str, Sequence[Picture]]  # "train" and "val"


def check_target(folder: Path) -> None:
    """Raises UserError where the folder cannot be made because something is there."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a new folder")


def check_names(split: Split) -> None:
    """Raises BadLabelsError where a part has two pictures of one name: they will share a folder."""
    faults = []
    for pictures in split.values():
        seen: dict[str, Path] = {}
        for picture in pictures:
            first = seen.setdefault(picture.path.name.casefold(), picture.path)
            if first != picture.path:
                faults.append(f"{picture.path}: has the same name as {first}; rename one, and its labels")
    if faults:
        raise BadLabelsError(faults)


def write_coco_folder(folder: Path, split: Split, categories: list[dict[str, Any]]) -> bool:
    """Links the pictures into `folder` and writes the annotation files; True if pictures had to be copied.

    All is written into a folder beside it, which is renamed at the end.  Raises UserError.
    """
    copied = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            part.chmod(0o777 & ~_umask())
            image_id = annotation_id = 0
            for name, pictures in split.items():
                annotation_file = part / "annotations" / f"instances_{name}2017.json"
                image_folder = part / f"{name}2017"
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
            os.replace(part, folder)  # takes the place of an empty folder
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); nothing was left there") from None
    return copied


def _link(source: Path, target: Path) -> bool:
    """Makes a hard link, or a copy where the disk cannot link; True for a copy."""
    source = source.resolve()  # a link to a symbolic link would break with it
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

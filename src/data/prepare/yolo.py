"""Reads YOLO labels: a text file for each picture, a line for each box; a data.yaml or a list names the categories."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from globox import BoundingBox

from src.data.images.formats import find_images
from src.data.prepare.labels import Checker, Labels, Picture, SplitName, choose_orientation
from src.data.prepare.split import read_lines
from src.runtime.errors import UserError

NAME_LISTS = ("classes.txt", "obj.names", "_darknet.labels")  # of labelImg and Label Studio; of CVAT; of Roboflow
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "val", "test")
BOX_VALUES = 5  # category, then centre x, centre y, width and height as fractions of the picture's sides
SMALLEST_POLYGON = 7  # values: category, then x and y of three points


def read_yolo_yaml(file: Path, checker: Checker) -> Labels:
    """The pictures that a data.yaml names, with the split under which it names them."""
    content = _load_yaml(file)
    names = _category_names(file, content.get("names"))
    if content.get("nc", len(names)) != len(names):
        raise UserError(f"{file}: nc = {content['nc']}: expected {len(names)}, as many as `names` has; correct one")
    splits: dict[Path, SplitName | None] = {}
    notes = []
    for split in SPLIT_NAMES:
        for path in _listed_pictures(file, content, split, checker):
            if path not in splits:
                splits[path] = split
            elif splits[path] != split:
                splits[path] = None  # in two splits: it gets a new one
    if None in splits.values() or "val" not in splits.values():
        notes.append("train and val name the same pictures or val names none: they are split anew")
        splits = {path: split if split == "test" else None for path, split in splits.items()}
    checker.raise_faults()
    if not splits:
        raise UserError(f"{file}: train: expected a folder with pictures; correct it")
    labels = _read_pictures(list(splits), names, file, checker)
    for picture in labels.pictures:
        picture.split = splits[picture.path]
    labels.notes = notes + labels.notes
    return labels


def read_yolo_folder(folder: Path, pictures: list[Path], name_list: Path | None, checker: Checker) -> Labels:
    """Pictures with label files next to them, or in `labels` for those in `images`.

    name_list: a file with a category name a line; None: the folder has one.
    """
    found = [path for name in NAME_LISTS for path in sorted(folder.rglob(name))]
    if name_list is None and not found:
        expected = ", ".join(NAME_LISTS)
        raise UserError(f"{folder}: no data.yaml and no list of names ({expected}); give one: --names FILE")
    file = name_list or found[0]
    names = [line.strip() for line in read_lines(file)]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise UserError(f"{file}: expected a name in every line, the first for category 0; correct it")
    return _read_pictures(pictures, names, file, checker)


def label_file(picture: Path) -> Path:
    """The picture's label file: a.txt next to a.jpg; for images/a.jpg it is labels/a.txt if that exists."""
    parts = picture.parts
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        file = Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt")
        if file.is_file():
            return file
    return picture.with_suffix(".txt")


def _load_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{file}{line}: not YAML ({getattr(error, 'problem', None) or 'unreadable'})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected `train`, `val` and `names`")
    return content


def _category_names(file: Path, names: Any) -> list[str]:
    """Category names in the order of their indices.  names: a list, or a dict by index."""
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UserError(f"{file}: names: expected the indices 0 to {len(names) - 1}, each once; correct them")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{file}: names: expected a list of category names; add it")
    return [str(name) for name in names]


def _listed_pictures(file: Path, content: dict[str, Any], split: SplitName, checker: Checker) -> Iterator[Path]:
    """The pictures of a split: those in the folders and in the lists that a data.yaml names."""
    given = content.get(split)
    for text in given if isinstance(given, list) else [given] if given else []:
        path = _resolve(file, content, str(text))
        if path is None:
            if split != "test":  # exporters name a test folder even if there is none
                checker.add_fault(file, f"{split} = {text}: no such file or folder; correct it")
        elif path.suffix == ".txt":
            for number, line in enumerate(read_lines(path), 1):
                if line.strip():
                    picture = _resolve(path, content, line.strip())
                    if picture is None:
                        checker.add_fault(f"{path}:{number}", f"{line.strip()}: no such picture; correct the line")
                    else:
                        yield picture
        else:
            yield from find_images(path).files


def _resolve(file: Path, content: dict[str, Any], text: str) -> Path | None:
    """The existing path that a data.yaml means by `text`: programs write it relative to different folders."""
    root = file.parent / str(content.get("path") or "")
    # Roboflow writes "../train/images" for a folder "train" next to the data.yaml.
    stripped = text.removeprefix("../")
    candidates = [folder / name for folder in (root, file.parent) for name in (text, stripped)]
    return next((path for path in candidates if path.exists()), None)


def _read_pictures(paths: list[Path], names: list[str], names_file: Path, checker: Checker) -> Labels:
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if first.setdefault(name, index) != index:
            checker.add_fault(names_file, f"categories {first[name]} and {index} are both named {name!r}; rename one")
    pictures = [Picture(path, 0, 0) for path in paths]
    upright = choose_orientation(pictures, {}, checker)
    picture_of: dict[Path, Path] = {}  # by label file
    without_labels = 0
    for picture in pictures:
        file = label_file(picture.path)
        if not file.is_file():
            without_labels += 1
        elif file in picture_of:
            checker.add_fault(
                file, f"two pictures are named {file.stem!r} ({picture_of[file]}, {picture.path}); rename one"
            )
        elif picture.width:
            picture_of[file] = picture.path
            _read_boxes(file, picture, names, names_file, checker)
    folders = {file.parent for file in picture_of}
    matched = {*picture_of, *(label_file(path) for path in paths)}
    unmatched = [
        file
        for folder in sorted(folders)
        for file in sorted(folder.glob("*.txt"))
        if file not in matched and file != names_file and file.name not in NAME_LISTS and _is_label_file(file)
    ]
    notes = [f"pictures without a label file: {without_labels}, kept as pictures without objects"]
    if unmatched:
        notes.append(f"labels without a picture: {len(unmatched)}, left out: {unmatched[0]}")
    categories = [{"id": index, "name": name} for index, name in enumerate(names, 1)]
    return Labels("YOLO", categories, pictures, notes, upright=upright)


def _is_label_file(file: Path) -> bool:
    """Whether a text file is empty or begins with a number; a README or a list of pictures does not."""
    first = next((line.split() for line in read_lines(file) if line.strip()), ["0"])
    return first[0].replace(".", "", 1).isdigit()


def _read_boxes(file: Path, picture: Picture, names: list[str], names_file: Path, checker: Checker) -> None:
    try:
        lines = read_lines(file)
    except UserError as error:
        checker.faults.append(str(error))
        return
    for number, line in enumerate(lines, 1):
        place = f"{file}:{number}"
        values = _numbers(line, place, checker) if line.strip() else None
        if values is None:
            continue
        index, *coordinates = values
        if index not in range(len(names)):
            message = f"category = {index:g}: expected 0 to {len(names) - 1}, {names_file.name} has {len(names)} names"
            checker.add_fault(place, f"{message}; correct the line or add the name")
            continue
        size = (picture.width, picture.height)
        try:
            if len(values) == BOX_VALUES:
                box = BoundingBox.from_yolo_v5(line, image_size=size)
            else:
                box = BoundingBox.from_yolo_seg(line, image_size=size)
        except AssertionError:  # globox refuses a negative width or height
            checker.add_fault(place, f"width, height = {coordinates[2]:g}, {coordinates[3]:g}: expected more than 0")
            continue
        ltwh = checker.clip_box(box.ltrb, picture, place)
        if ltwh is not None:
            picture.boxes.append({"category_id": int(index) + 1, "bbox": ltwh})


def _numbers(line: str, place: str, checker: Checker) -> list[float] | None:
    """The numbers of a line that describes a box or a polygon; adds a fault and returns None for any other line."""
    texts = line.split()
    if len(texts) != BOX_VALUES and (len(texts) < SMALLEST_POLYGON or len(texts) % 2 == 0):
        expected = "expected 5 (category, centre x, centre y, width, height), or category and the points of a polygon"
        checker.add_fault(place, f"{len(texts)} values: {expected}; correct the line")
        return None
    try:
        values = [float(text) for text in texts]
    except ValueError:
        checker.add_fault(place, f"{line.strip()!r}: expected numbers; correct the line")
        return None
    if not all(map(math.isfinite, values)):
        checker.add_fault(place, f"{line.strip()!r}: expected finite numbers; correct the line")
        return None
    return values

"""Chooses which pictures train and which validate."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import numpy as np

from src.data.prepare.labels import Picture
from src.runtime.errors import UserError


def split_at_random(pictures: Sequence[Picture], *, fraction: float, seed: int) -> list[bool]:
    """Whether each picture validates: `fraction` of all, and of each category as far as possible.

    Depends on the seed and on the pictures' names and labels, not on their order or folder.  Splits the rarest category
    first, because common ones have more pictures left to choose from.  A category of two or more pictures has one in
    each split, unless rarer categories have already put all its pictures into one.
    """
    by_name = sorted(range(len(pictures)), key=lambda index: normalize("NFC", pictures[index].path.name))
    order = [by_name[position] for position in np.random.default_rng(seed).permutation(len(pictures))]
    pictures_with: dict[int, list[int]] = defaultdict(list)
    for index in order:
        for category in sorted(pictures[index].categories):
            pictures_with[category].append(index)
    validates: dict[int, bool] = {}
    for category in sorted(pictures_with, key=lambda category: (len(pictures_with[category]), category)):
        _assign(pictures_with[category], validates, fraction)
    _assign([index for index in order if not pictures[index].boxes], validates, fraction)
    # Only pictures whose boxes are all crowds are left: they train.
    return [validates.get(index, False) for index in range(len(pictures))]


def _assign(indices: list[int], validates: dict[int, bool], fraction: float) -> None:
    """Adds the pictures that have no split yet to `validates`, so that about `fraction` of `indices` validates."""
    goal = min(max(1, round(fraction * len(indices))), len(indices) - 1) if len(indices) > 1 else 0
    missing = goal - sum(validates.get(index, False) for index in indices)
    for index in [index for index in indices if index not in validates]:
        validates[index] = missing > 0
        missing -= 1


def split_by_list(pictures: Sequence[Picture], file: Path) -> list[bool]:
    """Whether each picture is in the list `file`, which has a name a line, with or without folder and suffix.

    Raises UserError for a line that names no picture.
    """
    names: dict[str, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        for name in {picture.path.name, picture.path.stem}:
            names[normalize("NFC", name)].append(index)
    chosen: set[int] = set()
    for number, line in enumerate(read_lines(file), 1):
        name = normalize("NFC", line.strip().replace("\\", "/").rpartition("/")[2])
        if not name:
            continue
        found = names.get(name) or names.get(name.split()[0])  # VOC's lists may have a number after the name
        if not found:
            raise UserError(f"{file}:{number}: {line.strip()!r} names no labelled picture; correct or remove the line")
        chosen.update(found)
    return [index in chosen for index in range(len(pictures))]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file.  Raises UserError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not UTF-8 text; store it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None

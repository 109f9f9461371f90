"""File names as the disk has them: Unicode writes é as one character (NFC) or as an e and an accent (NFD)."""

import os
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize


def spelled_as_on_disk(names: Sequence[str], folder: Path) -> list[str]:
    """The names of files below `folder`, each in the Unicode form that it has on disk.

    A name stays unchanged if it could mean several files or another of the names.  Lists each folder once, and only
    folders of names that have several Unicode forms.
    """
    spelled, taken = list(names), set(names)
    listed: dict[Path, dict[str, list[str]]] = {}
    for index, name in enumerate(names):
        if name.isascii() or normalize("NFC", name) == normalize("NFD", name):
            continue
        found = _as_on_disk(name, folder, listed)
        if found not in taken:
            taken.add(found)
            spelled[index] = found
    return spelled


def _as_on_disk(name: str, folder: Path, listed: dict[Path, dict[str, list[str]]]) -> str:
    """The name with each part in the form it has on disk, if exactly one entry of the folder matches it.

    listed: a cache of folders: their entries by NFC form.
    """
    found: list[str] = []
    for part in name.split("/"):
        place = folder.joinpath(*found)
        if place not in listed:
            listed[place] = _by_composed_form(place)
        same = listed[place].get(normalize("NFC", part), [])
        found.append(same[0] if len(same) == 1 else part)
    return "/".join(found)


def _by_composed_form(folder: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    if folder.is_dir():
        for name in os.listdir(folder):
            names.setdefault(normalize("NFC", name), []).append(name)
    return names

"""Runs of `python -m src.data.prepare` on five small pictures, and the boxes that must come out."""

from src.data.annotations.dataset import read_dataset
from src.data.prepare.__main__ import main

NAMES = ["dog", "traffic light"]
BOXES = {
    "a.jpg": [(0, 10, 20, 60, 90), (1, 100.5, 5, 150, 45)],
    "Müller am See.jpg": [(0, 0, 0, 200, 100)],
    "c.jpg": [(1, 30, 30, 50, 60)],
    "d.jpg": [(1, 10, 10, 20, 20), (0, 40, 40, 80, 80)],
    "e.jpg": [(0, 15, 25, 35, 75)],
}


def found_boxes(folder) -> dict[str, list[tuple]]:
    """By picture: category name and corners, from both splits."""
    training, validation = read_dataset(folder, evaluating=True, upright=False)
    found = {}
    for annotations in (training, validation):
        for index in range(len(annotations)):
            boxes, labels = annotations.targets(index)
            found[annotations.file_name(index)] = sorted(
                (annotations.categories[label - 1].name, *box)
                for label, box in zip(labels, boxes.round(2).tolist(), strict=True)
            )
    return found


def expected_boxes(boxes=BOXES) -> dict[str, list[tuple]]:
    return {
        name: sorted((NAMES[index], *box) for index, *box in boxes_of_picture)
        for name, boxes_of_picture in boxes.items()
    }


def error_lines(arguments, capsys) -> list[str]:
    """The error lines of a run that must fail, without their common prefix."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    prefix = "python -m src.data.prepare: error: "
    assert lines
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]

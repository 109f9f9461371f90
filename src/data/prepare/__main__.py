"""Makes a data set of labelled pictures: `python -m src.data.prepare LABELS DIR`.

Reads YOLO, Pascal VOC, CVAT, LabelMe or one COCO file; writes the COCO 2017 layout that main.py --data takes.
"""

import argparse
import shlex
import sys
from collections import Counter
from pathlib import Path

from src.data.prepare.coco_folder import Splits, check_names, check_target, write_coco_folder
from src.data.prepare.labels import BadLabelsError, Labels, Picture
from src.data.prepare.split import split_at_random, split_by_list
from src.data.recipes import closest_recipe
from src.runtime.errors import UserError, escape_control_characters

PROGRAM = "python -m src.data.prepare"
DEFAULT_FRACTION = 0.2
BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns the exit status.

    If anything is wrong, prints a line for each fault, writes nothing and returns 2.
    """
    args = _parser().parse_args(arguments)
    if isinstance(sys.stdout.encoding, str):  # some terminals cannot show every file name
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        prepare(args)
    except BadLabelsError as error:
        for fault in error.faults:
            print(f"{PROGRAM}: error: {fault}", file=sys.stderr)
        return BAD_INPUT
    except UserError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Writes the data set and prints a summary and the commands to copy.  Raises UserError."""
    source, folder = args.labels.expanduser(), args.folder.expanduser()
    check_target(folder)
    try:
        from src.data.prepare.formats import read_labels
    except ModuleNotFoundError as error:
        raise UserError(f"reading label files needs {error.name}: pip install globox pyyaml") from None
    labels = read_labels(source, args.names, leave_out=folder)
    splits, how = _choose_splits(labels, args)
    check_names(splits)
    copied = write_coco_folder(folder, splits, labels.categories)
    _print_summary(labels, splits, source)
    how += ", pictures copied because the disk cannot link them" if copied else ""
    print(f"{folder}: {len(splits['train'])} training and {len(splits['val'])} validation pictures ({how})")
    _print_commands(folder, splits, upright=labels.upright)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Make a data set in the COCO 2017 layout from pictures with YOLO, Pascal VOC, CVAT, LabelMe or "
        "COCO labels.",
    )
    add = parser.add_argument
    add("labels", type=Path, metavar="LABELS", help="a folder with pictures and labels; or a data.yaml, a CVAT or a "
        "COCO file with the pictures in its folder or below")  # fmt: skip
    add("folder", type=Path, metavar="DIR", help="the data set to write: a new folder")
    add("--val", type=_fraction, metavar="FRACTION",
        help=f"share of pictures that validate, if the labels have no split (default: {DEFAULT_FRACTION})")  # fmt: skip
    add("--val-list", type=Path, metavar="FILE", help="names of the pictures that validate, one a line")
    add("--seed", type=int, default=0, metavar="N", help="another seed, another split (default: 0)")
    add("--names", type=Path, metavar="FILE", help="names of YOLO's categories, one a line (default: classes.txt, "
        "obj.names or _darknet.labels in LABELS)")  # fmt: skip
    return parser


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def _choose_splits(labels: Labels, args: argparse.Namespace) -> tuple[Splits, str]:
    """The pictures of each split, and a text that says how they were split.  Leaves out a test split."""
    pictures = [picture for picture in labels.pictures if picture.split != "test"]
    left_out = len(labels.pictures) - len(pictures)
    if left_out:
        labels.notes.append(f"pictures of the labels' test split: {left_out}, left out")
    if args.val_list:
        validates, how = split_by_list(pictures, args.val_list), f"split by {args.val_list}"
    elif {"train", "val"} <= {picture.split for picture in pictures}:
        if args.val is not None:
            labels.notes.append("--val: not used, because the labels have a split; --val-list FILE replaces it")
        unlisted = [picture for picture in pictures if picture.split is None]
        if unlisted:
            labels.notes.append(f"pictures that the split does not name: {len(unlisted)}, left out: {unlisted[0].path}")
        pictures = [picture for picture in pictures if picture.split is not None]
        validates, how = [picture.split == "val" for picture in pictures], "split as the labels have it"
    else:
        fraction = DEFAULT_FRACTION if args.val is None else args.val
        validates = split_at_random(pictures, fraction=fraction, seed=args.seed)
        how = f"split by --val {fraction:g} --seed {args.seed}"
    splits: dict[str, list[Picture]] = {"train": [], "val": []}
    for picture, is_val in zip(pictures, validates, strict=True):
        splits["val" if is_val else "train"].append(picture)
    for split, members in splits.items():
        if not any(picture.boxes for picture in members):
            raise UserError(f"{how}: {split} has {len(members)} pictures, none with a box; label or split otherwise")
    return splits, how


def _print_summary(labels: Labels, splits: Splits, source: Path) -> None:
    counts = {
        split: Counter(box["category_id"] for picture in pictures for box in picture.boxes)
        for split, pictures in splits.items()
    }
    total = counts["train"] + counts["val"]
    print(f"{source}: {labels.format_name}, {len(labels.pictures)} pictures, {total.total()} boxes")
    without = [str(category["name"]) for category in labels.categories if not total[category["id"]]]
    for category in sorted(labels.categories, key=lambda category: -total[category["id"]]):
        key = category["id"]
        if total[key]:
            where = f"{counts['train'][key]} train, {counts['val'][key]} val"
            print(escape_control_characters(f"  {category['name']}: {total[key]} boxes ({where})"))
    if without:
        more = ", ..." * (len(without) > 5)
        print(escape_control_characters(f"  categories without a box: {len(without)} ({', '.join(without[:5])}{more})"))
    empty = sum(not picture.boxes for pictures in splits.values() for picture in pictures)
    print(f"  pictures without boxes: {empty}; validation uses them, training does not")
    for note in labels.notes:
        print(escape_control_characters(f"  {note}"))


def _print_commands(folder: Path, splits: Splits, *, upright: bool) -> None:
    pictures = sum(bool(picture.boxes) for picture in splits["train"])
    recipe = closest_recipe(pictures)
    data = shlex.quote(str(folder)) + " --orientation upright" * upright
    print(f"Check it:  python main.py --mode check --data {data}")
    print(
        f"Train it ({recipe.iterations(pictures)} iterations; add --checkpoint FILE to start from a trained detector):"
    )
    print(f"  python main.py --data {data} {recipe.flags}")


if __name__ == "__main__":
    sys.exit(main())

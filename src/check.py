"""`--mode check`: reads both annotation files and every picture, and tells what is in them and what is wrong.

Where nothing is wrong, it draws a training batch too.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torchvision.ops import box_convert

from src.data.annotations.coco import Annotations, Category, locations, read_annotations
from src.data.pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loaders import DecodeCheck, TrainLoader
from src.report.exit_status import BAD_INPUT, DONE
from src.report.plots import draw_batch
from src.report.report import Report
from src.runtime.cores import usable_cores
from src.runtime.errors import DataError
from src.runtime.output_files import make_folder
from src.ssd.default_boxes import IMAGE_SIZE

CHUNK = 16  # pictures a thread takes at a time


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self, steps: int) -> None: ...


Progress = Callable[[int, str], AbstractContextManager[Bar]]  # of (total, name)
TrialMaker = Callable[..., DecodeCheck | None]  # of the training annotations and num_threads


def check(
    folder: Path,
    output: Path,
    *,
    upright: bool,
    make_loader: Callable[[Annotations], TrainLoader],
    make_decode_check: TrialMaker,
    report: Report,
) -> int:
    """Checks the data set in `folder` and draws a training batch of it into `output`; the exit status.

    upright: see `read_annotations`.  make_loader: the training loader of the annotations.  make_trial: whether it can
    decode them, `loaders.make_trial`.
    """
    make_folder(output)
    files = [locations(folder, split) for split in ("train", "val")]
    status = check_dataset(
        files, upright=upright, make_decode_check=make_decode_check, workers=usable_cores(),
        progress=report.progress, write=report.note,
    )  # fmt: skip
    if status == DONE:
        training = read_annotations(*files[0], upright=upright)
        with closing(make_loader(training)) as loader:
            path = draw_training_batch(next(iter(loader)), training.categories, output)
        report.note(f"A training batch as the network sees it: {path}")
    return status


def check_dataset(
    files: Sequence[tuple[Path, Path]],
    *,
    upright: bool = False,
    make_decode_check: TrialMaker,
    workers: int,
    progress: Progress,
    write: Callable[[str], None],
) -> int:
    """Checks annotation files and the pictures they name; the exit status, 2 where something is wrong, else 0.

    files: (annotation file, image folder), the training ones first: their categories are the ones that count, and
    their pictures are tried as the training decodes them too.
    upright and make_trial: as for `check`.  workers: threads that decode.
    Each fault is written as one line, then a summary of each file.
    """
    categories: tuple[Category, ...] | None = None
    faults = 0
    for annotation_file, image_folder in files:
        try:
            annotations = read_annotations(
                annotation_file, image_folder, categories=categories, upright=upright,
                for_scoring=annotation_file != files[0][0],
            )  # fmt: skip
        except DataError as error:
            faults += 1
            write(str(error))
            continue
        categories = categories or annotations.categories
        trial = make_decode_check(annotations, num_threads=workers) if annotation_file == files[0][0] else None
        unreadable = _check_images(annotations, trial, workers=workers, progress=progress, write=write)
        faults += unreadable
        for line in summary(annotations):
            write(line)
        sound = "  nothing is wrong" + (" but for the warnings" if annotations.warnings else "")
        write(f"  wrong: {unreadable} of {len(annotations)} image files" if unreadable else sound)
    return BAD_INPUT if faults else DONE


def _check_images(
    annotations: Annotations,
    trial: DecodeCheck | None,
    *,
    workers: int,
    progress: Progress,
    write: Callable[[str], None],
) -> int:
    """Reads every picture and writes a line for each that is missing, broken or of another size; their number."""
    total = len(annotations)
    if not annotations.image_folder.is_dir():
        write(f"{annotations.image_folder.absolute()}: no such folder: {annotations.path} names {total} images in it")
        return total
    faults = 0
    # Threads suffice: torchvision releases Python's lock while it reads and decodes.
    with progress(total, "images") as bar, ThreadPoolExecutor(workers) as pool:
        chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
        try:
            for chunk, found in zip(chunks, pool.map(lambda chunk: _faults(annotations, chunk), chunks), strict=True):
                told = list(found.values())
                if trial is not None:
                    told += trial.faults([index for index in chunk if index not in found])
                for fault in told:
                    write(str(fault))
                faults += len(told)
                bar.update(len(chunk))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return faults


def _faults(annotations: Annotations, chunk: range) -> dict[int, DataError]:
    """What is wrong with those of these pictures that are not in order."""
    faults = {}
    for index in chunk:
        try:
            read_image(annotations, index)
        except DataError as error:
            faults[index] = error
    return faults


def summary(annotations: Annotations) -> list[str]:
    """What is in an annotation file and what was left out of it, a line each."""
    counts = np.diff(annotations.first_box)
    categories = len(annotations.categories)
    lines = [
        f"{annotations.path}:",
        f"  images: {len(annotations)}, {np.count_nonzero(counts == 0)} of them without boxes",
        f"  boxes: {len(annotations.boxes)}, {np.count_nonzero(annotations.crowd)} of them crowds",
        f"  categories: {categories}, {categories - len(np.unique(annotations.labels))} of them without boxes",
        f"  image width: {_spread(annotations.sizes[:, 0])}; height: {_spread(annotations.sizes[:, 1])}",
    ]
    if len(annotations.boxes):
        width, height = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]).T
        lines += [
            f"  box width: {_spread(width)}; height: {_spread(height)}",
            f"  boxes an image: {_spread(counts)}",
        ]
    return lines + [f"  warning: {line.removeprefix(f'{annotations.path}: ')}" for line in annotations.warnings]


def _spread(values: np.ndarray) -> str:
    return f"{values.min():.5g} to {values.max():.5g}, median {np.median(values):.5g}"


def draw_training_batch(batch: Batch, categories: tuple[Category, ...], output: Path) -> Path:
    """Draws the images of a batch as the network sees them, with the boxes matched to default boxes, into batch.png."""
    make_folder(output)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (batch.images.float().cpu() * deviation + mean) * 255
    boxes, names = [], []
    for matched, labels in zip(batch.boxes.cpu(), batch.labels.cpu(), strict=True):
        positive = labels > 0
        rows = torch.cat((box_convert(matched[positive], "cxcywh", "xyxy"), labels[positive, None]), dim=1)
        rows = rows.unique(dim=0)  # a box is matched to many default boxes
        boxes.append((rows[:, :4] * IMAGE_SIZE).numpy())
        names.append([categories[int(label) - 1].name for label in rows[:, 4]])
    path = output / "batch.png"
    draw_batch(images.numpy(), boxes, names, path)
    return path

"""`--mode check`: reads both annotation files and every image, and prints what they hold and what is wrong.

If nothing is wrong, it also draws a training batch.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torchvision.ops import box_convert

from src.data.annotations.coco import Annotations, Category, locations, read_annotations
from src.data.annotations.dataset import NO_VALIDATION
from src.data.pipelines.batch import Batch, denormalise
from src.data.pipelines.image_reader import read_image
from src.data.pipelines.loaders import DecodeCheck, TrainLoader
from src.report.exit_status import BAD_INPUT, DONE
from src.report.image_plots import draw_batch
from src.report.report import Report
from src.report.run_folder import BATCH
from src.runtime.cores import usable_cores
from src.runtime.errors import DataError
from src.runtime.output_files import make_folder
from src.ssd.default_boxes import IMAGE_SIZE

CHUNK = 16  # images a thread takes at a time
NAMED = 5  # images that a warning names
DIGEST_BYTES = 16


class Bar(Protocol):
    """The part of a progress bar that `check_dataset` uses."""

    def update(self, steps: int) -> None: ...


Progress = Callable[[int, str], AbstractContextManager[Bar]]  # of (total, name)
MakeDecodeCheck = Callable[..., DecodeCheck | None]  # of the training annotations and num_threads


def check(
    folder: Path,
    output: Path,
    *,
    upright: bool,
    make_loader: Callable[[Annotations], TrainLoader],
    make_decode_check: MakeDecodeCheck,
    report: Report,
) -> int:
    """Checks the data set in `folder` and draws one of its training batches into `output`; the exit status.

    upright: see `read_annotations`.  make_loader: makes the training loader of annotations.
    make_decode_check: `loaders.make_decode_check`.
    """
    make_folder(output)
    files = [locations(folder, split) for split in ("train", "val")]
    if not os.path.lexists(files[1][0]):
        report.note(f"{folder.absolute()}: {NO_VALIDATION}")
        files.pop()
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
    make_decode_check: MakeDecodeCheck,
    workers: int,
    progress: Progress,
    write: Callable[[str], None],
) -> int:
    """Checks annotation files and the images they name; the exit status: 2 if something is wrong, else 0.

    files: pairs of annotation file and image folder, training first.  The training file's categories count, and its
    images must decode in the training pipeline, too.
    upright and make_decode_check: as for `check`.  workers: threads that decode.
    Writes a line for each fault, then a summary of each file.
    """
    categories: tuple[Category, ...] | None = None
    faults = 0
    seen: dict[bytes, str] = {}  # file names by digest, of the images of earlier annotation files
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
        decode_check = make_decode_check(annotations, num_threads=workers) if annotation_file == files[0][0] else None
        checked = _check_images(annotations, decode_check, workers=workers, progress=progress, write=write)
        faults += checked.faults
        for line in summary(annotations):
            write(line)
        warnings = [*_repeated_boxes(annotations), *_repeated_images(annotations, checked.digests, seen)]
        for line in warnings:
            write(f"  warning: {line}")
        seen |= {digest: annotations.file_name(index) for index, digest in checked.digests.items()}
        has_warnings = annotations.warnings or warnings or checked.damaged
        sound = "  nothing is wrong" + (" but for the warnings" if has_warnings else "")
        write(f"  wrong: {checked.faults} of {len(annotations)} image files" if checked.faults else sound)
    return BAD_INPUT if faults else DONE


class _Checked(NamedTuple):
    """The result of reading the images of an annotation file."""

    faults: int
    damaged: int  # JPEG files with damaged data that can still be read
    digests: dict[int, bytes]  # of the readable files, by image index


def _check_images(
    annotations: Annotations,
    decode_check: DecodeCheck | None,
    *,
    workers: int,
    progress: Progress,
    write: Callable[[str], None],
) -> _Checked:
    """Reads every image and writes a line for each that is missing, broken, damaged or of another size."""
    total = len(annotations)
    if not os.path.isdir(annotations.image_folder):  # Path.is_dir raises for a folder that may not be entered
        folder = annotations.image_folder.absolute()
        write(f"{folder}: no such folder, or it may not be entered: {annotations.path} names {total} images in it")
        return _Checked(total, 0, {})
    faults = damaged = 0
    digests: dict[int, bytes] = {}
    # Threads suffice: simplejpeg and Pillow release the GIL while they decode.
    with progress(total, "images") as bar, ThreadPoolExecutor(workers) as pool:
        chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
        try:
            for chunk, read in zip(
                chunks, pool.map(lambda chunk: _read_chunk(annotations, chunk), chunks), strict=True
            ):
                errors = list(read.faults.values())
                if decode_check is not None:
                    errors += decode_check.find_errors([index for index in chunk if index not in read.faults])
                    for line in decode_check.messages:
                        write(f"warning: {line}")
                    decode_check.messages.clear()
                for line in (*map(str, errors), *read.damage):
                    write(line)
                faults += len(errors)
                damaged += len(read.damage)
                digests |= read.digests
                bar.update(len(chunk))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _Checked(faults, damaged, digests)


class _Chunk(NamedTuple):
    """The result of reading a few images; the keys are image indices."""

    faults: dict[int, DataError]
    damage: list[str]
    digests: dict[int, bytes]


def _read_chunk(annotations: Annotations, chunk: range) -> _Chunk:
    read = _Chunk({}, [], {})
    for index in chunk:
        reasons: list[str] = []
        path = annotations.image_path(index)
        try:
            read_image(annotations, index, warn=reasons.append)
            read.digests[index] = hashlib.blake2b(path.read_bytes(), digest_size=DIGEST_BYTES).digest()
        except DataError as error:
            read.faults[index] = error
        read.damage.extend(
            f"warning: {path.absolute()}: damaged JPEG data ({reason}): parts of it may be wrong: store it anew"
            for reason in reasons
        )
    return read


def _repeated_boxes(annotations: Annotations) -> list[str]:
    """A line about boxes that repeat another of their image and category: a detector can find only one of them."""
    image_index = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    rows = np.column_stack((image_index, annotations.labels, annotations.boxes))
    rows = rows[np.lexsort(rows.T)]
    repeated = rows[1:][(rows[1:] == rows[:-1]).all(axis=1), 0].astype(np.int64)
    if not len(repeated):
        return []
    images = np.unique(repeated)
    names = _list_names([annotations.file_name(index) for index in images[:NAMED].tolist()], len(images))
    return [f"{len(repeated)} boxes repeat another of the same category on {len(images)} images: {names}"]


def _repeated_images(annotations: Annotations, digests: dict[int, bytes], seen: dict[bytes, str]) -> list[str]:
    """A line about image files that an earlier annotation file has too, byte for byte."""
    repeated = [index for index, digest in digests.items() if digest in seen]
    if not repeated:
        return []
    names = [f"{annotations.file_name(index)} = {seen[digests[index]]}" for index in repeated[:NAMED]]
    return [
        f"{len(repeated)} validation pictures are training pictures, byte for byte: {_list_names(names, len(repeated))}"
    ]


def _list_names(names: list[str], total: int) -> str:
    more = f" and {total - len(names)} more" if total > len(names) else ""
    return ", ".join(names) + more


def summary(annotations: Annotations) -> list[str]:
    """Lines that say what an annotation file holds, and what was left out of it."""
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
    """Draws a batch into batch.png as the network sees it, with the boxes that are matched to default boxes."""
    make_folder(output)
    images = denormalise(batch.images.float().cpu())
    boxes, names = [], []
    for matched, labels in zip(batch.boxes.cpu(), batch.labels.cpu(), strict=True):
        positive = labels > 0
        rows = torch.cat((box_convert(matched[positive], "cxcywh", "xyxy"), labels[positive, None]), dim=1)
        rows = rows.unique(dim=0)  # a box matches many default boxes
        boxes.append((rows[:, :4] * IMAGE_SIZE).numpy())
        names.append([categories[int(label) - 1].name for label in rows[:, 4]])
    path = output / BATCH
    draw_batch(images.numpy(), boxes, names, path)
    return path

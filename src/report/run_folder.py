"""The files of a run in --output: their names, and moving or copying those of an earlier run."""

import importlib.metadata
import os
import platform
import re
import shutil
from contextlib import suppress
from pathlib import Path

from src.runtime.output_files import atomic_write, convert_write_errors

LAST_CHECKPOINT, BEST_CHECKPOINT = "last.pt", "best.pt"
METRICS, FLAGS, MLPERF_LOG, TENSORBOARD = "metrics.jsonl", "flags.json", "mlperf.log", "tensorboard"
TRAINING, PRECISION_RECALL, EXAMPLES, BATCH = "training.png", "precision_recall.png", "detections.png", "batch.png"
DETECTIONS, CONFUSION, CONFUSION_PICTURE = "detections.json", "confusion_matrix.json", "confusion_matrix.png"
PICTURES = (TRAINING, PRECISION_RECALL, CONFUSION_PICTURE, EXAMPLES, BATCH)
RUN_FILES = (LAST_CHECKPOINT, BEST_CHECKPOINT, METRICS, FLAGS, MLPERF_LOG, *PICTURES, DETECTIONS, CONFUSION)
EVENT_FILES = f"{TENSORBOARD}/events.out.tfevents.*"
PACKAGES = ("torch", "torchvision", "numpy", "msgspec", "faster-coco-eval", "pycocotools")  # whose versions matter


def holds_run(output: Path) -> bool:
    """Whether the folder holds a run or an evaluation; detections.json alone may be a prediction's."""
    return any(os.path.lexists(output / name) for name in RUN_FILES if name != DETECTIONS)


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths name one folder, also through links, `..` or another mount."""
    return one.exists() and other.exists() and one.samefile(other)


def set_aside_old_run(output: Path) -> str | None:
    """Moves the files of an earlier run in `output` to `output/run-001` or the next free number.

    Returns the line to print; None if there was no run.  Other files stay.  Each file is moved by one rename, so an
    interruption loses nothing and the next call moves the remaining files.
    """
    with convert_write_errors(output):
        files = _run_files(output)
        if not files:
            return None
        folder = _next_folder(output)
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            os.rename(output / file, folder / file)
    return f"{output} held an earlier run: its files are now in {folder}"


def branch_off(output: Path, checkpoint: Path) -> str | None:
    """Copies the run in `output` to a numbered folder before it continues from an earlier checkpoint than last.pt.

    Afterwards last.pt is a copy of `checkpoint`: if the run then stops before it saves, --resume alone continues from
    there.  Returns the line to print; None if `checkpoint` is last.pt.
    """
    last = output / LAST_CHECKPOINT
    if last.exists() and last.samefile(checkpoint):
        return None
    with convert_write_errors(output):
        folder = _next_folder(output)
        for file in _run_files(output):
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copy2(output / file, folder / file)
    # Last, because a kill before this leaves the old run as it was.
    with atomic_write(last) as copy, checkpoint.open("rb") as original:
        shutil.copyfileobj(original, copy)
    return f"The run continues from {checkpoint}: a copy of what it had reached is in {folder}"


def _run_files(output: Path) -> list[Path]:
    """The files of the run in `output`, relative to it."""
    files = [Path(name) for name in RUN_FILES if os.path.lexists(output / name)]
    return files + [path.relative_to(output) for path in sorted(output.glob(EVENT_FILES))]


def _next_folder(output: Path) -> Path:
    """Makes and returns output/run-001 or the next free number."""
    names = [re.fullmatch(r"run-(\d+)", path.name) for path in output.iterdir()]
    last = max((int(name[1]) for name in names if name), default=0)
    folder = output / f"run-{last + 1:03d}"
    folder.mkdir()
    return folder


def versions() -> dict[str, str]:
    """Versions of Python and the installed packages that a run depends on, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for distribution in importlib.metadata.distributions():  # DALI's name ends in the CUDA version
        if (distribution.name or "").startswith("nvidia-dali-"):
            found["DALI"] = distribution.version
    return found

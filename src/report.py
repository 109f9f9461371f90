"""What a run tells: lines on the console, a progress bar, metrics.jsonl, flags.json, TensorBoard and the MLPerf log.

Every method is called on rank 0's `Report`; the other ranks hold a `NullReport`, which has the same methods and does
nothing.  metrics.jsonl holds one JSON object a line, told apart by "kind": "iteration", "epoch" or "evaluation";
numbers that are not finite are null.  Epochs and iterations count from 0, iterations on over the epochs.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from numbers import Number
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from .errors import UserError

TENSORBOARD_FOLDER = "tensorboard"
EVENT_FILES = f"{TENSORBOARD_FOLDER}/events.out.tfevents.*"
RUN_FILES = (
    "last.pt",
    "best.pt",
    "metrics.jsonl",
    "flags.json",
    "mlperf.log",
    "training.png",
    "precision_recall.png",
    "detections.png",
    "detections.json",
    "batch.png",
)
PACKAGES = ("torch", "torchvision", "numpy", "msgspec", "faster-coco-eval", "pycocotools")  # whose versions matter
NOT_DEFINED = "not defined"


class Bar(tqdm):
    """A progress bar without tqdm's helper thread and semaphore, which would be there in every forked worker."""

    monitor_interval = 0
    _lock = threading.RLock()


class Report:
    """Tells about a run on the console and in the files of its folder, which are opened when first needed."""

    def __init__(self, output: Path | None, *, append: bool, stream: TextIO | None = None) -> None:
        """output: the run's folder, made when needed; None: no files.  append: continue the files that are there.

        stream: where the lines go, standard output if left out.  Bars are shown when standard error is a terminal.
        """
        self._output = output
        self._append = append
        self._stream = sys.stdout if stream is None else stream
        self._show_bars = sys.stderr.isatty()
        self._bar: Bar | None = None
        self._metrics = None
        self._tensorboard = None
        self._tensorboard_start = None  # the first iteration that earlier event files do not hold
        self._iteration = 0

    # Lines

    def note(self, text: str) -> None:
        """A plain line."""
        self._print(text, self._stream)

    def warn(self, text: str) -> None:
        """A warning, on standard error."""
        self._print(f"main.py: warning: {text}", sys.stderr)

    def _print(self, text: str, stream: TextIO) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    # Training

    def begin_epoch(self, epoch: int, iterations: int, first_iteration: int = 0) -> None:
        """An epoch of so many iterations begins, at `first_iteration` of it when a run is continued there."""
        if self._show_bars:
            self._start_bar(total=iterations, initial=first_iteration, desc=f"Epoch {epoch:2d}")

    def step(self, images: int) -> None:
        """An iteration is done; called after every one, with the images of all processes."""
        if self._bar is not None:
            self._bar.update()

    def iteration(
        self,
        *,
        epoch: int,
        iteration: int,
        loss: float,
        localisation_loss: float,
        label_loss: float,
        learning_rate: float,
        images_per_second: float,
        loss_scale: float = 1.0,
    ) -> None:
        """The figures of an iteration that is logged: line, metrics.jsonl, bar and TensorBoard."""
        self._iteration = iteration
        figures = {
            "loss": loss,
            "localisation_loss": localisation_loss,
            "label_loss": label_loss,
            "learning_rate": learning_rate,
            "images_per_second": images_per_second,
            "loss_scale": loss_scale,
        }
        if self._bar is not None:
            postfix = f"loss {loss:.4f}, learning rate {learning_rate:.2e}, {images_per_second:.1f} images/s"
            self._bar.set_postfix_str(postfix, refresh=False)
        self.note(f"Epoch: {epoch:2d}, Iteration: {iteration}, Loss: {loss:.4f}")
        self._record({"kind": "iteration", "epoch": epoch, "iteration": iteration, **figures})
        self._scalars("training", figures)

    def end_epoch(
        self, *, epoch: int, seconds: float, images_per_second: float, average_images_per_second: float
    ) -> None:
        """An epoch is over; the average is that of the epochs so far."""
        self._end_bar()
        self.note(
            f"Epoch {epoch:2d} finished. Time: {seconds:.1f} s, Speed: {images_per_second:.1f} img/sec, "
            f"Average speed: {average_images_per_second:.1f}"
        )
        figures = {
            "seconds": seconds,
            "images_per_second": images_per_second,
            "average_images_per_second": average_images_per_second,
        }
        self._record({"kind": "epoch", "epoch": epoch, **figures})
        self._scalars("epoch", figures)

    def evaluation(self, *, epoch: int, figures: Mapping[str, float | None]) -> None:
        """The figures of an evaluation by name, "mAP" among them; None: not defined."""
        self._end_bar()
        self.note(f"Epoch {epoch:2d}, Accuracy: {_accuracy_text(figures['mAP'])}")
        self._record({"kind": "evaluation", "epoch": epoch, **figures})
        self._scalars("evaluation", figures)

    def end(self, *, average_images_per_second: float, seconds: float, accuracy: float | None | str) -> None:
        """The run is complete.  accuracy: the last evaluation's mAP, None: not defined, or a text instead of it."""
        self._end_bar()
        self.note(
            f"Training end: Average speed: {average_images_per_second:.1f} img/sec, Total time: {seconds:.1f} sec, "
            f"Final accuracy: {_accuracy_text(accuracy)}"
        )

    # Bars

    def progress(self, total: int, name: str):
        """A context that gives a bar with `update()`, for an evaluation or another long job of `total` steps."""
        if self._show_bars:
            self._start_bar(total=total, desc=name)
            return self._bar
        return NullBar()

    def _start_bar(self, **settings) -> None:
        self._end_bar()
        self._bar = Bar(**settings, dynamic_ncols=True, leave=False, miniters=1)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    # Files

    def flags(self, flags: Mapping[str, object], **facts: object) -> None:
        """Writes flags.json: the flags as given, the versions of what runs them, and facts such as the device."""
        content = {"flags": flags, **facts, "versions": versions()}
        if self._output is not None:
            text = json.dumps(content, indent=2, default=_as_json)
            _replace(self._folder() / "flags.json", text.encode() + b"\n")

    def truncate(self, *, epoch: int, iteration: int) -> None:
        """Forgets what was logged beyond the checkpoint that is continued.

        epoch: the one that training goes on in; iteration: the next one.  What a killed process left half written goes
        too.
        """
        self._tensorboard_start = iteration
        if self._output is None or not (path := self._output / "metrics.jsonl").exists():
            return
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise _unwritable(path, error) from None
        kept = [line for line in lines if _is_before(line, epoch, iteration)]
        _replace(path, b"".join(line + b"\n" for line in kept))

    def close(self) -> None:
        """Ends the bar and closes the files; a report that is closed can still print."""
        self._end_bar()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = None

    def _folder(self) -> Path:
        try:
            self._output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self._output, error) from None
        return self._output

    def _record(self, entry: Mapping[str, object]) -> None:
        """Adds a line to metrics.jsonl, in one write that needs no flush."""
        if self._output is None:
            return
        path = self._output / "metrics.jsonl"
        line = json.dumps({key: _finite(value) for key, value in entry.items()}, allow_nan=False) + "\n"
        try:
            if self._metrics is None:
                self._folder()
                self._metrics = path.open("ab" if self._append else "wb", buffering=0)
            self._metrics.write(line.encode())
        except OSError as error:
            raise _unwritable(path, error) from None

    def _scalars(self, group: str, figures: Mapping[str, float | None]) -> None:
        """Hands figures to TensorBoard, where that is installed."""
        if self._output is None:
            return
        if self._tensorboard is None:
            self._tensorboard = _open_tensorboard(self._folder() / TENSORBOARD_FOLDER, self._tensorboard_start)
        if self._tensorboard:
            for name, value in figures.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"{group}/{name.replace(' ', '_')}", value, self._iteration)


class NullBar:
    """A bar that is not shown."""

    def __enter__(self) -> "NullBar":
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        pass


class NullReport:
    """The report of the ranks that do not report."""

    def _nothing(self, *_, **__) -> None:
        pass

    note = warn = begin_epoch = step = iteration = end_epoch = evaluation = end = _nothing
    flags = truncate = close = _nothing

    def progress(self, total: int, name: str) -> NullBar:
        return NullBar()


def set_aside_old_run(output: Path) -> str | None:
    """Moves the files of an earlier run in `output` to the next free `output/run-001` and so on.

    Gives the sentence that says so, None where there was no run.  Other files stay.  Each file is moved whole by one
    rename, so that an interruption loses nothing; what it left behind is moved by the next call.
    """
    try:
        files = [name for name in RUN_FILES if os.path.lexists(output / name)]
        files += [str(path.relative_to(output)) for path in sorted(output.glob(EVENT_FILES))]
        if not files:
            return None
        folder = output / f"run-{_last_run_number(output) + 1:03d}"
        folder.mkdir()
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
            os.rename(output / name, folder / name)
    except OSError as error:
        raise _unwritable(Path(error.filename or output), error) from None
    return f"{output} held an earlier run: its files are now in {folder}"


def _last_run_number(output: Path) -> int:
    numbers = [re.fullmatch(r"run-(\d+)", path.name) for path in output.iterdir()]
    return max((int(number[1]) for number in numbers if number), default=0)


def versions() -> dict[str, str]:
    """Versions of Python and the packages that a run depends on, as far as they are installed, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    for distribution in importlib.metadata.distributions():  # DALI's name ends in the CUDA version
        if (distribution.name or "").startswith("nvidia-dali-"):
            found["DALI"] = distribution.version
    return found


def _accuracy_text(accuracy: float | None | str) -> str:
    if accuracy is None:
        return NOT_DEFINED
    return accuracy if isinstance(accuracy, str) else f"{accuracy:.4f} mAP"


def _finite(value: object) -> object:
    """A JSON value: numbers of any library as Python's, None for one that is not finite."""
    if isinstance(value, str | int) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _as_json(value: object) -> object:
    """What json.dumps does not know: numbers of other libraries, sets, and paths and the rest as text."""
    if isinstance(value, Number):
        return _finite(value)
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _is_before(line: bytes, epoch: int, iteration: int) -> bool:
    """Whether a line of metrics.jsonl is whole and was logged before that epoch and iteration."""
    try:
        entry = json.loads(line)
        return entry["iteration"] < iteration if entry["kind"] == "iteration" else entry["epoch"] < epoch
    except (ValueError, TypeError, KeyError):
        return False


def _open_tensorboard(folder: Path, first_iteration: int | None):
    """TensorBoard's writer, False where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    return SummaryWriter(log_dir=str(folder), purge_step=first_iteration)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror or error}")

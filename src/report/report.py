"""What a run tells: lines on the console, a progress bar, metrics.jsonl, flags.json, TensorBoard and the MLPerf log.

Rank 0 holds a `Report`; the other ranks hold a `NullReport`, which has the same methods and does nothing.
metrics.jsonl holds one JSON object a line, told apart by "kind": "iteration", "epoch" or "evaluation"; numbers that
are not finite are null.  Epochs and iterations count from 0, iterations on over the epochs; an epoch's object has
the iteration that comes next.  Every method that writes
a file raises UserError, which names the file, where it cannot be written.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, SupportsFloat, TextIO

from src.report import mlperf
from src.report.progress import Bar, NullBar, TrainingBar
from src.runtime.distributed import Processes
from src.runtime.errors import printable
from src.runtime.output_files import atomic_write, make_folder, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS, FLAGS, MLPERF_LOG, TENSORBOARD = "metrics.jsonl", "flags.json", "mlperf.log", "tensorboard"
PICTURES = ("training.png", "precision_recall.png", "detections.png", "batch.png")
RESULTS = "detections.json"
RUN_FILES = ("last.pt", "best.pt", METRICS, FLAGS, MLPERF_LOG, *PICTURES, RESULTS)
EVENT_FILES = f"{TENSORBOARD}/events.out.tfevents.*"
PACKAGES = ("torch", "torchvision", "numpy", "msgspec", "faster-coco-eval", "pycocotools")  # whose versions matter


class Report:
    """Tells about a run on the console and in the files of its folder, which are opened when first needed."""

    def __init__(self, output: Path | None, *, append: bool, stream: TextIO | None = None) -> None:
        """output: the run's folder, made when needed; None: no files.  append: continue its files; see `truncate`.

        stream: where the lines go, standard output if left out.  Bars are shown when standard error is a terminal.
        """
        self._output = output
        self._append = append
        self._stream = sys.stdout if stream is None else stream
        self._show_bars = sys.stderr.isatty()
        self._bar: Bar | None = None
        self._metrics: IO[bytes] | None = None
        self._mlperf: mlperf.MlperfLog | None = None
        self._tensorboard: SummaryWriter | Literal[False] | None = None  # False: done without
        self._continued_at: int | None = None
        self._iterations = 0  # done since the run's start

    def note(self, text: str) -> None:
        """A plain line."""
        self._print(text, self._stream)

    def warn(self, text: str) -> None:
        """A warning, on standard error."""
        self._print(f"main.py: warning: {text}", sys.stderr)

    def begin_run(self, constants: mlperf.Constants) -> None:
        """Starts mlperf.log with everything that is constant, or goes on with it."""
        if self._output is not None:
            path = make_folder(self._output) / MLPERF_LOG
            with writing(path):
                self._mlperf = mlperf.MlperfLog(path, constants, append=self._append)

    def begin_epoch(self, epoch: int, iterations: int, first_iteration: int = 0) -> None:
        """An epoch of so many iterations begins, at `first_iteration` of it when a run is continued there."""
        self._tell_mlperf(lambda log: log.begin_epoch(epoch))
        if self._show_bars:
            self._end_bar()
            self._bar = TrainingBar(iterations, f"Epoch {epoch:2d}", initial=first_iteration)

    def step(self, images: int) -> None:
        """An iteration is done, with so many images in all processes; called after each one."""
        self._iterations += 1
        if self._bar is not None:
            self._bar.images = images
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
        skipped_steps: int = 0,
    ) -> None:
        """The figures of an iteration that is logged; called after its `step`.

        skipped_steps: those that loss scaling has left out since the process started.
        """
        self._iterations = iteration + 1
        figures = {
            "loss": loss,
            "localisation_loss": localisation_loss,
            "label_loss": label_loss,
            "learning_rate": learning_rate,
            "images_per_second": images_per_second,
            "loss_scale": loss_scale,
            "skipped_steps": skipped_steps,
        }
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, rate {learning_rate:.2e}", refresh=False)
        self.note(f"Epoch: {epoch:2d}, Iteration: {iteration}, Loss: {loss:.4f}")
        self._record({"kind": "iteration", "epoch": epoch, "iteration": iteration, **figures})
        self._scalars("training", figures, iteration)

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
        self._record({"kind": "epoch", "epoch": epoch, "iteration": self._iterations, **figures})
        self._scalars("epoch", figures, epoch)

    def begin_evaluation(self, epoch: int) -> None:
        """An evaluation begins, of the model as it is after `epoch`."""
        self._tell_mlperf(lambda log: log.begin_evaluation(epoch))

    def evaluation(
        self,
        *,
        epoch: int,
        figures: Mapping[str, float | None],
        seconds: Mapping[str, float] | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """The evaluation's figures by name, "mAP" among them; None: not defined.  seconds: where its time went.

        details: further entries of its line in metrics.jsonl.
        """
        self._end_bar()
        self.note(f"Epoch {epoch:2d}, Accuracy: {_accuracy_text(figures['mAP'])}")
        timing = {"seconds": seconds} if seconds else {}
        self._record({"kind": "evaluation", "epoch": epoch, **figures, **(details or {}), **timing})
        self._scalars("evaluation", figures, epoch)
        self._tell_mlperf(lambda log: log.end_evaluation(epoch, _finite(figures["mAP"])))

    def end(self, *, average_images_per_second: float, seconds: float, accuracy: float | str | None) -> None:
        """The run is complete.  accuracy: the last evaluation's mAP, None: not defined, or a text instead of it."""
        self._end_bar()
        self.note(
            f"Training end: Average speed: {average_images_per_second:.1f} img/sec, Total time: {seconds:.1f} sec, "
            f"Final accuracy: {_accuracy_text(accuracy)}"
        )
        self._tell_mlperf(
            lambda log: log.end_run(accuracy=None if isinstance(accuracy, str) else _finite(accuracy), completed=True)
        )

    def mark_failed(self) -> None:
        """The run has ended without success and cannot be continued as it is.  (One that was stopped only closes.)"""
        self._tell_mlperf(lambda log: log.end_run(accuracy=None, completed=False))

    def progress(self, total: int, name: str) -> "Bar | NullBar":
        """A context that gives a bar with `update()`, for an evaluation or another long job of `total` steps."""
        self._end_bar()
        if not self._show_bars:
            return NullBar()
        self._bar = Bar(total, name)
        return self._bar

    def flags(self, flags: Mapping[str, object], **facts: object) -> None:
        """Writes flags.json: the flags as given, the versions of what runs them, and facts such as the device."""
        if self._output is not None:
            content = _plain({"flags": flags, **facts, "versions": versions()})
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
            with atomic_write(make_folder(self._output) / FLAGS) as file:
                file.write(text.encode())

    def truncate(self, *, epoch: int, iteration: int) -> None:
        """Forgets what the files tell from a checkpoint's position on, where the run is then continued.

        epoch: the one to go on in, perhaps with its evaluation; iteration: the next one, counted from the run's start.
        What a killed process left half written goes as well.
        """
        self._continued_at = self._iterations = iteration
        if self._output is None:
            return
        for name, truncated in (
            (METRICS, lambda text: _metrics_before(text, epoch, iteration)),
            (MLPERF_LOG, lambda text: mlperf.truncated(text, epoch)),
        ):
            path = self._output / name
            if path.exists():
                with writing(path):
                    text = path.read_text("utf-8", errors="replace")
                with atomic_write(path) as file:
                    file.write(truncated(text).encode())

    def close(self) -> None:
        """Ends the bar and closes the files."""
        self._end_bar()
        for file in (self._metrics, self._mlperf):
            if file:
                file.close()
        with self._doing_without():
            if self._tensorboard:
                self._tensorboard.close()
        self._metrics = self._mlperf = self._tensorboard = None

    def _print(self, text: str, stream: TextIO) -> None:
        where = "to standard output" if stream is self._stream else "to standard error"
        with Bar.external_write_mode(sys.stderr), writing(where):
            print(text, file=stream, flush=True)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _tell_mlperf(self, write: Callable[[mlperf.MlperfLog], None]) -> None:
        if self._mlperf is not None and self._output is not None:
            with writing(self._output / MLPERF_LOG):
                write(self._mlperf)

    def _record(self, entry: Mapping[str, object]) -> None:
        """Adds a line to metrics.jsonl, in one write that needs no flush."""
        if self._output is None:
            return
        path = self._output / METRICS
        with writing(path):
            if self._metrics is None:
                self._metrics = (make_folder(self._output) / METRICS).open("ab" if self._append else "wb", buffering=0)
            self._metrics.write(json.dumps(_plain(entry), allow_nan=False).encode() + b"\n")

    def _scalars(self, group: str, figures: Mapping[str, float | None], step: int) -> None:
        """Hands figures to TensorBoard, where that is installed."""
        if self._output is None or self._tensorboard is False:
            return
        with self._doing_without():
            if self._tensorboard is None:
                self._tensorboard = _open_tensorboard(make_folder(self._output) / TENSORBOARD, self._continued_at)
            for name, value in figures.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"{group}/{name.replace(' ', '_')}", value, step)

    @contextmanager
    def _doing_without(self) -> Iterator[None]:
        """Goes on without TensorBoard where it is not installed or fails: many packages have a part in it."""
        try:
            yield
        except Exception as error:
            self._tensorboard = False
            if not isinstance(error, ModuleNotFoundError):
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.warn(f"TensorBoard fails, so it gets no further events: {printable(reason)}")


class NullReport:
    """The report of the ranks that do not report."""

    def _nothing(self, *_: object, **__: object) -> None:
        pass

    note = warn = begin_run = begin_epoch = step = iteration = end_epoch = _nothing
    begin_evaluation = evaluation = end = mark_failed = flags = truncate = close = _nothing

    def progress(self, total: int, name: str) -> NullBar:
        return NullBar()


@dataclass(frozen=True)
class RunContext:
    """What every mode works with."""

    processes: Processes
    report: "Report | NullReport"
    output: Path  # --output


def holds_run(output: Path) -> bool:
    """Whether a run or an evaluation has left files in the folder; detections.json alone may be a prediction's."""
    return any(os.path.lexists(output / name) for name in RUN_FILES if name != RESULTS)


def set_aside_old_run(output: Path) -> str | None:
    """Moves the files of an earlier run in `output` to the next free `output/run-001` and so on.

    Gives the sentence that says so, None where there was no run.  Other files stay.  Each file is moved by one rename,
    so that an interruption loses nothing; what it left behind is moved by the next call.
    """
    with writing(output):
        files = [Path(name) for name in RUN_FILES if os.path.lexists(output / name)]
        files += [path.relative_to(output) for path in sorted(output.glob(EVENT_FILES))]
        if not files:
            return None
        folder = output / f"run-{_last_run_number(output) + 1:03d}"
        folder.mkdir()
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            os.rename(output / file, folder / file)
    return f"{output} held an earlier run: its files are now in {folder}"


def _last_run_number(output: Path) -> int:
    names = [re.fullmatch(r"run-(\d+)", path.name) for path in output.iterdir()]
    return max((int(name[1]) for name in names if name), default=0)


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


def _print_untold(otherwise: Callable[[threading.ExceptHookArgs], object], error: threading.ExceptHookArgs) -> None:
    """A thread's error, but that of TensorBoard's writer, which raises it once more where the next event is given."""
    if getattr(error.thread, "exception", None) is not error.exc_value:
        otherwise(error)


def _accuracy_text(accuracy: float | str | None) -> str:
    if accuracy is None:
        return "not defined"
    return accuracy if isinstance(accuracy, str) else f"{accuracy:.4f} mAP"


def _plain(value: object) -> object:
    """The value as JSON knows it: any library's numbers as Python's, None for one that is not finite, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str | int) or value is None:
        return value
    return _finite(value) if isinstance(value, Real) else str(value)


def _finite(value: SupportsFloat | None) -> float | None:
    """The number, None for one that is not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def _metrics_before(text: str, epoch: int, iteration: int) -> str:
    """The whole lines of a metrics.jsonl that were logged before that epoch and iteration."""
    return "".join(line + "\n" for line in text.splitlines() if _is_before(line, epoch, iteration))


def _is_before(line: str, epoch: int, iteration: int) -> bool:
    try:
        entry = json.loads(line)
        if entry["kind"] == "evaluation":
            return entry["epoch"] < epoch
        return entry["iteration"] < iteration + (entry["kind"] == "epoch")
    except (ValueError, TypeError, KeyError):
        return False


def _open_tensorboard(folder: Path, first_iteration: int | None) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # here, because it may be missing

    threading.excepthook = partial(_print_untold, threading.excepthook)
    return SummaryWriter(log_dir=str(folder), purge_step=first_iteration)

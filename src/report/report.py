"""The report of a run: lines on the console, a progress bar, metrics.jsonl, flags.json, TensorBoard and mlperf.log.

Every rank has a `Report`; only rank 0's is enabled.
metrics.jsonl has one JSON object a line.  Its "kind" is "iteration", "epoch", "evaluation" or "warning"; NaN and
infinity are null.  Epochs and iterations count from 0, iterations across epochs.  An epoch's object has the number of
the next iteration.  Every method that writes a file raises UserError, which names the file, if it cannot be written.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, TextIO

from src.report import mlperf, tensorboard
from src.report.metrics import IterationMetrics, finite, rewind_metrics, to_json_values
from src.report.progress import Bar, NullBar, TrainingBar
from src.report.run_folder import EVENT_FILES, FLAGS, METRICS, MLPERF_LOG, TENSORBOARD, versions
from src.runtime.console import take_failures
from src.runtime.distributed import Processes
from src.runtime.errors import escape_control_characters
from src.runtime.output_files import atomic_write, convert_write_errors, make_folder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Report:
    """Writes to the console and to the files in a run's folder; it opens each file at its first entry."""

    def __init__(
        self, output: Path | None, *, append: bool = False, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        """output: the run's folder, made when needed; None: no files.  append: continue its files; see `rewind`.

        enabled: False on ranks that report nothing.  stream: gets the lines, by default standard output.
        Progress bars are shown if standard error is a terminal.
        """
        self._output = output if enabled else None
        self._append = append
        self._enabled = enabled
        self._stream = sys.stdout if stream is None else stream
        self._show_bars = enabled and sys.stderr.isatty()
        self._bar: Bar | None = None
        self._metrics: IO[bytes] | None = None
        self._mlperf: mlperf.MlperfLog | None = None
        self._tensorboard: SummaryWriter | Literal[False] | None = None  # False: it is missing or failed
        self._iterations = 0  # since the run's start

    @classmethod
    def disabled(cls) -> "Report":
        """The report of ranks other than 0: every method does nothing."""
        return cls(None, enabled=False)

    def note(self, text: str) -> None:
        """Prints a plain line."""
        self._print(text, self._stream)

    def warn(self, text: str) -> None:
        """Prints a warning on standard error."""
        self._print(f"main.py: warning: {text}", sys.stderr)

    def begin_run(self, constants: mlperf.Constants) -> None:
        """Starts mlperf.log with the run's constants, or continues it."""
        if self._output is not None:
            path = make_folder(self._output) / MLPERF_LOG
            with convert_write_errors(path):
                self._mlperf = mlperf.MlperfLog(path, constants, append=self._append)

    def begin_epoch(self, epoch: int, iterations: int, first_iteration: int = 0) -> None:
        """Starts an epoch of `iterations`.  first_iteration: in the epoch, above 0 if a run continues there."""
        self._log_mlperf(lambda log: log.begin_epoch(epoch))
        if self._show_bars:
            self._end_bar()
            self._bar = TrainingBar(iterations, f"Epoch {epoch:2d}", initial=first_iteration)

    def advance(self, images: int) -> None:
        """Counts an iteration and moves the progress bar; call it after each one.  images: in all processes."""
        self._iterations += 1
        if self._bar is not None:
            self._bar.images = images
            self._bar.update()

    def log_iteration(self, epoch: int, iteration: int, metrics: IterationMetrics) -> None:
        """Logs an iteration; call it after its `advance`."""
        self._iterations = iteration + 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {metrics.loss:.4f}, rate {metrics.learning_rate:.2e}", refresh=False)
        self.note(f"Epoch: {epoch:2d}, Iteration: {iteration}, Loss: {metrics.loss:.4f}")
        self._write_metrics({"kind": "iteration", "epoch": epoch, "iteration": iteration, **metrics._asdict()})
        self._log_scalars("training", metrics._asdict(), iteration)

    def end_epoch(
        self, *, epoch: int, seconds: float, images_per_second: float, average_images_per_second: float
    ) -> None:
        """Logs an epoch.  average_images_per_second: over the epochs so far."""
        self._end_bar()
        self.note(
            f"Epoch {epoch:2d} finished. Time: {seconds:.1f} s, Speed: {images_per_second:.1f} img/sec, "
            f"Average speed: {average_images_per_second:.1f}"
        )
        metrics = {
            "seconds": seconds,
            "images_per_second": images_per_second,
            "average_images_per_second": average_images_per_second,
        }
        self._write_metrics({"kind": "epoch", "epoch": epoch, "iteration": self._iterations, **metrics})
        self._log_scalars("epoch", metrics, epoch)

    def begin_evaluation(self, epoch: int) -> None:
        """Logs the start of the evaluation after `epoch`."""
        self._log_mlperf(lambda log: log.begin_evaluation(epoch))

    def log_evaluation(
        self,
        *,
        epoch: int,
        metrics: Mapping[str, float | None],
        seconds: Mapping[str, float] | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        """Logs an evaluation.  metrics: by name, with "mAP"; None: not defined.  seconds: by phase.

        details: further entries of its line in metrics.jsonl.
        """
        self._end_bar()
        self.note(f"Epoch {epoch:2d}, Accuracy: {_accuracy_text(metrics['mAP'])}")
        timing = {"seconds": seconds} if seconds else {}
        self._write_metrics({"kind": "evaluation", "epoch": epoch, **metrics, **(details or {}), **timing})
        self._log_scalars("evaluation", metrics, epoch)
        self._log_mlperf(lambda log: log.end_evaluation(epoch, finite(metrics["mAP"])))

    def end_run(self, *, average_images_per_second: float, seconds: float, accuracy: float | str | None) -> None:
        """Logs the end of a complete run.  accuracy: the last mAP; None: not defined; or a text in its place."""
        self._end_bar()
        self.note(
            f"Training end: Average speed: {average_images_per_second:.1f} img/sec, Total time: {seconds:.1f} sec, "
            f"Final accuracy: {_accuracy_text(accuracy)}"
        )
        self._log_mlperf(
            lambda log: log.end_run(accuracy=None if isinstance(accuracy, str) else finite(accuracy), completed=True)
        )

    def mark_failed(self) -> None:
        """Logs the end of a run that diverged.  (A run that was stopped only closes its report.)"""
        self._log_mlperf(lambda log: log.end_run(accuracy=None, completed=False))

    def progress(self, total: int, name: str) -> "Bar | NullBar":
        """A context whose value is a progress bar of `total` steps; call its `update` after each step."""
        self._end_bar()
        if not self._show_bars:
            return NullBar()
        self._bar = Bar(total, name)
        return self._bar

    def write_flags(self, flags: Mapping[str, object], **facts: object) -> None:
        """Writes flags.json: the flags as given, facts such as the device, and versions of packages."""
        if self._output is not None:
            content = to_json_values({"flags": flags, **facts, "versions": versions()})
            text = json.dumps(content, indent=2, allow_nan=False) + "\n"
            with atomic_write(make_folder(self._output) / FLAGS) as file:
                file.write(text.encode())

    def rewind(self, *, epoch: int, iteration: int) -> None:
        """Removes the entries from a checkpoint's position on from all files; the run continues there.

        epoch: the one to continue in, perhaps with its evaluation.  iteration: the next one, counted from the run's
        start.  Warns of damaged lines and missing metrics.
        """
        self._iterations = iteration
        if self._output is None:
            return
        ended_epochs = self._rewind_metrics(epoch, iteration)
        log = self._output / MLPERF_LOG
        if log.exists():
            with convert_write_errors(log):
                text = log.read_text("utf-8", errors="replace")
            with atomic_write(log) as file:
                file.write(mlperf.rewind(text, epoch).encode())

        def is_before(tag: str, step: int) -> bool:
            group = tag.partition("/")[0]
            if group == "training":
                return step < iteration
            return step in ended_epochs if group == "epoch" else step < epoch

        with self._disable_tensorboard_on_error():
            for events in self._output.glob(EVENT_FILES):
                tensorboard.rewind_events(events, is_before)

    def _rewind_metrics(self, epoch: int, iteration: int) -> set[int]:
        """Rewinds metrics.jsonl; the epochs whose end is logged in it."""
        assert self._output is not None
        path = self._output / METRICS
        if not path.exists():
            if iteration and self._append:
                self.warn(f"{path}: missing: it now starts at epoch {epoch}, iteration {iteration}")
            return set(range(epoch))
        with convert_write_errors(path):
            rewound = rewind_metrics(path, epoch=epoch, iteration=iteration)
        with atomic_write(path) as file:
            file.write(rewound.text.encode())
        for warning in rewound.warnings:
            self.warn(warning)
        return rewound.ended_epochs

    def close(self) -> None:
        """Erases the bar and closes the files."""
        self._end_bar()
        for file in (self._metrics, self._mlperf):
            if file:
                file.close()
        with self._disable_tensorboard_on_error():
            if self._tensorboard:
                self._tensorboard.close()
        self._metrics = self._mlperf = self._tensorboard = None

    def _print(self, text: str, stream: TextIO) -> None:
        if not self._enabled:
            return
        with Bar.external_write_mode(sys.stderr):
            print(text, file=stream, flush=True)
        for failure in take_failures():
            self.warn(failure)
            self._write_metrics({"kind": "warning", "text": failure})

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _log_mlperf(self, write: Callable[[mlperf.MlperfLog], None]) -> None:
        if self._mlperf is not None and self._output is not None:
            with convert_write_errors(self._output / MLPERF_LOG):
                write(self._mlperf)

    def _write_metrics(self, entry: Mapping[str, object]) -> None:
        """Appends a line to metrics.jsonl by a single unbuffered write."""
        if self._output is None:
            return
        path = self._output / METRICS
        with convert_write_errors(path):
            if self._metrics is None:
                self._metrics = (make_folder(self._output) / METRICS).open("ab" if self._append else "wb", buffering=0)
            self._metrics.write(json.dumps(to_json_values(entry), allow_nan=False).encode() + b"\n")

    def _log_scalars(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Writes the values to TensorBoard if it is installed."""
        if self._output is None or self._tensorboard is False:
            return
        with self._disable_tensorboard_on_error():
            if self._tensorboard is None:
                self._tensorboard = tensorboard.open_writer(make_folder(self._output) / TENSORBOARD)
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(f"{group}/{name.replace(' ', '_')}", value, step)

    @contextmanager
    def _disable_tensorboard_on_error(self) -> Iterator[None]:
        """Disables TensorBoard if it is missing or fails inside, so that a package that it needs cannot end a run."""
        try:
            yield
        except Exception as error:
            self._tensorboard = False
            if not isinstance(error, ModuleNotFoundError):
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.warn(f"TensorBoard fails, so it gets no further events: {escape_control_characters(reason)}")


@dataclass(frozen=True)
class RunContext:
    """The values that every mode needs."""

    processes: Processes
    report: Report
    output: Path  # --output


def _accuracy_text(accuracy: float | str | None) -> str:
    if accuracy is None:
        return "not defined"
    return accuracy if isinstance(accuracy, str) else f"{accuracy:.4f} mAP"

"""The files of an evaluation, made by a process of low priority while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from pathlib import Path

from src.data.annotations.coco import Annotations
from src.evaluation.artifact_files import FILES, write_artifacts
from src.evaluation.artifacts import remains_of
from src.evaluation.evaluate import Evaluation
from src.report.report import METRICS, NullReport, Report
from src.runtime.background_process import Errand, ErrandLostError
from src.runtime.distributed import SigtermReceived
from src.runtime.errors import UserError
from src.runtime.output_files import make_folder

NICENESS = 10  # the making of files stands back behind the training
LAST_WAIT = 10  # seconds that a run which is told to stop waits for the files; a launcher kills after 30


class BackgroundFiles:
    """Has the files of one evaluation at a time made by another process; what fails there is a warning.

    A context: its end waits for the files, and leaves them as they are where the run fails or is interrupted.
    """

    def __init__(self, output: Path, report: Report | NullReport) -> None:
        self.output = output
        self.report = report
        self._errand: Errand | None = None
        self._thread = ThreadPoolExecutor(1)
        self._failures: Future[list[str]] | None = None

    def start(self, found: Evaluation, validation: Annotations) -> None:
        """Has the files made from what was found."""
        metrics = make_folder(self.output) / METRICS
        try:
            size = metrics.stat().st_size
            self._errand = Errand(niceness=NICENESS)
        except OSError as error:
            self._warn(str(error))
        else:
            self._failures = self._thread.submit(self._make, self._errand, found, validation, metrics, size)

    def _make(self, errand: Errand, found: Evaluation, validation: Annotations, metrics: Path, size: int) -> list[str]:
        """In the thread: reads the images to show and hands all over, which may take a while as well."""
        errand.send(write_artifacts, remains_of(found, validation, metrics=metrics, metrics_size=size), self.output)
        return errand.answer()

    def finish(self, timeout: float | None = None) -> None:
        """Waits for the files, no longer than `timeout` seconds where that is given, and warns of what is missing."""
        if self._failures is None:
            return
        try:
            for failure in self._failures.result(timeout):
                self.report.warn(failure)
        except TimeoutError:
            self._warn(f"they were not made in {timeout} s")
        except (UserError, ErrandLostError) as error:
            self._warn(str(error))
        self.stop()

    def _warn(self, why: str) -> None:
        self.report.warn(f"{', '.join(FILES)} in {self.output} are not all of the last evaluation: {why}")

    def stop(self) -> None:
        """Ends the making of files; what is not whole by then stays as it was."""
        if self._errand is not None:
            self._errand.stop()
        self._errand = self._failures = None

    def __enter__(self) -> "BackgroundFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, SigtermReceived):
                self.finish(None if kind is None else LAST_WAIT)
        finally:
            self.stop()
            self._thread.shutdown()

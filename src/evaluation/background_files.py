"""The files of an evaluation, written by a process of low priority while training continues.

The process is a fresh Python.  A fork would be unsafe with a GPU and threads, and multiprocessing would import main.py
and torch, which takes 6 s of a core.
"""

import json
import pickle
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from pathlib import Path

from src.data.annotations.coco import Annotations
from src.evaluation.artifacts import ARTIFACTS, collect_artifact_inputs
from src.evaluation.evaluate import Evaluation
from src.report.report import Report
from src.report.run_folder import METRICS
from src.runtime.errors import SigtermReceived, UserError
from src.runtime.output_files import make_folder

PROGRAM = "src.evaluation.write_artifacts"
ROOT = Path(__file__).parents[2]  # the folder from which `python -m` finds PROGRAM
SIGTERM_WAIT = 10  # seconds that a run waits for the files after SIGTERM: launchers kill 30 s after SIGTERM
STOP_WAIT = 5  # seconds in which a stopped process may remove an unfinished file


class WriterDiedError(RuntimeError):
    """The writing process ended before all files were written; the message says how."""


class BackgroundFiles:
    """Starts a process that writes the files of an evaluation, one evaluation at a time; its errors become warnings.

    A context manager: its end waits for the files.  If the run fails or is interrupted, it stops the process; files
    that are unfinished then stay as they were.
    """

    def __init__(self, output: Path, report: Report) -> None:
        self.output = output
        self.report = report
        self._process: subprocess.Popen | None = None
        self._inputs_sent = False
        self._thread = ThreadPoolExecutor(1)
        self._failures: Future[list[str]] | None = None

    def start(self, evaluation: Evaluation, validation: Annotations) -> None:
        """Starts writing the files of an evaluation; returns at once."""
        metrics_file = make_folder(self.output) / METRICS
        try:
            metrics_size = metrics_file.stat().st_size
            # In a session of its own, Ctrl-C at the terminal does not reach it; `stop` ends it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(self.output.absolute())],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._warn(str(error))
            return
        self._inputs_sent = False
        self._failures = self._thread.submit(
            self._write, self._process, evaluation, validation, metrics_file.absolute(), metrics_size
        )

    def _write(
        self, process: subprocess.Popen, evaluation: Evaluation, validation: Annotations, metrics: Path, size: int
    ) -> list[str]:
        """Runs in the thread, because reading the example images and sending 637,000 detections takes a second."""
        assert evaluation.results is not None and process.stdin is not None and process.stdout is not None
        inputs = collect_artifact_inputs(
            evaluation.results, evaluation.coco_metrics, validation, metrics_file=metrics, metrics_size=size
        )
        with suppress(BrokenPipeError):  # the exit status below says why
            pickle.dump(inputs, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
        self._inputs_sent = True
        with process.stdout:
            answer = process.stdout.read()
        status = process.wait()  # before standard input is closed, which interrupts the process
        if status:
            how = f"was killed by signal: {signal.strsignal(-status)}" if status < 0 else f"ended with status {status}"
            raise WriterDiedError(f"the process that writes them {how}")
        return json.loads(answer)

    def finish(self, timeout: float | None = None) -> None:
        """Waits for the files, at most `timeout` seconds, and warns about those that are missing."""
        if self._failures is None:
            return
        try:
            for failure in self._failures.result(timeout):
                self.report.warn(failure)
        except TimeoutError:
            self._warn(f"they were not written within {timeout} s")
        except (UserError, WriterDiedError) as error:
            self._warn(str(error))
        self.stop()

    def _warn(self, reason: str) -> None:
        self.report.warn(f"{', '.join(ARTIFACTS)} in {self.output} may be older than the last evaluation: {reason}")

    def stop(self) -> None:
        """Ends the process; a file that it has not finished stays as it was."""
        process, self._process, self._failures = self._process, None, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        if not self._inputs_sent:
            process.kill()  # it has opened no file yet, and closing its input would block until it reads
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(STOP_WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> "BackgroundFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, SigtermReceived):
                self.finish(None if kind is None else SIGTERM_WAIT)
        finally:
            self.stop()
            self._thread.shutdown()

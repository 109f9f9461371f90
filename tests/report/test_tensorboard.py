"""TensorBoard's events; a TensorBoard that is missing or fails does not end the run."""

import io
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from src.report.report import Report
from src.report.run_folder import set_aside_old_run
from tests.helpers.example_run import ITERATIONS, PER_EPOCH, log_iteration, play_run
from tests.helpers.small_runs import metrics


class FailingWriter:
    """Raises at its n-th use; its construction is the first."""

    def __init__(self, uses: int) -> None:
        self.uses = uses
        self._use()

    def _use(self) -> None:
        self.uses -= 1
        if self.uses == 0:
            raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file")

    def add_scalar(self, *_) -> None:
        self._use()

    def close(self) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("uses", "reason"),
    [
        (1, "Descriptors cannot be created directly."),
        (2, "Descriptors cannot be created directly."),
        (10**9, "[Errno 28]"),
    ],
)
def test_a_tensorboard_that_fails_causes_one_warning(tmp_path, monkeypatch, capsys, uses, reason):
    module = SimpleNamespace(SummaryWriter=lambda **_: FailingWriter(uses))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report, stop=PER_EPOCH)
    report.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: warning: TensorBoard fails, so it gets no further events: {reason}")
    assert [entry["epoch"] for entry in metrics(tmp_path) if entry["kind"] == "epoch"] == [0]


def test_an_installed_tensorboard_that_cannot_be_imported_causes_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace())  # no SummaryWriter: an ImportError
    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report, stop=PER_EPOCH)
    report.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "TensorBoard fails, so it gets no further events: cannot import name 'SummaryWriter'" in line


def test_without_tensorboard_there_are_no_events(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails as when it is not installed
    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report)
    report.close()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "mlperf.log"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tensorboard_that_cannot_write_causes_one_warning(tmp_path, capsys):
    """Python also prints the error of the writer's thread."""
    report = Report(tmp_path, append=False)
    log_iteration(report, 0)

    def no_space(_) -> None:
        raise OSError(28, "No space left on device")

    thread = report._tensorboard._get_file_writer().event_writer._async_writer._worker
    thread._record_writer.write = no_space
    log_iteration(report, 20)
    thread.join(60)
    log_iteration(report, 40)
    report.close()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("main.py")]
    assert line.startswith("main.py: warning: TensorBoard fails, so it gets no further events: ")


def test_tensorboard_gets_the_values_of_metrics_jsonl(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = Report(tmp_path, append=False, stream=io.StringIO())
    play_run(report)
    report.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert losses == [
        (entry["iteration"], pytest.approx(entry["loss"])) for entry in metrics(tmp_path) if "loss" in entry
    ]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/mAP")][1] == (1, pytest.approx(1 / 7))
    set_aside_old_run(tmp_path)
    assert list((tmp_path / "run-001" / "tensorboard").iterdir())


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every event, by tag, in the order of the files."""
    found = defaultdict(list)
    for file in sorted((folder / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[value.tag].append((event.step, value.simple_value))
    return dict(found)


@pytest.mark.parametrize(
    ("checkpoint", "epoch", "iteration"),
    [(PER_EPOCH, 1, ITERATIONS), (PER_EPOCH + 26, 1, ITERATIONS + 25), (2 * PER_EPOCH - 1, 1, 2 * ITERATIONS)],
    ids=["between epochs", "inside an epoch", "before an evaluation"],
)
def test_events_of_abandoned_epochs_are_removed(tmp_path, checkpoint, epoch, iteration):
    whole, rewound = tmp_path / "whole", tmp_path / "rewound"
    for folder in (whole, rewound):
        report = Report(folder, stream=io.StringIO())
        play_run(report)
        report.close()
    report = Report(rewound, append=True, stream=io.StringIO())
    report.rewind(epoch=epoch, iteration=iteration)
    play_run(report, start=checkpoint)
    report.close()
    assert len(list((rewound / "tensorboard").iterdir())) == 2
    assert scalars(rewound) == scalars(whole)
    assert [step for step, _ in scalars(rewound)["evaluation/mAP"]] == [0, 1, 2]

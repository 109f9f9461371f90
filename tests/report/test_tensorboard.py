"""A TensorBoard that fails, as one does whose packages do not fit together: a warning, and the run goes on."""

import io
import sys
from types import SimpleNamespace

import pytest

from src.report.report import Report
from tests.helpers.example_run import PER_EPOCH, metrics, run


class Failing:
    """Fails at its n-th use, its making being the first."""

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
    ("uses", "said"),
    [
        (1, "Descriptors cannot be created directly."),
        (2, "Descriptors cannot be created directly."),
        (10**9, "[Errno 28]"),
    ],
)
def test_a_tensorboard_that_fails_costs_one_warning(tmp_path, monkeypatch, capsys, uses, said):
    module = SimpleNamespace(SummaryWriter=lambda **_: Failing(uses))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    report = Report(tmp_path, append=False, stream=io.StringIO())
    run(report, stop=PER_EPOCH)
    report.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: warning: TensorBoard fails, so it gets no further events: {said}")
    assert [entry["epoch"] for entry in metrics(tmp_path) if entry["kind"] == "epoch"] == [0]


def test_a_tensorboard_that_cannot_be_imported_is_told_of_where_it_is_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace())  # no SummaryWriter: an ImportError
    report = Report(tmp_path, append=False, stream=io.StringIO())
    run(report, stop=PER_EPOCH)
    report.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "TensorBoard fails, so it gets no further events: cannot import name 'SummaryWriter'" in line

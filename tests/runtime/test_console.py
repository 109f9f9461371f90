"""Standard output and standard error that fail while the program runs."""

import io
import os
import sys

import pytest

from src.report.report import Report
from src.runtime.console import take_failures, tolerate_console_errors


def test_a_closed_pipe_is_reported_once_and_printing_continues(tmp_path, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with tolerate_console_errors():
            report = Report(tmp_path, append=False)
            report.note("a line")
            report.note("another line")
            report.close()
    warning = "cannot write to standard output: Broken pipe; the program continues without it"
    assert capsys.readouterr().err == f"main.py: warning: {warning}\n"
    assert (tmp_path / "metrics.jsonl").read_text() == f'{{"kind": "warning", "text": "{warning}"}}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_a_console_on_a_full_disk_ends_nothing(monkeypatch):
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        with tolerate_console_errors():
            for stream in (sys.stdout, sys.stderr):
                print("a line", file=stream, flush=True)
            failures = take_failures()
            assert take_failures() == []
    assert [failure.split(";")[0] for failure in failures] == [
        "cannot write to standard output: No space left on device",
        "cannot write to standard error: No space left on device",
    ]


def test_closed_streams_take_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with tolerate_console_errors():
        print("a line")
        sys.stderr.write("another")


def test_the_streams_are_restored():
    before = sys.stdout, sys.stderr
    with tolerate_console_errors():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_characters_beyond_the_encoding_are_escaped(monkeypatch):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii"))
    with tolerate_console_errors():
        print("日")
    assert output.getvalue() == rb"\u65e5" + os.linesep.encode()

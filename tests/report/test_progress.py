import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from src.report.report import Report
from tests.helpers.example_run import play_run
from tests.helpers.preloaded_python import launch

PROJECT = Path(__file__).parents[2]
BAR_SCRIPT = """
import sys
from src.report.report import Report
from tests.helpers.example_run import play_run
report = Report(None, append=False)
play_run(report)
with report.progress(12, "Evaluation") as bar:
    for _ in range(12):
        bar.update()
    report.warn("a warning while the bar shows")
report.close()
"""


def output_at_a_terminal(script: str, columns: int) -> str:
    """What a process writes to a terminal of so many columns that is its standard output and standard error."""
    terminal, child_side = pty.openpty()
    fcntl.ioctl(child_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=child_side, stderr=child_side)
    os.close(child_side)
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # the terminal's end of file
        pass
    os.close(terminal)
    assert child.wait() == 0, written
    return written.decode()


def lines_on_screen(written: str) -> list[str]:
    """The lines on the terminal's screen; text after a carriage return overwrites its line."""
    seen = []
    for line in written.replace("\r\n", "\n").split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part + screen[len(part) :]
        seen.append(screen.rstrip())
    return [line for line in seen if line]


def expected_lines() -> list[str]:
    stream = io.StringIO()
    play_run(Report(None, append=False, stream=stream))
    return [*stream.getvalue().splitlines(), "main.py: warning: a warning while the bar shows"]


def test_a_terminal_shows_bars_and_whole_lines():
    columns = 100
    written = output_at_a_terminal(BAR_SCRIPT, columns)
    assert lines_on_screen(written) == expected_lines()
    bars = [bar for bar in re.split(r"[\r\n]+", written) if "left" in bar]
    assert re.search(r"Epoch  1 \|.*\| 11/30, [\d:?]+ left, loss 14\.2857, rate 2\.60e-03, [\d.]+ images/s", written)
    assert re.search(r"Evaluation \|.*\| \d+/12, [\d:?]+ left", written)
    assert max(len(bar) for bar in bars) <= columns


def test_a_file_gets_only_lines():
    done = launch([sys.executable, "-c", BAR_SCRIPT])
    assert done.returncode == 0
    assert (done.stdout + done.stderr).splitlines() == expected_lines()
    assert "\r" not in done.stdout + done.stderr

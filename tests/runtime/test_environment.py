"""Checks and signal handlers before the libraries are imported."""

import ast
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

import main
from src.runtime import environment
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.launch import NO_DALI, SMALL, VARIABLES

NO_TEMPORARY_FOLDER = """
import errno, runpy, sys, tempfile
def none(): raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
tempfile._get_default_tempdir = none
runpy.run_path(sys.argv[1], run_name="__main__")
"""

# Imports the libraries first: on Windows they use other system calls, which this machine lacks.
WINDOWS = """
import runpy, signal, sys
import torch, torch.utils.data.datapipes, torchvision, tqdm, PIL.Image, faster_coco_eval, matplotlib.pyplot
import torch.distributed.elastic.multiprocessing.api, torch.testing
import os, multiprocessing.resource_tracker
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGALRM", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGSTOP", "SIGPIPE", "SIGQUIT"):
    vars(signal).pop(name, None)
for name in ("setitimer", "alarm", "pause", "pthread_kill", "pthread_sigmask", "sigwait"):
    vars(signal).pop(name, None)
for name in ("fork", "register_at_fork", "sched_getaffinity", "geteuid", "nice", "killpg", "memfd_create", "setsid"):
    vars(os).pop(name, None)
sys.argv[:] = sys.argv[1:]
from tests.helpers.tiny_model import use_tiny_model
import main
with use_tiny_model():
    sys.exit(main.main())
"""


@pytest.fixture(autouse=True)
def _start_of_a_process():
    """Installs Python's first handlers; restores handlers and environment variables afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with mock.patch.dict(os.environ):
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_notebooks_matplotlib_backend_is_ignored(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    environment.prepare()
    assert "MPLBACKEND" not in os.environ


def test_without_a_temporary_folder_the_program_ends_in_one_line():
    """It ends before it imports torch, which would print a traceback."""
    done = subprocess.run([sys.executable, "-c", NO_TEMPORARY_FOLDER, main.__file__], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "main.py: error: no folder can take temporary files: set TMPDIR to one that can\n"


def test_a_missing_tmpdir_is_replaced_by_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    environment.prepare()
    assert tempfile.tempdir is not None


def test_signals_are_handled_from_the_start():
    environment.prepare()
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is environment.exit_at_once


def test_signals_that_the_parent_ignores_stay_ignored():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    environment.prepare()
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_python_without_the_packages_ends_in_one_line():
    """-S leaves out the folder of installed packages."""
    done = subprocess.run([sys.executable, "-S", "-E", main.__file__], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    version = ".".join(map(str, sys.version_info[:3]))
    assert line.startswith(f"main.py: error: Python {version} ({sys.executable}) lacks torch, torchvision, numpy, ")
    requirements = Path(main.__file__).with_name("requirements.txt")
    assert line.endswith(f"or run {sys.executable} -m pip install -r {requirements}")


def test_an_old_python_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="2"):
        environment.prepare()
    expected = f"Python 3.9.18 ({sys.executable}) is too old: run main.py with Python 3.10 or newer"
    assert capsys.readouterr().err == f"main.py: error: {expected}\n"


@pytest.mark.parametrize("file", ["main.py", "src/__init__.py", "src/runtime/environment.py"])
def test_what_runs_before_the_check_parses_in_an_old_python(file):
    ast.parse((Path(main.__file__).parent / file).read_text(), feature_version=(3, 7))


def test_the_packages_that_are_checked_are_those_of_requirements_txt():
    lines = Path(main.__file__).with_name("requirements.txt").read_text().splitlines()
    names = [re.match(r"[\w-]+", line)[0] for line in lines if line[0] != "#" and "platform_system" not in line]
    modules = {"pillow": "PIL"}
    needed = {modules.get(name, name.replace("-", "_")) for name in names} - {"Cython"}  # builds pycocotools
    assert set(environment.MODULES) == needed


def test_the_program_trains_without_what_windows_lacks(tmp_path):
    data = write_coco(tmp_path / "data", [annotation(1), annotation(2)], images=2)
    flags = ["--data", data, "--output", tmp_path / "run", *SMALL, *NO_DALI, "--epochs", "1", "--evaluation"]
    line = [sys.executable, "-c", WINDOWS, main.__file__, *map(str, flags)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **VARIABLES})
    assert done.returncode == 0, done.stderr
    assert "Training end" in done.stdout

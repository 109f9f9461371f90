"""What the program finds around it before its libraries are imported."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

import main
from src.runtime import environment
from tests.helpers.datasets import annotation, write_coco
from tests.helpers.launch import NO_DALI, SMALL, VARIABLES

NO_TEMPORARY_FOLDER = """
import errno, runpy, sys, tempfile
def none(): raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
tempfile._get_default_tempdir = none
sys.modules["torch"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""

# The libraries are imported first: on Windows they have other ways, which cannot be had here.
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
from tests.helpers.tiny_model import narrow_network
import main
with narrow_network():
    sys.exit(main.main())
"""


@pytest.fixture
def sigint():
    """Python's own handler, as at a start; given back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_notebooks_matplotlib_backend_is_of_no_interest(monkeypatch, sigint):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    environment.prepare()
    assert "MPLBACKEND" not in os.environ


def test_without_a_place_for_temporary_files_the_program_ends_in_a_line():
    """Before torch, which would end in a traceback, is imported."""
    done = subprocess.run([sys.executable, "-c", NO_TEMPORARY_FOLDER, main.__file__], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "main.py: error: no folder can take temporary files: set TMPDIR to one that can\n"


def test_another_place_is_taken_where_there_is_one(monkeypatch, sigint, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    environment.prepare()
    assert tempfile.tempdir is not None


def test_the_program_trains_without_what_windows_lacks(tmp_path):
    data = write_coco(tmp_path / "data", [annotation(1), annotation(2)], images=2)
    flags = ["--data", data, "--output", tmp_path / "run", *SMALL, *NO_DALI, "--epochs", "1", "--evaluation"]
    line = [sys.executable, "-c", WINDOWS, main.__file__, *map(str, flags)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **VARIABLES})
    assert done.returncode == 0, done.stderr
    assert "Training end" in done.stdout

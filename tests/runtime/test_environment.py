"""What the program finds around it before its libraries are imported."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

import main
from src.runtime import environment

NO_TEMPORARY_FOLDER = """
import errno, runpy, sys, tempfile
def none(): raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
tempfile._get_default_tempdir = none
sys.modules["torch"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
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

"""SIGTERM at each moment of a process's life."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import main
from src.runtime.distributed import Processes
from src.runtime.errors import SigtermReceived
from src.runtime.preemption import GracefulShutdown, raise_on_signals
from tests.helpers.launch import LIMIT, VARIABLES

ALONE = Processes.single(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _restore_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def shutdown() -> GracefulShutdown:
    return GracefulShutdown(ALONE)


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_raises_outside_defer_sigterm(shutdown):
    with pytest.raises(SigtermReceived):
        send_sigterm()


def test_a_second_sigterm_does_not_interrupt_the_cleanup(shutdown):
    """Schedulers and launchers both send it."""
    finished = False
    with pytest.raises(SigtermReceived):
        try:
            send_sigterm()
        finally:
            shutdown.close()
            send_sigterm()
            finished = True
    assert finished


def test_defer_sigterm_finishes_its_block_first(shutdown):
    finished = False
    with pytest.raises(SigtermReceived), shutdown.defer_sigterm():
        send_sigterm()
        assert shutdown.poll_all_ranks()
        finished = True
    assert finished


def test_an_error_inside_defer_sigterm_wins_over_the_signal(shutdown):
    with pytest.raises(ZeroDivisionError), shutdown.defer_sigterm():
        send_sigterm()
        raise ZeroDivisionError


def test_close_restores_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    GracefulShutdown(ALONE).close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_mode_raises_on_sigterm_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SigtermReceived), raise_on_signals():
        try:
            send_sigterm()
        finally:
            send_sigterm()
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_sigterm_stays_ignored():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with raise_on_signals():
        send_sigterm()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no worker is forked on Windows")
def test_sigterm_ends_a_forked_worker_without_a_traceback():
    with raise_on_signals():
        child = os.fork()
        if child == 0:
            send_sigterm()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == main.TERMINATED


# Signals itself as soon as the module of that name is imported.
SIGNALLED = """
import os, runpy, signal, sys
where = sys.argv.pop(1)
del sys.argv[0]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def first_process() -> list[str]:
    """A prefix that makes a command the first process of a container, where signals have no default action.

    Empty if the system refuses that; signals then have their default actions.
    """
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("module", ["numpy", "src.runtime.preemption", "src.export.export"])
def test_sigterm_while_libraries_are_imported_ends_the_process_with_143(module):
    """From the first library on; the first process of a container would ignore it without a handler."""
    line = [*first_process(), sys.executable, "-c", SIGNALLED, module, main.__file__, "--data", "nowhere"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, env={**os.environ, **VARIABLES})
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")

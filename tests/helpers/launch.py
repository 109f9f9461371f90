"""Real processes on gloo, started through the launchers; and `-m tests.helpers.launch`, main.py with the tiny model.

The variable FAULT is "WHAT RANK STEP": what that rank does to itself before its training step of that number, counted
from 0 since the process started; a signal's name, `group:` before it for all of the process group, or `raise`.
"WHAT RANK STEP; WHAT RANK STEP": the second is for the first restart, and so on; then there is none. Without the
variable there is none at all.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from src.runtime.precision import half_is_fast
from tests.helpers.tiny_model import use_tiny_model

HERE = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
# Of the processes that tests start: one thread each, and this project before what else is found.
VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
}
LIMIT = 600  # seconds; a launch that takes longer hangs, whatever the machine
# Where it is computed in, it halves the time of the small runs; elsewhere it would only add a warning.
FP16 = ("--fp16",) if half_is_fast(torch.device("cpu")) else ()
SMALL = ("--backbone", "resnet18", "--backbone-weights", "none", *FP16, "--batch-size", "2", "--num-workers", "0")
TINY_MODEL = ("-m", "tests.helpers.launch")  # in main.py's place
NO_DALI = ("--data_pipeline", "no_dali")


def command(script: Sequence[str], *, processes: int = 2, launcher: Sequence[str] = TORCHRUN) -> list[str]:
    """The command line that starts `script` through a launcher: "main.py" or "-m" and a module, then the flags."""
    return [sys.executable, *launcher, f"--nproc_per_node={processes}", *map(str, script)]


@contextmanager
def started(line: Sequence[str], **variables: str) -> Iterator[subprocess.Popen]:
    """The running launcher, its text in pipes; ended where it is still there afterwards."""
    environment = {**os.environ, **VARIABLES, **variables}
    process = subprocess.Popen(
        list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=HERE
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(LIMIT)
        process.stdout.close()
        process.stderr.close()


def launch(line: Sequence[str], **variables: str) -> subprocess.CompletedProcess:
    """Starts and waits for the end; LIMIT is the proof that nothing hangs."""
    with started(line, **variables) as process:
        out, err = process.communicate(timeout=LIMIT)
        return subprocess.CompletedProcess(line, process.returncode, out, err)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def _with_fault(what: str, step: int) -> None:
    from src.training.step import Trainer

    train_step, steps = Trainer.step, iter(range(step + 1))

    def faulty(*arguments):
        if next(steps, None) == step:
            if what == "raise":
                raise KeyError("a mistake")
            *group, name = what.split(":")
            (os.killpg if group else os.kill)(os.getpid(), getattr(signal, name))
        return train_step(*arguments)

    Trainer.step = faulty


if __name__ == "__main__":
    from main import main

    faults = dict(enumerate(os.environ.get("FAULT", "nothing -1 0").split(";")))
    what, rank, step = faults.get(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), "nothing -1 0").split()
    if os.environ.get("RANK", "0") == rank:
        _with_fault(what, int(step))
    with use_tiny_model():
        sys.exit(main())

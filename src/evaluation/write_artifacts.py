"""Writes the files of an evaluation in a process of its own: `python -m src.evaluation.write_artifacts OUTPUT`.

Standard input holds a pickled ArtifactInputs.  Standard output gets a JSON list with a line for each file that cannot
be written.  The process ends when standard input closes, so it never outlives the training run, whatever ends that.
"""

import json
import os
import pickle
import signal
import sys
import threading
from _thread import interrupt_main
from contextlib import redirect_stdout
from pathlib import Path

from src.evaluation.artifacts import write_artifacts

NICENESS = 10  # training goes first where cores are short


def main(output: Path) -> None:
    """Writes the files into `output`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to every process of a job; the parent decides
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the parent started in the background
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        inputs = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_interrupt_at_end_of_input, daemon=True).start()
        with redirect_stdout(sys.stderr):  # what a library prints is not the answer
            failures = write_artifacts(inputs, output)
    except (KeyboardInterrupt, EOFError, pickle.UnpicklingError):  # the parent has stopped waiting or is gone
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt while Python ends would print a traceback
    json.dump(failures, sys.stdout)


def _interrupt_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    interrupt_main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

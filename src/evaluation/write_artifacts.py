"""The process that writes the files of an evaluation: `python -m src.evaluation.write_artifacts OUTPUT`.

It reads a pickled ArtifactInputs from standard input and writes a JSON list to standard output, with an error line for
each file that cannot be written.  It ends when standard input closes, so it never outlives the training run.
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

NICENESS = 10  # lets training go first if cores are few


def main(output: Path) -> None:
    """Writes the files into `output`."""
    # Schedulers send SIGTERM to every process of a job; the parent stops this one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # SIGINT is ignored if a shell started the parent in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    try:
        inputs = pickle.load(sys.stdin.buffer)
        threading.Thread(target=_interrupt_at_end_of_input, daemon=True).start()
        with redirect_stdout(sys.stderr):  # keeps what libraries print out of the JSON
            failures = write_artifacts(inputs, output)
    except (KeyboardInterrupt, EOFError, pickle.UnpicklingError):  # the parent has stopped this process or has ended
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt while Python exits would print a traceback
    json.dump(failures, sys.stdout)


def _interrupt_at_end_of_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    interrupt_main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

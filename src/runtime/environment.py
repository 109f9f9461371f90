"""What a process may find around it that the libraries would stumble over while they are imported; light to import."""

import os
import signal
import sys
import tempfile

BAD_SURROUNDINGS = 2  # the exit status


def prepare() -> None:
    """To be called before the other imports.  Exits with status 2 and one line where temporary files have no place."""
    # Importing takes seconds, in which Ctrl-C would show where they were.  Who starts this may have it ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Matplotlib refuses to be imported with a notebook's.  Nothing is shown here, so none is needed.
    os.environ.pop("MPLBACKEND", None)
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        print("main.py: error: no folder can take temporary files: set TMPDIR to one that can", file=sys.stderr)
        sys.exit(BAD_SURROUNDINGS)

"""Checks before the libraries are imported, which takes seconds; this module imports only the standard library."""

import os
import signal
import sys
from types import FrameType

MIN_PYTHON = (3, 10)
# The modules of requirements.txt without which the program cannot start.
MODULES = ("torch", "torchvision", "numpy", "msgspec", "faster_coco_eval", "pycocotools", "PIL", "simplejpeg",
           "matplotlib", "tqdm", "mlperf_compliance", "safetensors")  # fmt: skip
CANNOT_START = 2  # exit status, as for bad input


def prepare() -> None:
    """Installs signal handlers and checks Python, its packages and the folder of temporary files.

    Call it before the other imports.  Exits with status 2 and one line if the program cannot run.
    """
    # The first process of a container has no default actions: without a handler it ignores SIGTERM (`docker stop`).
    # A signal that the parent process ignores (nohup, a shell's background job) stays ignored.
    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is default:
            signal.signal(number, exit_at_once)
    # If rank 0 is missing, torch logs up to ninety lines of C++ frames, some at level ERROR; the error that it raises
    # says the same in one line.  Set the variable to see them.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # A notebook sets a backend with which matplotlib cannot be imported here.  The program shows no windows.
    os.environ.pop("MPLBACKEND", None)
    problem = _python_problem() or _temporary_folder_problem()
    if problem:
        print(f"main.py: error: {problem}", file=sys.stderr)
        sys.exit(CANNOT_START)


def exit_at_once(number: int, frame: "FrameType | None") -> None:
    """Handles a signal while libraries are imported: exits, because nothing has to be saved yet."""
    os._exit(128 + number)


def _python_problem() -> "str | None":  # in quotes, because Python 3.9 cannot evaluate it
    from importlib.util import find_spec  # here, so that the handlers are installed first

    version = ".".join(map(str, sys.version_info[:3]))
    python = f"Python {version} ({sys.executable})"
    if sys.version_info < MIN_PYTHON:
        return f"{python} is too old: run main.py with Python {'.'.join(map(str, MIN_PYTHON))} or newer"
    missing = [name for name in MODULES if find_spec(name) is None]
    if not missing:
        return None
    requirements = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "requirements.txt")
    command = f"{sys.executable} -m pip install -r {requirements}"
    return f"{python} lacks {', '.join(missing)}: run main.py with the Python that has them, or run {command}"


def _temporary_folder_problem() -> "str | None":
    import tempfile

    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return "no folder can take temporary files: set TMPDIR to one that can"
    return None

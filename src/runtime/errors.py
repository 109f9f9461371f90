"""Errors that end a run with one line."""

SHARED_MEMORY = "/dev/shm"
ENLARGE_SHARED_MEMORY_HINT = "enlarge it (docker run --shm-size=1g)"


class UserError(Exception):
    """Bad flags, files or data; the message names the file, the field and what to do.

    `main.py` prints it as one line and exits with status 2.
    """

    def __str__(self) -> str:
        return escape_control_characters(super().__str__())


class DataError(UserError):
    """A data set that cannot be trained on or scored as it is."""


class ReportedElsewhereError(UserError):
    """Another rank prints what is wrong; this one exits with the same status and prints nothing."""


class DivergenceError(Exception):
    """The loss is not finite; the message names epoch, iteration and rate."""


def escape_control_characters(text: str) -> str:
    r"""The text as one line whose control characters are escaped, as in \n.

    File and category names come from others and may hold sequences that a terminal would obey.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class SigtermReceived(BaseException):
    """SIGTERM arrived.  Not an Exception, so that `except Exception` does not catch it."""

"""Errors that end a run with one line.  A UserError names the file, the field and what to do."""


class UserError(Exception):
    """Bad flags, files or data; `main.py` prints the message as one line and exits with status 2."""

    def __str__(self) -> str:
        return escape_control_characters(super().__str__())


class DataError(UserError):
    """A data set that cannot be trained on or scored as it is."""


class ReportedElsewhereError(UserError):
    """Another rank prints what is wrong; this one exits with the same status and prints nothing."""


class DivergenceError(Exception):
    """The loss is not finite; the message names epoch, iteration and rate."""


def escape_control_characters(text: str) -> str:
    r"""The text as one line that a terminal shows and does not obey: control characters become escapes such as \n.

    File and category names come from other people and may hold anything.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class SigtermReceived(BaseException):
    """SIGTERM arrived where nothing has to be finished first."""

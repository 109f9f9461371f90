"""Errors that are the user's to mend: one line that names the file, the field and what to do about it."""


class UserError(Exception):
    """Bad flags, files or data; `main.py` prints the message as one line and exits with status 2."""


class DataError(UserError):
    """A data set that cannot be trained on or scored as it is."""

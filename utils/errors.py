"""The errors that are shown to people as one sentence instead of a traceback."""


class UserError(Exception):
    """Something outside the code is wrong (a file, a folder, the data); scripts exit with 1.

    The message is one sentence: what was wrong, in which flag or file, and what to do.
    """

    exit_status = 1


class SettingsError(UserError):
    """A flag or a settings file asks for what cannot be; scripts exit with 2."""

    exit_status = 2


class DiskError(UserError):
    """A file cannot be written; what is in memory is intact, and a later attempt may succeed."""

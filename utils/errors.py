"""The errors that are shown to people as one sentence instead of a traceback."""

import sys


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


def run_tool(main):
    """Run `main()` of a small tool and end the process: a UserError with its sentence and status 1,
    Ctrl-C with 130. (`utils.runs.script.run_script` is for scripts that compute.)"""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

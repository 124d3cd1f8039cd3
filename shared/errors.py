"""Errors that a user can mend. Entry points print them as one line and leave with exit code 2, without a traceback."""

import signal
from pathlib import Path


class UserError(Exception):
    """Something is wrong with what the user gave: the message says where, what was found and how to mend it."""


class ConfigError(UserError):
    """A configuration file or an override is wrong; the message holds one line a problem."""


class DataError(UserError):
    """A data set is missing, damaged or does not fit the request."""


class CheckpointError(UserError):
    """A saved state is missing, damaged or belongs to something else."""


class RunError(UserError):
    """A run folder cannot be used as asked."""


class InterruptedRunError(Exception):
    """Ctrl-C or SIGTERM ended a run between two steps; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code, self.folder = 128 + signal_number, folder

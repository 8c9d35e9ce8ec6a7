"""The errors that fedmpi raises on purpose.

Each names the argument, what was expected and what was got. Anything else that escapes is a bug.
"""

from __future__ import annotations


class FedMPIError(Exception):
    """Base of every error that a user can cause and can mend."""


class ConfigError(FedMPIError):
    """A configuration that cannot be run (unknown key, wrong type, impossible value)."""


class DataError(FedMPIError):
    """A data set that is missing, truncated or not what its format says."""


class MessageError(FedMPIError):
    """Bytes that are not a message of the expected shape."""


class CommError(FedMPIError):
    """Ranks that cannot work together (no MPI, different configurations, a rank that failed)."""


class CheckpointError(FedMPIError):
    """A checkpoint that cannot be written, or is not what was written, or is of another run."""


class Stopped(FedMPIError):
    """A signal ended the run after a round; a checkpoint holds all of it."""


class Unstarted(Stopped):
    """A signal ended the run before its first round; nothing is lost."""


class NumericalError(FedMPIError):
    """A number that stops being one (NaN or infinity in a loss or an update)."""

"""Errors that diffcal raises: what was expected, what came, what to do."""

__all__ = [
    "ArtifactError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DiffcalError",
    "MissingExtraError",
    "NumericalError",
    "UnsafeCheckpointError",
]


class DiffcalError(Exception):
    """Base of every error that diffcal raises on purpose; the command line prints it in one line."""


class ConfigError(DiffcalError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(DiffcalError, ValueError):
    """Input data do not have the promised form (shape, range, labels, file content)."""


class CheckpointError(DiffcalError, ValueError):
    """A model file cannot be used: wrong kind, wrong keys, wrong shapes, damaged."""


class UnsafeCheckpointError(CheckpointError):
    """A model file asks for code to be run or names something that is not on the list."""


class ArtifactError(DiffcalError, RuntimeError):
    """An artefact on disk is damaged, or belongs to another configuration."""


class NumericalError(DiffcalError, ArithmeticError):
    """A computation produced NaN or infinity."""


class MissingExtraError(DiffcalError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

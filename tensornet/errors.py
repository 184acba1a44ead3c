"""Errors and warnings of the library.

Each class also inherits the builtin a caller would expect, so `except ValueError` keeps working.
Messages show the value received, the value expected and the remedy, and list the alternatives.
"""


class TensorNetError(Exception):
    """Base class of all errors raised by tensornet and its plugins."""


class NonFiniteError(TensorNetError, ValueError):
    """A weight, gradient or activation contains NaN or infinity."""


class BudgetError(TensorNetError, ValueError):
    """A budget is contradictory or cannot be met by any network of the requested kind."""


class TopologyError(TensorNetError, ValueError):
    """A topology is malformed, unknown, or does not fit the matrix it is used for."""


class ShapeError(TensorNetError, ValueError):
    """A tensor has a shape or dtype other than the one its place requires."""


class TargetError(TensorNetError, ValueError):
    """A module pattern matches nothing, or a module cannot be compressed."""


class FormatError(TensorNetError, ValueError):
    """A stored file or folder does not follow the format it claims to follow."""


class DestinationError(TensorNetError, OSError):
    """A destination exists already or cannot be written, so that the requested output is missing."""


class CalibrationWarning(UserWarning):
    """A model is compressed without calibration data from the caller; the message names the replacement."""


class MissingDependencyError(TensorNetError, ImportError):
    """An optional package is missing; the message holds the pip command that installs it."""

"""Every error the library raises on purpose.

Each class also inherits the builtin a caller would expect, so `except ValueError` keeps working.
Messages say what was got, what was expected, what to do, and list the alternatives.
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
    """A destination exists already, or cannot be written: what was asked for is not there."""


class CalibrationWarning(UserWarning):
    """A model is compressed without calibration data of the caller's: say what is used instead."""


class MissingDependencyError(TensorNetError, ImportError):
    """An optional package is needed; the message holds the pip line that installs it."""

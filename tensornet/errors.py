"""Errors and warnings of the library.

Each class also inherits from the builtin exception that a caller would expect, such as `ValueError`.
A message shows the received value, the expected value, the remedy and the alternatives.
"""


class TensorNetError(Exception):
    """Base class of all errors raised by tensornet and its plugins.

    Example:
        >>> try:
        ...     tn.topologies.Budget(max_bond=0)
        ... except tn.TensorNetError as error:
        ...     print(type(error).__name__, isinstance(error, ValueError))
        BudgetError True
    """


class NonFiniteError(TensorNetError, ValueError):
    """A weight, gradient or activation contains NaN or infinity.

    Example:
        >>> tn.truncated_svd(torch.tensor([[float("nan")]]))
        Traceback (most recent call last):
            ...
        tensornet.errors.NonFiniteError: The matrix contains 1 NaN or infinite value among 1 elements; ...
    """


class BudgetError(TensorNetError, ValueError):
    """A budget is out of range, or no network of the requested topology is small or accurate enough for it.

    Example:
        >>> tn.topologies.Budget(rel_error=2)
        Traceback (most recent call last):
            ...
        tensornet.errors.BudgetError: rel_error must lie in [0, 1), got 2: ...
    """


class TopologyError(TensorNetError, ValueError):
    """A topology is malformed or unknown, or its dimensions do not fit the matrix.

    Example:
        >>> tn.decompose(torch.eye(4), "ring")
        Traceback (most recent call last):
            ...
        tensornet.errors.TopologyError: Unknown topology 'ring'; registered are ...
    """


class ShapeError(TensorNetError, ValueError):
    """A tensor has the wrong shape or dtype.

    Example:
        >>> tn.truncated_svd(torch.ones(3))
        Traceback (most recent call last):
            ...
        tensornet.errors.ShapeError: truncated_svd needs a matrix of shape (m, n) ...
    """


class ContractionError(TensorNetError, ValueError):
    """There is no optimizer of contraction orders of this name, or a contraction order is invalid.

    Example:
        >>> tn.decompose(torch.eye(4), "low_rank", max_bond=1).network.to_matrix(optimize="fastest")
        Traceback (most recent call last):
            ...
        tensornet.errors.ContractionError: There is no optimizer 'fastest' of contraction orders. ...
    """


class MemoryLimitError(TensorNetError, MemoryError):
    """A result does not fit in the memory that is available, or in the limit that was given.

    Example:
        >>> tn.MPO.identity([2] * 24).to_matrix()
        Traceback (most recent call last):
            ...
        tensornet.errors.MemoryLimitError: The dense matrix of shape (16777216, 16777216) needs ...
    """


class TargetError(TensorNetError, ValueError):
    """A module pattern matches nothing, or a module cannot be compressed.

    Example:
        >>> config = tn.CompressionConfig(param_ratio=0.5, exclude_modules=["attention.*"])
        >>> tn.plan(torch.nn.Sequential(torch.nn.Linear(32, 32)), config)
        Traceback (most recent call last):
            ...
        tensornet.errors.TargetError: ...
    """


class FormatError(TensorNetError, ValueError):
    """A file or folder is damaged or does not have the expected format.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "model.safetensors"
        ...     _ = path.write_bytes(b"not a model")
        ...     tn.load_model(torch.nn.Linear(8, 8), path)
        Traceback (most recent call last):
            ...
        tensornet.errors.FormatError: Cannot read a model from ...
    """


class DestinationError(TensorNetError, OSError):
    """The output cannot be written: the destination exists already or is not writable.

    Example:
        >>> tn.save_model(torch.nn.Linear(8, 8), "/dev/null/model.safetensors")
        Traceback (most recent call last):
            ...
        tensornet.errors.DestinationError: The model cannot be written to /dev/null/model.safetensors: ...
    """


class WorkerError(TensorNetError, RuntimeError):
    """A worker process died.

    Example:
        >>> issubclass(tn.errors.WorkerError, RuntimeError)
        True
    """


class CalibrationWarning(UserWarning):
    """Calibration data are missing or insufficient; the message states the fallback or the remedy.

    Example:
        >>> import warnings
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", tn.errors.CalibrationWarning)
        ...     report = tn.compress(model, tn.CompressionConfig(param_ratio=0.5))
    """


class MissingDependencyError(TensorNetError, ImportError):
    """An optional package is missing; the message contains the pip command that installs it.

    Example:
        >>> from tensornet._util import require
        >>> require(("no_such_package",), extra="viz", user="draw")
        Traceback (most recent call last):
            ...
        tensornet.errors.MissingDependencyError: draw needs no_such_package, ...
    """

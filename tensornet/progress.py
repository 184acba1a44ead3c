"""Progress of long work: a bar on a terminal or in a notebook, else occasional lines."""

import sys
import threading
import time
from typing import Any

from tqdm import std
from tqdm.auto import tqdm

#: Seconds between two lines.
PERIOD = 30.0
#: Seconds after which the first line estimates the whole, if it will take longer than `PERIOD`.
FIRST = 5.0


class LineProgress(std.tqdm):
    """Progress as lines on stderr, for logs: an early estimate, then one line every `PERIOD` seconds.

    Takes the arguments of `tqdm`. A thread writes the lines, so that they come while one step takes long.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._over = threading.Event()
        super().__init__(*args, **{**kwargs, "mininterval": 0, "miniters": 1, "leave": False})
        self._began = time.monotonic()
        if not self.disable:
            threading.Thread(target=self._report, daemon=True).start()

    def refresh(self, *_: Any, **__: Any) -> bool:
        """Skip the redraw of tqdm: a thread writes the lines, see `_report`."""
        return False

    def clear(self, *_: Any, **__: Any) -> None:
        """Skip the erasure of tqdm: written lines stay."""

    def display(self, *_: Any, **__: Any) -> bool:
        """Skip the drawing of tqdm: no line is drawn in place."""
        return False

    def close(self) -> None:
        """Stop the thread that writes lines."""
        self._over.set()
        super().close()

    def line(self) -> str:
        """Format the steps done, the elapsed time, and the estimated remaining time.

        Examples:
            >>> with LineProgress(total=4, desc="planning", unit="layer") as progress:
            ...     _ = progress.update(2)
            ...     progress.line().partition(",")[0]
            'planning: 2 of 4 layers'
            >>> with LineProgress(total=4, desc="calibrating", unit="batch") as progress:
            ...     progress.line().partition(",")[0]
            'calibrating: 0 of 4 batches'
        """
        gone = time.monotonic() - self._began
        text = f"{self.desc.removesuffix(': ')}: {self.n}"
        units = f"{self.unit}{'es' if self.unit.endswith('ch') else 's'}"
        text += f" {units}" if self.total is None else f" of {self.total} {units}"
        whole = self._whole(gone)
        return f"{text}, {_time(gone)} gone" + (f", about {_time(whole - gone)} left" if whole else "")

    def _whole(self, gone: float) -> float:
        """Estimate the seconds of all steps of this run."""
        done = self.n - self.initial
        return gone * (self.total - self.initial) / done if done > 0 and self.total is not None else 0.0

    def _report(self) -> None:
        waited = FIRST
        if self._over.wait(FIRST):
            return
        if self._whole(time.monotonic() - self._began) > PERIOD:
            self._say()
            waited = 0.0
        while not self._over.wait(PERIOD - waited):
            waited = 0.0
            self._say()

    def _say(self) -> None:
        self.fp.write(f"{self.line()}\n")
        self.fp.flush()


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """Make a tqdm progress bar, or a line writer if stderr is neither a terminal nor a notebook.

    Args:
        args, kwargs: of `tqdm`.

    Examples:
        >>> [layer for layer in progress_bar(["up", "down"], desc="planning", unit="layer", disable=True)]
        ['up', 'down']
    """
    notebook = not issubclass(tqdm, std.tqdm) or any("notebook" in kind.__module__ for kind in tqdm.__mro__)
    return (tqdm if notebook or sys.stderr.isatty() else LineProgress)(*args, **kwargs)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

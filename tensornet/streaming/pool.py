"""Pool of independent tasks: in this process, in worker processes, or on a `concurrent.futures.Executor`."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from types import ModuleType
from typing import Any, TypeVar

from tensornet.errors import TensorNetError

T = TypeVar("T")
R = TypeVar("R")

#: Deaths of workers with a task in flight before the task is blamed.
ATTEMPTS = 3


class WorkerError(TensorNetError, RuntimeError):
    """Error after worker processes died repeatedly on the same work.

    Example:
        >>> from tensornet_hf import WorkerError
        >>> issubclass(WorkerError, RuntimeError)
        True
    """


def run_tasks(
    function: Callable[[T], R],
    tasks: Iterable[tuple[str, T]],
    done: Callable[[str, R], None],
    *,
    workers: int = 1,
    executor: Executor | None = None,
    start_method: str = "spawn",
) -> None:
    """Run a function on every task, in no particular order.

    Args:
        function: at the top level of a module, so that other processes find it.
        tasks: names and arguments; names are for messages.
        done: called here with the name and result of each, as they come.
        workers: 1 runs in this process; more start as many processes, and start them again if one dies.
        executor: runs the tasks instead, and stays open.
        start_method: of our processes; a plain fork would copy the locks of torch's threads.

    Raises:
        WorkerError: a worker died three times over the same tasks, or an executor of the caller broke.
        Exception: the first that a task raises; tasks that have not begun are dropped.
    """
    pending = dict(tasks)
    if executor is not None:
        try:
            _drain(executor, function, pending, done, window=len(pending))
        except BrokenProcessPool as error:
            raise WorkerError(
                f"A worker of the executor died ({error}). What is finished is kept; run again with a new "
                "executor."
            ) from error
    elif workers == 1:
        for name, task in pending.items():
            done(name, function(task))
    else:
        _own_pool(function, pending, done, workers, start_method)


def _own_pool(
    function: Callable[[T], R],
    pending: dict[str, T],
    done: Callable[[str, R], None],
    workers: int,
    start_method: str,
) -> None:
    deaths: Counter[str] = Counter()
    while pending:
        flying: set[str] = set()
        pool = _Processes(
            min(workers, len(pending)), mp_context=get_context(start_method), initializer=_end_with_parent
        )
        try:
            # No more in flight than can run, so that few are suspected when a worker dies
            _drain(pool, function, pending, done, window=workers, flying=flying)
        except BrokenProcessPool as error:
            deaths.update(flying)
            if worst := sorted(name for name in flying if deaths[name] >= ATTEMPTS):
                raise WorkerError(
                    f"Workers died {ATTEMPTS} times while at work on {', '.join(worst)} ({error}). Most "
                    "likely memory ran out: use fewer workers. What is finished is kept; run again to "
                    "continue."
                ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Processes(ProcessPoolExecutor):
    """Pool of worker processes that do not run the caller's script again when they start.

    They would, for functions defined in it; ours are not. So the script needs no guard around its code.
    """

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # has no file
        try:
            return super().submit(*args, **kwargs)  # starts processes
        finally:
            sys.modules["__main__"] = main


def _end_with_parent() -> None:
    """End this process when its parent has died, instead of waiting for tasks for ever."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _drain(
    pool: Executor,
    function: Callable[[T], R],
    pending: dict[str, T],
    done: Callable[[str, R], None],
    *,
    window: int,
    flying: set[str] | None = None,
) -> None:
    """Run all tasks of `pending`, removing finished ones; `flying` holds those in flight."""
    flying = set() if flying is None else flying
    queue = list(pending.items())[::-1]
    futures: dict[Future[R], str] = {}
    try:
        while queue or futures:
            while queue and len(futures) < window:
                name, task = queue.pop()
                flying.add(name)
                futures[pool.submit(function, task)] = name
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                result = future.result()
                name = futures.pop(future)
                flying.discard(name)
                del pending[name]
                done(name, result)
    finally:
        for future in futures:
            future.cancel()

"""Tasks of lm-evaluation-harness, run on a loaded model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tensornet._util import import_optional
from tensornet.errors import TargetError, TensorNetError

_USER = "tensornet eval --tasks"
_OFFLINE = (
    "Offline: save the data as JSON lines, name that file in a task file, NAME.yaml, under "
    "dataset_path: json and dataset_kwargs: {data_files: {validation: FILE}}, and run --tasks NAME "
    "--task-path FOLDER"
)


class TaskError(TensorNetError, ValueError):
    """Unknown task, or a task whose data is not on this machine.

    Example:
        >>> from tensornet_hf.evaluation.harness import TaskError
        >>> issubclass(TaskError, ValueError)
        True
    """


@dataclass(frozen=True)
class TaskScores:
    """Scores of tasks.

    Args:
        scores: by task and metric, standard errors as `METRIC_stderr`.
        samples: number of examples of each task.
        version: of lm-evaluation-harness.
    """

    scores: Mapping[str, Mapping[str, float]]
    samples: Mapping[str, int]
    version: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_path: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> TaskScores:
    """Run tasks of lm-evaluation-harness on a model, compressed or not.

    Args:
        model: language model, causal or encoder-decoder.
        tokenizer: its tokenizer.
        tasks: names, of the harness or of files in `task_path`.
        task_path: folder of task files, or one such file.
        shots: examples shown before each question; as the task says if absent.
        limit: use only so many examples of each task.
        batch_size: requests run at once.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        TargetError: the model writes no text.
        TaskError: an unknown task, or one whose data is on the hub, which is not reached here.
    """
    harness: Any = import_optional("lm_eval", extra="eval", user=_USER)
    if not model.can_generate():
        raise TargetError(
            f"{type(model).__name__} writes no text, which the tasks of lm-evaluation-harness need; measure "
            "encoders and classifiers in Python, as examples/sentence_encoder.py does."
        )
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    loaded = _load_tasks(tasks, task_path)
    if shots is not None:
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=str(model.device),
        dtype=model.dtype,
    )
    found: Any = evaluate(wrapped, loaded, limit=limit, bootstrap_iters=1000)
    scores = {name: _numbers(values) for name, values in found["results"].items()}
    samples = {name: counts["effective"] for name, counts in found["n-samples"].items()}
    return TaskScores(scores, samples, harness.__version__)


def _load_tasks(names: Sequence[str], task_path: str | Path | None) -> Any:
    """Load tasks with their data.

    Raises:
        TaskError: an unknown task, or data that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    folder = None if task_path is None else Path(task_path)
    if folder is not None and not folder.exists():
        raise TaskError(f"There is no task file or folder {folder}.")
    folder = folder.parent if folder is not None and folder.is_file() else folder
    include = None if folder is None else str(folder.resolve())
    # The index of the thousands of tasks that come with the harness takes seconds.
    manager = TaskManager(include_path=include, include_defaults=False)
    own = set(manager.all_tasks)
    if not own.issuperset(names):
        manager = TaskManager(include_path=include)
    known = set(manager.all_tasks)
    if unknown := [name for name in names if name not in known]:
        near = sorted(own) or "none, --task-path names a folder of them"
        raise TaskError(
            f"Unknown task {unknown[0]!r}: lm-evaluation-harness has {len(known) - len(own):,} tasks "
            f"(lm-eval ls tasks lists them), and there are task files of your own: {near}."
        )
    try:
        return manager.load(list(names))
    except Exception as error:  # of datasets and huggingface_hub: missing files, no network, bad columns
        raise TaskError(
            f"The data of {', '.join(names)} cannot be loaded: {_reason(error)}. A task of the harness takes "
            f"its data from the hub, unless it is in the cache. {_OFFLINE}."
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one task by name, without the name of the default filter."""
    return {
        key.replace(",none", ""): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }

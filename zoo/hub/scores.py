"""Results of lm-eval, read from its JSON, as lines of a model card and of the Hub's `model-index`."""

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from zoo.checkpoint import read_json
from zoo.hub.places import is_place


class Score(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    """With the name of its filter behind a comma, if there is one: `exact_match,strict-match`."""
    value: float
    stderr: float | None
    shots: int | None
    samples: int | None
    """Documents that were scored."""
    of_samples: int | None
    """Documents that the task has; a limit leaves some out."""
    dataset: str
    dataset_config: str | None
    split: str | None

    def to_eval_result(self) -> EvalResult:
        """As an entry of the `model-index`."""
        counted = {"shots": self.shots, "samples": self.samples}
        return EvalResult(
            task_type="text-generation",
            dataset_type=self.dataset,
            dataset_name=self.task,
            dataset_config=self.dataset_config,
            dataset_split=self.split,
            dataset_args={key: value for key, value in counted.items() if value is not None} or None,
            metric_type=self.metric.split(",")[0],
            metric_name=self.metric,
            metric_value=self.value,
        )


def read_scores(path: Path) -> list[Score]:
    """Every metric of a file in lm-eval's layout, in its order; groups of tasks are rows like tasks.

    Raises:
        ValueError: if it is no such file.
    """
    content = read_json(path)
    try:
        return scores_of(content)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in lm-eval's layout: {type(error).__name__}: {error}") from error


def scores_of(content: dict[str, Any]) -> list[Score]:
    """Every metric of results in lm-eval's layout."""
    return [score for task, metrics in content["results"].items() for score in _of_task(content, task, metrics)]


def _of_task(content: dict[str, Any], task: str, metrics: dict[str, Any]) -> list[Score]:
    """The scores of a task, whose keys are `metric,filter`; what is no number (alias, stderr "N/A") is none."""
    config = content.get("configs", {}).get(task, {})
    samples = content.get("n-samples", {}).get(task, {})
    builder = config.get("dataset_path")
    is_local = builder in (None, "", "json") or is_place(builder)  # "json" reads local files
    scores = []
    for key, value in metrics.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = metrics.get(f"{name}_stderr,{filtered}")
        scores.append(
            Score(
                task=task,
                metric=name if filtered == "none" else key,
                value=float(value),
                stderr=stderr if isinstance(stderr, float) else None,
                shots=content.get("n-shot", {}).get(task),
                samples=samples.get("effective"),
                of_samples=samples.get("original"),
                dataset=task if is_local else builder,
                dataset_config=config.get("dataset_name"),
                split=config.get("test_split") or config.get("validation_split"),
            )
        )
    return scores

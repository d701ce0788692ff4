"""Run tasks of lm-eval on a checkpoint: those that lm-eval has, those of the evals shelf, and a user's YAML files."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

import zoo.evaluate.lm  # noqa: F401 (it registers the model)
from zoo.errors import unknown_name
from zoo.files import whole_file
from zoo.layout import shelf
from zoo.processes import connect_processes

SUITES = {
    "commonsense": (
        *("wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"),
        *("openbookqa", "sciq", "social_iqa", "boolq"),
    )
}
"""The tasks that papers report together, zero-shot, with data of the Hub: of Mamba (arXiv:2312.00752), Mamba-2
(arXiv:2405.21060), RWKV-4 (arXiv:2305.13048) and Gated DeltaNet (arXiv:2412.06464)."""


def evaluate(
    checkpoint: str,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str | None = None,
    allow_truncation: bool = True,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Score a checkpoint of the zoo.

    Args:
        checkpoint: a folder or a name on the Hub.
        tasks: names of tasks, groups and tags, or paths of YAML files.
        limit: how many documents of each task; default: all.
        batch_size, device, allow_truncation: as for `ZooLM`.
        metadata: laid over that of every task, as by lm-eval's `--metadata`.

    Returns:
        What lm-eval writes to a file; None in the processes of a launcher other than the first.

    Raises:
        ValueError: on an unknown task, one whose data cannot be had, a checkpoint that is not of the zoo, or more
            processes than a task has documents.
    """
    if not tasks:
        raise ValueError(f"no tasks are named; there are those of lm-eval and the suites {', '.join(SUITES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be positive, got {limit}")
    if batch_size != "auto" and not (str(batch_size).isdigit() and int(batch_size) > 0):
        raise ValueError(f"batch_size must be positive or auto, got {batch_size}")
    manager, loaded = _load(list(dict.fromkeys(tasks)), metadata)
    _check_shares(loaded, limit)
    tracker = EvaluationTracker()
    results = simple_evaluate(
        model="zoo",
        model_args={"pretrained": checkpoint, "allow_truncation": allow_truncation},
        tasks=loaded,
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        device=device,
        log_samples=False,
        evaluation_tracker=tracker,
    )
    if results is None:
        return None
    tracker.general_config_tracker.log_end_time()
    return {**results, **asdict(tracker.general_config_tracker)}


def named_tasks(tasks: str, suite: str | None) -> list[str]:
    """The tasks of a list with commas, then those of a suite.

    Raises:
        ValueError: if there is no such suite.
    """
    if suite is not None and suite not in SUITES:
        raise unknown_name("suite", suite, SUITES)
    return [name for name in tasks.split(",") if name] + list(SUITES.get(suite, ()))


def write_results(results: dict[str, Any], path: Path) -> None:
    """Write results as lm-eval does, to one file that appears whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(
            json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def result_table(results: dict[str, Any]) -> str:
    """lm-eval's own table of the results, and of groups if there are any."""
    return "\n".join(make_table(results, part) for part in ("results", "groups") if results.get(part))


def _load(tasks: Sequence[str], metadata: dict[str, Any] | None) -> tuple[TaskManager, list[Task | Group]]:
    """The tasks, before any model is loaded, and the manager that they come from."""
    names = [name for name in tasks if not Path(name).is_file()]
    manager = TaskManager(include_path=shelf("evals"), include_defaults=False, metadata=metadata)
    if not set(names) <= set(manager.all_tasks):  # lm-eval takes a minute to find its own
        manager = TaskManager(include_path=shelf("evals"), metadata=metadata)
    for name in names:
        if name not in manager.all_tasks:
            raise unknown_name("task", name, manager.all_tasks)
    loaded: list[Task | Group] = []
    for name in tasks:
        try:
            found = manager.load(name)
        except OSError as error:
            raise ValueError(f"the data of task {name} could not be had: {error}") from error
        inner = {child for children in found["group_map"].values() for child in children}
        loaded += [item for each, item in (found["tasks"] | found["groups"]).items() if each not in inner]
    return manager, loaded


def _check_shares(loaded: Sequence[Task | Group], limit: int | None) -> None:
    """Raise ValueError unless every process gets a document of every task, without which lm-eval fails."""
    processes = connect_processes().num_processes
    if processes == 1:
        return
    for task in (task for each in loaded for task in (each.get_all_tasks() if isinstance(each, Group) else [each])):
        documents = min(len(task.eval_docs), limit or len(task.eval_docs))
        if documents < processes:
            raise ValueError(f"{documents} documents of {task.task_name} are too few for {processes} processes")

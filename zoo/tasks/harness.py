"""Groups of lm-eval tasks, each of them described by one YAML of the evals shelf.

That of a synthetic task says `class: !function zoo.tasks.harness.GeneratedTasks`.
"""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask

from zoo.tasks import load_task


class TaskGroup(Group):
    """A group of lm-eval tasks that one YAML describes, and that differ in their metadata.

    Args:
        config: what the YAML says.
        metadata: those that all tasks have.
        tasks: those of each task alone, by what its name has behind that of the group.
    """

    task_class = ConfigurableTask

    def __init__(self, config: Mapping[str, Any], metadata: dict[str, Any], tasks: Mapping[str, Mapping[str, Any]]):
        super().__init__(config["task"], metadata=metadata)
        shared = {name: value for name, value in config.items() if name != "class"}
        for label, own in tasks.items():
            name = f"{self.name}_{label}"
            self.add(self.task_class(config={**shared, "task": name, "metadata": {**metadata, **own}}))


class GeneratedTask(ConfigurableTask):
    """A setting of a synthetic task."""

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Generate the documents."""
        self.dataset = {"test": _documents(**self.config.metadata)}


class GeneratedTasks(TaskGroup):
    """A group of lm-eval tasks, one for each setting, whose documents are generated as the `metadata` say.

    The metadata are those of the YAML, over which lm-eval lays its user's `--metadata` (and `--model_args`):

    - `task`: the name of the synthetic task;
    - `settings`: a list of options of the task, one mapping for each task of the group, which is named after them:
      `induction_length1024`. Without, there is one task, `induction_defaults`;
    - any option of the synthetic task, for all settings;
    - `examples`: documents of each task, of the test split; 100 unless given;
    - `seed`: 0 unless given.

    The metric is `acc`: of few choices the most likely one counts, else the answer must be what greedy decoding gives.
    The group has no mean of its own, since settings differ in difficulty.

    Raises:
        ValueError: on `settings` of another form or one that comes twice, on an unknown option, or on one that stands
            both in `settings` and beside it.
    """

    task_class = GeneratedTask

    def __init__(self, config: Mapping[str, Any]):
        metadata = {"settings": [{}], **config["metadata"]}
        settings = metadata.pop("settings")
        if not settings or not all(isinstance(setting, Mapping) for setting in settings):
            raise ValueError(f"`settings` is a list of options, as [{{length: 1024}}], not {settings!r}")
        known = vars(load_task(metadata["task"]).options()).keys()
        common = {name: metadata.pop(name) for name in known if name in metadata}
        tasks = {}
        for setting in settings:
            label = "_".join(map(_label, setting.items())) if setting else "defaults"
            if label in tasks:
                raise ValueError(f"`settings` of task {config['task']!r} has {dict(setting)} twice")
            if both := common.keys() & setting.keys():
                raise ValueError(f"{min(both)} of task {config['task']!r} stands both in `settings` and beside it")
            tasks[label] = {"options": {**common, **setting}}
        super().__init__(config, metadata, tasks)


def _documents(task: str, options: Mapping[str, Any], examples: int = 100, seed: int = 0, **others: Any) -> Dataset:
    """Rows of `text`, `target`, `choices`; `others` are metadata that are not about the documents."""
    generated = islice(load_task(task).generate("test", seed, **options), examples)
    return Dataset.from_list(
        [{"text": each.question, "target": each.answer, "choices": list(each.choices)} for each in generated]
    )


def _label(option: tuple[str, Any]) -> str:
    name, value = option
    return value if isinstance(value, str) else f"{name}{value}"

"""Results of evaluations as rows of a CSV file, one a metric, of which `zoo plots` makes pictures and tables."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from zoo.checkpoint import read_json
from zoo.hub.scores import scores_of
from zoo.inspection import state_bytes, state_grows
from zoo.processes import connect_processes
from zoo.provenance import commit, device_name
from zoo.tables import Row, read_table, update_table

_KEY = ("model", "task", "setting", "metric", "seed")
COLUMNS = (
    *("model", "task", "setting", "metric", "value", "stderr", "documents"),
    "state_bytes",  # of a sequence; nothing where it grows with the length
    *("parameters", "training_tokens", "commit"),
    "seed",  # of the training
    *("device", "date"),
)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file.

    Raises:
        ValueError: if it is another kind of file.
    """
    return read_table(path, COLUMNS)


def add_rows(results: dict[str, Any], checkpoint: str, path: Path) -> None:
    """Add what `zoo.evaluate.harness.evaluate` found to a CSV file, in place of older rows of the same.

    Args:
        results: in lm-eval's layout.
        checkpoint: the folder, or name on the Hub, that was evaluated.
        path: the file; those rows stay that differ in model, task, setting, metric or seed of the training.

    Raises:
        ValueError: if it is another kind of file.
    """
    update_table(path, COLUMNS, _KEY, _make_rows(results, checkpoint))


def _make_rows(results: dict[str, Any], checkpoint: str) -> list[Row]:
    config = AutoConfig.from_pretrained(checkpoint)
    facts = Path(checkpoint) / "training.json"
    training = read_json(facts) if facts.is_file() else {}
    device = torch.device(results["config"]["device"] or connect_processes().device)
    source = {"commit": commit(), "device": device_name(device), "date": datetime.now(UTC).date().isoformat()}
    groups = {child: group for group, children in results["group_subtasks"].items() for child in children}
    of_model = {
        "model": _model_name(checkpoint),
        "state_bytes": "" if state_grows(config) else state_bytes(config),
        "parameters": results["config"]["model_num_parameters"],
        "training_tokens": training.get("tokens", ""),
        "seed": training.get("seed", ""),
    }
    rows = []
    for score in scores_of(results):
        task = groups.get(score.task, score.task)
        rows.append(
            {
                "task": task,
                "setting": score.task.removeprefix(task).removeprefix("_"),
                "metric": score.metric,
                "value": f"{score.value:.5g}",
                "stderr": "" if score.stderr is None else f"{score.stderr:.2g}",
                "documents": score.samples,
                **of_model,
                **source,
            }
        )
    return rows


def _model_name(checkpoint: str) -> str:
    """The name on the Hub, or of the folder; of a run's checkpoint that of the run."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    folder = folder.absolute()
    return folder.parent.name if re.fullmatch(r"latest|step-\d+", folder.name) else folder.name

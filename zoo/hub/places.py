"""What the files of a run say of the disk that it ran on: a publication has the last name of a path, no more."""

import json
from pathlib import Path, PurePath
from typing import Any

import yaml

from zoo.checkpoint import read_json, read_yaml

_PLACES = ("output", "cache", "tokenizer", "dataset", "files")
"""Keys of a recipe that may hold paths."""


def is_place(name: str) -> bool:
    """Whether it is an absolute path, and no name of the Hub, URL or path from where a command runs."""
    return PurePath(name).is_absolute() or name.startswith("~")


def without_places(content: Any, key: str | None = None) -> Any:
    """What a recipe or a `training.json` says, with `./mine.jsonl` for `/home/me/mine.jsonl`, and no cache."""
    if isinstance(content, dict):
        return {name: without_places(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [without_places(value, key) for value in content]
    if key not in _PLACES or not isinstance(content, str) or not is_place(content):
        return content
    return None if key == "cache" else f"./{PurePath(content).name}"


def write_without_places(file: Path, folder: Path) -> Path:
    """A copy of a `recipe.yaml` or `training.json` without places, in a folder.

    Raises:
        ValueError: if it is no YAML or JSON.
    """
    copy = folder / file.name
    if file.suffix == ".yaml":
        text = yaml.safe_dump(without_places(read_yaml(file)), sort_keys=False, allow_unicode=True)
    else:
        text = json.dumps(without_places(read_json(file)), indent=2) + "\n"
    copy.write_text(text, encoding="utf-8")
    return copy

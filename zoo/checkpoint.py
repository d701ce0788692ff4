"""Weights as others published them: safetensors or pickles, whole or in shards, read one tensor at a time.

Nothing in a file is executed: of a pickle only tensors are read. What a file says of itself is believed after a check.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

_WEIGHTS = ("model.safetensors.index.json", "*.safetensors", "pytorch_model.bin.index.json", "*.bin", "*.pth")
"""What may hold the weights in a folder, the first that is there."""

_NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "rng_state*.pth")


class Checkpoint:
    """A folder or a file of weights, opened; tensors are read when asked for.

    Args:
        path: a folder with weights and perhaps a `config.json`, or a file of weights.

    Raises:
        FileNotFoundError: if there is no such file, or no weights in the folder.
        ValueError: if a file is damaged, holds more than tensors, or its index names a file outside of the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.config: dict[str, Any] = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        self.shapes: dict[str, torch.Size] = {}
        """By name, the shape of each tensor."""
        self._readers: dict[str, Callable[[], Tensor]] = {}
        for file in weight_files(path):
            for name, shape, read in _open(file):
                if name in self.shapes:
                    raise ValueError(f"{path}: two files hold a tensor {name!r}")
                self.shapes[name], self._readers[name] = shape, read

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU.

        Raises:
            ValueError: if the file is damaged there.
        """
        return self._readers[name]()

    def count_layers(self, prefix: str) -> int:
        """How many different numbers follow a prefix, as `"blocks."`, in the names."""
        return len({name.removeprefix(prefix).split(".")[0] for name in self.shapes if name.startswith(prefix)})


def weight_files(path: Path) -> list[Path]:
    """The files of the weights: of the folder's index, or all of the first kind that is there; `path` if it is a file.

    Raises:
        FileNotFoundError: if there is no such file, or no weights in the folder.
        ValueError: if the index names a file outside of the folder, or there are several models.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no file or folder {path}")
    for pattern in _WEIGHTS:
        found = sorted(file for file in path.glob(pattern) if not any(map(file.match, _NOT_WEIGHTS)))
        if not found:
            continue
        if pattern.endswith(".index.json"):
            return _files_of_index(found[0])
        if pattern == "*.pth" and len(found) > 1:
            raise ValueError(f"{path} holds several models: pass one of {', '.join(file.name for file in found)}")
        return found
    raise FileNotFoundError(f"{path} holds no weights: none of {', '.join(_WEIGHTS)}")


def _files_of_index(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no weight_map")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if Path(name).name != name:
            raise ValueError(f"{index} names {name!r}, which is not a file of its folder")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not there")
        files.append(index.parent / name)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: if it is no JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_as_float)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted an object")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The table that a YAML file holds.

    Raises:
        ValueError: if it is no YAML, or no table.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a table")
    return content


def _as_float(content: dict[str, Any]) -> Any:
    """The number that transformers writes as {"__float__": "Infinity"}; any other object as it is."""
    named = content.get("__float__") if len(content) == 1 else None
    return float(named) if isinstance(named, str) else content


def _open(file: Path) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
    """Name, shape and reader of each tensor of a file."""
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)


def _open_safetensors(file: Path) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
    try:
        opened = safe_open(file, framework="pt")
        shapes = {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
    for name, shape in shapes.items():
        yield name, shape, lambda name=name: opened.get_tensor(name)


def _open_pickle(file: Path) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
    try:  # only the zip format of torch can be mapped into memory; before 2020 there was another
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n", 1)[0].split(".", 1)[0]
        raise ValueError(f"{file} is damaged or holds more than tensors, and is not read: {reason}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{file} is no table of tensors: it holds a {type(content).__name__}")
    for name, x in content.items():
        yield str(name), x.shape, lambda x=x: x

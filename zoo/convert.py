"""Import of published checkpoints and export to other libraries, tensor by tensor, bit for bit.

A `Layout` describes how one library writes one architecture down: how to recognise it, its configuration, and a list of
`Rule`s, each a name there, a name here and a lossless change of shape. Layouts live with their plugins; this is the
machinery that reads them in both directions.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import has_file, logging

from zoo import registry
from zoo.checkpoint import Checkpoint
from zoo.config import ZooConfig
from zoo.errors import unknown_name
from zoo.files import whole_folder


class Change(NamedTuple):
    """A change of shape that loses nothing: what it does to their tensors, and what to ours on the way back."""

    to_ours: Callable[..., Tensor | Sequence[Tensor]]
    to_theirs: Callable[..., Tensor | Sequence[Tensor]]


SAME = Change(lambda x: x, lambda x: x)
TRANSPOSED = Change(lambda x: x.t(), lambda x: x.t())
ROW = Change(lambda x: x.flatten(), lambda x: x.reshape(1, 1, -1))
"""Theirs (1 1 d), ours (d)."""


def concatenated(*sizes: int) -> Change:
    """Theirs are several tensors of these first sizes, ours is one, with them behind each other."""
    return Change(lambda *parts: torch.cat(parts), lambda x: x.split(sizes))


def divided(*sizes: int) -> Change:
    """Theirs is one tensor, ours are its parts of these first sizes."""
    return Change(lambda x: x.split(sizes), lambda *parts: torch.cat(parts))


class Rule(NamedTuple):
    """Which tensors of theirs are which of ours: a name or several on either side."""

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    change: Change = SAME


def rename(names: dict[str, str], theirs: str = "", ours: str = "", change: Change = SAME) -> list[Rule]:
    """Rules for tensors whose names differ (theirs: ours), with a prefix on either side."""
    return [Rule(theirs + a, ours + b, change) for a, b in names.items()]


def save_safetensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the weights as stock transformers reads them, in shards where they are large."""
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


@dataclass(frozen=True)
class Layout:
    """How one library writes one architecture down.

    Args:
        name: for messages, as "transformers' mamba".
        library: whose it is; `export_checkpoint` takes it as `to`.
        recognizes: whether a checkpoint is written so; by its configuration or the names of its tensors.
        read_config: the zoo's configuration for such a checkpoint.
        rules: all tensors of a model of the zoo's configuration. The head may be missing where it is tied.
        write_config: their configuration for a model of the zoo's, or None where their files have none. As
            `read_config` it raises ValueError on what the other side has no room for, naming it. Left out: import only.
        write_weights: writes tensors under their names into a folder, on export.
        ignored: patterns of names of tensors that hold nothing learned.
        read_tokenizer: the tokenizer that lies in a folder, in a form that only this library knows, or None.
    """

    name: str
    library: str
    recognizes: Callable[[Checkpoint], bool]
    read_config: Callable[[Checkpoint], ZooConfig]
    rules: Callable[[ZooConfig], Iterable[Rule]]
    write_config: Callable[[ZooConfig], PreTrainedConfig | None] | None = None
    write_weights: Callable[[dict[str, Tensor], Path], None] = save_safetensors
    ignored: tuple[str, ...] = ()
    read_tokenizer: Callable[[Path], PreTrainedTokenizerBase | None] | None = None


def has_model_type(model_type: str) -> Callable[[Checkpoint], bool]:
    """Recognises a folder of transformers by the model type in its `config.json`."""
    return lambda checkpoint: checkpoint.config.get("model_type") == model_type


def transformers_config(checkpoint: Checkpoint, ignored: Sequence[str] = ()) -> PreTrainedConfig:
    """The checkpoint's configuration in transformers' own class, with its defaults and its checks.

    Args:
        checkpoint: a folder of transformers.
        ignored: fields that are nothing to the zoo, whatever they are.

    Raises:
        ValueError: if transformers does not accept it.
    """
    fields = {key: value for key, value in checkpoint.config.items() if key not in ("model_type", *ignored)}
    for name in ("num_hidden_layers", "n_layer", "num_blocks"):
        _check_depth(checkpoint, fields.get(name))
    try:
        return CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(fields)
    except Exception as error:  # whatever a value of the wrong type runs into
        raise _invalid(checkpoint, error) from error


def make_config(checkpoint: Checkpoint, config_class: type[ZooConfig], **fields: Any) -> ZooConfig:
    """A configuration of the zoo from fields that a checkpoint named.

    Raises:
        ValueError: if a value is of the wrong type or size.
    """
    _check_depth(checkpoint, fields.get("num_hidden_layers"))
    try:
        return config_class(**fields)
    except Exception as error:
        raise _invalid(checkpoint, error) from error


def _check_depth(checkpoint: Checkpoint, num_hidden_layers: Any) -> None:
    """Raise ValueError on more layers than tensors, before anything is made for each of them."""
    if isinstance(num_hidden_layers, int) and num_hidden_layers > len(checkpoint.shapes):
        raise ValueError(
            f"{checkpoint.path}: the configuration has {num_hidden_layers} layers, and there are "
            f"{len(checkpoint.shapes)} tensors in all"
        )


def refuse_others(config: object, **wanted: Any) -> None:
    """Raise ValueError on a field of theirs that has another value than the only one that the zoo computes."""
    for name, value in wanted.items():
        if (found := getattr(config, name)) != value:
            raise ValueError(f"this variant is not in the zoo: {name} is {found!r}, it knows {value!r}")


def _invalid(checkpoint: Checkpoint, error: Exception) -> ValueError:
    """The error for a configuration that some code did not accept; what it said, in one line."""
    cause = error.__cause__ or error
    said = " ".join(str(cause).split())
    if not isinstance(cause, (ValueError, TypeError)) or not said:
        said = f"{type(cause).__name__}: {said}"
    return ValueError(f"the configuration of {checkpoint.path} is not valid: {said}")


# -- import ------------------------------------------------------------------------------------------------------------


def import_checkpoint(
    source: str | PathLike, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Read a published checkpoint into a model of the zoo.

    Args:
        source: a folder, a file (`.pth`, `.bin`, `.safetensors`) or a repository on the Hugging Face Hub.
        dtype: of the model's weights. Default: as they are in the checkpoint.

    Returns:
        The model, in evaluation mode, and its tokenizer where the source has one.

    Raises:
        FileNotFoundError: if there is no such source, or no weights in it.
        ValueError: if a file is damaged, the zoo does not know the layout or the variant, or tensors are missing,
            unexpected or of the wrong shape; the message names them.
    """
    checkpoint = Checkpoint(_find(source))
    plugin, layout = _recognize(checkpoint)
    config = layout.read_config(checkpoint)
    rules = _matching_rules(checkpoint, layout, config)
    model_class = plugin.model_class("ForCausalLM")
    try:
        with torch.device("meta"):
            expected = {name: x.shape for name, x in model_class(config).state_dict().items()}
    except Exception as error:
        raise _invalid(checkpoint, error) from error
    tensors: dict[str, Tensor] = {}
    for rule in logging.tqdm(rules, desc="reading tensors", unit="tensor", leave=False):
        for name, x in zip(_as_tuple(rule.ours), _to_ours(checkpoint, rule), strict=True):
            if x.shape != expected[name]:
                raise ValueError(
                    f"{checkpoint.path}: {_join(rule.theirs)} is {tuple(x.shape)} as {name}, wanted "
                    f"{tuple(expected[name])} for {layout.name} of this configuration"
                )
            tensors[name] = x.contiguous() if dtype is None else x.to(dtype).contiguous()
    model = _build(model_class, config, tensors)
    return model, _read_tokenizer(checkpoint, layout)


def _find(source: str | PathLike) -> Path:
    path = Path(source).expanduser()
    if not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        return Path(snapshot_download(str(source)))
    return path


def _recognize(checkpoint: Checkpoint) -> tuple[registry.Plugin, Layout]:
    layouts = [(plugin, layout) for plugin in registry.plugins().values() for layout in plugin.layouts]
    for plugin, layout in layouts:
        if layout.recognizes(checkpoint):
            return plugin, layout
    what = f"model type {checkpoint.config['model_type']!r}" if "model_type" in checkpoint.config else "layout"
    raise ValueError(
        f"the zoo does not know the {what} of {checkpoint.path} (its first tensors are "
        f"{_some(sorted(checkpoint.shapes))}); it reads {', '.join(layout.name for _, layout in layouts)}"
    )


def _matching_rules(checkpoint: Checkpoint, layout: Layout, config: ZooConfig) -> list[Rule]:
    """The rules whose tensors the checkpoint has, after making sure that it has what they ask for, and no more."""
    rules = list(layout.rules(config))
    wanted = {name for rule in rules for name in _as_tuple(rule.theirs)}
    found = {name for name in checkpoint.shapes if not any(fnmatchcase(name, pattern) for pattern in layout.ignored)}
    tied = [rule for rule in rules if config.tie_word_embeddings and rule.ours == "lm_head.weight"]
    missing, unexpected = wanted - found - {rule.theirs for rule in tied}, found - wanted
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint.path} is not a whole checkpoint of {layout.name}: "
            f"missing {_some(sorted(missing))}; unexpected {_some(sorted(unexpected))}"
        )
    return [rule for rule in rules if rule not in tied]


def _to_ours(checkpoint: Checkpoint, rule: Rule) -> tuple[Tensor, ...]:
    tensors = [checkpoint.read(name) for name in _as_tuple(rule.theirs)]
    try:
        return _as_tuple(rule.change.to_ours(*tensors))
    except (RuntimeError, IndexError) as error:  # of torch, on shapes that do not fit
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(f"{checkpoint.path}: {_join(rule.theirs)} of {shapes} make no {_join(rule.ours)}") from error


def _build(model_class: type[PreTrainedModel], config: ZooConfig, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """A model around tensors that are taken as they are, without a copy where they can be."""
    kinds = Counter(x.dtype for x in tensors.values() if x.is_floating_point())
    config.dtype = kinds.most_common(1)[0][0]
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # there is nothing left to load
    try:
        model = model_class.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=config.dtype)
    finally:
        if progress:
            logging.enable_progress_bar()
    model.load_state_dict(tensors, strict=False, assign=True)  # some in a precision of their own
    model.tie_weights()
    return model.eval()


def _read_tokenizer(checkpoint: Checkpoint, layout: Layout) -> PreTrainedTokenizerBase | None:
    folder = checkpoint.folder
    if layout.read_tokenizer is not None and (tokenizer := layout.read_tokenizer(folder)) is not None:
        return tokenizer
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if checkpoint.path.is_dir() and any((folder / name).is_file() for name in known):
        return AutoTokenizer.from_pretrained(folder)
    return None


# -- export ------------------------------------------------------------------------------------------------------------


def export_checkpoint(
    model: PreTrainedModel,
    destination: str | PathLike,
    to: str = "transformers",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a model of the zoo in another library's layout; the folder appears whole or not at all.

    Args:
        model: a causal language model of the zoo.
        destination: a folder that is not there yet.
        to: whose layout, as `Layout.library`; "transformers" is loaded by stock transformers, without the zoo.
        tokenizer: is written beside the weights.

    Raises:
        FileExistsError: if there is something at the destination.
        ValueError: if that library has no such architecture or no room for this model's options.
    """
    destination = _free(destination)
    layout, theirs = _target(model, to)
    ours = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for rule in layout.rules(model.config):
        if model.config.tie_word_embeddings and rule.ours == "lm_head.weight":
            continue
        parts = _as_tuple(rule.change.to_theirs(*(ours[name] for name in _as_tuple(rule.ours))))
        if len(parts) > 1:  # parts of one storage are not written
            parts = tuple(x.clone(memory_format=torch.contiguous_format) for x in parts)
        tensors.update(zip(_as_tuple(rule.theirs), (x.contiguous() for x in parts), strict=True))
    with whole_folder(destination) as folder:
        if theirs is not None:
            theirs.dtype, theirs.architectures = model.dtype, [_architecture(theirs)]
            theirs.save_pretrained(folder)
        layout.write_weights(tensors, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def save_imported(source: str | PathLike, destination: str | PathLike) -> PreTrainedModel:
    """Import a checkpoint and write it as a folder of the zoo, whole or not at all; raises as `import_checkpoint`."""
    destination = _free(destination)
    model, tokenizer = import_checkpoint(source)
    with whole_folder(destination) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return model


def save_exported(source: str | PathLike, destination: str | PathLike, to: str = "transformers") -> None:
    """Export a folder of the zoo, or a repository on the Hub, with its tokenizer; raises as `export_checkpoint`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    has_tokenizer = has_file(source, "tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(source) if has_tokenizer else None
    export_checkpoint(model, destination, to=to, tokenizer=tokenizer)


def _target(model: PreTrainedModel, library: str) -> tuple[Layout, PreTrainedConfig | None]:
    """The layout to write a model in, and its configuration there, if there is one."""
    plugin = next((p for p in registry.plugins().values() if isinstance(model, p.models)), None)
    if plugin is None or not isinstance(model, plugin.model_class("ForCausalLM")):
        raise ValueError(f"only causal language models of the zoo are exported, not {type(model).__name__}")
    writable = [layout for layout in plugin.layouts if layout.write_config is not None]
    libraries = sorted({layout.library for layout in writable})
    if library not in libraries:
        raise unknown_name(f"library to export {type(model).__name__} to", library, libraries)
    refusals = []
    for layout in writable:
        if layout.library == library:
            try:
                return layout, layout.write_config(model.config)
            except ValueError as error:
                refusals.append(f"{layout.name}: {error}")
    raise ValueError(f"{library} has no architecture for this model ({'; '.join(refusals)})")


def _architecture(config: PreTrainedConfig) -> str:
    return AutoModelForCausalLM._model_mapping[type(config)].__name__


def _free(destination: str | PathLike) -> Path:
    path = Path(destination).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _as_tuple(x: Any) -> tuple:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _join(names: str | tuple[str, ...]) -> str:
    return " + ".join(_as_tuple(names))


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more

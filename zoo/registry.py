"""Plugins: found in the tree and among installed distributions, handed to the Auto classes, looked up by name.

An architecture is one `Plugin` value, named `PLUGIN` in its package. In-tree packages are found by a scan of
`zoo.plugins`; other distributions point at theirs with an entry point of the group `zoo.plugins`.
"""

import dataclasses
import importlib
import logging
import pkgutil
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zoo.errors import unknown_name

logger = logging.getLogger(__name__)

_AUTO_CLASSES = {
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "Model": AutoModel,
}


@dataclass(frozen=True)
class Plugin:
    """All that the zoo must know of one architecture.

    Args:
        models: its model classes; the end of a class's name says which Auto class offers it.
        presets: configurations by name, each the fields that differ from the config's defaults. One ends in `-tiny`.
        mixers: the mixer classes it offers, by name, to every model whose configuration has their `config_fields`, and
            to hybrids, which bring these along.
        channel_mixers: likewise, what can stand in the second half of a layer.
        layouts: how others write its checkpoints down (`zoo.convert.Layout`).
        tokenizer: a tokenizer class of its own, which `AutoTokenizer` then finds for its models and by its name.
        lora_targets: names of the linear modules that a LoRA adapter should cover, as peft's `target_modules`.
        paper: where it was published.
        unkept: promises of the contract test that the architecture cannot keep, each with the reason; the call must
            raise an error that gives it.
    """

    models: tuple[type[PreTrainedModel], ...]
    presets: Mapping[str, Mapping[str, Any]]
    mixers: Mapping[str, type] = field(default_factory=dict)
    channel_mixers: Mapping[str, type] = field(default_factory=dict)
    layouts: tuple[Any, ...] = ()
    tokenizer: type[PreTrainedTokenizerBase] | None = None
    lora_targets: tuple[str, ...] = ()
    paper: str = ""
    unkept: Mapping[str, str] = field(default_factory=dict)

    @property
    def all_mixers(self) -> Mapping[str, type]:
        """Mixers and channel mixers together, which share one set of names."""
        return {**self.mixers, **self.channel_mixers}

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return self.models[0].config_class

    def model_class(self, suffix: str) -> type[PreTrainedModel]:
        """The class whose name ends in `suffix`, as `"ForCausalLM"`."""
        return next(model for model in self.models if _suffix(model) == suffix)


_plugins: dict[str, Plugin] = {}
_failures: dict[str, Exception] = {}


def load_plugins() -> None:
    """Find every plugin and register it, those in the tree first; one that fails is reported and left out."""
    from zoo import plugins as tree  # noqa: PLC0415 (plugins import zoo, which is complete only now)

    sources = {found.name: f"{tree.__name__}.{found.name}" for found in pkgutil.iter_modules(tree.__path__)}
    for point in sorted(entry_points(group="zoo.plugins"), key=lambda point: point.name):
        if point.name in sources:
            taken = ValueError(f"{sources[point.name]} has the name {point.name!r} already")
            _leave_out(point.name, point.value, taken)
        else:
            sources[point.name] = point.value
    for name, module in sources.items():
        try:
            register(name, importlib.import_module(module).PLUGIN)
        except Exception as error:  # whatever a foreign package raises, the rest of the zoo must work
            _leave_out(name, module, error)


def _leave_out(name: str, module: str, error: Exception) -> None:
    _failures[name] = error
    logger.warning("zoo plugin %r (%s) is left out: %s: %s", name, module, type(error).__name__, error)


def register(name: str, plugin: Plugin) -> None:
    """Enter a plugin under a name and hand its classes to transformers' Auto classes.

    Raises:
        ValueError: if it is no `Plugin`, or a name it brings is taken, by another plugin or by transformers itself.
    """
    if not isinstance(plugin, Plugin):
        raise ValueError(f"PLUGIN of {name!r} is a {type(plugin).__name__}, not a zoo.Plugin")
    for other, registered in _plugins.items():
        for kind in ("presets", "all_mixers"):
            if taken := getattr(registered, kind).keys() & getattr(plugin, kind).keys():
                what = kind.removeprefix("all_")
                raise ValueError(
                    f"plugin {name!r} brings {what} that {other!r} has already: {', '.join(sorted(taken))}"
                )
    config = plugin.config_class
    if config.model_type in CONFIG_MAPPING:
        raise ValueError(f"plugin {name!r} brings the model type {config.model_type!r}, which is registered already")
    offered = [(_AUTO_CLASSES[_suffix(model)], model) for model in plugin.models]
    AutoConfig.register(config.model_type, config)
    for auto_class, model in offered:
        auto_class.register(config, model, exist_ok=True)  # a name that transformers has too is still another class
    if plugin.tokenizer is not None:
        AutoTokenizer.register(config, tokenizer_class=plugin.tokenizer)
    _plugins[name] = plugin


def _suffix(model: type) -> str:
    for suffix in _AUTO_CLASSES:
        if model.__name__.endswith(suffix):
            return suffix
    raise ValueError(f"the name of {model.__name__} ends in none of {', '.join(_AUTO_CLASSES)}")


# -- looking things up -------------------------------------------------------------------------------------------------


def plugins() -> Mapping[str, Plugin]:
    """Every registered plugin, by name."""
    return MappingProxyType(_plugins)


def find_mixer(name: str) -> type:
    """The mixer class of that name.

    Raises:
        ValueError: on an unknown name; the nearest known ones are suggested.
    """
    return _find("mixer", name, {key: mixer for plugin in _plugins.values() for key, mixer in plugin.mixers.items()})


def find_channel_mixer(name: str) -> type:
    """The channel mixer class of that name.

    Raises:
        ValueError: on an unknown name; the nearest known ones are suggested.
    """
    known = {key: mixer for plugin in _plugins.values() for key, mixer in plugin.channel_mixers.items()}
    return _find("channel mixer", name, known)


def find_owner(name: str) -> Plugin:
    """The plugin that brings the mixer or channel mixer of that name.

    Raises:
        ValueError: on an unknown name; the nearest known ones are suggested.
    """
    return _find("mixer", name, {key: plugin for plugin in _plugins.values() for key in plugin.all_mixers})


def find_preset(name: str) -> Plugin:
    """The plugin that has a preset of that name.

    Raises:
        ValueError: on an unknown name; the nearest known ones are suggested.
    """
    return _find("model", name, {preset: plugin for plugin in _plugins.values() for preset in plugin.presets})


def _find(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    if name in known:
        return known[name]
    for plugin, error in _failures.items():
        if name == plugin or name.startswith(f"{plugin}-"):
            raise error
    error = unknown_name(kind, name, known)
    if _failures:
        error = ValueError(f"{error}; plugins left out, as they failed to load: {', '.join(_failures)}")
    raise error


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match a shell pattern, in natural order (`x-130m` before `x-2b` before `x-10b`)."""
    names = (name for plugin in _plugins.values() for name in plugin.presets)
    return sorted((name for name in names if fnmatchcase(name, pattern)), key=_natural_key)


def _natural_key(name: str) -> list[tuple[int, float | str]]:
    """Words as words, numbers as numbers, where m and b stand for millions and billions."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([mb]?\b)?|(\D+)", name)
    scale = {"": 1.0, "m": 1e6, "b": 1e9}
    return [(1, word) if word else (0, float(number) * scale[unit]) for number, unit, word in parts]


def create_config(name: str, **overrides) -> PreTrainedConfig:
    """The configuration of a preset, with some fields changed.

    Raises:
        ValueError: on an unknown preset or field, where the nearest known ones are suggested; on a value of the wrong
            type; on sizes that do not go together.
    """
    plugin = find_preset(name)
    known = _field_names(plugin.config_class)
    for key in overrides:
        if key not in known:
            raise unknown_name(f"field of {plugin.config_class.__name__}", key, known)
    try:
        return plugin.config_class(**{**plugin.presets[name], **overrides})
    except StrictDataclassError as error:  # wraps what a validator said in two lines of its own
        raise ValueError(f"{name}: {error.__cause__ or error}") from error


def create_model(name: str, **overrides) -> PreTrainedModel:
    """A freshly initialised causal language model of a preset, with some configuration fields changed.

    Raises:
        ValueError: on an unknown preset or field; the nearest known ones are suggested.
    """
    config = create_config(name, **overrides)
    return find_preset(name).model_class("ForCausalLM")._from_config(config)  # honours its dtype


def _field_names(config_class: type[PreTrainedConfig]) -> Iterable[str]:
    derived = {"layer_types", "transformers_version"}
    names = [field.name for field in dataclasses.fields(config_class) if field.name not in derived]
    return [*names, "num_labels", "attn_implementation"]

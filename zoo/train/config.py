"""What a recipe may say: dataclasses, filled from a YAML file and then from `key=value` words, strictly."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import unknown_name
from zoo.layout import shelf


@dataclass
class ModelSection:
    preset: str = MISSING
    """A name of `zoo list`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that differ from the preset; the vocabulary is the tokenizer's."""


@dataclass
class DataSection:
    corpus: str = "stdlib"
    """A name of `zoo.train.data.CORPORA`."""
    vocab_size: int = 4096
    """Entries of the BPE tokenizer that is trained on the corpus."""
    sequence_length: int = 256
    """Tokens of a training row."""
    batch_size: int = 16
    """Rows of a step."""


@dataclass
class TrainSection:
    output: str = MISSING
    """Folder of the run: log, plot, checkpoints. `<output>/latest` is the newest checkpoint."""
    tokens: float = MISSING
    """Tokens to train on, rounded to whole steps."""
    save_every: int = 100
    """Steps from one checkpoint to the next."""
    seed: int = 0
    learning_rate: float = 3e-3
    """Peak of the learning rate: linear warm-up, then cosine down to a tenth."""
    warmup_fraction: float = 0.05
    """Part of the steps that warm up."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    """Decay of AdamW's averages of the gradient and of its square."""
    max_grad_norm: float = 1.0
    sample_prompt: str = "def "
    """Beginning of the text that is generated at the end."""


@dataclass
class TrainConfig:
    """A whole recipe."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)


def load_config(recipe: str, assignments: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe, and change what `assignments` (as `train.seed=1`) say.

    Args:
        recipe: a YAML file, or its path on the recipes shelf (`tiny/retnet.yaml`, with or without `recipes/` in front).

    Raises:
        ValueError: if there is no such recipe; on an unknown key, a missing one, or a value of the wrong type or out of
            range. The nearest known name is suggested.
    """
    path = _find(recipe)
    try:
        from_file = OmegaConf.load(path)
    except Exception as error:  # a YAML library's errors have many types, all mean the same here
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    for word in assignments:
        if "=" not in word:
            raise ValueError(f"{word!r} is no assignment; write it as key=value, for example train.seed=1")
    try:
        from_words = OmegaConf.from_dotlist(list(assignments))
    except Exception as error:  # the YAML library again, on a value
        raise ValueError(f"a value of {' '.join(assignments)} is no valid YAML") from error
    for source, where in ((from_file, str(path)), (from_words, "the command line")):
        if not OmegaConf.is_dict(source):
            raise ValueError(f"{where} must hold sections with keys")
        _check_keys(OmegaConf.to_container(source), TrainConfig, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), from_file, from_words)
        if missing := OmegaConf.missing_keys(merged):
            raise ValueError(f"{path} must set {', '.join(sorted(missing))}")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{error.full_key or path}: {reason}") from error
    _check_values(config)
    return config


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration, as it is kept beside a run."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def list_recipes() -> list[str]:
    """Paths of the recipes that come with the zoo, on their shelf."""
    folder = shelf("recipes")
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))


def _find(recipe: str) -> Path:
    if Path(recipe).is_file():
        return Path(recipe)
    on_shelf = recipe.removeprefix("recipes/")
    for name in (on_shelf, f"{on_shelf}.yaml"):
        if (shelf("recipes") / name).is_file():
            return shelf("recipes") / name
    raise unknown_name("recipe", on_shelf, list_recipes())


def _check_keys(values: Any, section: type, where: str, prefix: str = "") -> None:
    known = {item.name: item.type for item in dataclasses.fields(section)}
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.')} is a section and takes keys, got {values!r}")
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"key in {where}", f"{prefix}{key}", [f"{prefix}{name}" for name in known])
        if dataclasses.is_dataclass(known[key]):
            _check_keys(value, known[key], where, f"{prefix}{key}.")


def _check_values(config: TrainConfig) -> None:
    data, train, below_one = config.data, config.train, math.nextafter(1, 0)
    ranges = {  # lowest and highest value allowed
        "data.vocab_size": (data.vocab_size, 257, math.inf),  # the bytes and the end of text
        "data.sequence_length": (data.sequence_length, 2, math.inf),
        "data.batch_size": (data.batch_size, 1, math.inf),
        "train.tokens": (train.tokens, 1, 1e18),
        "train.save_every": (train.save_every, 1, math.inf),
        "train.learning_rate": (train.learning_rate, 0, 1e3),
        "train.warmup_fraction": (train.warmup_fraction, 0, 1),
        "train.weight_decay": (train.weight_decay, 0, math.inf),
        "train.max_grad_norm": (train.max_grad_norm, 0, math.inf),
        "train.beta1": (train.beta1, 0, below_one),
        "train.beta2": (train.beta2, 0, below_one),
    }
    for name, (value, lowest, highest) in ranges.items():
        if not lowest <= value <= highest:
            raise ValueError(f"{name} must be from {lowest:g} to {highest:g}, got {value}")
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        if name in config.model.overrides:
            raise ValueError(f"model.overrides.{name}: it follows from the tokenizer, see data.vocab_size")

"""What a recipe may say: dataclasses, filled from a YAML file and then from `key=value` words, strictly."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import unknown_name
from zoo.layout import shelf


@dataclass
class ModelSection:
    preset: str = MISSING
    """A name of `zoo list`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that differ from the preset. Without `vocab_size` it is the tokenizer's."""


@dataclass
class SourceSection:
    """Where documents come from: `corpus`, `dataset` or `task`, one of the three."""

    corpus: str | None = None
    """A name of `zoo.train.corpora.CORPORA`, text that needs no download."""
    dataset: str | None = None
    """A dataset of the Hub, a folder, or a format that `datasets` knows (`json`, `parquet`, `text`) with `files`."""
    config: str | None = None
    """Which configuration of the dataset."""
    revision: str | None = None
    """A commit of a dataset of the Hub. None: the newest, with which a run cannot go on once there is a newer one."""
    files: list[str] = field(default_factory=list)
    """Files or patterns of a format, or of a dataset of which only these are wanted."""
    split: str = "train"
    column: str = "text"
    """The column with text, or with token ids of the tokenizer that `data.tokenizer` names."""
    streaming: bool = False
    """Whether training starts while documents are still read; they are then shuffled a window at a time."""
    task: str | None = None
    """A task of the evals shelf, whose examples are generated."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the task."""
    limit: int | None = None
    """Take this many documents and no more."""
    held_out: int = 0
    """Never train on the first documents, this many, and validate on them. A corpus brings its own; of a task they are
    examples of its test split."""
    weight: float = 1.0
    """How many rows come from this source, in proportion to the weights of the others."""


@dataclass
class DataSection:
    sources: dict[str, SourceSection] = MISSING
    """By a name of your choice, what to train on."""
    tokenizer: str = "bpe"
    """`bpe` (bytes) or `words` (between spaces), trained on the spot; else a name of the Hub, or a folder."""
    vocab_size: int = 4096
    """Entries of the tokenizer, if it is trained on the spot."""
    sequence_length: int = 256
    """Tokens of a row."""
    batch_size: int = 16
    """Rows of a step, of all processes together."""
    micro_batch_size: int | None = None
    """Rows that a process reads at a time; their gradients add up. None: all of its rows."""
    isolate_documents: bool = True
    """Whether documents in a row are hidden from each other."""
    cache: str | None = None
    """Folder of tokenised data. None: `zoo/tokens` in $XDG_CACHE_HOME or ~/.cache."""


@dataclass
class TrainSection:
    output: str = MISSING
    """Folder of the run: log, plots, checkpoints. `<output>/latest` is the newest checkpoint."""
    tokens: float = MISSING
    """Tokens to train on, rounded to whole steps."""
    save_every: int = 100
    """Steps from one checkpoint to the next."""
    evaluate_every: int | None = None
    """Steps from one validation to the next. None: as often as checkpoints are saved."""
    evaluate_rows: int = 64
    """Rows of each held-out text that a validation reads at most; at the end it is all of them."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the one with the lowest validation loss."""
    seed: int = 0
    optimizer: str = "adamw"
    """`adamw`, or `muon`: Muon for the matrices inside of the layers, AdamW for all else."""
    learning_rate: float = 3e-3
    """Peak of the learning rate."""
    schedule: str = "cosine"
    """After the warm-up, which is linear: `cosine` or `linear` down to the end, or `wsd`, constant and then linear."""
    warmup_fraction: float = 0.05
    """Part of the steps that warm up."""
    decay_fraction: float = 0.2
    """Part of the steps, the last, in which `wsd` falls."""
    final_fraction: float = 0.1
    """The learning rate at the end, as a part of its peak."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    """Decay of AdamW's averages of the gradient and of its square."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's average of squares."""
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    """Weight of the squared log-normaliser of the softmax (PaLM, arXiv:2204.02311, section 5)."""
    precision: str = "auto"
    """Of the products: `fp32`, `bf16`, or `auto`, bf16 on a GPU. Weights are float32."""
    gradient_checkpointing: bool = False
    """Keep only what stands between layers for the backward pass, and compute the rest again."""
    compile: bool = False
    """Run the model through `torch.compile`."""
    carry_state: bool = False
    """Rows go on where those of the step before ended, with the state they left; gradients stop between steps."""
    max_skipped: int = 10
    """Steps in a row without finite gradients after which the run stops; each is skipped."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Besides the log: any of `tensorboard`, `wandb`, `trackio`."""
    sample_prompt: str | None = "def "
    """Beginning of the text that is generated at each validation; null: none is."""


@dataclass
class TrainConfig:
    """A whole recipe."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)


CHOICES = {
    "train.optimizer": ("adamw", "muon"),
    "train.schedule": ("cosine", "linear", "wsd"),
    "train.precision": ("auto", "fp32", "bf16"),
    "train.trackers": ("tensorboard", "wandb", "trackio"),
}


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
    """The resolved configuration, as it is kept with every checkpoint."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def list_recipes() -> list[str]:
    """Paths of the recipes that come with the zoo, on their shelf."""
    folder = shelf("recipes")
    found = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(str(path) for path in found if path.parts[0] != "launch")


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
        kind = known[key]
        if dataclasses.is_dataclass(kind):
            _check_keys(value, kind, where, f"{prefix}{key}.")
        elif get_origin(kind) is dict and dataclasses.is_dataclass(inner := get_args(kind)[1]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {prefix}{key} takes sections with names of your choice, got {value!r}")
            for name, part in value.items():
                _check_keys(part, inner, where, f"{prefix}{key}.{name}.")


def _check_values(config: TrainConfig) -> None:
    data, train, below_one = config.data, config.train, math.nextafter(1, 0)
    ranges = {  # lowest and highest value allowed
        "data.sequence_length": (data.sequence_length, 2, 1e9),
        "data.batch_size": (data.batch_size, 1, 1e9),
        "data.micro_batch_size": (data.micro_batch_size, 1, data.batch_size),
        "train.tokens": (train.tokens, 1, 1e18),
        "train.save_every": (train.save_every, 1, math.inf),
        "train.evaluate_every": (train.evaluate_every, 1, math.inf),
        "train.evaluate_rows": (train.evaluate_rows, 1, math.inf),
        "train.keep": (train.keep, 1, math.inf),
        "train.seed": (train.seed, 0, 2**32 - 1),
        "train.learning_rate": (train.learning_rate, 0, 1e3),
        "train.warmup_fraction": (train.warmup_fraction, 0, 1),
        "train.decay_fraction": (train.decay_fraction, 0, 1),
        "train.final_fraction": (train.final_fraction, 0, 1),
        "train.weight_decay": (train.weight_decay, 0, 1e3),
        "train.max_grad_norm": (train.max_grad_norm, 1e-18, math.inf),
        "train.epsilon": (train.epsilon, 0, 1),
        "train.z_loss": (train.z_loss, 0, 1e3),
        "train.max_skipped": (train.max_skipped, 1, math.inf),
        "train.beta1": (train.beta1, 0, below_one),
        "train.beta2": (train.beta2, 0, below_one),
    }
    if data.tokenizer == "bpe":
        ranges["data.vocab_size"] = (data.vocab_size, 257, 1e9)  # the bytes and the end of text
    elif data.tokenizer == "words":
        ranges["data.vocab_size"] = (data.vocab_size, 3, 1e9)  # a word, what stands for all others, the end of text
    for name, source in data.sources.items():
        ranges[f"data.sources.{name}.weight"] = (source.weight, 1e-18, 1e18)
        ranges[f"data.sources.{name}.held_out"] = (source.held_out, 0, 1e18)
        ranges[f"data.sources.{name}.limit"] = (source.limit, 1, 1e18)
        given = [kind for kind in ("corpus", "dataset", "task") if getattr(source, kind)]
        if len(given) != 1:
            raise ValueError(f"data.sources.{name} must set one of corpus, dataset and task, got {given or 'none'}")
        if source.corpus and (source.streaming or source.held_out):
            raise ValueError(f"data.sources.{name}: a corpus is not streamed, and brings its own held-out text")
    for name, (value, lowest, highest) in ranges.items():
        if value is not None and not lowest <= value <= highest:
            raise ValueError(f"{name} must be from {lowest:.10g} to {highest:.10g}, got {value}")
    for name, known in CHOICES.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        for choice in value if isinstance(value, list) else [value]:
            if choice not in known:
                raise unknown_name(name, choice, known)
    if not data.sources:
        raise ValueError("data.sources names nothing to train on")
    if train.schedule == "wsd" and train.warmup_fraction + train.decay_fraction > 1:
        raise ValueError("train.warmup_fraction and train.decay_fraction are more than the whole run together")
    if train.carry_state and not data.isolate_documents:
        raise ValueError("train.carry_state starts anew where documents do: leave data.isolate_documents on")
    if train.carry_state and train.gradient_checkpointing:
        raise ValueError("train.gradient_checkpointing reads a row twice, so that no state can be carried: use one")
    if train.carry_state and (len(data.sources) > 1 or any(s.streaming or s.task for s in data.sources.values())):
        raise ValueError("train.carry_state reads one source from beginning to end: one that is no task, not streaming")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in config.model.overrides:
            raise ValueError(f"model.overrides.{name}: it follows from the tokenizer")

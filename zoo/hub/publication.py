"""What of a checkpoint is published: its files, the pictures of its run, and a card; all checked before it is sent."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from zoo import registry
from zoo.checkpoint import Checkpoint, read_json, weight_files
from zoo.convert import save_exported
from zoo.errors import unknown_name
from zoo.hub.card import Facts, make_card
from zoo.hub.places import write_without_places
from zoo.hub.scores import read_scores

FORMATS = ("zoo", "transformers")

_MODEL = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER = ("tokenizer*", "*vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json")
_OF_RUN = ("recipe.yaml", "training.json")
_OF_ANY_FORMAT = ("generation_config.json", "chat_template.*", *_OF_RUN)
_OF_FOLDER = (*_MODEL, *_TOKENIZER, *_OF_ANY_FORMAT)


@dataclass(frozen=True)
class Publication:
    """What goes into a repository."""

    repo_id: str
    model_type: str
    card: ModelCard
    files: dict[str, Path]
    """Where each file lies, by its name in the repository: all but the card, `README.md`."""
    left_out: list[str]
    """What in the checkpoint's folder is not published."""
    commit_message: str

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, the card included."""
        return {"README.md": len(str(self.card).encode())} | {
            name: path.stat().st_size for name, path in self.files.items()
        }

    def list_files(self) -> str:
        """The files with their sizes, and what is left out."""
        lines = [f"{'file':<44}{'bytes':>16}"]
        lines += [f"{name:<44}{size:>16,}" for name, size in self.sizes.items()]
        lines.append(f"{f'{len(self.sizes)} files':<44}{sum(self.sizes.values()):>16,}")
        if self.left_out:
            lines.append(f"left out: {', '.join(self.left_out)}")
        return "\n".join(lines)


def is_of_checkpoint(name: str) -> bool:
    """Whether a file of that name is part of a checkpoint that is published."""
    return any(fnmatchcase(name, pattern) for pattern in _OF_FOLDER)


@contextmanager
def prepare(
    checkpoint: str | PathLike,
    repo_id: str,
    format: str = "zoo",
    license: str = "apache-2.0",
    results: str | PathLike | None = None,
) -> Iterator[Publication]:
    """What a checkpoint is published as; the files are there while the block lasts. The network is not touched.

    Args:
        checkpoint: a folder of `save_pretrained`, with `recipe.yaml` and `training.json` if it was trained by the zoo.
            Pictures beside the log of its run (`log.jsonl` in the folder above) go with it. Paths in both files are
            cut down to their last names.
        repo_id: the repository, as `user/name`.
        format: `"zoo"`, or `"transformers"` for files that stock transformers loads.
        license: of the weights, by its identifier on the Hub.
        results: a JSON file of lm-eval. Default: `results.json` in the folder, if it is there.

    Raises:
        FileNotFoundError: if the folder has no weights.
        ValueError: if it holds no whole causal language model of the zoo in safetensors, the format has no room for it,
            `repo_id` is no name with an owner, or a JSON file is not what it should be.
    """
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner: write it as user/{repo_id}")
    validate_repo_id(repo_id)
    folder = Path(checkpoint).expanduser().resolve()  # the `latest` of a run is a link
    model = _model_of(folder)
    if results is None and (folder / "results.json").is_file():
        results = folder / "results.json"
    with TemporaryDirectory() as scratch:
        files = _files_of(folder) if format == "zoo" else _exported(folder, Path(scratch) / "exported")
        files |= {name: write_without_places(path, Path(scratch)) for name, path in files.items() if name in _OF_RUN}
        files |= _pictures(folder.parent)
        facts = Facts(
            repo_id=repo_id,
            model=model,
            format=format,
            license=license,
            files=list(files),
            training=read_json(files["training.json"]) if "training.json" in files else {},
            scores=[] if results is None else read_scores(Path(results)),
        )
        yield Publication(
            repo_id=repo_id,
            model_type=read_json(files["config.json"])["model_type"],
            card=make_card(facts),
            files=files,
            left_out=sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in files),
            commit_message=_commit_message(facts),
        )


def _model_of(folder: Path) -> PreTrainedModel:
    """The model in a folder, without memory for its weights, after a look at what tensors there are."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json")
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type not in {plugin.config_class.model_type for plugin in registry.plugins().values()}:
        raise ValueError(f"{folder} holds a {model_type}, which is not of the zoo; `zoo import` may read it")
    if others := [path.name for path in weight_files(folder) if path.suffix != ".safetensors"]:
        raise ValueError(f"{folder}: {', '.join(others)} is no safetensors file; save_pretrained writes one")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = Checkpoint(folder).shapes
    expected = {name: x.shape for name, x in model.state_dict().items()}
    tied = model.all_tied_weights_keys.keys() - shapes.keys()
    wrong = [name for name in (expected | shapes).keys() - tied if shapes.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            f"{folder} holds no whole {type(model).__name__}: {len(wrong)} tensors are missing, unknown or not of the "
            f"configuration's shape, as {min(wrong)}"
        )
    return model


def _files_of(folder: Path) -> dict[str, Path]:
    weights = weight_files(folder)  # shards of an earlier save may lie beside them
    files = [path for path in folder.iterdir() if path.suffix != ".safetensors" and is_of_checkpoint(path.name)]
    return {path.name: path for path in sorted([*files, *weights])}


def _exported(folder: Path, destination: Path) -> dict[str, Path]:
    """The files for stock transformers, written to `destination`, and those of the folder that are of any format."""
    try:
        save_exported(folder, destination)
    except ValueError as error:
        raise ValueError(f"{error}; --format zoo publishes every model of the zoo") from error
    files = [path for pattern in _OF_ANY_FORMAT for path in folder.glob(pattern)]
    return {path.name: path for path in sorted([*files, *destination.iterdir()], key=lambda path: path.name)}


def _pictures(run: Path) -> dict[str, Path]:
    """The pictures of a training run, as its loss over steps; none where the folder is no run."""
    return {path.name: path for path in sorted(run.glob("*.png"))} if (run / "log.jsonl").is_file() else {}


def _commit_message(facts: Facts) -> str:
    step = facts.training.get("step")
    return f"Publish {facts.architecture}" + (f" at step {step:,}" if step is not None else "")

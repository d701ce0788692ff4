"""The model card: what a model is, how it was trained, what it scores; from facts at hand, and no others."""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from zoo import registry
from zoo.config import NO_MIXER
from zoo.hub.scores import Score
from zoo.inspection import embedding_parameters, paper_link, state_bytes

TAG = "sequence-zoo"
"""Is on every card that `zoo publish` wrote, and on no other."""

_GROWING_STATE_AT = 2048  # tokens
_TRAINING = {  # in `training.json` and its data, and on the card
    "tokens": "tokens",
    "step": "steps",
    "skipped_steps": "steps that were skipped",
    "seed": "seed",
    "hours": "hours",
    "device": "device",
    "world_size": "processes",
    "torch": "PyTorch",
    "zoo": "sequence-zoo",
    "commit": "commit",
    "date": "date",
    "sha256": "SHA-256 of the data",
}


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Args:
        repo_id: the repository that it is for, as `user/name`.
        model: the causal language model of the zoo; its weights are not looked at.
        format: what loads the files, `"zoo"` or `"transformers"`.
        license: of the weights, by its identifier on the Hub.
        files: names of all that is published beside the card.
        training: `training.json` of the checkpoint; {} if there is none.
        scores: results of evaluations.
    """

    repo_id: str
    model: PreTrainedModel
    format: str
    license: str
    files: list[str]
    training: dict[str, Any]
    scores: list[Score]

    @property
    def name(self) -> str:
        return self.repo_id.split("/")[1]

    @property
    def architecture(self) -> str:
        """The name of the plugin that brings the model."""
        return next(name for name, plugin in registry.plugins().items() if isinstance(self.model, plugin.models))


def make_card(facts: Facts) -> ModelCard:
    """The model card; its metadata carry the tag `sequence-zoo`, and every result as `model-index`."""
    results = [score.to_eval_result() for score in facts.scores] + _validation_results(facts)
    data = ModelCardData(
        license=facts.license,
        library_name="transformers" if facts.format == "transformers" else TAG,
        pipeline_tag="text-generation",
        tags=[TAG, facts.architecture],
        model_name=facts.name,
        eval_results=results or None,
    )
    sections = (
        _architecture(facts),
        _loading(facts),
        _model(facts),
        _training(facts),
        _evaluation(facts),
        f"## Licence\n\nOf the weights: {facts.license}.",
    )
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _architecture(facts: Facts) -> str:
    """The beginning of the README beside the model's module: what it is, where it was published, its equations."""
    title, module = f"# {facts.name}", type(facts.model).__module__
    if not module.startswith("zoo.plugins."):  # of another distribution, whose README may be of any form
        return title
    readme = Path(sys.modules[module].__file__).with_name("README.md").read_text(encoding="utf-8")
    begin = re.match(r"# .*\n\n(.+)\n(?:\n((?:    .*\n)+))?", readme)
    about = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", begin[1])  # links into the tree lead nowhere here
    equations = begin[2].rstrip() if begin[2] else ""
    more = f"More in `plugins/{facts.architecture}/README.md` of sequence-zoo."
    return "\n\n".join(part for part in (title, about, equations, more) if part)


def _loading(facts: Facts) -> str:
    has_tokenizer = "tokenizer_config.json" in facts.files
    code = ["from transformers import AutoModelForCausalLM" + ", AutoTokenizer" * has_tokenizer, ""]
    code.append(f'model = AutoModelForCausalLM.from_pretrained("{facts.repo_id}")')
    if has_tokenizer:
        code.append(f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo_id}")')
    needed = ["transformers"]
    if facts.format == "zoo":
        code.insert(0, "import zoo  # registers the architecture")
        needed = [TAG, *_other_distributions(facts)]
    lines = ("## Load it", "", "```bash", f"pip install {' '.join(needed)}", "```", "", "```python", *code, "```")
    return "\n".join(lines)


def _other_distributions(facts: Facts) -> list[str]:
    """What else must be installed: the distributions that plugins outside of the tree come from."""
    config = facts.model.config
    mixers = {*config.mixers, *config.channel_mixers} - {NO_MIXER}
    owners = [registry.plugins()[facts.architecture], *map(registry.find_owner, mixers)]
    packages = {owner.models[0].__module__.split(".")[0] for owner in owners} - {"zoo"}
    return sorted({name for package in packages for name in packages_distributions()[package]})


def _model(facts: Facts) -> str:
    model, config = facts.model, facts.model.config
    parameters, embedding = model.num_parameters(), embedding_parameters(model)
    rows = {
        "architecture": facts.architecture,
        "layers": ", ".join(f"{count} {mixer}" for mixer, count in Counter(config.mixers).items()),
        "parameters": f"{parameters:,}: {embedding:,} embedding, {parameters - embedding:,} other",
        "precision": str(model.dtype).removeprefix("torch."),
        "state of a sequence": _state(facts),
        "paper": paper_link(registry.plugins()[facts.architecture].paper),
    }
    return f"## Model\n\n{_facts_table(rows)}"


def _state(facts: Facts) -> str:
    one, two = (state_bytes(facts.model.config, length) for length in (_GROWING_STATE_AT, _GROWING_STATE_AT + 1))
    if one == two:
        return f"{one:,} bytes, whatever its length"
    return f"{one:,} bytes at {_GROWING_STATE_AT:,} tokens, {two - one:,} more with each token"


def _training(facts: Facts) -> str:
    data = facts.training.get("data", {})
    known = {**facts.training, "sha256": data.get("sha256")}
    rows = {label: known[key] for key, label in _TRAINING.items() if known.get(key) is not None}
    if "seed" in rows:
        rows["seed"] = str(rows["seed"])  # an identifier, which gets no commas
    recipe = "`zoo train recipe.yaml` repeats it." if "recipe.yaml" in facts.files else ""
    sources = [{"source": name, **about} for name, about in data.get("sources", {}).items()]
    pictures = [f"![{Path(name).stem}]({name})" for name in facts.files if name.endswith(".png")]
    parts = [recipe, _facts_table(rows) if rows else "", _table(sources) if sources else "", *pictures]
    parts = [part for part in parts if part]
    return "\n\n".join(["## Training", *parts]) if parts else ""


def _evaluation(facts: Facts) -> str:
    units = {"loss": "nats a token", "bits_per_byte": "bits a byte"}
    held_out = [
        {"held-out text": name, **{units.get(key, key): value for key, value in score.items()}}
        for name, score in facts.training.get("validation", {}).items()
    ]
    tasks = [
        {
            "task": score.task,
            "metric": score.metric,
            "value": f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else ""),
            "shots": score.shots,
            "samples": _samples(score),
        }
        for score in facts.scores
    ]
    parts = [_table(rows) for rows in (held_out, tasks) if rows]
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _samples(score: Score) -> str:
    """How many documents were scored, and of how many where a limit left some out."""
    if score.samples == score.of_samples:
        return _cell(score.samples)
    return f"{_cell(score.samples)} of {_cell(score.of_samples)}"


def _validation_results(facts: Facts) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=f"{name}, held out",
            metric_type=metric,
            metric_value=score[metric],
        )
        for name, score in facts.training.get("validation", {}).items()
        for metric in score
        if metric != "tokens"
    ]


# -- Markdown ----------------------------------------------------------------------------------------------------------


def _facts_table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _table(rows: list[dict[str, Any]]) -> str:
    """A table with a column for every key of a row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    """A value in words; numbers with commas and four digits, lists and options behind each other."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(option)}" for key, option in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    if isinstance(value, (bool, str)):
        return str(value).replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"

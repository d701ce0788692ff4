"""Every recipe: it says what it is, builds a model of the size that its folder is named after, and trains."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import config_args
from transformers import PreTrainedModel

import zoo
from zoo.cli import main
from zoo.evaluate import harness
from zoo.inspection import embedding_parameters
from zoo.layout import shelf
from zoo.tasks import list_tasks
from zoo.train import corpora
from zoo.train.config import ModelSection, SourceSection, TrainConfig, list_recipes, load_config, to_yaml
from zoo.train.loop import run
from zoo.train.plan import ASSUMED_MFU, DEVICES, multiplied_parameters, plan_run

SIZES = {"130m": 130e6, "340m": 340e6, "1b3": 1.3e9}
RECIPES = list_recipes()
SYNTHETIC = [recipe for recipe in RECIPES if recipe.startswith("synthetic/")]
TINY = [recipe for recipe in RECIPES if recipe.startswith("tiny/")]
LARGE = [recipe for recipe in RECIPES if recipe not in (*SYNTHETIC, *TINY)]


def header_of(recipe: str) -> str:
    """The comment on top, in one line where it is broken."""
    lines = (shelf("recipes") / recipe).read_text().split("\nmodel:\n")[0]
    return re.sub(r"\n# (?![A-Z][a-z ]*: | )", " ", lines)


@functools.cache
def model_of(recipe: str) -> PreTrainedModel:
    """The model of a recipe, without memory for its weights."""
    config = load_config(recipe)
    with torch.device("meta"):
        return zoo.create_model(config.model.preset, **{"vocab_size": config.data.vocab_size, **config.model.overrides})


def test_every_architecture_has_every_size():
    names = {folder: {Path(r).name for r in RECIPES if Path(r).parts[0] == folder} for folder in ("tiny", *SIZES)}
    assert all(found == names["tiny"] for found in names.values())
    assert sum(map(len, names.values())) == len(TINY + LARGE)
    architectures = {model_of(recipe).config.model_type for recipe in TINY}
    plugins = {name: plugin.config_class for name, plugin in zoo.registry.plugins().items()}
    in_tree = {name: kind for name, kind in plugins.items() if kind.__module__.startswith("zoo.plugins.")}
    assert [name for name, kind in in_tree.items() if kind.model_type not in architectures] == []


@pytest.mark.parametrize("recipe", LARGE)
def test_parameters_are_those_of_the_name(recipe):
    parameters = model_of(recipe).num_parameters()
    assert parameters == pytest.approx(SIZES[Path(recipe).parts[0]], rel=0.03)
    said, unit = re.search(r" with ([\d.]+)([MB]) parameters ", header_of(recipe)).groups()
    assert said == (f"{parameters / 1e6:.0f}" if unit == "M" else f"{parameters / 1e9:.2f}")


@pytest.mark.parametrize("recipe", TINY)
def test_tiny_is_about_a_million_parameters(recipe):
    """Beside embedding and head, tied or not."""
    inner = model_of(recipe).num_parameters() - embedding_parameters(model_of(recipe))
    assert 0.9e6 <= inner <= 1.1e6
    assert f" with {inner / 1e6:.2f}M non-embedding parameters " in header_of(recipe)


@pytest.mark.parametrize("recipe", LARGE)
def test_architectures_of_a_size_read_the_same(recipe):
    config = load_config(recipe)
    other = load_config(f"{Path(recipe).parts[0]}/transformer.yaml")
    assert config.data.batch_size * config.data.sequence_length == 2**19
    assert config.data.sources == other.data.sources
    assert (config.data.tokenizer, config.train.tokens) == (other.data.tokenizer, other.train.tokens)


@pytest.mark.parametrize("recipe", LARGE)
def test_hours_are_those_of_the_plan(recipe):
    operations = 6 * multiplied_parameters(model_of(recipe)) * load_config(recipe).train.tokens
    hours = operations / (8 * DEVICES["H100"].flops * ASSUMED_MFU) / 3600
    span = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
    assert f"\n# Hardware: 8 H100, {span} (" in header_of(recipe)


QUICK = ("130m/transformer.yaml", "340m/rwkv7.yaml", "1b3/mamba2.yaml")
"""Recipes whose memory is quickly found; all of them take minutes."""


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[] if r in QUICK else pytest.mark.slow) for r in LARGE])
def test_it_fits_in_the_memory_of_the_hardware_in_the_header(recipe):
    count, device = re.search(r"\n# Hardware: (\d+) (\w+), ", header_of(recipe)).groups()
    labels = [line.split("  ")[0] for line in plan_run(load_config(recipe), device, int(count))]
    assert "memory" in labels
    assert "DOES NOT FIT" not in labels
    if "recipes/launch/fsdp2.yaml" not in header_of(recipe):
        assert "NEEDS FSDP2" not in labels


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_names_command_hardware_and_source(recipe):
    header, path = header_of(recipe), f"recipes/{recipe}"
    command, folder = f"zoo train {path}", Path(recipe).parent.name
    if recipe in SYNTHETIC:
        assert re.search(r"\n# Hardware: (one CPU core, .+ minutes?|one GPU; not run yet)\.\n", header)
        assert re.search(rf"\n# Accuracy to expect: .+ evals/{folder}/README\.md", header)
    elif recipe in TINY:
        assert re.search(r"\n# Hardware: two CPU cores, .+ minutes", header)
        assert re.search(r"\n# Loss to expect: .+ nats a token", header)
    else:
        launch = re.search(r"--config_file recipes/(launch/\w+\.yaml)", header)[1]
        assert (shelf("recipes") / launch).is_file()
        command = f"accelerate launch --config_file recipes/{launch} -m zoo.train {path}"
    assert f"\n#   {command}\n" in header
    assert "\n# Source: " in header
    assert load_config(recipe).train.output == f"runs/{Path(recipe).stem}-{folder}"


def test_every_task_has_recipes():
    assert sorted({Path(recipe).parent.name for recipe in SYNTHETIC}) == list_tasks()


@pytest.mark.parametrize("recipe", SYNTHETIC)
def test_synthetic_recipes_train_on_the_task_of_their_folder(recipe):
    config = load_config(recipe)
    assert {source.task for source in config.data.sources.values()} == {Path(recipe).parent.name}
    assert all(source.held_out for source in config.data.sources.values())
    assert config.model.preset.startswith(Path(recipe).stem.split("-")[0])


@pytest.mark.parametrize("path", sorted((shelf("recipes") / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files_are_what_accelerate_reads(path):
    """An unknown key is an error of its loader."""
    config = config_args.load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert f"--config_file recipes/launch/{path.name} " in path.read_text()


# -- two steps of each -------------------------------------------------------------------------------------------------


def shrunken(recipe: str, cache: Path, output: Path) -> TrainConfig:
    """The recipe with its own `train` section, a model of its kinds of layers that fits a test, and text that is here.

    The model is the tiny preset of the architecture that has the recipe's mixers, or can have them. Of a task it is a
    few examples, as long as in the recipe.
    """
    config = load_config(recipe)
    mixers, channel_mixers = unique(model_of(recipe).config.mixers), unique(model_of(recipe).config.channel_mixers)
    presets = [name for name in zoo.registry.find_preset(config.model.preset).presets if name.endswith("-tiny")]
    presets.sort(key=lambda name: unique(zoo.create_config(name).mixers) != mixers)
    layers = max(2, len(mixers), len(channel_mixers))
    overrides = {"mixers": mixers, "channel_mixers": channel_mixers, "num_hidden_layers": layers}
    if recipe in SYNTHETIC:
        longest = model_of(recipe).config.to_dict().get("max_position_embeddings")
        overrides.update({"max_position_embeddings": longest} if longest else {})
        sources = config.data.sources.items()
        shrunk = {
            "sources": {name: dataclasses.replace(source, limit=4, held_out=2) for name, source in sources},
            "batch_size": 1,
            "micro_batch_size": None,
        }
    else:
        shrunk = {
            "sources": {name: SourceSection(corpus="stdlib") for name in config.data.sources},
            "tokenizer": "bpe",
            "vocab_size": 300,
            "sequence_length": 32,
            "batch_size": 4,
            "micro_batch_size": config.data.micro_batch_size and 2,
        }
    data = dataclasses.replace(config.data, cache=str(cache), **shrunk)
    tokens = 2 * data.batch_size * data.sequence_length
    train = dataclasses.replace(config.train, output=str(output), tokens=tokens, trackers=[], sample_prompt="")
    return TrainConfig(ModelSection(presets[0], overrides), data, train)


def unique(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """The tokenised text, once for all recipes."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def small_corpus(monkeypatch):
    documents = [Path(__file__).read_text(), Path(corpora.__file__).read_text()]
    held_out = {"code": Path(zoo.__file__).read_text()[:500]}
    monkeypatch.setitem(corpora.CORPORA, "stdlib", lambda: corpora.Corpus(documents, held_out))


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe, tokens, small_corpus, tmp_path):
    config = shrunken(recipe, tokens, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


@pytest.mark.slow
def test_parity_tells_a_state_machine_from_a_diagonal_recurrence(tmp_path):
    """Trained on 3 to 40 bits: sLSTM follows them up to 256, Mamba-2 cannot."""
    beyond = {}
    for name in ("xlstm-0-1", "mamba2"):
        words = [f"train.output={tmp_path / name}", f"data.cache={tmp_path / 'tokens'}", "train.trackers=[]"]
        run(load_config(f"synthetic/parity/{name}.yaml", words))
        results = harness.evaluate(str(tmp_path / name / "latest"), ["parity"])["results"]
        beyond[name] = results["parity_min_length40_length256"]["acc,none"]
    assert beyond["xlstm-0-1"] > 0.95
    assert beyond["mamba2"] < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny/retnet.yaml", "tiny/griffin.yaml"])
def test_a_tiny_recipe_reaches_the_loss_that_its_header_expects(recipe, tmp_path):
    """To what another Python's standard library and another machine's rounding may change."""
    code, prose = re.search(
        r"expect: (\S+) nats a token on held-out code, (\S+) on held-out prose", header_of(recipe)
    ).groups()
    assert main(["train", recipe, f"train.output={tmp_path}", "train.trackers=[]", "train.sample_prompt=null"]) == 0
    found = json.loads((tmp_path / "latest" / "training.json").read_text())["validation"]
    assert found["code"]["loss"] == pytest.approx(float(code), abs=0.05)
    assert found["prose"]["loss"] == pytest.approx(float(prose), abs=0.1)

"""What one wants to know of a model before running it: its parameters, the state it carries, the kernels it runs on."""

import importlib
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from zoo import registry
from zoo.config import ZooConfig
from zoo.mixer import Mixer
from zoo.ops.dispatch import Choice, choose
from zoo.ops.fused import FUSED, choose_fused
from zoo.ops.grouped_linear import choose_grouped_linear
from zoo.ops.linear import choose_linear
from zoo.ops.masked_attention import choose_masked_attention


def state_bytes(config: PreTrainedConfig, length: int | None = None, dtype: torch.dtype | None = None) -> int:
    """Bytes of state that one sequence carries from token to token.

    Args:
        config: configuration of a zoo model.
        length: tokens of the sequence; needed where a layer's state grows with it (attention over everything).
        dtype: of the activations. Default: that of the configuration, which a model converted later (`model.half()`)
            no longer has, else float32.

    Raises:
        ValueError: if a layer's state grows and no length is given, or it is no configuration of the zoo.
    """
    if not isinstance(config, ZooConfig):
        raise ValueError(f"state_bytes knows the models of the zoo, not {type(config).__name__}")
    if length is not None and length < 0:
        raise ValueError(f"a sequence has no {length} tokens")
    dtype = dtype or config.dtype or torch.float32
    if isinstance(dtype, str):  # saving a model turns the dtype of its configuration into a name
        dtype = getattr(torch, dtype)
    return sum(keeper.state_bytes(own, layer_idx, length, dtype) for keeper, own, layer_idx in config.keepers())


def state_grows(config: PreTrainedConfig) -> bool:
    """Whether the state of a sequence grows with its length, as where a layer attends to everything."""
    return state_bytes(config, 1) != state_bytes(config, 2)


class ModelSummary(NamedTuple):
    """Figures of a preset; parameters are exact, a tied head counts as embedding."""

    name: str
    model_type: str
    mixers: list[str]
    parameters: int
    embedding_parameters: int
    paper: str


def summarize(name: str) -> ModelSummary:
    """Build a preset without memory for its weights and count them.

    Raises:
        ValueError: on an unknown preset; the nearest known ones are suggested.
    """
    with torch.device("meta"):
        model = registry.create_model(name)
    return ModelSummary(
        name=name,
        model_type=model.config.model_type,
        mixers=model.config.mixers,
        parameters=model.num_parameters(),
        embedding_parameters=embedding_parameters(model),
        paper=registry.find_preset(name).paper,
    )


def embedding_parameters(model: PreTrainedModel) -> int:
    """Parameters of a causal language model's embedding and head, which count once where they are tied."""
    tables = {id(x.weight): x.weight for x in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(weight.numel() for weight in tables.values())


class KernelUse(NamedTuple):
    """Which form of an op a module of a model runs, and why."""

    module: str
    kind: str
    op: str
    backend: str
    why: str


def kernel_report(model: PreTrainedModel) -> list[KernelUse]:
    """One row for each op of each module of a zoo model (mixers, norms, gates), for the device the model is on.

    Raises:
        ValueError: if the model has no layer of the zoo.
    """
    if not any(isinstance(module, Mixer) for module in model.modules()):
        raise ValueError(f"kernel_report knows the models of the zoo, not {type(model).__name__}")
    return [
        KernelUse(name, type(module).__name__, op, *_choice(op, model))
        for name, module in model.named_modules()
        for op in getattr(module, "ops", ())
    ]


def _choice(op: str, model: PreTrainedModel) -> Choice:
    if op == "attention":
        return Choice(model.config._attn_implementation, "transformers' attn_implementation")
    if op == "linear":
        return choose_linear(model.device, model.dtype)
    if op == "grouped_linear":
        return choose_grouped_linear(model.device, model.dtype)
    if op == "masked_attention":
        return choose_masked_attention(model.device, model.dtype, model.config.kernels)
    if op in FUSED:
        return choose_fused(model.device, model.dtype, model.config.kernels)
    forms = importlib.import_module(f"zoo.ops.{op}").OP.forms
    dtype = torch.promote_types(model.dtype, torch.float32)
    return choose(op, forms, model.device, dtype, model.config.kernels)


def architecture_table() -> list[str]:
    """The README's table of architectures, in lines of Markdown: name, paper, models, mixers, state."""
    rows = [
        "| architecture | paper | models | mixers it offers | channel mixers | state of a sequence |",
        "|---|---|---|---|---|---|",
    ]
    for name, plugin in registry.plugins().items():
        published = sum(not preset.endswith("-tiny") for preset in plugin.presets)
        models = ", ".join(f"`{preset}`" for preset in registry.list_models("*-tiny") if preset in plugin.presets)
        models += f", {published} published size{'s' * (published > 1)}" if published else ""
        mixers, channel_mixers = (
            ", ".join(f"`{mixer}`" for mixer in offered) or "-" for offered in (plugin.mixers, plugin.channel_mixers)
        )
        states = [_state_in_words(registry.create_config(preset)) for preset in plugin.presets]
        link, state = paper_link(plugin.paper), ", ".join(dict.fromkeys(states))
        rows.append(f"| [{name}](plugins/{name}) | {link} | {models} | {mixers} | {channel_mixers} | {state} |")
    return rows


def paper_link(paper: str) -> str:
    """A plugin's paper in Markdown: a link where it is on arXiv, else as it is."""
    number = paper.removeprefix("arXiv:")
    return f"[{number}](https://arxiv.org/abs/{number})" if number != paper else paper


def _state_in_words(config: PreTrainedConfig) -> str:
    return "grows with the length" if state_grows(config) else "constant"

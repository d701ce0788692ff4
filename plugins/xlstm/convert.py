"""Checkpoints of xLSTM: transformers' class, and both models of the authors' package, xlstm.

The package's files have no configuration: sizes are read from shapes, and what no shape tells is as the package has it
by default.
"""

import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from zoo.plugins.xlstm.modeling import XLSTMConfig

from zoo.checkpoint import Checkpoint, read_yaml
from zoo.config import NO_MIXER
from zoo.convert import (
    SAME,
    Change,
    Layout,
    Rule,
    divided,
    has_model_type,
    make_config,
    refuse_others,
    rename,
    transformers_config,
)


def _sizes(checkpoint: Checkpoint, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor, to read sizes of the model from."""
    if name not in checkpoint.shapes:
        raise ValueError(f"{checkpoint.path}: missing {name}, which tells sizes of the model")
    shape = tuple(checkpoint.shapes[name])
    if len(shape) != dims:
        raise ValueError(f"{checkpoint.path}: {name} is {shape}, wanted rank {dims}")
    return shape


# -- the large models --------------------------------------------------------------------------------------------------

_FIRST_BLOCK = "backbone.blocks.0."
_VARIANT = {"norm_eps": 1e-6, "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0}
_ONLY = {"use_bias": False, "add_out_norm": True, "eps": 1e-6}
_SAME_FIELDS = (*_VARIANT, "vocab_size", "num_heads", "pad_token_id", "bos_token_id", "eos_token_id")
_HOW_IT_RUNS = (
    *("chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size", "max_inference_chunksize"),
    *("return_last_states", "autocast_kernel_dtype", "inference_state_dtype", "norm_reduction_force_float32"),
)


def _is_fused(checkpoint: Checkpoint) -> bool:
    """Whether projections of the same input are one tensor: their `weight_mode`."""
    return f"{_FIRST_BLOCK}mlstm_layer.qkv_opreact.weight" in checkpoint.shapes


def _inner_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    (value_size,) = _sizes(checkpoint, f"{_FIRST_BLOCK}mlstm_layer.multihead_norm.weight", 1)
    if _is_fused(checkpoint):
        key_size = _sizes(checkpoint, f"{_FIRST_BLOCK}mlstm_layer.qkv_opreact.weight", 2)[0] // 2 - value_size
    else:
        key_size, _ = _sizes(checkpoint, f"{_FIRST_BLOCK}mlstm_layer.q.weight", 2)
    _, intermediate_size = _sizes(checkpoint, f"{_FIRST_BLOCK}ffn.proj_down.weight", 2)
    return {"key_size": key_size, "value_size": value_size, "intermediate_size": intermediate_size}


def _read_transformers(checkpoint: Checkpoint) -> XLSTMConfig:
    """Width and depth have two names each; published files have the second alone, and the first has a default.

    The head is never tied, whatever `tie_word_embeddings` says.
    """
    theirs = transformers_config(checkpoint, ignored=_HOW_IT_RUNS)
    refuse_others(theirs, weight_mode="single", **_ONLY)  # its class cannot make a model of fused weights
    for name, other in (("hidden_size", "embedding_dim"), ("num_hidden_layers", "num_blocks")):
        if name in checkpoint.config:
            refuse_others(theirs, **{name: getattr(theirs, other)})
    return make_config(
        checkpoint,
        XLSTMConfig,
        hidden_size=theirs.embedding_dim,
        num_hidden_layers=theirs.num_blocks,
        **_inner_sizes(checkpoint),
        **{name: getattr(theirs, name) for name in _SAME_FIELDS},
    )


def _write_transformers(config: XLSTMConfig) -> PreTrainedConfig:
    if set(config.mixers) != {"mlstm"} or set(config.channel_mixers) != {"swiglu"}:
        raise ValueError(f"it has layers of mlstm and SwiGLU only, not {config.mixers}, {config.channel_mixers}")
    for name, wanted in (("norm_type", "rms_norm"), ("hidden_act", "silu"), ("tie_word_embeddings", False)):
        if getattr(config, name) != wanted:
            raise ValueError(f"its {name} is {wanted!r}, not {getattr(config, name)!r}")
    if config.output_logit_soft_cap is None:
        raise ValueError("it caps the logits: output_logit_soft_cap is None")
    for name in ("key_size", "value_size"):
        if getattr(config, name) % 64:
            raise ValueError(f"its cache has room for a {name} in multiples of 64, not {getattr(config, name)}")
    d = config.hidden_size
    return CONFIG_MAPPING["xlstm"](
        hidden_size=d,
        num_hidden_layers=config.num_hidden_layers,
        qk_dim_factor=_factor(config.key_size, d),
        v_dim_factor=_factor(config.value_size, d),
        ffn_proj_factor=_factor(config.intermediate_size, d),
        ffn_round_up_to_multiple_of=1,
        **{name: getattr(config, name) for name in _SAME_FIELDS},
    )


def _factor(size: int, width: int) -> float:
    """The factor that makes the size of the width, where the product is rounded down."""
    factor = size / width
    return factor if int(width * factor) == size else math.nextafter(factor, math.inf)


def _read_large(checkpoint: Checkpoint) -> XLSTMConfig:
    """Of the package; in a folder of its own, `config.yaml` says what shapes do not."""
    file = checkpoint.path / "config.yaml"
    stated = read_yaml(file) if file.is_file() else {}
    variant = {name: stated.get(name, value) for name, value in (_ONLY | _VARIANT).items()}
    refuse_others(SimpleNamespace(**variant), **_ONLY)
    vocab_size, hidden_size = _sizes(checkpoint, "embedding.weight", 2)
    gate = "ifgate" if _is_fused(checkpoint) else "igate"
    (gates,) = _sizes(checkpoint, f"{_FIRST_BLOCK}mlstm_layer.{gate}_preact.bias", 1)
    return make_config(
        checkpoint,
        XLSTMConfig,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=checkpoint.count_layers("backbone.blocks."),
        num_heads=gates // 2 if _is_fused(checkpoint) else gates,
        **_inner_sizes(checkpoint),
        **{name: variant[name] for name in _VARIANT},
    )


def _large_rules(config: XLSTMConfig, embedding: str, fused: bool) -> Iterator[Rule]:
    yield Rule(embedding, "model.embed_tokens.weight")
    yield Rule("backbone.out_norm.weight", "model.norm.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    names = {
        "norm_mlstm.weight": "mixer_norm.weight",
        "mlstm_layer.multihead_norm.weight": "mixer.multihead_norm.weight",
        "mlstm_layer.out_proj.weight": "mixer.out_proj.weight",
        "norm_ffn.weight": "channel_norm.weight",
        "ffn.proj_down.weight": "channel_mixer.down_proj.weight",
    }
    if not fused:
        names |= {f"mlstm_layer.{name}.weight": f"mixer.{name}_proj.weight" for name in "qkv"}
        names |= {"mlstm_layer.ogate_preact.weight": "mixer.ogate.weight"}
        for gate in ("igate", "fgate"):
            names |= {f"mlstm_layer.{gate}_preact.{kind}": f"mixer.{gate}.{kind}" for kind in ("weight", "bias")}
        names |= {"ffn.proj_up_gate.weight": "channel_mixer.gate_proj.weight"}
        names |= {"ffn.proj_up.weight": "channel_mixer.up_proj.weight"}
    for i in range(config.num_hidden_layers):
        theirs, ours = f"backbone.blocks.{i}.", f"model.layers.{i}."
        yield from rename(names, theirs, ours)
        if fused:
            yield from _fused_rules(config, theirs, ours)


def _fused_rules(config: XLSTMConfig, theirs: str, ours: str) -> Iterator[Rule]:
    k, v, h = config.key_size, config.value_size, config.num_heads
    projections = tuple(f"{ours}mixer.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "ogate"))
    yield Rule(f"{theirs}mlstm_layer.qkv_opreact.weight", projections, divided(k, k, v, v))
    for kind in ("weight", "bias"):
        gates = (f"{ours}mixer.igate.{kind}", f"{ours}mixer.fgate.{kind}")
        yield Rule(f"{theirs}mlstm_layer.ifgate_preact.{kind}", gates, divided(h, h))
    yield _gate_and_up(config, f"{theirs}ffn.proj_up_gate_z.weight", ours)


def _gate_and_up(config: XLSTMConfig, theirs: str, ours: str) -> Rule:
    """The first product of the channel mixer, which is one tensor of theirs."""
    parts = (f"{ours}channel_mixer.gate_proj.weight", f"{ours}channel_mixer.up_proj.weight")
    return Rule(theirs, parts, divided(config.intermediate_size, config.intermediate_size))


# -- the first paper ---------------------------------------------------------------------------------------------------

_BLOCKS = "xlstm_block_stack.blocks."
FIRST_PAPER = {"norm_type": "layer_norm", "norm_eps": 1e-5, "hidden_act": "gelu", "output_logit_soft_cap": None}
_MLSTM_NAMES = {
    "learnable_skip": "learnable_skip",
    "proj_up.weight": "up_proj.weight",
    "conv1d.conv.weight": "conv.weight",
    "conv1d.conv.bias": "conv.bias",
    "q_proj.weight": "q_weight",
    "k_proj.weight": "k_weight",
    "v_proj.weight": "v_weight",
    "mlstm_cell.igate.weight": "igate.weight",
    "mlstm_cell.igate.bias": "igate.bias",
    "mlstm_cell.fgate.weight": "fgate.weight",
    "mlstm_cell.fgate.bias": "fgate.bias",
    "mlstm_cell.outnorm.weight": "multihead_norm.weight",
    "proj_down.weight": "down_proj.weight",
}
_SLSTM_NAMES = {  # the package's layer takes its input gate from `fgate`, and its forget gate from `igate`
    "conv1d.conv.weight": "conv.weight",
    "conv1d.conv.bias": "conv.bias",
    "fgate.weight": "igate_weight",
    "igate.weight": "fgate_weight",
    "zgate.weight": "zgate_weight",
    "ogate.weight": "ogate_weight",
    "group_norm.weight": "multihead_norm.weight",
}


def _is_vanilla(checkpoint: Checkpoint) -> bool:
    """Whether recurrent weights lie as the sLSTM in PyTorch has them, not as the CUDA kernel does: (h 4c c)."""
    kernels = (x for name, x in checkpoint.shapes.items() if name.endswith("slstm_cell._recurrent_kernel_"))
    return any(len(shape) == 3 and shape[1] == 4 * shape[2] for shape in kernels)


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding, which a file then holds twice."""
    if "lm_head.weight" not in checkpoint.shapes:
        return False
    embedding, head = checkpoint.read("token_embedding.weight"), checkpoint.read("lm_head.weight")
    return embedding.dtype == head.dtype and torch.equal(embedding, head)


def _read_first_paper(checkpoint: Checkpoint) -> XLSTMConfig:
    vocab_size, hidden_size = _sizes(checkpoint, "token_embedding.weight", 2)
    blocks = [f"{_BLOCKS}{i}." for i in range(checkpoint.count_layers(_BLOCKS))]
    fields: dict[str, Any] = {}
    for block in blocks:
        fields |= _sizes_of_block(checkpoint, block)
    return make_config(
        checkpoint,
        XLSTMConfig,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=len(blocks),
        mixers=["mlstm_preup" if _is_mlstm(checkpoint, block) else "slstm" for block in blocks],
        channel_mixers=["swiglu" if _has_mlp(checkpoint, block) else NO_MIXER for block in blocks],
        tie_word_embeddings=_is_tied(checkpoint),
        **fields,
        **FIRST_PAPER,
    )


def _is_mlstm(checkpoint: Checkpoint, block: str) -> bool:
    return f"{block}xlstm.learnable_skip" in checkpoint.shapes


def _has_mlp(checkpoint: Checkpoint, block: str) -> bool:
    return f"{block}ffn_norm.weight" in checkpoint.shapes


def _sizes_of_block(checkpoint: Checkpoint, block: str) -> dict[str, int]:
    sizes = {"conv_kernel": _sizes(checkpoint, f"{block}xlstm.conv1d.conv.weight", 3)[-1]}
    if _is_mlstm(checkpoint, block):
        sizes["inner_size"] = _sizes(checkpoint, f"{block}xlstm.learnable_skip", 1)[0]
        sizes["qkv_block_size"] = _sizes(checkpoint, f"{block}xlstm.q_proj.weight", 3)[-1]
        sizes["num_heads"] = _sizes(checkpoint, f"{block}xlstm.mlstm_cell.igate.bias", 1)[0]
    else:
        sizes["num_heads"] = _sizes(checkpoint, f"{block}xlstm.igate.weight", 3)[0]
    if _has_mlp(checkpoint, block):
        sizes["intermediate_size"] = _sizes(checkpoint, f"{block}ffn.proj_down.weight", 2)[-1]
    return sizes


def _first_paper_rules(config: XLSTMConfig, vanilla: bool) -> Iterator[Rule]:
    yield Rule("token_embedding.weight", "model.embed_tokens.weight")
    yield Rule("xlstm_block_stack.post_blocks_norm.weight", "model.norm.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    h = config.num_heads
    kernel = Change(lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)) if vanilla else SAME
    bias = Change(lambda x: x.view(h, -1), lambda x: x.flatten())
    if vanilla:  # the gates stand outside of the heads
        bias = Change(
            lambda x: x.view(4, h, -1).transpose(0, 1).flatten(1),
            lambda x: x.unflatten(1, (4, -1)).transpose(0, 1).flatten(),
        )
    for i, (mixer, channel_mixer) in enumerate(zip(config.mixers, config.channel_mixers, strict=True)):
        theirs, ours = f"{_BLOCKS}{i}.", f"model.layers.{i}."
        yield Rule(f"{theirs}xlstm_norm.weight", f"{ours}mixer_norm.weight")
        names = _MLSTM_NAMES if mixer == "mlstm_preup" else _SLSTM_NAMES
        yield from rename(names, f"{theirs}xlstm.", f"{ours}mixer.")
        if mixer == "slstm":
            yield Rule(f"{theirs}xlstm.slstm_cell._recurrent_kernel_", f"{ours}mixer.recurrent_weight", kernel)
            yield Rule(f"{theirs}xlstm.slstm_cell._bias_", f"{ours}mixer.bias", bias)
        if channel_mixer != NO_MIXER:
            yield Rule(f"{theirs}ffn_norm.weight", f"{ours}channel_norm.weight")
            yield Rule(f"{theirs}ffn.proj_down.weight", f"{ours}channel_mixer.down_proj.weight")
            yield _gate_and_up(config, f"{theirs}ffn.proj_up.weight", ours)


# -- the layouts -------------------------------------------------------------------------------------------------------


def _package_layout(fused: bool) -> Layout:
    names = {"embedding.weight", f"{_FIRST_BLOCK}norm_mlstm.weight"}
    return Layout(
        name="xlstm's xLSTMLarge" + " with fused weights" * fused,
        library="xlstm",
        recognizes=lambda checkpoint: names <= checkpoint.shapes.keys() and _is_fused(checkpoint) == fused,
        read_config=_read_large,
        rules=partial(_large_rules, embedding="embedding.weight", fused=fused),
    )


def _first_paper_layout(vanilla: bool) -> Layout:
    name = f"{_BLOCKS}0.xlstm_norm.weight"
    return Layout(
        name="xlstm's xLSTMLMModel" + " with vanilla sLSTM" * vanilla,
        library="xlstm",
        recognizes=lambda checkpoint: name in checkpoint.shapes and _is_vanilla(checkpoint) == vanilla,
        read_config=_read_first_paper,
        rules=partial(_first_paper_rules, vanilla=vanilla),
    )


LAYOUTS = (
    Layout(
        name="transformers' xlstm",
        library="transformers",
        recognizes=has_model_type("xlstm"),
        read_config=_read_transformers,
        rules=partial(_large_rules, embedding="backbone.embeddings.weight", fused=False),
        write_config=_write_transformers,
    ),
    *(_package_layout(fused) for fused in (False, True)),
    *(_first_paper_layout(vanilla) for vanilla in (False, True)),
)

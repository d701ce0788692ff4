"""Checkpoints of transformers' Jamba: each expert with matrices of its own, or all of them packed."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from transformers import JambaConfig as TransformersJambaConfig
from zoo.plugins.jamba.modeling import JambaConfig

from zoo.checkpoint import Checkpoint
from zoo.convert import Change, Layout, Rule, has_model_type, make_config, refuse_others, rename, transformers_config

_SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "attention_dropout", "num_experts", "num_experts_per_tok", "router_aux_loss_coef"),
    *("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset", "initializer_range"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_FIELDS = {name: name for name in _SAME_FIELDS} | {  # theirs: ours
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_rank": "time_step_rank",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
    "rms_norm_eps": "norm_eps",
}
_WANTED = {"attention_bias": False, "norm_topk_prob": False, "n_shared_experts": 0, "hidden_act": "silu"}


def _read_config(checkpoint: Checkpoint) -> JambaConfig:
    theirs = transformers_config(checkpoint)
    refuse_others(theirs, hidden_act="silu")
    if not getattr(theirs, "mamba_inner_layernorms", True):  # of their code before it came to transformers
        raise ValueError("this variant is not in the zoo: mamba_inner_layernorms is False, it knows True")
    fields = {ours: getattr(theirs, name) for name, ours in _FIELDS.items()}
    if theirs.num_experts == 1:  # their name for an MLP
        fields |= {"channel_mixers": ["swiglu"], "num_experts_per_tok": 1}
    return make_config(checkpoint, JambaConfig, router_z_loss_coef=0.0, **fields)


def _write_config(config: JambaConfig) -> TransformersJambaConfig:
    fields = {name: getattr(config, ours) for name, ours in _FIELDS.items()}
    for name, wanted in _WANTED.items():
        if (found := getattr(config, name)) != wanted:
            raise ValueError(f"it has no {name} but {wanted!r}: it is {found!r}")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"its heads are hidden_size / num_attention_heads wide, not head_dim {config.head_dim}")
    if config.moe_intermediate_size not in (None, config.intermediate_size):
        raise ValueError(f"its experts are of intermediate_size, not of {config.moe_intermediate_size}")
    theirs = TransformersJambaConfig(**fields)
    mixers = ["attention" if kind == "attention" else "jamba_mamba" for kind in theirs.layers_block_type]
    channel_mixers = ["moe" if experts > 1 else "swiglu" for experts in theirs.layers_num_experts]
    if (config.mixers, config.channel_mixers) != (mixers, channel_mixers):
        raise ValueError(
            f"its layers follow from periods and offsets: {mixers}, {channel_mixers}, "
            f"not {config.mixers}, {config.channel_mixers}"
        )
    return theirs


def _rules(config: JambaConfig, is_packed: bool) -> Iterator[Rule]:
    yield Rule("model.embed_tokens.weight", "model.embed_tokens.weight")
    yield Rule("model.final_layernorm.weight", "model.norm.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    for i, (mixer, channel_mixer) in enumerate(zip(config.mixers, config.channel_mixers, strict=True)):
        layer = f"model.layers.{i}."
        norms = {"input_layernorm.weight": "mixer_norm.weight", "pre_ff_layernorm.weight": "channel_norm.weight"}
        yield from rename(norms, layer, layer)
        yield from _attention(layer) if mixer == "attention" else _mamba(config, layer)
        theirs, ours = f"{layer}feed_forward.", f"{layer}channel_mixer."
        if channel_mixer == "swiglu":
            yield from rename({f"{x}_proj.weight": f"{x}_proj.weight" for x in ("gate", "up", "down")}, theirs, ours)
            continue
        yield Rule(f"{theirs}router.weight", f"{ours}router.weight")
        theirs, ours = f"{theirs}experts.", f"{ours}experts."
        if is_packed:
            yield from rename({name: name for name in ("gate_up_proj", "down_proj")}, theirs, ours)
            continue
        for packed, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            names = tuple(f"{theirs}{e}.{part}.weight" for e in range(config.num_experts) for part in parts)
            yield Rule(names, f"{ours}{packed}", _packed(config.num_experts, len(parts)))


def _packed(experts: int, parts: int) -> Change:
    """Theirs are the parts of every expert, one expert after the other; ours is all, (experts parts*rows columns)."""

    def pack(*matrices: Tensor) -> Tensor:
        return torch.cat(matrices).unflatten(0, (experts, -1))

    return Change(pack, lambda x: x.flatten(0, 1).chunk(experts * parts))


def _attention(layer: str) -> list[Rule]:
    names = {f"{x}_proj.weight": f"{x}_proj.weight" for x in "qkvo"}
    return rename(names, f"{layer}self_attn.", f"{layer}mixer.")


def _mamba(config: JambaConfig, layer: str) -> list[Rule]:
    same = ["A_log", "D", "conv1d.weight", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"]
    same += ["conv1d.bias"] * config.use_conv_bias + ["in_proj.bias", "out_proj.bias"] * config.use_bias
    names = {name: name for name in same} | {"dt_proj.bias": "dt_bias"}
    names |= {f"{x}_layernorm.weight": f"{y}_norm.weight" for x, y in (("dt", "dt"), ("b", "B"), ("c", "C"))}
    return rename(names, f"{layer}mamba.", f"{layer}mixer.")


def _is_packed(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(".experts.gate_up_proj") for name in checkpoint.shapes)


_is_jamba = has_model_type("jamba")

LAYOUTS = (
    Layout(
        name="transformers' jamba",
        library="transformers",
        recognizes=lambda checkpoint: _is_jamba(checkpoint) and not _is_packed(checkpoint),
        read_config=_read_config,
        rules=partial(_rules, is_packed=False),
        write_config=_write_config,
    ),
    Layout(
        name="transformers' jamba with packed experts",
        library="transformers",
        recognizes=_is_jamba,
        read_config=_read_config,
        rules=partial(_rules, is_packed=True),
    ),
)

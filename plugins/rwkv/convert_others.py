"""Checkpoints of RWKV in folders of other libraries: transformers' of version 4, flash-linear-attention's of 7."""

from collections.abc import Iterator
from math import isclose
from types import SimpleNamespace

from transformers import RwkvConfig
from zoo.plugins.rwkv.convert import (
    BIASED,
    LOW_RANK,
    MIXERS,
    Sizes,
    in_layer,
    read_sizes,
    read_tokenizer,
    require_version,
    rwkv_rules,
    shift,
    within,
)
from zoo.plugins.rwkv.modeling import RWKVConfig
from zoo.plugins.rwkv.parts import NORM_EPS

from zoo.checkpoint import Checkpoint
from zoo.convert import Change, Layout, Rule, has_model_type, make_config, refuse_others, rename, transformers_config

# -- transformers' RWKV-4 ----------------------------------------------------------------------------------------------

_SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
_RENAMED = {
    "emb": "embeddings",
    "ln0": "pre_ln",
    "att": "attention",
    "ffn": "feed_forward",
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}


def _read_transformers_config(checkpoint: Checkpoint) -> RWKVConfig:
    """Without `context_length`, which bounds transformers' kernel, not the model, and `rescale_every`.

    Rescaling halves weights and activations together as the depth grows, against overflow in half precision.
    """
    theirs = transformers_config(checkpoint)
    refuse_others(theirs, attention_hidden_size=theirs.hidden_size)
    mixer, channel_mixer = MIXERS[4]
    fields = {name: getattr(theirs, name, None) for name in _SAME_FIELDS}
    return make_config(
        checkpoint,
        RWKVConfig,
        mixers=[mixer],
        channel_mixers=[channel_mixer],
        norm_eps=theirs.layer_norm_epsilon,
        **fields,
    )


def _write_transformers_config(config: RWKVConfig) -> RwkvConfig:
    """Without rescaling: transformers would divide the weights in place as soon as the model runs."""
    require_version(config, (4,))
    fields = {name: getattr(config, name) for name in _SAME_FIELDS}
    return RwkvConfig(layer_norm_epsilon=config.norm_eps, rescale_every=0, **fields)


def _transformers_name(name: str) -> str:
    parts = [_RENAMED.get(part, part) for part in name.split(".")]
    return ".".join(parts if parts[0] == "head" else ["rwkv", *parts])


def _transformers_rules(config: RWKVConfig) -> Iterator[Rule]:
    for theirs, ours, change in rwkv_rules(config):
        names = _transformers_name(theirs) if isinstance(theirs, str) else tuple(map(_transformers_name, theirs))
        yield Rule(names, ours, change)


TRANSFORMERS_RWKV = Layout(
    name="transformers' rwkv",
    library="transformers",
    recognizes=has_model_type("rwkv"),
    read_config=_read_transformers_config,
    rules=_transformers_rules,
    write_config=_write_transformers_config,
    read_tokenizer=read_tokenizer,
)


# -- flash-linear-attention's RWKV-7 -----------------------------------------------------------------------------------

_FLA_OUTSIDE = {
    "model.embeddings.weight": "model.embed_tokens.weight",
    "model.layers.0.pre_norm.weight": "model.embed_norm.weight",
    "model.layers.0.pre_norm.bias": "model.embed_norm.bias",
    "model.norm.weight": "model.norm.weight",
    "model.norm.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
}
_FLA_BLOCK = {
    "attn_norm.weight": "mixer_norm.weight",
    "attn_norm.bias": "mixer_norm.bias",
    "ffn_norm.weight": "channel_norm.weight",
    "ffn_norm.bias": "channel_norm.bias",
    "ffn.key.weight": "channel_mixer.k_proj.weight",
    "ffn.value.weight": "channel_mixer.v_proj.weight",
}
_FLA_TIME_MIXING = [
    *rename({f"{letter}_proj.weight": f"{letter}_proj.weight" for letter in "rkvo"}),
    *rename({"g_norm.weight": "norm.weight", "g_norm.bias": "norm.bias"}),
    *rename({"k_k": "removal_scale", "k_a": "iclr_mix", "r_k": "bonus"}),
    *rename({f"{letter}_lora.lora.0.weight": f"{ours}.down.weight" for letter, ours in LOW_RANK.items()}),
    *rename({f"{letter}_lora.lora.2.weight": f"{ours}.up.weight" for letter, ours in LOW_RANK.items()}),
    *rename({f"{letter}_lora.lora.2.bias": f"{LOW_RANK[letter]}.bias" for letter in BIASED}),
    shift("x_", "rwkvag"),
]
_FLA_CHANNEL_SHIFT = Rule("ffn.x_k", "channel_mixer.shift.mu", Change(lambda x: x[None], lambda x: x[0]))
_FLA_SIZES: Sizes = {
    "vocab_size": ("model.embeddings.weight", 0),
    "hidden_size": ("model.embeddings.weight", 1),
    "intermediate_size": ("model.layers.0.ffn.key.weight", 0),
    "head_dim": ("model.layers.0.attn.r_k", 1),
    "decay_rank": ("model.layers.0.attn.w_lora.lora.0.weight", 0),
    "iclr_rank": ("model.layers.0.attn.a_lora.lora.0.weight", 0),
    "value_rank": ("model.layers.1.attn.v_lora.lora.0.weight", 0),
    "gate_rank": ("model.layers.0.attn.g_lora.lora.0.weight", 0),
}
_FLA_OPTIONS = {"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "attn": None}
"""What has one value in the zoo, and over there by default."""


def _read_fla_config(checkpoint: Checkpoint) -> RWKVConfig:
    theirs = {"norm_eps": 1e-5, "tie_word_embeddings": False} | _FLA_OPTIONS | checkpoint.config
    refuse_others(SimpleNamespace(**theirs), **_FLA_OPTIONS)
    kept = ("norm_eps", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    config = make_config(
        checkpoint,
        RWKVConfig,
        num_hidden_layers=checkpoint.count_layers("model.layers."),
        **read_sizes(checkpoint, _FLA_SIZES),
        **{name: theirs.get(name) for name in kept},
    )
    if not isclose(config.head_dim * config.norm_eps, NORM_EPS):
        raise ValueError(
            f"this variant is not in the zoo: its norm of heads adds head_dim * norm_eps = "
            f"{config.head_dim * config.norm_eps}, it knows {NORM_EPS}"
        )
    return config


def _fla_rules(config: RWKVConfig) -> Iterator[Rule]:
    yield from rename(_FLA_OUTSIDE)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        yield from rename(_FLA_BLOCK, layer, layer)
        yield from within(in_layer(_FLA_TIME_MIXING, i), f"{layer}attn.", f"{layer}mixer.")
        yield from within([_FLA_CHANNEL_SHIFT], layer, layer)


FLA_RWKV7 = Layout(
    name="flash-linear-attention's rwkv7",
    library="fla",
    recognizes=has_model_type("rwkv7"),
    read_config=_read_fla_config,
    rules=_fla_rules,
    read_tokenizer=read_tokenizer,
)

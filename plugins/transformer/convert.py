"""Checkpoints of transformers' Llama."""

from collections.abc import Iterator

from transformers import LlamaConfig
from zoo.plugins.transformer.modeling import TransformerConfig

from zoo.checkpoint import Checkpoint
from zoo.convert import Layout, Rule, has_model_type, make_config, refuse_others, rename, transformers_config

_SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "attention_bias", "attention_dropout", "max_position_embeddings"),
    *("rope_parameters", "initializer_range", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _read_config(checkpoint: Checkpoint) -> TransformerConfig:
    theirs = transformers_config(checkpoint)
    refuse_others(theirs, mlp_bias=False)
    fields = {name: getattr(theirs, name) for name in _SAME_FIELDS}
    return make_config(checkpoint, TransformerConfig, norm_eps=theirs.rms_norm_eps, **fields)


def _write_config(config: TransformerConfig) -> LlamaConfig:
    if set(config.mixers) != {"attention"} or set(config.channel_mixers) != {"swiglu"}:
        raise ValueError(f"it has layers of attention and SwiGLU only, not {config.mixers}, {config.channel_mixers}")
    return LlamaConfig(rms_norm_eps=config.norm_eps, **{name: getattr(config, name) for name in _SAME_FIELDS})


def _rules(config: TransformerConfig) -> Iterator[Rule]:
    yield Rule("model.embed_tokens.weight", "model.embed_tokens.weight")
    yield Rule("model.norm.weight", "model.norm.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    kinds = ("weight", "bias") if config.attention_bias else ("weight",)
    names = {f"self_attn.{proj}.{kind}": f"mixer.{proj}.{kind}" for proj in _PROJECTIONS for kind in kinds}
    names |= {f"mlp.{proj}.weight": f"channel_mixer.{proj}.weight" for proj in ("gate_proj", "up_proj", "down_proj")}
    names |= {
        "input_layernorm.weight": "mixer_norm.weight",
        "post_attention_layernorm.weight": "channel_norm.weight",
    }
    for i in range(config.num_hidden_layers):
        yield from rename(names, f"model.layers.{i}.", f"model.layers.{i}.")


LLAMA = Layout(
    name="transformers' llama",
    library="transformers",
    recognizes=has_model_type("llama"),
    read_config=_read_config,
    rules=_rules,
    write_config=_write_config,
    ignored=("*.rotary_emb.inv_freq",),
)

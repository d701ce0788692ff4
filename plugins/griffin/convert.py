"""Checkpoints of transformers' RecurrentGemma."""

from collections.abc import Iterator

from transformers import RecurrentGemmaConfig
from zoo.plugins.griffin.modeling import GriffinConfig

from zoo.checkpoint import Checkpoint
from zoo.convert import Change, Layout, Rule, has_model_type, make_config, refuse_others, rename, transformers_config

_SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "lru_width", "num_attention_heads", "num_key_value_heads"),
    *("attention_bias", "attention_dropout", "rope_parameters", "logits_soft_cap", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
_OTHER_NAMES = {
    "conv1d_width": "conv_kernel",
    "attention_window_size": "sliding_window",
    "hidden_activation": "hidden_act",
    "rms_norm_eps": "norm_eps",
}
_MIXERS = {"recurrent": "rglru", "attention": "local_attention"}

_RECURRENT = {
    "linear_x.weight": "x_proj.weight",
    "linear_x.bias": "x_proj.bias",
    "linear_y.weight": "y_proj.weight",
    "linear_y.bias": "y_proj.bias",
    "linear_out.weight": "out_proj.weight",
    "linear_out.bias": "out_proj.bias",
    "conv_1d.weight": "conv1d.weight",
    "conv_1d.bias": "conv1d.bias",
    "rg_lru.recurrent_param": "Lambda",
    "rg_lru.input_gate_weight": "input_gate.weight",
    "rg_lru.recurrent_gate_weight": "recurrence_gate.weight",
}
_GATE_BIASES = {
    "rg_lru.input_gate_bias": "input_gate.bias",
    "rg_lru.recurrent_gate_bias": "recurrence_gate.bias",
}


def _read_config(checkpoint: Checkpoint) -> GriffinConfig:
    theirs = transformers_config(checkpoint)
    refuse_others(theirs, head_dim=theirs.hidden_size // theirs.num_attention_heads)
    if (rope_type := theirs.rope_parameters["rope_type"]) != "default":
        raise ValueError(f"this variant is not in the zoo: rope_type is {rope_type!r}, it knows 'default'")
    pattern = theirs.block_types
    for name in pattern:
        if name not in _MIXERS:
            raise ValueError(f"this variant is not in the zoo: block_types has {name!r}, it knows {', '.join(_MIXERS)}")
    fields = {name: getattr(theirs, name) for name in _SAME_FIELDS}
    fields |= {ours: getattr(theirs, name) for name, ours in _OTHER_NAMES.items()}
    return make_config(
        checkpoint,
        GriffinConfig,
        intermediate_size=theirs.intermediate_size // 2,  # their class halves it
        mixers=[_MIXERS[pattern[i % len(pattern)]] for i in range(theirs.num_hidden_layers)],
        **fields,
    )


def _write_config(config: GriffinConfig) -> RecurrentGemmaConfig:
    if not set(config.mixers) <= set(_MIXERS.values()) or set(config.channel_mixers) != {"griffin_mlp"}:
        raise ValueError(
            f"it has layers of {', '.join(_MIXERS.values())} with griffin_mlp only, not {config.mixers}, "
            f"{config.channel_mixers}"
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"its heads divide hidden_size ({config.hidden_size}): num_attention_heads is "
            f"{config.num_attention_heads}, head_dim {config.head_dim}"
        )
    fields = {name: getattr(config, name) for name in _SAME_FIELDS}
    fields |= {theirs: getattr(config, name) for theirs, name in _OTHER_NAMES.items()}
    names = {ours: theirs for theirs, ours in _MIXERS.items()}
    return RecurrentGemmaConfig(
        intermediate_size=2 * config.intermediate_size,
        use_cache="local_attention" in config.mixers,  # their class has no cache for recurrent layers alone
        block_types=[names[mixer] for mixer in _shortest_pattern(config.mixers)],
        **fields,
    )


def _shortest_pattern(names: list[str]) -> list[str]:
    """The least part at the front that gives all when it is repeated."""
    return next(names[:n] for n in range(1, len(names) + 1) if all(x == names[i % n] for i, x in enumerate(names)))


def _rules(config: GriffinConfig) -> Iterator[Rule]:
    yield Rule("model.embed_tokens.weight", "model.embed_tokens.weight")
    yield Rule("model.final_norm.weight", "model.norm.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    blocks = config.num_attention_heads
    by_blocks = Change(lambda x: x.flatten(), lambda x: x.unflatten(0, (blocks, -1)))
    kinds = ("weight", "bias") if config.attention_bias else ("weight",)
    attention = {f"{proj}.{kind}": f"{proj}.{kind}" for proj in ("q_proj", "k_proj", "v_proj") for kind in kinds}
    attention |= {"o_proj.weight": "o_proj.weight", "o_proj.bias": "o_proj.bias"}
    same = {"temporal_pre_norm.weight": "mixer_norm.weight", "channel_pre_norm.weight": "channel_norm.weight"}
    for proj in ("gate_proj", "up_proj", "down_proj"):
        same |= {f"mlp_block.{proj}.{kind}": f"channel_mixer.{proj}.{kind}" for kind in ("weight", "bias")}
    for i, mixer in enumerate(config.mixers):
        layer = f"model.layers.{i}."
        yield from rename(same, layer, layer)
        sides = f"{layer}temporal_block.", f"{layer}mixer."
        if mixer == "rglru":
            yield from rename(_RECURRENT, *sides)
            yield from rename(_GATE_BIASES, *sides, by_blocks)
        else:
            yield from rename(attention, *sides)


RECURRENT_GEMMA = Layout(
    name="transformers' recurrent_gemma",
    library="transformers",
    recognizes=has_model_type("recurrent_gemma"),
    read_config=_read_config,
    rules=_rules,
    write_config=_write_config,
    ignored=("*.rotary_emb.inv_freq",),
)

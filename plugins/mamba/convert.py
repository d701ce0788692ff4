"""Checkpoints of Mamba: transformers' three classes, and what the authors' own package, state-spaces/mamba, wrote."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers import FalconMambaConfig, Mamba2Config, PreTrainedConfig
from transformers import MambaConfig as TransformersMambaConfig
from zoo.plugins.mamba.modeling import MambaConfig

from zoo.checkpoint import Checkpoint
from zoo.config import NO_MIXER
from zoo.convert import Layout, Rule, has_model_type, make_config, refuse_others, rename, transformers_config

_SAME_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "use_conv_bias", "use_bias"),
    *("time_step_min", "time_step_max", "time_step_floor", "residual_in_fp32", "initializer_range"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"),
)
_NO_LIMIT = [0.0, math.inf]


def _rules(config: MambaConfig, embedding: str = "embeddings") -> Iterator[Rule]:
    yield Rule(f"backbone.{embedding}.weight", "model.embed_tokens.weight")
    yield Rule("backbone.norm_f.weight", "model.norm.weight")
    yield Rule("lm_head.weight", "lm_head.weight")
    same = ["A_log", "D", "conv1d.weight", "in_proj.weight", "out_proj.weight"]
    names = {"norm.weight": "mixer_norm.weight"}
    if config.mixers[0] == "mamba":
        same += ["x_proj.weight", "dt_proj.weight"]
        names["mixer.dt_proj.bias"] = "mixer.dt_bias"
    else:
        same += ["dt_bias", "norm.weight"]
    if config.use_conv_bias:
        same += ["conv1d.bias"]
    if config.use_bias:
        same += ["in_proj.bias", "out_proj.bias"]
    names |= {f"mixer.{name}": f"mixer.{name}" for name in same}
    for i in range(config.num_hidden_layers):
        yield from rename(names, f"backbone.layers.{i}.", f"model.layers.{i}.")


# -- transformers ------------------------------------------------------------------------------------------------------


def _shared_fields(theirs: PreTrainedConfig) -> dict[str, Any]:
    refuse_others(theirs, hidden_act="silu")
    return {name: getattr(theirs, name) for name in _SAME_FIELDS} | {"norm_eps": theirs.layer_norm_epsilon}


def _read_mamba(checkpoint: Checkpoint) -> MambaConfig:
    """Of Mamba, and of Falcon Mamba, which has norms in its mixer.

    Where a file has `intermediate_size` their classes go by it, whatever `expand` says.
    """
    theirs = transformers_config(checkpoint)
    inner, width = theirs.intermediate_size, theirs.hidden_size
    if not isinstance(inner, int) or width < 1 or inner % width:
        raise ValueError(
            f"this variant is not in the zoo: intermediate_size ({inner}) is no multiple of hidden_size ({width})"
        )
    fields = _shared_fields(theirs)
    fields["expand"] = inner // width
    fields["mixer_rms_eps"] = getattr(theirs, "mixer_rms_eps", None)
    return make_config(checkpoint, MambaConfig, mixers=["mamba"], time_step_rank=theirs.time_step_rank, **fields)


def _read_mamba2(checkpoint: Checkpoint) -> MambaConfig:
    """Of Mamba-2. Its class normalises behind the gate, whatever `rms_norm` and `norm_before_gate` of a file say."""
    theirs = transformers_config(checkpoint)
    fields = _shared_fields(theirs) | {name: getattr(theirs, name) for name in ("expand", "head_dim", "n_groups")}
    if (limit := list(theirs.time_step_limit)) != _NO_LIMIT:
        fields["time_step_limit"] = limit
    return make_config(checkpoint, MambaConfig, mixers=["mamba2"], **fields)


def _write(config: MambaConfig, config_class: type[PreTrainedConfig], mixer: str, **fields: Any) -> PreTrainedConfig:
    if set(config.mixers) != {mixer} or set(config.channel_mixers) != {NO_MIXER}:
        raise ValueError(f"it has layers of {mixer} only, not {config.mixers}, {config.channel_mixers}")
    fields |= {name: getattr(config, name) for name in (*_SAME_FIELDS, "expand")}
    return config_class(layer_norm_epsilon=config.norm_eps, **fields)


def _write_mamba(config: MambaConfig) -> TransformersMambaConfig:
    if config.mixer_rms_eps is not None:
        raise ValueError(f"it has no norms in the mixer: mixer_rms_eps is {config.mixer_rms_eps}")
    return _write(config, TransformersMambaConfig, "mamba", time_step_rank=config.time_step_rank)


def _write_falcon_mamba(config: MambaConfig) -> FalconMambaConfig:
    if config.mixer_rms_eps is None:
        raise ValueError("it has norms in the mixer: mixer_rms_eps is None")
    fields = {"time_step_rank": config.time_step_rank, "mixer_rms_eps": config.mixer_rms_eps}
    return _write(config, FalconMambaConfig, "mamba", **fields)


def _write_mamba2(config: MambaConfig) -> Mamba2Config:
    fields = {"head_dim": config.head_dim, "num_heads": config.expand * config.hidden_size // config.head_dim}
    fields |= {"n_groups": config.n_groups, "time_step_limit": config.time_step_limit or _NO_LIMIT}
    return _write(config, Mamba2Config, "mamba2", **fields)


# -- state-spaces ------------------------------------------------------------------------------------------------------

_DEFAULTS = {  # of their class of the same name (mamba_ssm/models/config_mamba.py)
    "d_model": 2560,
    "n_layer": 64,
    "vocab_size": 50277,
    "pad_vocab_size_multiple": 8,
    "d_intermediate": 0,
    "ssm_cfg": {},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "tie_embeddings": True,
}
_MIXERS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
_OPTIONS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
}
_OPTIONS_OF = {
    "mamba": _OPTIONS | {"dt_rank": "time_step_rank"},
    "mamba2": _OPTIONS | {"headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "time_step_limit"},
}
_WANTED = {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
_WITHOUT_EFFECT = (  # on what a trained model computes
    *("chunk_size", "use_mem_eff_path", "use_fast_path", "conv_init", "dt_init", "dt_scale", "A_init_range"),
)


def _is_state_spaces(checkpoint: Checkpoint) -> bool:
    return "d_model" in checkpoint.config and "backbone.embedding.weight" in checkpoint.shapes


def _read_state_spaces(checkpoint: Checkpoint) -> MambaConfig:
    theirs = _DEFAULTS | checkpoint.config
    for name in sorted(theirs.keys() - _DEFAULTS.keys()):
        raise ValueError(f"this variant is not in the zoo: {name} is {theirs[name]!r}")
    for name, wanted in (("rms_norm", True), ("attn_layer_idx", []), ("d_intermediate", 0)):
        if theirs[name] != wanted:
            raise ValueError(f"this variant is not in the zoo: {name} is {theirs[name]!r}, it knows {wanted!r}")
    for name in ("d_model", "vocab_size", "pad_vocab_size_multiple"):
        if not isinstance(theirs[name], int) or theirs[name] < 1:
            raise ValueError(f"{checkpoint.path}: {name} is {theirs[name]!r}, wanted a positive number")
    return make_config(
        checkpoint,
        MambaConfig,
        vocab_size=theirs["vocab_size"] + -theirs["vocab_size"] % theirs["pad_vocab_size_multiple"],
        hidden_size=theirs["d_model"],
        num_hidden_layers=theirs["n_layer"],
        residual_in_fp32=theirs["residual_in_fp32"],
        tie_word_embeddings=theirs["tie_embeddings"],
        **_read_options(checkpoint, theirs["ssm_cfg"]),
    )


def _read_options(checkpoint: Checkpoint, options: Any) -> dict[str, Any]:
    """Our fields for their `ssm_cfg`, which are arguments of their mixer."""
    if not isinstance(options, dict):
        raise ValueError(f"{checkpoint.path}: ssm_cfg is {options!r}, wanted an object")
    layer = options.get("layer", "Mamba1")
    if layer not in list(_MIXERS):  # it may be anything
        raise ValueError(f"this variant is not in the zoo: layer is {layer!r}, it knows {', '.join(_MIXERS)}")
    fields: dict[str, Any] = {"mixers": [_MIXERS[layer]]}
    names = _OPTIONS_OF[_MIXERS[layer]]
    for name, value in options.items():
        if name in names:
            fields[names[name]] = value
        elif name in _WANTED and value != _WANTED[name]:
            raise ValueError(f"this variant is not in the zoo: {name} is {value!r}, it knows {_WANTED[name]!r}")
        elif name not in ("layer", *_WANTED, *_WITHOUT_EFFECT):
            raise ValueError(f"this variant is not in the zoo: {name} is {value!r}")
    if fields.get("time_step_rank") == "auto":
        del fields["time_step_rank"]
    if fields.get("time_step_limit") == _NO_LIMIT:
        del fields["time_step_limit"]
    return fields


LAYOUTS = (
    *(
        Layout(
            name=f"transformers' {model_type}",
            library="transformers",
            recognizes=has_model_type(model_type),
            read_config=read,
            rules=_rules,
            write_config=write,
        )
        for model_type, read, write in (
            ("mamba", _read_mamba, _write_mamba),
            ("falcon_mamba", _read_mamba, _write_falcon_mamba),
            ("mamba2", _read_mamba2, _write_mamba2),
        )
    ),
    Layout(
        name="state-spaces' mamba",
        library="state-spaces",
        recognizes=_is_state_spaces,
        read_config=_read_state_spaces,
        rules=partial(_rules, embedding="embedding"),
    ),
)

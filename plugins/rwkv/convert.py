"""Checkpoints of RWKV 4, 5.2, 6 and 7 in the authors' own files, as their package `rwkv` reads them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from zoo.plugins.rwkv.modeling import RWKVConfig
from zoo.plugins.rwkv.tokenizer import RwkvTokenizer

from zoo.checkpoint import Checkpoint
from zoo.convert import ROW, TRANSPOSED, Change, Layout, Rule, make_config, rename

MIXERS = {
    4: ("rwkv4", "rwkv4_channel"),
    5: ("rwkv5", "rwkv4_channel"),
    6: ("rwkv6", "rwkv6_channel"),
    7: ("rwkv7", "rwkv7_channel"),
}
"""By version, the mixer of its layers and their channel mixer."""

ROWS = Change(
    lambda *rows: torch.stack([row.flatten() for row in rows]),
    lambda x: x[:, None, None].unbind(),
)
"""Theirs are several (1 1 d), ours is (c d)."""

Sizes = dict[str, tuple[str, int]]
"""By a field of the configuration, a tensor and the axis of it that has this size."""


def shift(prefix: str, letters: str) -> Rule:
    return Rule(tuple(prefix + letter for letter in letters), "shift.mu", ROWS)


def within(rules: Iterable[Rule], theirs: str, ours: str) -> Iterator[Rule]:
    """Rules whose names continue these prefixes."""
    for rule in rules:
        names = theirs + rule.theirs if isinstance(rule.theirs, str) else tuple(theirs + name for name in rule.theirs)
        yield Rule(names, ours + rule.ours, rule.change)


def read_sizes(checkpoint: Checkpoint, sizes: Sizes) -> dict[str, int]:
    """What is left out, as the tensor is missing or has no such axis, is reported when the tensors are read."""
    shapes = ((field, checkpoint.shapes.get(name, ()), axis) for field, (name, axis) in sizes.items())
    return {field: shape[axis] for field, shape, axis in shapes if len(shape) > axis}


def require_version(config: RWKVConfig, versions: Iterable[int]) -> None:
    """Raise ValueError unless all layers are those of one of these versions."""
    if not any(set(zip(config.mixers, config.channel_mixers, strict=True)) == {MIXERS[v]} for v in versions):
        names = ", ".join(map(str, versions))
        raise ValueError(f"all its layers are of one version ({names}), not {config.mixers}, {config.channel_mixers}")


def read_tokenizer(folder: Path) -> RwkvTokenizer | None:
    vocabulary = folder / RwkvTokenizer.vocab_files_names["vocab_file"]
    return RwkvTokenizer(vocabulary) if vocabulary.is_file() else None


# -- names and sizes ---------------------------------------------------------------------------------------------------

_OUTSIDE = {
    "emb.weight": "model.embed_tokens.weight",
    "blocks.0.ln0.weight": "model.embed_norm.weight",
    "blocks.0.ln0.bias": "model.embed_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "ln1.weight": "mixer_norm.weight",
    "ln1.bias": "mixer_norm.bias",
    "ln2.weight": "channel_norm.weight",
    "ln2.bias": "channel_norm.bias",
    "att.receptance.weight": "mixer.r_proj.weight",
    "att.key.weight": "mixer.k_proj.weight",
    "att.value.weight": "mixer.v_proj.weight",
    "att.output.weight": "mixer.o_proj.weight",
    "ffn.key.weight": "channel_mixer.k_proj.weight",
    "ffn.value.weight": "channel_mixer.v_proj.weight",
}
_NORM = {"ln_x.weight": "norm.weight", "ln_x.bias": "norm.bias"}
_GATE = {"gate.weight": "g_proj.weight"}
LOW_RANK = {"w": "decay", "a": "iclr", "v": "value_gate", "g": "gate"}
BIASED = ("w", "a", "v")

# In this order: the package looks for norm and gate before it asks the decay's shape which version of 5 a file has.
_TIME_MIXING = {
    "rwkv4": [
        *rename({"time_decay": "time_decay", "time_first": "bonus"}),
        shift("time_mix_", "kvr"),
    ],
    "rwkv5": [
        *rename(_NORM | _GATE | {"time_decay": "time_decay", "time_faaaa": "bonus"}),
        shift("time_mix_", "kvrg"),
    ],
    "rwkv6": [
        *rename(_NORM | _GATE | {"time_maa_w2": "shift.up", "time_faaaa": "bonus"}),
        *rename({"time_maa_x": "shift.mu_x", "time_decay": "decay.bias"}, change=ROW),
        *rename({"time_maa_w1": "shift.down.weight"}, change=TRANSPOSED),
        *rename({"time_decay_w1": "decay.down.weight", "time_decay_w2": "decay.up.weight"}, change=TRANSPOSED),
        shift("time_maa_", "wkvrg"),
    ],
    "rwkv7": [
        *rename(_NORM | {"r_k": "bonus"}),
        *rename({"k_k": "removal_scale", "k_a": "iclr_mix"}, change=ROW),
        *rename({f"{c}0": f"{LOW_RANK[c]}.bias" for c in BIASED}, change=ROW),
        *rename({f"{c}1": f"{ours}.down.weight" for c, ours in LOW_RANK.items()}, change=TRANSPOSED),
        *rename({f"{c}2": f"{ours}.up.weight" for c, ours in LOW_RANK.items()}, change=TRANSPOSED),
        shift("x_", "rwkvag"),
    ],
}
_RECEPTANCE = Rule("receptance.weight", "r_proj.weight")
_CHANNEL_MIXING = {
    "rwkv4_channel": [_RECEPTANCE, shift("time_mix_", "kr")],
    "rwkv6_channel": [_RECEPTANCE, shift("time_maa_", "kr")],
    "rwkv7_channel": [shift("x_", "k")],
}

_SIZES: Sizes = {
    "vocab_size": ("emb.weight", 0),
    "hidden_size": ("emb.weight", 1),
    "intermediate_size": ("blocks.0.ffn.key.weight", 0),
}
_SIZES_OF_VERSION: dict[int, Sizes] = {
    4: {},
    5: {"head_dim": ("blocks.0.att.time_faaaa", 1)},
    6: {
        "head_dim": ("blocks.0.att.time_faaaa", 1),
        "shift_rank": ("blocks.0.att.time_maa_w2", 1),
        "decay_rank": ("blocks.0.att.time_decay_w1", 1),
    },
    7: {
        "head_dim": ("blocks.0.att.r_k", 1),
        "decay_rank": ("blocks.0.att.w1", 1),
        "iclr_rank": ("blocks.0.att.a1", 1),
        "value_rank": ("blocks.1.att.v1", 1),
        "gate_rank": ("blocks.0.att.g1", 1),
    },
}


def _version(checkpoint: Checkpoint) -> int:
    """By the names in any of the blocks, in whatever order they come."""
    parts = {name.split(".", 2)[-1]: shape for name, shape in checkpoint.shapes.items() if name.startswith("blocks.")}
    if "att.time_state" in parts:
        raise _variant(checkpoint, "tuned initial states (att.time_state)")
    if "ffn.s_emb.weight" in parts:
        raise _variant(checkpoint, "version 7a or 7b, with embeddings in the channel mixers (ffn.s_emb.weight)")
    if "att.r_k" in parts:
        return 7
    if "att.time_maa_x" in parts:
        return 6
    if "att.ln_x.weight" in parts:
        if "att.gate.weight" not in parts:
            raise _variant(checkpoint, "version 5.0 (no att.gate.weight); of 5 it knows 5.2")
        decay = parts.get("att.time_decay")
        if decay is not None and decay[1:].numel() == 1:
            raise _variant(checkpoint, "version 5.1 (att.time_decay has one number a head); of 5 it knows 5.2")
        return 5
    if "att.time_first" in parts:
        return 4
    raise _variant(checkpoint, f"no version of RWKV that it knows ({', '.join(map(str, MIXERS))})")


def _variant(checkpoint: Checkpoint, what: str) -> ValueError:
    return ValueError(f"{checkpoint.path}: this variant is not in the zoo: {what}")


def _read_config(checkpoint: Checkpoint) -> RWKVConfig:
    """From the tensors alone. In all vocabularies of the authors id 0 stands between documents."""
    version = _version(checkpoint)
    mixer, channel_mixer = MIXERS[version]
    return make_config(
        checkpoint,
        RWKVConfig,
        mixers=[mixer],
        channel_mixers=[channel_mixer],
        num_hidden_layers=checkpoint.count_layers("blocks."),
        bos_token_id=0,
        eos_token_id=0,
        **read_sizes(checkpoint, _SIZES | _SIZES_OF_VERSION[version]),
    )


def rwkv_rules(config: RWKVConfig) -> Iterator[Rule]:
    yield from rename(_OUTSIDE)
    for i, (mixer, channel_mixer) in enumerate(zip(config.mixers, config.channel_mixers, strict=True)):
        theirs, ours = f"blocks.{i}.", f"model.layers.{i}."
        yield from rename(_BLOCK, theirs, ours)
        yield from within(in_layer(_TIME_MIXING[mixer], i), f"{theirs}att.", f"{ours}mixer.")
        yield from within(_CHANNEL_MIXING[channel_mixer], f"{theirs}ffn.", f"{ours}channel_mixer.")


def in_layer(rules: Iterable[Rule], i: int) -> Iterator[Rule]:
    """Layer 0 of version 7 has no values below it to mix in."""
    return (rule for rule in rules if i or not rule.ours.startswith("value_gate."))


def _check_for_package(config: RWKVConfig) -> None:
    require_version(config, MIXERS)
    if config.tie_word_embeddings:
        raise ValueError("its head is not tied to the embedding")
    if config.norm_eps != RWKVConfig.norm_eps:
        raise ValueError(f"it knows one norm_eps, {RWKVConfig.norm_eps}, not {config.norm_eps}")


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    torch.save({name: x.cpu() for name, x in tensors.items()}, folder / "model.pth")


RWKV = Layout(
    name="BlinkDL's rwkv",
    library="rwkv",
    recognizes=lambda checkpoint: any(name.startswith("blocks.0.att.") for name in checkpoint.shapes),
    read_config=_read_config,
    rules=rwkv_rules,
    write_config=_check_for_package,
    write_weights=_save,
    ignored=("blocks.0.att.v[012]",),  # some files of version 7 have them; there are no values below to mix in
    read_tokenizer=read_tokenizer,
)

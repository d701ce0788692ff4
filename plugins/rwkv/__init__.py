"""RWKV, versions 4 to 7: Peng et al., arXiv:2305.13048 (4), arXiv:2404.05892 (5 and 6), arXiv:2503.14456 (7)."""

from zoo.plugins.rwkv.channel_mixing import ChannelMixing4, ChannelMixing6, ChannelMixing7
from zoo.plugins.rwkv.convert import MIXERS, RWKV
from zoo.plugins.rwkv.convert_others import FLA_RWKV7, TRANSFORMERS_RWKV
from zoo.plugins.rwkv.modeling import (
    RWKVForCausalLM,
    RWKVForSequenceClassification,
    RWKVForTokenClassification,
    RWKVModel,
)
from zoo.plugins.rwkv.rwkv4 import TimeMixing4
from zoo.plugins.rwkv.rwkv6 import TimeMixing5, TimeMixing6
from zoo.plugins.rwkv.rwkv7 import TimeMixing7
from zoo.plugins.rwkv.tokenizer import RwkvTokenizer

from zoo.registry import Plugin

_PILE, _WORLD = 50277, 65536
"""Sizes of the vocabularies: GPT-NeoX's, and World's padded to a power of two."""


def _version(number: int) -> dict:
    mixer, channel_mixer = MIXERS[number]
    return {"mixers": [mixer], "channel_mixers": [channel_mixer]}


def _tiny(number: int, **fields) -> dict:
    sizes = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "head_dim": 32}
    return {**_version(number), **sizes, **fields}


def _published(number: int, vocab_size: int, num_hidden_layers: int, hidden_size: int, **fields) -> dict:
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": num_hidden_layers, "hidden_size": hidden_size}
    if number in (5, 6):
        sizes["intermediate_size"] = int(3.5 * hidden_size) // 32 * 32
    return {**_version(number), **sizes, **fields}


def _goose(num_hidden_layers: int, hidden_size: int, decay: int, iclr: int, value: int, gate: int) -> dict:
    ranks = {"decay_rank": decay, "iclr_rank": iclr, "value_rank": value, "gate_rank": gate}
    return _published(7, _WORLD, num_hidden_layers, hidden_size, **ranks)


PLUGIN = Plugin(
    models=(RWKVModel, RWKVForCausalLM, RWKVForSequenceClassification, RWKVForTokenClassification),
    mixers={"rwkv4": TimeMixing4, "rwkv5": TimeMixing5, "rwkv6": TimeMixing6, "rwkv7": TimeMixing7},
    channel_mixers={
        "rwkv4_channel": ChannelMixing4,
        "rwkv6_channel": ChannelMixing6,
        "rwkv7_channel": ChannelMixing7,
    },
    presets={
        "rwkv4-tiny": _tiny(4),
        "rwkv5-tiny": _tiny(5, intermediate_size=448),
        "rwkv6-tiny": _tiny(6, intermediate_size=448, shift_rank=16, decay_rank=16),
        "rwkv7-tiny": _tiny(7),
        "rwkv4-169m": _published(4, _PILE, 12, 768),
        "rwkv4-430m": _published(4, _PILE, 24, 1024),
        "rwkv4-1.5b": _published(4, _PILE, 24, 2048),
        "rwkv4-3b": _published(4, _PILE, 32, 2560),
        "rwkv4-7b": _published(4, _PILE, 32, 4096),
        "rwkv4-14b": _published(4, _PILE, 40, 5120),
        "rwkv5-1.5b": _published(5, _WORLD, 24, 2048),
        "rwkv5-3b": _published(5, _WORLD, 32, 2560),
        "rwkv5-7b": _published(5, _WORLD, 32, 4096),
        "rwkv6-1.6b": _published(6, _WORLD, 24, 2048, shift_rank=32, decay_rank=64),
        "rwkv6-3b": _published(6, _WORLD, 32, 2560, shift_rank=32, decay_rank=64),
        "rwkv6-7b": _published(6, _WORLD, 32, 4096, shift_rank=64, decay_rank=128),
        "rwkv7-0.1b": _goose(12, 768, decay=64, iclr=64, value=32, gate=128),
        "rwkv7-0.4b": _goose(24, 1024, decay=64, iclr=64, value=32, gate=128),
        "rwkv7-1.5b": _goose(24, 2048, decay=96, iclr=96, value=64, gate=256),
        "rwkv7-2.9b": _goose(32, 2560, decay=96, iclr=96, value=64, gate=320),
    },
    layouts=(RWKV, TRANSFORMERS_RWKV, FLA_RWKV7),
    tokenizer=RwkvTokenizer,
    lora_targets=("r_proj", "k_proj", "v_proj", "g_proj", "o_proj"),
    paper="arXiv:2503.14456",
)

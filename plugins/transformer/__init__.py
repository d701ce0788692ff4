"""Transformer baseline after Llama: Touvron et al., 2023, arXiv:2302.13971."""

from zoo.plugins.transformer.convert import LLAMA
from zoo.plugins.transformer.modeling import (
    TransformerForCausalLM,
    TransformerForSequenceClassification,
    TransformerForTokenClassification,
    TransformerModel,
)

from zoo.moe import MoE
from zoo.nn import Attention, GatedMLP, SlidingWindowAttention
from zoo.registry import Plugin

_TINY = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

PLUGIN = Plugin(
    models=(
        TransformerModel,
        TransformerForCausalLM,
        TransformerForSequenceClassification,
        TransformerForTokenClassification,
    ),
    mixers={"attention": Attention, "sliding_attention": SlidingWindowAttention},
    channel_mixers={"swiglu": GatedMLP, "moe": MoE},
    presets={
        "transformer-tiny": _TINY,
        "transformer-sliding-tiny": {**_TINY, "mixers": ["sliding_attention", "attention"], "sliding_window": 32},
    },
    layouts=(LLAMA,),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    paper="arXiv:2302.13971",
)

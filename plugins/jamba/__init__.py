"""Jamba: Lieber et al., "Jamba: A Hybrid Transformer-Mamba Language Model", arXiv:2403.19887."""

from zoo.plugins.jamba.convert import LAYOUTS
from zoo.plugins.jamba.modeling import (
    JambaForCausalLM,
    JambaForSequenceClassification,
    JambaForTokenClassification,
    JambaMamba,
    JambaModel,
)

from zoo.registry import Plugin

_52B = {
    "vocab_size": 65536,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

PLUGIN = Plugin(
    models=(JambaModel, JambaForCausalLM, JambaForSequenceClassification, JambaForTokenClassification),
    mixers={"jamba_mamba": JambaMamba},
    presets={
        "jamba-tiny": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "intermediate_size": 256,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "num_experts": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "jamba-v0.1": _52B,
        "jamba-1.5-mini": _52B,
        "jamba-1.5-large": {
            "vocab_size": 65536,
            "hidden_size": 8192,
            "num_hidden_layers": 72,
            "intermediate_size": 24576,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    },
    layouts=LAYOUTS,
    lora_targets=(
        *("in_proj", "x_proj", "dt_proj", "out_proj"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    paper="arXiv:2403.19887",
)

"""Griffin and Hawk: De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language
Models", arXiv:2402.19427, as published with RecurrentGemma, arXiv:2404.07839.
"""

from zoo.plugins.griffin.convert import RECURRENT_GEMMA
from zoo.plugins.griffin.modeling import (
    RGLRU,
    GriffinForCausalLM,
    GriffinForSequenceClassification,
    GriffinForTokenClassification,
    GriffinMLP,
    GriffinModel,
    LocalAttention,
)

from zoo.registry import Plugin

_GEMMA = {"vocab_size": 256000, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

PLUGIN = Plugin(
    models=(GriffinModel, GriffinForCausalLM, GriffinForSequenceClassification, GriffinForTokenClassification),
    mixers={"rglru": RGLRU, "local_attention": LocalAttention},
    channel_mixers={"griffin_mlp": GriffinMLP},
    presets={
        "griffin-tiny": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "sliding_window": 32,
        },
        "recurrentgemma-2b": {
            **_GEMMA,
            "hidden_size": 2560,
            "num_hidden_layers": 26,
            "intermediate_size": 7680,
            "num_attention_heads": 10,
        },
        "recurrentgemma-9b": {
            **_GEMMA,
            "hidden_size": 4096,
            "num_hidden_layers": 38,
            "intermediate_size": 12288,
            "num_attention_heads": 16,
        },
    },
    layouts=(RECURRENT_GEMMA,),
    lora_targets=(
        *("x_proj", "y_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
    paper="arXiv:2402.19427",
)

"""Hybrids: any mixers of the zoo in one model; Waleffe et al., "An Empirical Study of Mamba-based Language Models",
arXiv:2406.07887, compare the best known mix with its parts."""

from zoo.plugins.hybrid.modeling import (
    HybridForCausalLM,
    HybridForSequenceClassification,
    HybridForTokenClassification,
    HybridModel,
)

from zoo.registry import Plugin

PLUGIN = Plugin(
    models=(HybridModel, HybridForCausalLM, HybridForSequenceClassification, HybridForTokenClassification),
    presets={
        "hybrid-tiny": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "intermediate_size": 256,
            "mixers": ["mamba2", "rwkv7", "retention", "attention"],
            "channel_mixers": ["swiglu", "rwkv7_channel"],
            "tie_word_embeddings": True,
        },
    },
    lora_targets=(
        *("in_proj", "x_proj", "dt_proj", "out_proj", "q_proj", "k_proj", "v_proj", "g_proj", "r_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
    paper="arXiv:2406.07887",
)

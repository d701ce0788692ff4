"""Titans: Behrouz et al., "Titans: Learning to Memorize at Test Time", arXiv:2501.00663."""

from zoo.plugins.titans.modeling import (
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTokenClassification,
    TitansLMM,
    TitansMAG,
    TitansMAL,
    TitansModel,
)
from zoo.plugins.titans.segments import TitansMAC

from zoo.registry import Plugin

PLUGIN = Plugin(
    models=(TitansModel, TitansForCausalLM, TitansForSequenceClassification, TitansForTokenClassification),
    mixers={"titans_lmm": TitansLMM, "titans_mac": TitansMAC, "titans_mag": TitansMAG, "titans_mal": TitansMAL},
    presets={
        "titans-tiny": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "intermediate_size": 256,
            "mixers": ["titans_lmm", "titans_mac", "titans_mag", "titans_mal"],
            "num_attention_heads": 4,
            "chunk_size": 8,
            "num_persistent_tokens": 4,
            "segment_length": 16,
            "sliding_window": 16,
            "tie_word_embeddings": True,
        },
    },
    lora_targets=(
        *("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gates_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
    paper="arXiv:2501.00663",
)

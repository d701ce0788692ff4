"""RMT and ARMT: Rodkin et al., 2024, "Associative Recurrent Memory Transformer", arXiv:2407.04841."""

from zoo.plugins.armt.modeling import (
    ARMTForCausalLM,
    ARMTForSequenceClassification,
    ARMTForTokenClassification,
    ARMTModel,
)

from zoo.registry import Plugin

PLUGIN = Plugin(
    models=(ARMTModel, ARMTForCausalLM, ARMTForSequenceClassification, ARMTForTokenClassification),
    presets={
        "armt-tiny": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "intermediate_size": 384,
            "tie_word_embeddings": True,
            "backbone_options": {"num_attention_heads": 4, "num_key_value_heads": 2},
            "segment_length": 18,
            "num_memory_tokens": 4,
            "d_mem": 16,
        },
    },
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    paper="arXiv:2407.04841",
)

"""LM2: Kang et al., "LM2: Large Memory Models", 2025, arXiv:2502.06049, in a form that is causal."""

from zoo.plugins.lm2.modeling import (
    LM2ForCausalLM,
    LM2ForSequenceClassification,
    LM2ForTokenClassification,
    LM2Model,
)

from zoo.registry import Plugin

PLUGIN = Plugin(
    models=(LM2Model, LM2ForCausalLM, LM2ForSequenceClassification, LM2ForTokenClassification),
    presets={
        "lm2-tiny": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "intermediate_size": 384,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "segment_length": 16,
            "num_memory_slots": 16,
            "tie_word_embeddings": True,
        },
        "lm2-1.7b": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_memory_heads": 8,
            "num_memory_slots": 2048,
            "segment_length": 2048,
            "initial_memory": "identity",
            "norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": True,
        },
    },
    lora_targets=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        *("output_gate", "input_gate", "forget_gate"),
    ),
    paper="arXiv:2502.06049",
)

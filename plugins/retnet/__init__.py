"""RetNet: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", arXiv:2307.08621."""

from zoo.plugins.retnet.modeling import (
    Retention,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
)

from zoo.registry import Plugin

PLUGIN = Plugin(
    models=(RetNetModel, RetNetForCausalLM, RetNetForSequenceClassification, RetNetForTokenClassification),
    mixers={"retention": Retention},
    presets={
        "retnet-tiny": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "intermediate_size": 256,
            "num_heads": 4,
            "tie_word_embeddings": True,
        },
    },
    lora_targets=("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    paper="arXiv:2307.08621",
)

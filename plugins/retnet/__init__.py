"""RetNet: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", arXiv:2307.08621."""

from zoo.plugins.retnet.modeling import (
    Retention,
    RetNetForCausalLM,
    RetNetForSequenceClassification,
    RetNetForTokenClassification,
    RetNetModel,
)

from zoo.registry import Plugin

# The sizes of the paper's table 2; the widths of values and feed-forward layers are those of the authors' code, whose
# gated layers have as many parameters as the plain ones of the paper.
_PUBLISHED = {
    "retnet-1.3b": (24, 2048, 3456, 8),
    "retnet-2.7b": (32, 2560, 4280, 10),
    "retnet-6.7b": (32, 4096, 6912, 16),
}

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
        **{
            name: {
                "num_hidden_layers": layers,
                "hidden_size": width,
                "value_size": inner_width,
                "intermediate_size": inner_width,
                "num_heads": heads,
            }
            for name, (layers, width, inner_width, heads) in _PUBLISHED.items()
        },
    },
    lora_targets=("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    paper="arXiv:2307.08621",
)

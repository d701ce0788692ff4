"""Mamba: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752; and Mamba-2:
Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
arXiv:2405.21060.
"""

from zoo.plugins.mamba.convert import LAYOUTS
from zoo.plugins.mamba.modeling import (
    Mamba,
    Mamba2,
    MambaForCausalLM,
    MambaForSequenceClassification,
    MambaForTokenClassification,
    MambaModel,
)

from zoo.registry import Plugin

_TINY = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4}
_WIDTHS_AND_DEPTHS = {  # of both versions by their authors, smallest first
    "hidden_size": (768, 1024, 1536, 2048, 2560),
    "num_hidden_layers": (24, 48, 48, 48, 64),
}


def _published(names: tuple[str, ...], **fields) -> dict[str, dict]:
    sizes = zip(*_WIDTHS_AND_DEPTHS.values(), strict=True)
    return {
        name: {"hidden_size": width, "num_hidden_layers": depth, **fields}
        for name, (width, depth) in zip(names, sizes, strict=True)
    }


PLUGIN = Plugin(
    models=(MambaModel, MambaForCausalLM, MambaForSequenceClassification, MambaForTokenClassification),
    mixers={"mamba": Mamba, "mamba2": Mamba2},
    presets={
        "mamba-tiny": _TINY,
        "mamba2-tiny": {**_TINY, "mixers": ["mamba2"], "state_size": 32, "head_dim": 32, "n_groups": 2},
        **_published(("mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b"), vocab_size=50280),
        **_published(
            ("mamba2-130m", "mamba2-370m", "mamba2-780m", "mamba2-1.3b", "mamba2-2.7b"),
            vocab_size=50288,
            mixers=["mamba2"],
        ),
        "falcon-mamba-7b": {
            "vocab_size": 65024,
            "hidden_size": 4096,
            "num_hidden_layers": 64,
            "mixer_rms_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        "codestral-mamba-7b": {
            "vocab_size": 32768,
            "hidden_size": 4096,
            "num_hidden_layers": 64,
            "mixers": ["mamba2"],
            "n_groups": 8,
            "tie_word_embeddings": False,
        },
    },
    layouts=LAYOUTS,
    lora_targets=("in_proj", "x_proj", "dt_proj", "out_proj"),
    paper="arXiv:2312.00752",
)

"""xLSTM: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv:2405.04517, and "xLSTM 7B", arXiv:2503.13427."""

from zoo.plugins.xlstm.convert import FIRST_PAPER, LAYOUTS
from zoo.plugins.xlstm.modeling import (
    MLSTM,
    SLSTM,
    MLSTMPreUp,
    XLSTMForCausalLM,
    XLSTMForSequenceClassification,
    XLSTMForTokenClassification,
    XLSTMModel,
)

from zoo.registry import Plugin

_TINY = {"vocab_size": 4096, "hidden_size": 128, "num_hidden_layers": 4, "num_heads": 4}
_PUBLISHED_1_0 = {"vocab_size": 50304, "num_heads": 4, "mixers": ["mlstm_preup"], **FIRST_PAPER}

PLUGIN = Plugin(
    models=(XLSTMModel, XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification),
    mixers={"mlstm": MLSTM, "mlstm_preup": MLSTMPreUp, "slstm": SLSTM},
    presets={
        "xlstm-tiny": _TINY,
        "xlstm-1-1-tiny": {**_TINY, **FIRST_PAPER, "mixers": ["mlstm_preup", "slstm"], "intermediate_size": 192},
        "xlstm-7b": {"vocab_size": 50304, "hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8},
        "xlstm-1-0-125m": {**_PUBLISHED_1_0, "hidden_size": 768, "num_hidden_layers": 24},
        "xlstm-1-0-350m": {**_PUBLISHED_1_0, "hidden_size": 1024, "num_hidden_layers": 48},
        "xlstm-1-0-760m": {**_PUBLISHED_1_0, "hidden_size": 1536, "num_hidden_layers": 48},
        "xlstm-1-0-1.3b": {**_PUBLISHED_1_0, "hidden_size": 2048, "num_hidden_layers": 48},
    },
    layouts=LAYOUTS,
    lora_targets=("q_proj", "k_proj", "v_proj", "ogate", "out_proj", "gate_proj", "up_proj", "down_proj"),
    paper="arXiv:2405.04517",
)

"""An architecture outside of the tree that asks for all the room the spine has.

Two leaky memories run side by side in each layer. Their initial state is learned. The first one in a model leaves its
values for those above. The logits are soft-capped, training adds an auxiliary loss, the optimiser gets a group of its
own, and the class has a name that transformers treats specially.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers import initialization as init

from zoo import AuxiliaryLoss, Plugin, RecurrentMixer, Tokens, ZooConfig, ZooForCausalLM, ZooModel, heads_of


@strict
class RwkvMambaEchoConfig(ZooConfig):
    model_type = "zoo_echo"
    default_mixers = ("echo_pair",)


class Echo(RecurrentMixer):
    """s_t = a s_{t-1} + (1 - a) v_t for each channel, with a learned a and a learned s_0."""

    parameter_options = {"decay": {"weight_decay": 0.0, "lr_scale": 2.0}}

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        d = config.hidden_size
        self.v_proj, self.o_proj = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.decay, self.start = nn.Parameter(torch.empty(1, d)), nn.Parameter(torch.empty(d))
        has_echo_below = not {"echo", "echo_pair"}.isdisjoint(config.mixers[:layer_idx])
        self.share = nn.Parameter(torch.empty(d)) if has_echo_below else None

    @classmethod
    def state_shapes(cls, config, layer_idx):
        return {"memory": ((config.hidden_size,), torch.float32)}

    def initial_state(self, x: Tensor):
        (zeros,) = super().initial_state(x)
        return (zeros + self.start,)

    def scan_shared(self, x: Tensor, state, tokens: Tokens, shared):
        (memory,) = state
        values = self.v_proj(x)
        first = shared.get("first_values", values)
        if self.share is not None:
            values = values + (first - values) * self.share.sigmoid()
        keep, start = self.decay[0].sigmoid().to(memory.dtype), self.initial_state(x)[0]
        outputs = []
        for t, value in enumerate(values.unbind(1)):
            if tokens.segments is not None and t:
                starts = tokens.segments[:, t] != tokens.segments[:, t - 1]
                memory = torch.where(starts[:, None], start, memory)
            new = keep * memory + (1 - keep) * value
            memory = new if tokens.mask is None else torch.where(tokens.mask[:, t, None], new, memory)
            outputs.append(memory)
        y = torch.stack(outputs, dim=1).to(x.dtype)
        return self.o_proj(y), (memory,), shared | {"first_values": first}

    def reset_parameters(self):
        init.constant_(self.decay, 1.0)
        init.normal_(self.start, std=0.1)
        if self.share is not None:
            init.zeros_(self.share)


class EchoPair(RecurrentMixer):
    """Two mixers in parallel in one layer; the state is the one behind the other."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.left, self.right = Echo(config, layer_idx), Echo(config, layer_idx)

    @classmethod
    def state_shapes(cls, config, layer_idx):
        shapes = Echo.state_shapes(config, layer_idx)
        return {f"{side}_{name}": shape for side in ("left", "right") for name, shape in shapes.items()}

    def initial_state(self, x: Tensor):
        return self.left.initial_state(x) + self.right.initial_state(x)

    def scan_shared(self, x: Tensor, state, tokens: Tokens, shared):
        left, left_state, shared = self.left.scan_shared(x, state[:1], tokens, shared)
        right, right_state, shared = self.right.scan_shared(x, state[1:], tokens, shared)
        return left + right, left_state + right_state, shared


class RwkvMambaEchoModel(ZooModel):
    config: RwkvMambaEchoConfig


class RwkvMambaEchoForCausalLM(ZooForCausalLM, GenerationMixin):
    config: RwkvMambaEchoConfig
    model_class = RwkvMambaEchoModel

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return 30 * torch.tanh(super().compute_logits(hidden_states) / 30)

    def auxiliary_losses(self, outputs):
        size = outputs.shared["first_values"].float().pow(2).flatten(1).mean(1)
        return [*super().auxiliary_losses(outputs), AuxiliaryLoss("first_values", 1e-3, size)]


_, RwkvMambaEchoForSequenceClassification, RwkvMambaEchoForTokenClassification = heads_of(RwkvMambaEchoModel)

PLUGIN = Plugin(
    models=(
        RwkvMambaEchoModel,
        RwkvMambaEchoForCausalLM,
        RwkvMambaEchoForSequenceClassification,
        RwkvMambaEchoForTokenClassification,
    ),
    mixers={"echo": Echo, "echo_pair": EchoPair},
    presets={
        "echo-tiny": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
        },
    },
    lora_targets=("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    paper="none",
)

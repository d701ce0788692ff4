"""RetNet: retention in place of attention (Sun et al., 2023, arXiv:2307.08621).

Letters: b batch, t tokens, d width, h heads, k key width of a head, v value width of a head.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo.cache import State
from zoo.config import ZooConfig
from zoo.heads import heads_of
from zoo.mixer import RecurrentMixer, Tokens
from zoo.modeling import Block, ZooModel
from zoo.nn import Linear, rotate_pairs
from zoo.ops.decay_attention import decay_attention
from zoo.ops.fused import rms_norm


@strict
class RetNetConfig(ZooConfig):
    """Configuration of RetNet.

    Args:
        num_heads: number of retention heads h; head i decays by 1 - 2^(-5 - i) a token.
        value_size: width of the values of all heads together. Default: 2 * hidden_size.
        initializer_range: standard deviation of embedding and head. Default: hidden_size ** -0.5.
    """

    model_type = "zoo_retnet"
    default_mixers = ("retention",)
    sizes = (*ZooConfig.sizes, "num_heads", "value_size")
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise_gather_output",
        "layers.*.mixer.k_proj": "colwise_gather_output",
        "layers.*.mixer.v_proj": "colwise_gather_output",
        "layers.*.mixer.g_proj": "colwise_gather_output",
        "layers.*.channel_mixer.gate_proj": "colwise",
        "layers.*.channel_mixer.up_proj": "colwise",
        "layers.*.channel_mixer.down_proj": "rowwise",
    }

    hidden_act: str = "gelu"
    num_heads: int = 4
    value_size: int | None = None
    initializer_range: float | None = None

    def fill_defaults(self):
        self.value_size = self.value_size or 2 * self.hidden_size
        self.initializer_range = self.initializer_range or self.hidden_size**-0.5

    def validate_architecture(self):
        if self.hidden_size % (2 * self.num_heads) or self.value_size % self.num_heads:
            raise ValueError(
                f"a head needs an even key width and a whole value width: hidden_size {self.hidden_size} and "
                f"value_size {self.value_size} over num_heads {self.num_heads}"
            )


class Retention(RecurrentMixer):
    """Multi-scale retention (eq. 8): each head a matrix state that decays at its own fixed rate.

    Its state is that matrix and how many tokens the document has so far, the angle that its next key is turned by.
    """

    ops = ("decay_attention", "rms_norm")
    config_fields = ("num_heads", "value_size")

    def __init__(self, config: RetNetConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d, v = config.hidden_size, config.value_size
        self.q_proj = Linear(d, d, bias=False)
        self.k_proj = Linear(d, d, bias=False)
        self.v_proj = Linear(d, v, bias=False)
        self.g_proj = Linear(d, v, bias=False)
        self.o_proj = Linear(v, d, bias=False)

    @classmethod
    def state_shapes(cls, config: RetNetConfig, layer_idx: int) -> dict:
        h = config.num_heads
        return {
            "matrix": ((h, config.hidden_size // h, config.value_size // h), torch.float32),
            "position": ((), torch.long),
        }

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        matrix, position = state
        heads = (self.config.num_heads, -1)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = self._rotation(tokens.places(position, x.shape[1]), x)
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k * k.shape[-1] ** -0.5, cos, sin)
        y, matrix = decay_attention(
            *(q, k, v, self._log_decay(matrix), matrix, tokens.mask, tokens.segments), kernels=self.config.kernels
        )
        y = rms_norm(y, None, self.config.norm_eps, self.config.kernels).flatten(-2)
        position = tokens.count_last(position, x.shape[1])
        return self.o_proj(F.silu(self.g_proj(x)) * y), (matrix, position)

    def _log_decay(self, like: Tensor) -> Tensor:
        """log(1 - 2^(-5 - i)) for each head i, (h), in the dtype of the state whatever the weights are."""
        head = torch.arange(self.config.num_heads, device=like.device, dtype=like.dtype)
        return torch.log1p(-torch.exp2(-5 - head))

    def _rotation(self, places: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (b t k/2), of the angles of tokens at places (b t), in the dtype of x."""
        # In float32 an angle of a million tokens is off by several hundredths; Apple's GPUs have no float64.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        pairs = self.config.hidden_size // self.config.num_heads // 2
        frequency = 10000.0 ** -torch.linspace(0, 1, pairs, device=x.device, dtype=dtype)
        angle = places[..., None].to(dtype) * frequency
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def reset_parameters(self) -> None:
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            init.xavier_uniform_(proj.weight, gain=2**-2.5)
        init.xavier_uniform_(self.o_proj.weight)


class RetNetBlock(Block):
    def reset_parameters(self) -> None:
        for proj in self.channel_mixer.children() if self.channel_mixer is not None else ():
            if isinstance(proj, nn.Linear):
                init.kaiming_uniform_(proj.weight, a=math.sqrt(5))


class RetNetModel(ZooModel):
    config: RetNetConfig
    block_class = RetNetBlock


RetNetForCausalLM, RetNetForSequenceClassification, RetNetForTokenClassification = heads_of(RetNetModel)

"""RWKV-4: an average whose weights decay by channel (Peng et al., 2023, arXiv:2305.13048).

Letters: b batch, t tokens, d width.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init
from zoo.plugins.rwkv.modeling import RWKVConfig
from zoo.plugins.rwkv.parts import NO_DECAY, Place, TokenShift, reset_projections

from zoo.cache import State
from zoo.mixer import RecurrentMixer, Tokens
from zoo.nn import Linear
from zoo.ops.lse_scan import lse_scan


class TimeMixing4(RecurrentMixer):
    """o_proj(sigmoid(r) * wkv), wkv the average of v weighed by exp(k) and decaying by exp(-exp(time_decay)) (eq. 16).

    Its state is the last token and the average, kept so that weights of any size fit (appendix D).
    """

    ops = ("lse_scan",)
    parameter_options = {
        "shift.mu": NO_DECAY,
        "time_decay": {"lr_scale": 2.0},
        "bonus": {"lr_scale": 3.0},
    }

    def __init__(self, config: RWKVConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d = config.hidden_size
        self.shift = TokenShift(config, 3, mu_of_current=True)
        self.k_proj = Linear(d, d, bias=False)
        self.v_proj = Linear(d, d, bias=False)
        self.r_proj = Linear(d, d, bias=False)
        self.time_decay = nn.Parameter(torch.empty(d))
        self.bonus = nn.Parameter(torch.empty(d))
        self.o_proj = Linear(d, d, bias=False)

    @classmethod
    def state_shapes(cls, config: RWKVConfig, layer_idx: int) -> dict:
        shape = (config.hidden_size,)
        average = dict.fromkeys(("numerator", "denominator", "maximum"), (shape, torch.float32))
        return {"last": (shape, None), **average}

    def initial_state(self, x: Tensor) -> State:
        *zeros, maximum = super().initial_state(x)
        return *zeros, maximum.fill_(-torch.inf)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        last, *average = state
        (x_k, x_v, x_r), last = self.shift(x, last, tokens)
        log_decay = -self.time_decay.to(average[0].dtype).exp()
        y, average = lse_scan(
            *(self.k_proj(x_k), self.v_proj(x_v), log_decay, tuple(average), tokens.mask, tokens.segments),
            bonus=self.bonus,
            kernels=self.config.kernels,
        )
        r = self.r_proj(x_r).sigmoid()
        return self.o_proj(r * y.to(r.dtype)), (last, *average)

    def reset_parameters(self) -> None:
        place = Place(self.config, self.layer_idx)
        init.copy_(self.time_decay, -5 + 8 * place.ramp ** (0.7 + 1.3 * place.rise))
        init.copy_(self.bonus, math.log(0.3) + 0.5 * ((place.channel + 1) % 3 - 1))
        falling = place.share**place.fall
        init.copy_(self.shift.mu, torch.stack([falling, falling + 0.3 * place.rise, falling**0.5]))
        reset_projections({self.k_proj: 0.0, self.v_proj: 1.0, self.r_proj: 0.0, self.o_proj: 0.0})

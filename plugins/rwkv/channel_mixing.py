"""The channel mixers of RWKV: a token and the one before it through a squared ReLU.

Letters: b batch, t tokens, d width.
"""

from torch import Tensor
from torch.nn import functional as F
from transformers import initialization as init
from zoo.plugins.rwkv.modeling import RWKVConfig
from zoo.plugins.rwkv.parts import NO_DECAY, Place, TokenShift, reset_projections

from zoo.cache import State
from zoo.mixer import RecurrentMixer, Tokens
from zoo.nn import Linear


class ChannelMixing7(RecurrentMixer):
    """Version 7: v_proj(relu(k_proj(x_k))^2) (arXiv:2503.14456, section 4). Its state is the last token."""

    config_fields = ("intermediate_size",)
    parameter_options = {"shift.mu": NO_DECAY}

    def __init__(self, config: RWKVConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.shift = TokenShift(config, 1)
        self.k_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.v_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    @classmethod
    def state_shapes(cls, config: RWKVConfig, layer_idx: int) -> dict:
        return {"last": ((config.hidden_size,), None)}

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        (x_k,), last = self.shift(x, *state, tokens)
        k = F.relu(self.k_proj(x_k))  # squared as a product: `square` is `pow`, which takes longer for a token
        return self.v_proj(k * k), (last,)

    def reset_parameters(self) -> None:
        place = Place(self.config, self.layer_idx)
        init.copy_(self.shift.mu, 1 - place.share[None] ** place.fall**4)
        reset_projections({self.k_proj: 1.0, self.v_proj: 0.0})


class ChannelMixing6(ChannelMixing7):
    """Versions up to 6 have a receptance: sigmoid(r_proj(x_r)) gates what comes out (arXiv:2404.05892, section 4.1)."""

    def __init__(self, config: RWKVConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.shift = TokenShift(config, 2)
        self.r_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        (x_k, x_r), last = self.shift(x, *state, tokens)
        k = F.relu(self.k_proj(x_k))
        return self.r_proj(x_r).sigmoid() * self.v_proj(k * k), (last,)

    def reset_parameters(self) -> None:
        place = Place(self.config, self.layer_idx)
        init.copy_(self.shift.mu, (1 - place.share**place.fall**3).expand(2, -1))
        reset_projections({self.k_proj: 1.0, self.r_proj: 0.0, self.v_proj: 0.0})


class ChannelMixing4(ChannelMixing6):
    """Versions 4 and 5: the same, with the shares of the token itself as parameters (arXiv:2305.13048, eq. 18)."""

    def __init__(self, config: RWKVConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.shift = TokenShift(config, 2, mu_of_current=True)

    def reset_parameters(self) -> None:
        place = Place(self.config, self.layer_idx)
        init.copy_(self.shift.mu, (place.share**place.fall).expand(2, -1))
        tall = (self.config.intermediate_size / self.config.hidden_size) ** 0.5
        reset_projections({self.k_proj: max(1.0, tall), self.r_proj: 0.0, self.v_proj: 0.0})

"""What the versions of RWKV share: the token shift, low-rank maps, the norm of heads, rules of initialisation.

Letters: b batch, t tokens, d width, h heads, n width of a head, c inputs that a shift mixes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from zoo.plugins.rwkv.modeling import RWKVConfig

from zoo.mixer import Tokens
from zoo.nn import Linear
from zoo.ops.packing import segment_starts

NORM_EPS = 64e-5
"""Of the norm of heads. Version 5 writes it as 1e-5 for outputs that are divided by 8."""

NO_DECAY = {"weight_decay": 0.0}
"""For `parameter_options`: the authors let matrices of `nn.Linear` and the embedding decay, nothing else."""


class TokenShift(nn.Module):
    """Each token mixed with the one before it, in c ways: `x + mu * (previous - x)`.

    Versions 4 and 5 store 1 - mu, the share of the token itself (`mu_of_current`); tensors stay as they are published.
    """

    def __init__(self, config: RWKVConfig, ways: int, mu_of_current: bool = False):
        super().__init__()
        self.mu = nn.Parameter(torch.empty(ways, config.hidden_size))
        self.mu_of_current = mu_of_current

    def forward(self, x: Tensor, last: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """x (b t d), the last token before them (b d) -> mixed (c b t d), the last token (b d)."""
        previous, last = look_back(x, last, tokens)
        mu = self.mu.view(-1, 1, 1, x.shape[-1])
        if self.mu_of_current:
            return torch.addcmul(previous, x - previous, mu), last
        return torch.addcmul(x, previous - x, mu), last


def look_back(x: Tensor, last: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """x (b t d), the last token before them (b d) -> the token before each (b t d), 0 where a document starts, and the
    last real token (b d)."""
    if x.shape[1] == 1 and tokens.mask is None:
        return last[:, None], x[:, 0]
    joined = torch.cat([last[:, None], x], dim=1)
    previous = joined[:, :-1]
    starts = segment_starts(tokens.segments, tokens.mask, x)
    if starts is not None:
        previous = previous.masked_fill(starts[..., None], 0.0)
    if tokens.mask is None:
        return previous, joined[:, -1].clone()
    lengths = tokens.mask.sum(dim=1)
    return previous, joined.take_along_dim(lengths[:, None, None], dim=1).squeeze(1)


class LowRank(nn.Module):
    """bias + up(activation(down(x))), as arXiv:2503.14456 writes `loramlp`."""

    def __init__(self, config: RWKVConfig, rank: int, activation: type[nn.Module] = nn.Identity, bias: bool = True):
        super().__init__()
        self.down = Linear(config.hidden_size, rank, bias=False)
        self.activation = activation()
        self.up = Linear(rank, config.hidden_size, bias=False)
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if bias else None

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(b t d) -> (b t d), the bias added in the given precision."""
        y = self.up(self.activation(self.down(x)))
        return y if self.bias is None else self.bias.to(dtype or y.dtype) + y


class HeadNorm(nn.Module):
    """The layer norm of each head by itself, with weights and biases of the whole width: a group norm, `ln_x`."""

    def __init__(self, config: RWKVConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, y: Tensor) -> Tensor:
        """(b t h n) -> (b t d)"""
        y = F.layer_norm(y, y.shape[-1:], eps=NORM_EPS).flatten(-2)
        return torch.addcmul(self.bias, y, self.weight)


# -- initialisation ----------------------------------------------------------------------------------------------------


class Place:
    """Where a layer stands, and its channels: what the authors' rules of initialisation read."""

    def __init__(self, config: RWKVConfig, layer_idx: int):
        layers, d = config.num_hidden_layers, config.hidden_size
        self.rise = layer_idx / max(layers - 1, 1)
        """0 in the first layer, 1 in the last."""
        self.fall = 1 - layer_idx / layers
        """1 in the first layer, above 0 in the last."""
        self.layer_scale = (layer_idx + 1) / layers
        self.channel = torch.arange(d, dtype=torch.float64)
        self.share = self.channel / d
        """0 up to 1 over the channels."""
        self.ramp = self.channel / (d - 1)
        """0 to 1 over the channels, both included."""


def reset_norm(norm: HeadNorm, place: Place) -> None:
    init.constant_(norm.weight, place.layer_scale**0.7)
    init.zeros_(norm.bias)


def reset_projections(gains: dict[nn.Linear, float]) -> None:
    """Orthogonal weights of a gain; 0 makes them 0."""
    for proj, gain in gains.items():
        if gain:
            init.orthogonal_(proj.weight, gain=gain)
        else:
            init.zeros_(proj.weight)

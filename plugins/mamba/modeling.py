"""Mamba: selective state space models in place of attention (Gu and Dao, 2023, arXiv:2312.00752), and Mamba-2, whose
state space is an attention that decays (Dao and Gu, 2024, arXiv:2405.21060).

Letters: b batch, t tokens, d width, e inner channels, n states of a channel, r rank of the time step,
h heads, p channels of a head, g groups of heads.
"""

# ruff: noqa: N806
# A, B, C and D are capitals in the field.

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init

from zoo.cache import State
from zoo.config import NO_MIXER, ZooConfig
from zoo.heads import heads_of
from zoo.mixer import RecurrentMixer, Shared, Tokens
from zoo.modeling import Block, ZooModel
from zoo.nn import Linear, RMSNorm, ShortConv
from zoo.ops.decay_attention import decay_attention
from zoo.ops.fused import rms_norm, swiglu
from zoo.ops.selective_scan import selective_scan


@strict
class MambaConfig(ZooConfig):
    """Configuration of Mamba and Mamba-2, which are the mixers `mamba` and `mamba2`.

    Args:
        state_size: states n of a channel. Default: 16, with `mamba2` 128.
        expand: inner channels e for each of the width.
        conv_kernel: tokens that the short convolution sees.
        use_conv_bias: whether it has a bias.
        use_bias: whether the projections into and out of the mixer have one.
        time_step_rank: rank r of the projection to the time step, `mamba` only. Default: hidden_size / 16, rounded up.
        time_step_min, time_step_max: range of the time steps at the start of training.
        time_step_floor: the least of them.
        mixer_rms_eps: epsilon of RMS norms without weights on time step, B and C, as in Falcon Mamba, `mamba` only;
            None: there are none.
        head_dim: channels p of a head, `mamba2` only.
        n_groups: groups of heads with the same B and C, `mamba2` only.
        time_step_limit: least and largest time step, `mamba2` only; None: no limit.
        residual_in_fp32: whether the residual stream is float32 where weights are of lower precision.
    """

    model_type = "zoo_mamba"
    default_mixers = ("mamba",)
    default_channel_mixers = (NO_MIXER,)
    sizes = (
        *ZooConfig.sizes,
        *("state_size", "expand", "conv_kernel", "time_step_rank", "head_dim", "n_groups"),
    )
    base_model_tp_plan = {
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.out_proj": "colwise_gather_output",
    }

    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    state_size: int | None = None
    expand: int = 2
    conv_kernel: int = 4
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_rank: int | None = None
    time_step_min: float = 1e-3
    time_step_max: float = 1e-1
    time_step_floor: float = 1e-4
    mixer_rms_eps: float | None = None
    head_dim: int = 64
    n_groups: int = 1
    time_step_limit: list[float] | None = None
    residual_in_fp32: bool = True

    def fill_defaults(self):
        mixers = self.mixers or self.default_mixers
        self.state_size = self.state_size or (128 if "mamba2" in mixers else 16)
        self.time_step_rank = self.time_step_rank or math.ceil(self.hidden_size / 16)

    def validate_architecture(self):
        if not 0 < self.time_step_min <= self.time_step_max < math.inf:
            raise ValueError(
                f"time steps need a range: time_step_min {self.time_step_min}, time_step_max {self.time_step_max}"
            )
        if "mamba2" not in self.mixers:
            return
        if self.time_step_limit is not None and len(self.time_step_limit) != 2:
            raise ValueError(f"time_step_limit is the least and the largest, got {self.time_step_limit}")
        channels = self.expand * self.hidden_size
        if channels % (self.head_dim * self.n_groups):
            raise ValueError(
                f"groups need whole heads: expand {self.expand} times hidden_size {self.hidden_size} are {channels} "
                f"channels, over n_groups {self.n_groups} of heads of head_dim {self.head_dim}"
            )


class SelectiveStateSpace(RecurrentMixer):
    """What both versions share: the names of their parts, and how these are drawn.

    The continuous system h' = A h + B x, y = C h + D x has a decaying A = -exp(A_log); time step, B and C are functions
    of the token.
    """

    parameter_options = {name: {"weight_decay": 0.0} for name in ("A_log", "D", "dt_bias")}
    in_proj: nn.Linear
    conv1d: ShortConv
    out_proj: nn.Linear
    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter

    def _time_step(self, dt: Tensor, like: Tensor) -> Tensor:
        """softplus(dt + bias), in the dtype of the state whatever the weights are."""
        return F.softplus(dt.to(like.dtype) + self.dt_bias)

    def _rates(self, like: Tensor) -> Tensor:
        """A, in the dtype of the state."""
        return -self.A_log.to(like.dtype).exp()

    def reset_parameters(self) -> None:
        """As the authors' code: projections as `nn.Linear` draws them, that onto the residual stream scaled down."""
        config = self.config
        _draw_uniform(self.in_proj, self.in_proj.in_features**-0.5)
        branches = len(config.mixers) + sum(name != NO_MIXER for name in config.channel_mixers)
        _draw_uniform(self.out_proj, (self.out_proj.in_features * branches) ** -0.5)
        init.ones_(self.D)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(low, high).exp()
        dt = dt.clamp(min=config.time_step_floor)
        init.copy_(self.dt_bias, dt + (-torch.expm1(-dt)).log())  # the inverse of softplus


def _draw_uniform(linear: nn.Linear, bound: float) -> None:
    init.uniform_(linear.weight, -bound, bound)


class Mamba(SelectiveStateSpace):
    """The selective state space of Mamba (arXiv:2312.00752, section 3): n states for each channel.

    Its state are the last inputs of the convolution and the states of the channels.
    """

    ops = ("short_conv", "selective_scan", "swiglu", "rms_norm")
    config_fields = (
        *("state_size", "expand", "conv_kernel", "use_conv_bias", "use_bias", "time_step_rank"),
        *("time_step_min", "time_step_max", "time_step_floor", "mixer_rms_eps"),
    )

    def __init__(self, config: MambaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d, e, n, r = config.hidden_size, config.expand * config.hidden_size, config.state_size, config.time_step_rank
        self.widths = (r, n, n)  # of the time step, B and C
        self.in_proj = Linear(d, 2 * e, bias=config.use_bias)
        self.conv1d = ShortConv(config, e, config.conv_kernel, bias=config.use_conv_bias)
        self.x_proj = Linear(e, sum(self.widths), bias=False)
        self.dt_proj = Linear(r, e, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(e))
        self.A_log = nn.Parameter(torch.empty(e, n))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = Linear(e, d, bias=config.use_bias)

    @classmethod
    def state_shapes(cls, config: MambaConfig, layer_idx: int) -> dict:
        e = config.expand * config.hidden_size
        return {
            "conv": ShortConv.state_shape(e, config.conv_kernel),
            "ssm": ((e, config.state_size), torch.float32),
        }

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        conv, ssm = state
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, conv = self.conv1d(x, conv, tokens)
        x = F.silu(x)
        dt, B, C = self._select(x)
        dt = self._time_step(self.dt_proj(dt), ssm)
        y, ssm = selective_scan(
            *(x, dt, self._rates(ssm), B, C, ssm, tokens.mask, tokens.segments), kernels=self.config.kernels
        )
        y = swiglu(z, torch.addcmul(y, self.D.to(y.dtype), x), self.config.kernels)
        return self.out_proj(y), (conv, ssm)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the token, of x (b t e): time step (b t r), B and C (b t n)."""
        selected = self.x_proj(x).split(self.widths, dim=-1)
        if (eps := self.config.mixer_rms_eps) is not None:
            selected = tuple(rms_norm(part, None, eps, self.config.kernels) for part in selected)
        return selected

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _draw_uniform(self.x_proj, self.x_proj.in_features**-0.5)
        _draw_uniform(self.dt_proj, self.config.time_step_rank**-0.5)
        states = torch.arange(1, self.config.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, states.log().expand_as(self.A_log))


class GatedRMSNorm(nn.Module):
    """The RMS norm of y silu(z) over the channels of each group (arXiv:2405.21060, section 7)."""

    def __init__(self, config: MambaConfig, channels: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and the gate z (b t e) -> (b t e)."""
        config, groups = self.config, self.config.n_groups
        y = swiglu(z, y, config.kernels)
        if groups == 1:
            return rms_norm(y, self.weight, config.norm_eps, config.kernels)
        y = y.unflatten(-1, (groups, -1))
        return rms_norm(y, None, config.norm_eps, config.kernels).flatten(-2) * self.weight


class Mamba2(SelectiveStateSpace):
    """The state space of Mamba-2 (arXiv:2405.21060, sections 6 and 7): heads of p channels with one decay each.

    Its state are the last inputs of the convolution and a matrix for each head.
    """

    ops = ("short_conv", "decay_attention", "swiglu", "rms_norm")
    config_fields = (
        *("state_size", "expand", "conv_kernel", "use_conv_bias", "use_bias", "head_dim", "n_groups"),
        *("time_step_min", "time_step_max", "time_step_floor", "time_step_limit"),
    )

    def __init__(self, config: MambaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d, e, n, g = config.hidden_size, config.expand * config.hidden_size, config.state_size, config.n_groups
        h = e // config.head_dim
        self.widths = (e, e + 2 * g * n, h)  # of z; of x, B and C together; of the time step
        self.in_proj = Linear(d, sum(self.widths), bias=config.use_bias)
        self.conv1d = ShortConv(config, self.widths[1], config.conv_kernel, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(h))
        self.norm = GatedRMSNorm(config, e)
        self.out_proj = Linear(e, d, bias=config.use_bias)

    @classmethod
    def state_shapes(cls, config: MambaConfig, layer_idx: int) -> dict:
        e, n, p = config.expand * config.hidden_size, config.state_size, config.head_dim
        return {
            "conv": ShortConv.state_shape(e + 2 * config.n_groups * n, config.conv_kernel),
            "ssm": ((e // p, n, p), torch.float32),
        }

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        conv, ssm = state
        z, x, dt = self.in_proj(x).split(self.widths, dim=-1)
        x, conv = self.conv1d(x, conv, tokens)
        x, B, C = self._heads(F.silu(x))
        dt = self._time_step(dt, ssm)
        if self.config.time_step_limit is not None:
            dt = dt.clamp(*self.config.time_step_limit)
        values = (dt[..., None] * x).to(x.dtype)
        y, ssm = decay_attention(
            *(C, B, values, dt * self._rates(ssm), ssm, tokens.mask, tokens.segments), kernels=self.config.kernels
        )
        y = torch.addcmul(y, self.D.to(y.dtype)[:, None], x).flatten(-2)
        return self.out_proj(self.norm(y, z)), (conv, ssm)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of what left the convolution: x (b t h p), B and C (b t h n)."""
        config = self.config
        e, n, g = self.widths[0], config.state_size, config.n_groups
        x, B, C = x.split((e, g * n, g * n), dim=-1)
        x = x.unflatten(-1, (-1, config.head_dim))
        heads = x.shape[2] // g
        B, C = (z.unflatten(-1, (g, 1, n)).expand(-1, -1, -1, heads, -1).flatten(2, 3) for z in (B, C))
        return x, B, C

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.copy_(self.A_log, torch.empty_like(self.A_log, dtype=torch.float32).uniform_(1, 16).log())


class StreamRMSNorm(RMSNorm):
    """The norm of a residual stream that may be wider than the weights: in the stream's dtype, given in theirs."""

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.weight.to(x.dtype), self.eps, self.config.kernels)
        return y.to(self.weight.dtype)


class MambaBlock(Block):
    norm_class = StreamRMSNorm


class MambaModel(ZooModel):
    config: MambaConfig
    block_class = MambaBlock

    def run_layers(self, x: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Shared]:
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        return super().run_layers(x, tokens, past_key_values)


MambaForCausalLM, MambaForSequenceClassification, MambaForTokenClassification = heads_of(MambaModel)

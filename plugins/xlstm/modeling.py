"""xLSTM: LSTMs with exponential gates, and with a matrix for a memory (Beck et al., 2024, arXiv:2405.04517).

Three mixers: `mlstm` is that of the large models (Beck et al., 2025, arXiv:2503.13427), `mlstm_preup` and `slstm` are
those of the first paper.

Letters: b batch, t tokens, d width, h heads, k key width of a head, v value width of a head, c channels of a head.
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from zoo.cache import State
from zoo.config import NO_MIXER, ZooConfig
from zoo.heads import heads_of
from zoo.mixer import RecurrentMixer, Tokens
from zoo.modeling import Block, ZooModel
from zoo.nn import Linear, RMSNorm, ShortConv, soft_cap
from zoo.ops.cell_scan import cell_scan
from zoo.ops.decay_attention import normalized_decay_attention


@strict
class XLSTMConfig(ZooConfig):
    """Configuration of xLSTM; the defaults are those of the large models, the presets have those of the first paper.

    Args:
        num_heads: number of heads h of every mixer.
        key_size: width of the queries and keys of all heads of `mlstm` together. Default: hidden_size / 2.
        value_size: width of its values. Default: hidden_size.
        gate_soft_cap: c in c tanh(x / c), which its input and forget gates go through before they are exponentiated.
        inner_size: width of what `mlstm_preup` projects up to. Default: 2 * hidden_size, up to a multiple of 64.
        qkv_block_size: side of the blocks on the diagonal of its projections to queries, keys and values.
        conv_kernel: taps of the convolution of `mlstm_preup` and `slstm`.
        intermediate_size: inner width of the channel mixer. Default: 8/3 * hidden_size, up to a multiple of 64.
        channel_mixers: as of every model. Default: "none" behind `mlstm_preup`, else "swiglu".
        norm_type: of the residual stream: `rms_norm`, or `layer_norm` with a weight stored as its difference from 1.
        output_logit_soft_cap: likewise of the logits; None: no cap.
        initializer_range: standard deviation of freshly drawn weights. Default: sqrt(2 / (5 * hidden_size)).
    """

    model_type = "zoo_xlstm"
    default_mixers = ("mlstm",)
    sizes = (*ZooConfig.sizes, "num_heads", "key_size", "value_size", "inner_size", "qkv_block_size", "conv_kernel")
    base_model_tp_plan = {
        "layers.*.channel_mixer.gate_proj": "colwise",
        "layers.*.channel_mixer.up_proj": "colwise",
        "layers.*.channel_mixer.down_proj": "rowwise",
    }

    num_heads: int = 4
    key_size: int | None = None
    value_size: int | None = None
    gate_soft_cap: float = 15.0
    inner_size: int | None = None
    qkv_block_size: int = 4
    conv_kernel: int = 4
    intermediate_size: int | None = None
    norm_type: str = "rms_norm"
    output_logit_soft_cap: float | None = 30.0
    initializer_range: float | None = None

    @property
    def soft_cap(self) -> float | None:
        return self.output_logit_soft_cap

    def fill_defaults(self):
        d = self.hidden_size
        self.key_size = self.key_size or d // 2
        self.value_size = self.value_size or d
        self.inner_size = self.inner_size or _round_up(2 * d)
        self.intermediate_size = self.intermediate_size or _round_up(8 * d // 3)
        self.initializer_range = self.initializer_range or (2 / (5 * d)) ** 0.5
        self.channel_mixers = self.channel_mixers or [
            NO_MIXER if name == "mlstm_preup" else "swiglu" for name in self.mixers or self.default_mixers
        ]

    def validate_architecture(self):
        divided = {"mlstm": ("key_size", "value_size"), "mlstm_preup": ("inner_size",), "slstm": ("hidden_size",)}
        for name in [name for mixer in dict.fromkeys(self.mixers) for name in divided.get(mixer, ())]:
            if (width := getattr(self, name)) % self.num_heads:
                raise ValueError(f"{name} ({width}) must be a multiple of num_heads ({self.num_heads})")
        if "mlstm_preup" in self.mixers and (inner := self.inner_size) % (block := self.qkv_block_size):
            raise ValueError(f"inner_size ({inner}) must be a multiple of qkv_block_size ({block})")
        if self.norm_type not in ("rms_norm", "layer_norm"):
            raise ValueError(f"norm_type is 'rms_norm' or 'layer_norm', got {self.norm_type!r}")


def _round_up(width: int) -> int:
    """The next multiple of 64."""
    return width + -width % 64


# -- norms -------------------------------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """The layer norm over the last dimension, without a bias: of x (b t d), or of every head of x (b t h v) alone.

    Either way it gives (b t d), with a weight for each of the d channels.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(2) * self.weight


class ResidualLayerNorm(LayerNorm):
    """The same with a weight that is stored as its difference from 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps).flatten(2) * (1 + self.weight)


def make_stream_norm(config: XLSTMConfig) -> nn.Module:
    """A norm of the residual stream."""
    if config.norm_type == "rms_norm":
        return RMSNorm(config)
    return ResidualLayerNorm(config.hidden_size, config.norm_eps)


# -- the matrix memory -------------------------------------------------------------------------------------------------


class _MatrixMemory(RecurrentMixer):
    """The mLSTM cell (eq. 19-27): a matrix C a head with exponential gates, and a normaliser n, in units of exp(m)."""

    @staticmethod
    def memory_shapes(heads: int, key_size: int, value_size: int) -> dict:
        """The last three entries of `state_shapes`, for widths of all heads together."""
        k, v = key_size // heads, value_size // heads
        return {
            "matrix": ((heads, k, v), torch.float32),
            "normalizer": ((heads, k), torch.float32),
            "maximum": ((heads,), torch.float32),
        }

    def remember(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, memory: State, tokens: Tokens
    ) -> tuple[Tensor, State]:
        """q, k (b t h*k), v (b t h*v), gates i, f (b t h) before exp and sigmoid -> what is read (b t h v), memory."""
        q, k, v = (x.unflatten(-1, (self.config.num_heads, -1)) for x in (q, k, v))
        return normalized_decay_attention(
            *(q * q.shape[-1] ** -0.5, k, v, F.logsigmoid(f), i, memory, tokens.mask, tokens.segments),
            kernels=self.config.kernels,
        )

    def reset_gates(self, input_bias: float, deviation: float) -> None:
        """Gates that do not look at the token yet, with long memories of several lengths."""
        init.zeros_(self.igate.weight)
        init.normal_(self.igate.bias, mean=input_bias, std=deviation)
        init.zeros_(self.fgate.weight)
        init.copy_(self.fgate.bias, torch.linspace(3, 6, self.config.num_heads))


class MLSTM(_MatrixMemory):
    """The mLSTM of the large models (arXiv:2503.13427), which works at the width of the residual stream."""

    ops = ("decay_attention",)
    config_fields = ("num_heads", "key_size", "value_size", "gate_soft_cap")

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d, key_size, value_size = config.hidden_size, config.key_size, config.value_size
        self.q_proj = Linear(d, key_size, bias=False)
        self.k_proj = Linear(d, key_size, bias=False)
        self.v_proj = Linear(d, value_size, bias=False)
        self.igate = Linear(d, config.num_heads)
        self.fgate = Linear(d, config.num_heads)
        self.ogate = Linear(d, value_size, bias=False)
        self.multihead_norm = LayerNorm(value_size, config.norm_eps)
        self.out_proj = Linear(value_size, d, bias=False)

    @classmethod
    def state_shapes(cls, config: XLSTMConfig, layer_idx: int) -> dict:
        return cls.memory_shapes(config.num_heads, config.key_size, config.value_size)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        dtype = state[0].dtype
        i, f = (soft_cap(gate(x).to(dtype), self.config.gate_soft_cap) for gate in (self.igate, self.fgate))
        y, state = self.remember(self.q_proj(x), self.k_proj(x), self.v_proj(x), i, f, state, tokens)
        return self.out_proj(torch.sigmoid(self.ogate(x)) * self.multihead_norm(y)), state

    def reset_parameters(self) -> None:
        self.reset_gates(input_bias=-10.0, deviation=0.0)
        init.zeros_(self.ogate.weight)
        _init_output(self.out_proj, self.config)


class MLSTMPreUp(_MatrixMemory):
    """The mLSTM block of the first paper (its figure 11): up-projection, convolution, mLSTM, gate, down-projection."""

    ops = ("decay_attention", "short_conv")
    config_fields = ("num_heads", "inner_size", "qkv_block_size", "conv_kernel")

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d, inner, block = config.hidden_size, config.inner_size, config.qkv_block_size
        self.up_proj = Linear(d, 2 * inner, bias=False)
        self.conv = ShortConv(config, inner, config.conv_kernel)
        self.q_weight, self.k_weight, self.v_weight = (
            nn.Parameter(torch.empty(inner // block, block, block)) for _ in range(3)
        )
        self.igate = Linear(3 * inner, config.num_heads)
        self.fgate = Linear(3 * inner, config.num_heads)
        self.multihead_norm = ResidualLayerNorm(inner, config.norm_eps)
        self.learnable_skip = nn.Parameter(torch.empty(inner))
        self.down_proj = Linear(inner, d, bias=False)

    @classmethod
    def state_shapes(cls, config: XLSTMConfig, layer_idx: int) -> dict:
        return {
            "conv": ShortConv.state_shape(config.inner_size, config.conv_kernel),
            **cls.memory_shapes(config.num_heads, config.inner_size, config.inner_size),
        }

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        conv, *memory = state
        x, z = self.up_proj(x).chunk(2, dim=-1)
        mixed, conv = self.conv(x, conv, tokens)
        mixed = F.silu(mixed)
        q, k, v = blockwise(mixed, self.q_weight), blockwise(mixed, self.k_weight), blockwise(x, self.v_weight)
        qkv = torch.cat([q, k, v], dim=-1)
        i, f = (gate(qkv).to(memory[0].dtype) for gate in (self.igate, self.fgate))
        y, memory = self.remember(q, k, v, i, f, memory, tokens)
        y = self.multihead_norm(y) + self.learnable_skip * mixed
        return self.down_proj(y * F.silu(z)), (conv, *memory)

    def reset_parameters(self) -> None:
        for weight in (self.q_weight, self.k_weight, self.v_weight):
            init.normal_(weight, std=self.config.initializer_range)
        self.reset_gates(input_bias=0.0, deviation=0.1)
        init.ones_(self.learnable_skip)
        init.zeros_(self.multihead_norm.weight)
        _init_output(self.down_proj, self.config)


# -- the scalar memory -------------------------------------------------------------------------------------------------


class SLSTM(RecurrentMixer):
    """The sLSTM of the first paper (eq. 8-17, figure 10), whose gates see the last output of their head."""

    ops = ("cell_scan", "short_conv")
    config_fields = ("num_heads", "conv_kernel")
    parameter_options = {"recurrent_weight": {"weight_decay": 0.0}, "bias": {"weight_decay": 0.0}}

    def __init__(self, config: XLSTMConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        h, c = config.num_heads, config.hidden_size // config.num_heads
        self.conv = ShortConv(config, config.hidden_size, config.conv_kernel)
        self.igate_weight, self.fgate_weight, self.zgate_weight, self.ogate_weight = (
            nn.Parameter(torch.empty(h, c, c)) for _ in range(4)
        )
        self.recurrent_weight = nn.Parameter(torch.empty(h, c, 4 * c))  # from a channel to the gates i, f, z, o
        self.bias = nn.Parameter(torch.empty(h, 4 * c))
        self.multihead_norm = ResidualLayerNorm(config.hidden_size, config.norm_eps)

    @classmethod
    def state_shapes(cls, config: XLSTMConfig, layer_idx: int) -> dict:
        cell = (config.num_heads, config.hidden_size // config.num_heads), torch.float32
        return {
            "conv": ShortConv.state_shape(config.hidden_size, config.conv_kernel),
            **dict.fromkeys(("output", "cell", "normalizer", "maximum"), cell),
        }

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        conv, *cell = state
        mixed, conv = self.conv(x, conv, tokens)
        mixed = F.silu(mixed)
        inputs = (mixed, self.igate_weight), (mixed, self.fgate_weight), (x, self.zgate_weight), (x, self.ogate_weight)
        gates = torch.cat([blockwise(*pair).unflatten(-1, (self.config.num_heads, -1)) for pair in inputs], dim=-1)
        y, cell = cell_scan(
            *("slstm", gates, self.recurrent_weight, self.bias, tuple(cell), tokens.mask, tokens.segments),
            kernels=self.config.kernels,
        )
        return self.multihead_norm(y.to(x.dtype)), (conv, *cell)

    def reset_parameters(self) -> None:
        for weight in (self.igate_weight, self.fgate_weight, self.zgate_weight, self.ogate_weight):
            init.normal_(weight, std=self.config.initializer_range)
        init.zeros_(self.recurrent_weight)
        depth = self.layer_idx / max(1, self.config.num_hidden_layers - 1)
        i, _, z, o = self.bias.new_zeros(self.bias.shape).chunk(4, dim=-1)
        forget = 5 - 12 * torch.linspace(0, 1, i.shape[-1], device=i.device) ** (0.3 + 1.3 * depth)
        init.copy_(self.bias, torch.cat([i, forget.to(i.dtype).expand_as(i), z, o], dim=-1))
        init.zeros_(self.multihead_norm.weight)


# -- the model ---------------------------------------------------------------------------------------------------------


def blockwise(x: Tensor, weight: Tensor) -> Tensor:
    """x (b t n*i) times a matrix with n blocks (n o i) on its diagonal -> (b t n*o)."""
    n, o, i = weight.shape
    joined = math.gcd(n, max(1, 16 // i))
    if joined > 1 and x.shape[1] > 1:  # many tokens times tiny blocks are slow: join some, with zeros between them
        diagonal = torch.eye(joined, dtype=weight.dtype, device=weight.device)
        weight = torch.einsum("ngoi,gh->ngohi", weight.unflatten(0, (-1, joined)), diagonal)
        weight = weight.reshape(n // joined, joined * o, joined * i)
    return torch.einsum("btni,noi->btno", x.unflatten(-1, (weight.shape[0], -1)), weight).flatten(2)


def _init_output(proj: nn.Linear, config: XLSTMConfig) -> None:
    """What leads back to the residual stream starts small, the more so the deeper the model."""
    init.normal_(proj.weight, std=2 / config.num_hidden_layers / config.hidden_size**0.5)


class XLSTMBlock(Block):
    norm_class = staticmethod(make_stream_norm)

    def reset_parameters(self) -> None:
        if self.channel_mixer is not None:
            _init_output(self.channel_mixer.down_proj, self.mixer.config)


class XLSTMModel(ZooModel):
    config: XLSTMConfig
    block_class = XLSTMBlock

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResidualLayerNorm):
            init.zeros_(module.weight)


XLSTMForCausalLM, XLSTMForSequenceClassification, XLSTMForTokenClassification = heads_of(XLSTMModel)

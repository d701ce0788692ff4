"""Griffin and Hawk: gated linear recurrences, with local attention in between or alone (De et al., 2024,
arXiv:2402.19427), as RecurrentGemma has them (Botev et al., 2024, arXiv:2404.07839).

Letters: b batch, t tokens, d width, e channels of the recurrence, h blocks of the gates.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init

from zoo.cache import State
from zoo.config import RotaryAttentionConfig
from zoo.heads import heads_of
from zoo.mixer import RecurrentMixer, Shared, Tokens
from zoo.modeling import Block, ZooModel
from zoo.nn import GatedActivation, GatedMLP, Linear, RMSNorm, ShortConv, SlidingWindowAttention
from zoo.ops.fused import rms_norm
from zoo.ops.linear_scan import linear_scan
from zoo.ops.packing import segment_starts

SHARPNESS = 8.0
"""The c of the paper (section 2.4): a channel decays by a^(c r), at most."""

MAX_SQRT_GRADIENT = 1000.0
"""Bound on the derivative of the square root, as in the authors' code: at a decay of 1 it has none."""


@strict
class GriffinConfig(RotaryAttentionConfig):
    """Configuration of Griffin and Hawk: the fields of `RotaryAttentionConfig`, and more. Griffin is the default; Hawk
    has `mixers: [rglru]`.

    Args:
        intermediate_size: inner width of the channel mixer; transformers' RecurrentGemma states twice of it.
        lru_width: channels e of the recurrence. Default: hidden_size.
        conv_kernel: tokens that the convolution before the recurrence sees.
        num_attention_heads: query heads of attention, and blocks h of the gates of the recurrence.
        num_key_value_heads: heads of keys and values. Default: one for all queries.
        sliding_window: tokens that attention sees, the token itself included.
        attention_bias: whether queries, keys and values have biases; the output projection has one.
        rope_parameters: the rotary embedding, in transformers' form. Default: it turns half of a head.
        logits_soft_cap: bound that the logits approach.
        initializer_range: standard deviation of the embedding. Default: hidden_size ** -0.5.
    """

    model_type = "zoo_griffin"
    default_mixers = ("rglru", "rglru", "local_attention")
    default_channel_mixers = ("griffin_mlp",)
    sizes = (*RotaryAttentionConfig.sizes, "lru_width", "conv_kernel")
    base_model_tp_plan = {
        "layers.*.channel_mixer.gate_proj": "colwise",
        "layers.*.channel_mixer.up_proj": "colwise",
        "layers.*.channel_mixer.down_proj": "rowwise",
    }

    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    lru_width: int | None = None
    conv_kernel: int = 4
    num_key_value_heads: int = 1
    sliding_window: int = 2048
    max_position_embeddings: int = 8192
    logits_soft_cap: float | int = 30.0
    initializer_range: float | None = None

    @property
    def soft_cap(self) -> float:
        return self.logits_soft_cap

    def fill_defaults(self):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        self.rope_parameters = self.rope_parameters or rope
        super().fill_defaults()
        self.lru_width = self.lru_width or self.hidden_size
        self.initializer_range = self.initializer_range or self.hidden_size**-0.5

    def validate_architecture(self):
        if self.lru_width % self.num_attention_heads:
            raise ValueError(
                f"the gates need whole blocks: lru_width {self.lru_width} over num_attention_heads "
                f"{self.num_attention_heads}"
            )
        part = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if (turned := int(self.head_dim * part)) < 2 or turned % 2:
            raise ValueError(
                f"the rotary embedding turns pairs: partial_rotary_factor {part} of head_dim {self.head_dim} is "
                f"{turned}"
            )
        if not self.logits_soft_cap > 0:
            raise ValueError(f"logits_soft_cap must be positive, got {self.logits_soft_cap}")


class BoundedSqrt(torch.autograd.Function):
    """The square root of x >= 0, whose derivative is taken to be at most `MAX_SQRT_GRADIENT`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad / (2 * root).clamp(min=1 / MAX_SQRT_GRADIENT)


class BlockDiagonalLinear(nn.Module):
    """A linear layer with a weight for each of h blocks of channels: what the gates are made with."""

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, channels // blocks, channels // blocks))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b t e) -> (b t e), x W + bias by blocks: a weight maps from its rows to its columns."""
        blocks, width, _ = self.weight.shape
        bias = self.bias.view(blocks, 1, width)
        y = torch.baddbmm(bias, x.reshape(-1, blocks, width).transpose(0, 1), self.weight)
        return y.transpose(0, 1).reshape(x.shape)


class RGLRU(RecurrentMixer):
    """The recurrent block (section 2.3): a convolution and the RG-LRU beside a branch that gates them (section 2.4).

    Its state are the last inputs of the convolution, the state of the channels, and whether there was any token: the
    first one of a sequence is written whole.
    """

    ops = ("short_conv", "linear_scan")
    config_fields = ("lru_width", "conv_kernel", "num_attention_heads", "hidden_act")

    def __init__(self, config: GriffinConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        d, e, h = config.hidden_size, config.lru_width, config.num_attention_heads
        self.y_proj = Linear(d, e)
        self.x_proj = Linear(d, e)
        self.conv1d = ShortConv(config, e, config.conv_kernel)
        self.input_gate = BlockDiagonalLinear(e, h)
        self.recurrence_gate = BlockDiagonalLinear(e, h)
        self.Lambda = nn.Parameter(torch.empty(e))
        self.out_proj = Linear(e, d)
        self.act = GatedActivation(config)

    @classmethod
    def state_shapes(cls, config: GriffinConfig, layer_idx: int) -> dict:
        return {
            "conv": ShortConv.state_shape(config.lru_width, config.conv_kernel),
            "h": ((config.lru_width,), torch.float32),
            "begun": ((), torch.bool),
        }

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        conv, h, begun = state
        y = self.y_proj(x)
        x, conv = self.conv1d(self.x_proj(x), conv, tokens)
        log_a = self._log_decay(x, h).masked_fill(_first_tokens(begun, x, tokens)[..., None], -torch.inf)
        multiplier = BoundedSqrt.apply(-torch.expm1(2 * log_a))
        gated = multiplier * (torch.sigmoid(self.input_gate(x)) * x)
        states, h = linear_scan(log_a.exp(), gated, h, tokens.mask, kernels=self.config.kernels)
        begun = torch.ones_like(begun) if tokens.mask is None else begun | tokens.mask[:, 0]
        return self.out_proj(self.act(y, states.to(y.dtype))), (conv, h, begun)

    def _log_decay(self, x: Tensor, like: Tensor) -> Tensor:
        """log a = -c softplus(Lambda) r of x (b t e), in the dtype of the state whatever the weights are."""
        slowest = -SHARPNESS * F.softplus(self.Lambda.to(like.dtype))
        return slowest * torch.sigmoid(self.recurrence_gate(x).to(like.dtype))

    def reset_parameters(self) -> None:
        """As the authors' code: the square of exp(-softplus(Lambda)) is uniform, between 0.9^2 and 0.999^2."""
        config = self.config
        for proj in (self.y_proj, self.x_proj):
            init.normal_(proj.weight, std=config.hidden_size**-0.5)
        _draw_onto_stream(self.out_proj, config)
        init.normal_(self.conv1d.weight, std=(0.01 / config.conv_kernel) ** 0.5)
        init.zeros_(self.conv1d.bias)
        for gate in (self.input_gate, self.recurrence_gate):
            init.normal_(gate.weight, std=gate.weight.shape[1] ** -0.5)
            init.zeros_(gate.bias)
        squares = torch.empty_like(self.Lambda, dtype=torch.float32).uniform_(0.9**2, 0.999**2)
        init.copy_(self.Lambda, torch.expm1(-0.5 * squares.log()).log())


def _first_tokens(begun: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
    """(b t), True at the first token of every document."""
    first = ~begun[:, None]
    if x.shape[1] > 1:
        first = F.pad(first, (0, x.shape[1] - 1))
    starts = segment_starts(tokens.segments, tokens.mask, x)
    return first if starts is None else first | starts


def _draw_onto_stream(linear: nn.Linear, config: GriffinConfig) -> None:
    """A projection onto the residual stream: its variance is that of the others, over half of the depth."""
    init.normal_(linear.weight, std=(2 / config.num_hidden_layers / linear.in_features) ** 0.5)


class LocalAttention(SlidingWindowAttention):
    """Local attention (section 2.3): a window, and a bias on the output."""

    def __init__(self, config: GriffinConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.o_proj.bias = nn.Parameter(torch.empty(config.hidden_size))

    def reset_parameters(self) -> None:
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            init.normal_(proj.weight, std=self.config.hidden_size**-0.5)
        init.zeros_(self.o_proj.bias)
        _draw_onto_stream(self.o_proj, self.config)


class GriffinMLP(GatedMLP):
    """The gated channel mixer (section 2.2), with biases."""

    def __init__(self, config: GriffinConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        for proj in (self.gate_proj, self.up_proj, self.down_proj):
            proj.bias = nn.Parameter(torch.empty(proj.out_features))

    def reset_parameters(self) -> None:
        for proj in (self.gate_proj, self.up_proj):
            init.normal_(proj.weight, std=self.config.hidden_size**-0.5)
            init.zeros_(proj.bias)
        _draw_onto_stream(self.down_proj, self.config)
        init.zeros_(self.down_proj.bias)


class GriffinRMSNorm(RMSNorm):
    """The RMS norm with weights around 0: it multiplies by 1 + weight, in float32 or more."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = rms_norm(x.to(dtype), 1 + self.weight.to(dtype), self.eps, self.config.kernels)
        return y.to(x.dtype)


class GriffinBlock(Block):
    norm_class = GriffinRMSNorm


class GriffinModel(ZooModel):
    config: GriffinConfig
    block_class = GriffinBlock

    def __init__(self, config: GriffinConfig):
        super().__init__(config)
        # Rounded as the authors trained it; a number, as a tensor would have to be moved along.
        self.embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16, device="cpu").item()

    def run_layers(self, x: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Shared]:
        return super().run_layers(x * self.embedding_scale, tokens, past_key_values)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GriffinRMSNorm):
            init.zeros_(module.weight)


GriffinForCausalLM, GriffinForSequenceClassification, GriffinForTokenClassification = heads_of(GriffinModel)

"""Parts that several architectures use: norms, head, gated MLP, short convolution, softmax attention, rotations.

Letters: b batch, t queries, s keys, h heads, d head width, r rotated width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from zoo.cache import State
from zoo.config import ZooConfig
from zoo.mixer import Mixer, RecurrentMixer, Shared, Tokens
from zoo.ops.fused import geglu, rms_norm, rotate_halves, swiglu
from zoo.ops.linear import linear
from zoo.ops.linear_cross_entropy import linear_cross_entropy
from zoo.ops.short_conv import short_conv


class RMSNorm(nn.RMSNorm):
    """The root-mean-square norm over the last dimension (arXiv:1910.07467), of `size` channels or the stream's."""

    ops = ("rms_norm",)

    def __init__(self, config: ZooConfig, size: int | None = None):
        super().__init__(size or config.hidden_size, config.norm_eps)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.config.kernels)


class Linear(nn.Linear):
    """A linear layer, whose products are not PyTorch's where those are slow (`zoo.ops.linear`)."""

    ops = ("linear",)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LanguageModelHead(Linear):
    """The logits of the vocabulary, or the loss of what they shall predict.

    Its weight is used in `forward` only: there it is whole, where FSDP shards it.
    """

    def __init__(self, config: ZooConfig):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.config = config

    def forward(self, x: Tensor, targets: Tensor | None = None, **options) -> Tensor:
        """x (b t d) -> logits (b t v); with targets (b t) a loss, without the logits of all tokens at once.

        Args:
            options: of the loss, those of `zoo.ops.linear_cross_entropy`.
        """
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, self.bias, kernels=self.config.kernels, **options)


class LayerNorm(nn.LayerNorm):
    """The layer norm over the last dimension (arXiv:1607.06450), with a bias."""

    def __init__(self, config: ZooConfig):
        super().__init__(config.hidden_size, config.norm_eps)


class ShortConv(nn.Module):
    """A causal convolution of each channel along the tokens; its state are the last inputs (`zoo.ops.short_conv`)."""

    ops = ("short_conv",)

    def __init__(self, config: ZooConfig, channels: int, width: int, bias: bool = True):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    @staticmethod
    def state_shape(channels: int, width: int) -> tuple[tuple[int, ...], torch.dtype]:
        """The entry of `RecurrentMixer.state_shapes` for such a convolution."""
        return (width - 1, channels), torch.float32

    def forward(self, x: Tensor, state: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """x (b t d), the inputs before (b w-1 d) -> y (b t d), the last inputs (b w-1 d)."""
        weight = self.weight.squeeze(1)
        return short_conv(x, weight, self.bias, state, tokens.mask, tokens.segments, kernels=self.config.kernels)

    def reset_parameters(self) -> None:
        """As `torch.nn.Conv1d` draws them: uniform within width^(-1/2)."""
        bound = self.weight.shape[-1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)


class GatedActivation(nn.Module):
    """act(gate) * up, the middle of a gated MLP (arXiv:2002.05202): SwiGLU's with the default activation."""

    _kernels = {"silu": swiglu, "swish": swiglu, "gelu_pytorch_tanh": geglu}

    def __init__(self, config: ZooConfig):
        super().__init__()
        self.config = config
        self.act = ACT2FN[config.hidden_act]
        self.kernel = self._kernels.get(config.hidden_act)
        self.ops = () if self.kernel is None else (self.kernel.__name__,)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up, both (... f) -> (... f)."""
        return self.act(gate) * up if self.kernel is None else self.kernel(gate, up, self.config.kernels)


class GatedMLP(Mixer):
    """The gated channel mixer, `down(act(gate(x)) * up(x))`; `width` is the inner one, if not the configuration's."""

    config_fields = ("intermediate_size", "hidden_act")

    def __init__(self, config: ZooConfig, layer_idx: int, width: int | None = None):
        super().__init__(config, layer_idx)
        width = width or config.intermediate_size
        self.gate_proj = Linear(config.hidden_size, width, bias=False)
        self.up_proj = Linear(config.hidden_size, width, bias=False)
        self.down_proj = Linear(width, config.hidden_size, bias=False)
        self.act = GatedActivation(config)

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        return self.down_proj(self.act(self.gate_proj(x), self.up_proj(x))), shared


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap tanh(x / cap): near 0 the identity, and never beyond the cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return cap * torch.tanh(x / cap)


# -- rotations ---------------------------------------------------------------------------------------------------------


class RotaryEmbedding(LlamaRotaryEmbedding):
    """Cosines and sines of positions; `partial_rotary_factor` is heeded of a plain embedding too."""

    @staticmethod
    def compute_default_rope_parameters(config: ZooConfig, **unused) -> tuple[Tensor, float]:
        """The frequencies, (r/2), and the factor of cosines and sines."""
        rope = config.rope_parameters
        width = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        return rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width), 1.0


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate features 2i and 2i + 1 of x (b t h d) by angles whose cosines and sines are (b|1 t d/2)."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


# -- softmax attention -------------------------------------------------------------------------------------------------


class SoftmaxAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v through transformers' attention interface: eager, SDPA, flash or flex."""

    is_causal = True

    def __init__(self, config: ZooConfig):
        super().__init__()
        self.config = config
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options) -> tuple[Tensor, Tensor | None]:
        """q (b h t d), k and v (b g s d) with g key-value heads -> (b t h*d), and from eager the weights (b h t s)."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=q.shape[-1] ** -0.5, **options)
        return y.flatten(2), weights


def eager_attention(
    module: SoftmaxAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, with an additive mask (b 1 t s): the only form that returns its weights."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.mT * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    y = F.dropout(weights, dropout, module.training) @ v
    return y.transpose(1, 2), weights


class _GroupedQueries:
    """The projections of grouped-query attention (arXiv:2305.13245), for the mixers below."""

    ops = ("attention",)
    uses_rotary = True
    config_fields = ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "attention_dropout")

    def __init__(self, config: ZooConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, heads * width, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, groups * width, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, groups * width, bias=config.attention_bias)
        self.o_proj = Linear(heads * width, config.hidden_size, bias=config.attention_bias)
        self.attention = SoftmaxAttention(config)

    def _project(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """x (b t d) -> q (b h t d), k, v (b g t d), rotated where the model has a rotary embedding."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.config.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if tokens.rotary is not None:
            q, k = (rotate_halves(heads, *tokens.rotary, kernels=self.config.kernels) for heads in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Attention(_GroupedQueries, Mixer):
    """Causal softmax attention over the whole sequence; its memory is transformers' cache of keys and values."""

    layer_type = "full_attention"

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        q, k, v = self._project(x, tokens)
        if cache is not None:
            k, v = cache.update(k, v, self.cache_idx)
        y, _ = self.attention(q, k, v, tokens.attention_masks[self.layer_type], **tokens.attention_options)
        return self.o_proj(y), shared

    @classmethod
    def state_bytes(cls, config: ZooConfig, layer_idx: int, length: int | None, dtype: torch.dtype) -> int:
        if length is None:
            raise ValueError("the state of attention grows with the sequence: state_bytes needs its length")
        return 2 * length * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def saved_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        shape = (self.config.num_key_value_heads, length, self.config.head_dim)
        return {"keys": shape, "values": shape}


class SlidingWindowAttention(_GroupedQueries, RecurrentMixer):
    """Causal softmax attention to the newest `config.sliding_window` tokens of a document, the token itself included.

    Its memory is a recurrent state: the keys and values of the window. So padding takes no room in the window, and
    everything that the state contract promises holds. The count says how many slots of the window, from the right,
    have been filled.
    """

    config_fields = (*_GroupedQueries.config_fields, "sliding_window")

    @classmethod
    def state_shapes(cls, config: ZooConfig, layer_idx: int) -> dict:
        window = (config.num_key_value_heads, config.sliding_window - 1, config.head_dim)
        return {"keys": (window, None), "values": (window, None), "count": ((), torch.long)}

    def initial_state(self, x: Tensor) -> State:
        """An empty window, of the heads that are on this process: tensor parallelism shares them out."""
        keys, values, count = super().initial_state(x)
        weight = self.k_proj.weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        heads = local.shape[0] // self.config.head_dim
        return keys[:, :heads], values[:, :heads], count

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        if cache is not None:
            return super().forward(x, shared, tokens, cache)
        aligned = tokens.left_aligned  # a whole sequence has no window before it, and leaves none
        q, k, v = self._project(aligned.gather(x), aligned)
        y, _ = self.attention(q, k, v, self._whole_mask(x, aligned.segments), **aligned.attention_options)
        return aligned.scatter(self.o_proj(y)), shared

    def _whole_mask(self, x: Tensor, segments: Tensor | None) -> Tensor | BlockMask | None:
        """The mask of whole sequences x (b t d); None where every token sees all before it, which SDPA knows of."""
        t = x.shape[1]
        if t <= self.config.sliding_window and segments is None and self.config._attn_implementation == "sdpa":
            return None
        count = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self._as_mask(self._visible(count, t, segments, past=0), x.dtype)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        past_k, past_v, count = state
        q, k, v = self._project(x, tokens)
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        visible = self._visible(count, x.shape[1], tokens.segments)
        y, _ = self.attention(q, k, v, self._as_mask(visible, x.dtype), **tokens.attention_options)
        return self.o_proj(y), self._newest(k, v, count, tokens)

    def _newest(self, k: Tensor, v: Tensor, count: Tensor, tokens: Tokens) -> State:
        """The state after the tokens of a call, given the keys and values (b g s d) of the window before and theirs."""
        kept = self.config.sliding_window - 1
        t = k.shape[2] - kept
        count = tokens.count_last(count, t)
        if tokens.mask is None:
            k, v = k[:, :, t:], v[:, :, t:]
            if t > 1:  # hold on to nothing older
                k, v = k.clone(), v.clone()
        else:
            lengths = tokens.mask.sum(dim=1, keepdim=True)
            newest = lengths + torch.arange(kept, device=k.device)  # the slots of the last `kept` real tokens
            index = newest[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            k, v = k.gather(2, index), v.gather(2, index)
        if tokens.segments is not None:  # what was before the last document is gone
            empty = (torch.arange(kept, device=k.device) < kept - count[:, None])[:, None, :, None]
            k, v = k.masked_fill(empty, 0.0), v.masked_fill(empty, 0.0)
        return k, v, count

    def _visible(self, count: Tensor, t: int, segments: Tensor | None, past: int | None = None) -> Tensor:
        """Which of the s = past + t slots each query sees, (b 1 t s); by default `sliding_window` - 1 are past."""
        past = self.config.sliding_window - 1 if past is None else past
        slot = torch.arange(past + t, device=count.device)
        query = slot[past:, None]
        in_window = (slot <= query) & (slot > query - self.config.sliding_window)
        filled = slot >= past - count[:, None]
        visible = in_window & filled[:, None]
        if segments is not None:
            documents = torch.cat([segments[:, :1].expand(-1, past), segments], dim=1)
            visible = visible & (segments[:, :, None] == documents[:, None, :])
        return visible[:, None]

    def _as_mask(self, visible: Tensor, dtype: torch.dtype) -> Tensor | BlockMask:
        """`visible` in the form the attention implementation takes."""
        implementation = self.config._attn_implementation
        if "flash" in implementation:
            raise ValueError(
                f"sliding-window layers need a mask for every query, which {implementation} cannot take; load the "
                "model with attn_implementation='sdpa' or 'flex_attention'"
            )
        if implementation == "sdpa":
            return visible
        if implementation == "flex_attention":
            b, _, t, s = visible.shape
            return create_block_mask(
                lambda row, head, query, slot: visible[row, 0, query, slot], b, None, t, s, device=visible.device
            )
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

"""The spine: embedding, a stack of blocks, norm. A plugin brings mixers, and overrides a named method where its
architecture differs; the heads are in `zoo.heads`.

    Block      x + mixer(norm(x)), then x + channel_mixer(norm(x))
    ZooModel   embed -> run_layers -> norm
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.modeling_layers import (
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import capture_outputs

from zoo import registry
from zoo.cache import RECURRENT, RecurrentStateLayer, recurrent_mask
from zoo.config import NO_MIXER, ZooConfig
from zoo.mixer import Mixer, Shared, Tokens
from zoo.nn import RMSNorm, RotaryEmbedding, ShortConv, SoftmaxAttention


class Block(GradientCheckpointingLayer):
    """One layer: the tokens are mixed, then the channels, each behind a norm and beside a residual connection."""

    norm_class: type[nn.Module] = RMSNorm
    """Of all norms on the residual stream, built as `Norm(config)`."""

    def __init__(self, config: ZooConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = self.norm_class(config)
        name = config.mixers[layer_idx]
        self.mixer: Mixer = registry.find_mixer(name)(config.for_mixer(name), layer_idx)
        self.channel_mixer: Mixer | None = None
        if (name := config.channel_mixers[layer_idx]) != NO_MIXER:
            self.channel_norm = self.norm_class(config)
            self.channel_mixer = registry.find_channel_mixer(name)(config.for_mixer(name), layer_idx)

    def forward(
        self, x: Tensor, shared: Shared, tokens: Tokens, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Shared]:
        """x (b t d) and the values left below -> x (b t d) and the values left for the layers above."""
        y, shared = self.mixer(self.mixer_norm(x), shared, tokens, past_key_values)
        x = x + y
        if self.channel_mixer is None:
            return x, shared
        y, shared = self.channel_mixer(self.channel_norm(x), shared, tokens, past_key_values)
        return x + y, shared

    def reset_parameters(self) -> None:
        """Initialise what the architecture draws by a rule of its own, with `transformers.initialization` only."""


class ZooPreTrainedModel(PreTrainedModel):
    """What transformers must know of every model of the zoo."""

    config: ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = False  # every state can be rolled back, so assisted decoding is allowed
    _can_compile_fullgraph = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": SoftmaxAttention}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Yes; transformers would say no to a class by its name (rwkv, xlstm and others)."""
        return True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise one module, whether or not it has parameters of its own.

        For code outside of transformers the caller leaves out modules whose own parameters are all loaded, and so every
        module that only has children: a mixer, a block. The zoo writes through `transformers.initialization`, which
        leaves a loaded parameter alone, so it needs no such care.
        """
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Block, Mixer, ShortConv)):
            module.reset_parameters()

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """The trained parameters in groups for an optimiser.

        Matrices and embeddings decay, vectors and scalars do not; a mixer's `parameter_options` override that.
        """
        special = {
            f"{path}.{name}": options
            for path, module in self.named_modules()
            if isinstance(module, Mixer)
            for name, options in module.parameter_options.items()
        }
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                options = special.get(name, {})
                decay = options.get("weight_decay", weight_decay if parameter.dim() >= 2 else 0.0)
                groups.setdefault((learning_rate * options.get("lr_scale", 1.0), decay), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


@dataclass
class ZooModelOutput(BaseModelOutputWithPast):
    """What a model without a head returns."""

    shared: Shared | None = None
    """What the layers left for each other; an auxiliary loss may read it."""
    mask: Tensor | None = None
    """(b t) bool, False at padding; None: no padding."""
    segments: Tensor | None = None
    """(b t) ids of the documents packed in a row; None: one document a row."""


class ZooModel(ZooPreTrainedModel):
    """The model without a head. A plugin's model class names its config, and overrides what its paper changes."""

    block_class: type[Block] = Block

    def __init__(self, config: ZooConfig):
        super().__init__(config)
        config.settle_layers()  # from_pretrained sets fields after the configuration is made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.block_class(config, i) for i in range(config.num_hidden_layers))
        for index, keeper in enumerate(self.keepers()):
            keeper.cache_idx = index
        self.norm = self.block_class.norm_class(config)
        self.rotary = RotaryEmbedding(config) if getattr(config, "rope_parameters", None) else None
        self.gradient_checkpointing = False
        self._no_split_modules = [self.block_class.__name__]
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> ZooModelOutput:
        """Hidden states of the tokens of a call.

        Args:
            input_ids: (b t). Either these or `inputs_embeds`.
            attention_mask: (b past+t), 0 at padding, which may stand anywhere; None: no padding, past and present.
            position_ids: (b t), place of each token in its document. Where it does not go on by one within a call, a
                new document starts, and the two do not see each other. None: counted from the mask or the cache.
            past_key_values: the cache to continue from; it is advanced in place. The first document of a row goes on
                from it, or starts anew if its first position is 0; what is kept of a row is its last document. So a
                stream of documents may be read in windows, if every layer is recurrent.
            inputs_embeds: (b t d).
            use_cache: whether to return a cache. None: in evaluation, as the config says, unless rows are packed.
            kwargs: options of the attention implementation.

        Raises:
            ValueError: if arguments contradict each other; packed rows cannot be cached, for example, where the state
                of a layer grows with the length.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if position_ids is None and (kwargs.get("seq_idx") is not None or kwargs.get("cu_seq_lens_q") is not None):
            raise ValueError("packed rows are told by position_ids: pass them beside seq_idx or cu_seq_lens_q")
        if self.gradient_checkpointing and self.training and (past_key_values is not None or use_cache):
            raise ValueError(
                "gradient checkpointing runs layers twice, so it cannot advance a cache: use one of the two"
            )
        if self.gradient_checkpointing and self.training and _is_reentrant(self.layers[0]):
            raise ValueError("reentrant checkpointing loses gradients of what layers share: pass use_reentrant=False")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.shape[1] == 0:
            raise ValueError("there are no tokens to read: the sequences have length 0")
        self._check_cache(past_key_values, x.shape[0])
        is_cached = past_key_values is not None or bool(use_cache)
        # A graph cannot depend on values: while compiling, rows may be packed, but for generation.
        may_be_packed = not (is_torchdynamo_compiling() and is_cached) or (self.training and self._is_recurrent)
        tokens = self._read_tokens(x, attention_mask, position_ids, past_key_values, may_be_packed, kwargs)
        if is_cached:
            self._check_documents(tokens, past_key_values)
        if past_key_values is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training and tokens.segments is None
            past_key_values = DynamicCache(config=self.config) if use_cache else None
        x, shared = self.run_layers(x, tokens, past_key_values)
        return ZooModelOutput(
            last_hidden_state=self.norm(x),
            past_key_values=past_key_values,
            shared=shared or None,
            mask=tokens.mask,
            segments=tokens.segments,
        )

    def keepers(self) -> list[Mixer]:
        """The mixers that keep something of a sequence, in the order of a cache's layers (`ZooConfig.keepers`)."""
        channel_mixers = [layer.channel_mixer for layer in self.layers if layer.channel_mixer is not None]
        return [layer.mixer for layer in self.layers] + [m for m in channel_mixers if m.layer_type is not None]

    def run_layers(self, x: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Shared]:
        """Embeddings (b t d) -> the residual stream after the last block (b t d), and the values the layers left."""
        shared: Shared = {}
        for layer in islice(self.layers, self.config.num_hidden_layers):  # early exit lowers the number for a while
            x, shared = layer(x, shared, tokens=tokens, past_key_values=past_key_values)
        return x, shared

    def _check_cache(self, cache: Cache | None, batch_size: int) -> None:
        """Raise unless the cache has the layers that this model's mixers read and write, for as many rows."""
        if cache is None:
            return
        wanted = [layer_type == RECURRENT for layer_type in self.config.layer_types]
        found = [isinstance(layer, RecurrentStateLayer) for layer in getattr(cache, "layers", ())]
        grows_on_demand = not found and not any(wanted) and isinstance(cache, DynamicCache)
        if found != wanted and not grows_on_demand:
            raise ValueError(
                f"this {type(cache).__name__} is not for a {type(self).__name__} of {len(wanted)} layers: make it with "
                "DynamicCache(config=model.config) or StaticCache(config=model.config, max_cache_len=...)"
            )
        for layer in cache.layers:
            if isinstance(layer, RecurrentStateLayer) and layer.states and len(layer.states[0]) != batch_size:
                raise ValueError(f"the cache carries {len(layer.states[0])} rows, the call has {batch_size}")

    @property
    def _is_recurrent(self) -> bool:
        """Whether no layer's state grows with the length."""
        return set(self.config.layer_types) == {RECURRENT}

    def _check_documents(self, tokens: Tokens, cache: Cache | None) -> None:
        """Raise where a cache does not take the documents of a call."""
        if tokens.segments is None and tokens.starts_anew is None:
            return
        if not self._is_recurrent and tokens.starts_anew is not None:
            raise ValueError("position_ids start a new document in a row whose cache holds another: use a new cache")
        if not self._is_recurrent:
            raise ValueError(
                "position_ids pack several documents in a row, and attention's cache carries one: use_cache=False"
            )
        if cache is not None and any(layer.record_past for layer in cache.layers):
            raise ValueError("a cache that records takes one document a row: position_ids start another one")

    # -- reading the arguments -----------------------------------------------------------------------------------------

    def _read_tokens(
        self,
        x: Tensor,
        attention_mask: Tensor | dict[str, Any] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        may_be_packed: bool,
        options: dict[str, Any],
    ) -> Tokens:
        """Work out positions, padding and documents of a call, and the masks of the layers, once for all of them."""
        b, t = x.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        made_by_generate = isinstance(attention_mask, dict)  # as it does for caches that can be compiled
        if made_by_generate:
            padding, mask = None, attention_mask.get(RECURRENT)
        else:
            attention_mask = _checked_mask(attention_mask, b, t, past)
            padding = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
            mask = recurrent_mask(x, attention_mask if RECURRENT in self.config.layer_types else padding)
        if position_ids is not None:
            positions = position_ids
        elif padding is not None:
            positions = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -t:]
        else:
            positions = (torch.arange(t, device=x.device) + past)[None]
        tokens = Tokens(positions, mask=mask, attention_options=options | {"position_ids": position_ids})
        if self.rotary is not None:
            tokens.rotary = self.rotary(x, positions)
        if position_ids is not None and may_be_packed and not made_by_generate:
            if t > 1:
                tokens.segments = _find_segments(positions.expand(b, -1), mask)
            if cache is not None:
                tokens.starts_anew = _find_restarts(positions.expand(b, -1), mask, padding, past)
        tokens.left_aligned = tokens.align_left()
        tokens.attention_masks = (
            attention_mask if made_by_generate else self._make_masks(x, attention_mask, tokens, cache)
        )
        return tokens

    def _make_masks(
        self, x: Tensor, attention_mask: Tensor | None, tokens: Tokens, cache: Cache | None
    ) -> dict[str, Any]:
        """The masks of the attention layers, by layer type, in the form of the attention implementation."""
        packing = {}
        if tokens.segments is not None and attention_mask is not None:
            if "flash" in self.config._attn_implementation:
                raise ValueError("flash attention takes rows that are padded or packed, not both")
            segments = tokens.segments
            packing["and_mask_function"] = lambda b, h, q, k: segments[b, q] == segments[b, k]
        return {
            layer_type: LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[layer_type](
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=tokens.positions,
                **packing,
            )
            for layer_type in set(self.config.layer_types) - {RECURRENT}
        }


def _is_reentrant(layer: GradientCheckpointingLayer) -> bool:
    """Whether the checkpointing that was set on a layer is torch's older, reentrant kind."""
    return bool(getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"))


def _checked_mask(mask: Tensor | None, b: int, t: int, past: int | Tensor) -> Tensor | None:
    """The mask if it fits the call; None where it hides nothing."""
    if mask is None or is_torchdynamo_compiling():
        return mask
    if mask.dim() == 2:
        if mask.shape != (b, int(past) + t):
            raise ValueError(
                f"attention_mask is {tuple(mask.shape)}; the call has {b} rows of {int(past)} cached and {t} new "
                f"tokens, so it must be {(b, int(past) + t)}"
            )
        return None if mask.all() else mask
    return mask


def _find_restarts(positions: Tensor, mask: Tensor | None, padding: Tensor | None, past: int | Tensor) -> Tensor | None:
    """Which rows start a new document though they have read tokens, (b) bool; None: no row."""
    aligned = Tokens(positions, mask=mask).align_left()
    starts = aligned.positions[:, 0] == 0
    if aligned.mask is not None:
        starts = starts & aligned.mask[:, 0]
    if is_torchdynamo_compiling():
        return starts
    if padding is not None:
        starts = starts & padding[:, : int(past)].any(dim=1)
    return starts if past > 0 and starts.any() else None


def _find_segments(positions: Tensor, mask: Tensor | None) -> Tensor | None:
    """Ids of the documents packed in each row, (b t): a new one starts where its real tokens' positions jump.

    None if every row is one document.
    """
    aligned = Tokens(positions, mask=mask).align_left()
    starts = torch.diff(aligned.positions, dim=1, prepend=aligned.positions[:, :1] - 1) != 1
    if aligned.mask is not None:
        starts = starts & aligned.mask
    if not is_torchdynamo_compiling() and not starts.any():
        return None
    return aligned.scatter(starts).cumsum(dim=1)

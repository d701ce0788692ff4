"""Softmax attention in a model that reads segment by segment."""

import torch
from torch import Tensor

from zoo.config import MixerConfig, ZooConfig
from zoo.mixer import Shared, Tokens
from zoo.nn import Attention, SlidingWindowAttention
from zoo.segments.run import OpenSegment


class SegmentAttention(SlidingWindowAttention):
    """Causal softmax attention to the open segment: what `attention` is where layers run segment by segment.

    It is a window that all tokens of a segment have room in, and costs no more than attention where a segment opens.
    """

    @classmethod
    def taking_over(cls, attention: Attention, window: int) -> "SegmentAttention":
        """The same attention, its weights and their names, inside of segments of up to `window` tokens."""
        with torch.device("meta"):
            mixer = cls(cls.view(attention.config, window), attention.layer_idx)
        for name, module in attention.named_children():
            setattr(mixer, name, module)
        mixer.cache_idx = attention.cache_idx
        return mixer

    @staticmethod
    def view(config: ZooConfig | MixerConfig, window: int) -> MixerConfig:
        """The configuration of an attention as that of this mixer."""
        return MixerConfig(config, {"sliding_window": window})

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: OpenSegment) -> tuple[Tensor, Shared]:
        slot = cache.layers[self.cache_idx]
        if slot.states is not None:
            return super().forward(x, shared, tokens, cache)
        q, k, v = self._project(x, tokens)
        y, _ = self.attention(q, k, v, self._whole_mask(x, tokens.segments), **tokens.attention_options)
        if slot.wanted:
            empty = self.initial_state(x)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(empty, (k, v), strict=False))
            slot.write(self._newest(keys, values, empty[2], tokens), x.shape[1])
        return self.o_proj(y), shared

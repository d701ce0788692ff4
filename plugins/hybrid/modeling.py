"""Hybrids: any registered mixers and channel mixers in one stack of layers."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin

from zoo import registry
from zoo.config import MixedConfig
from zoo.heads import ZooForCausalLM, heads_of
from zoo.modeling import ZooModel


@strict
class HybridConfig(MixedConfig):
    """Configuration of a hybrid: `mixers` and `channel_mixers` say what stands in its layers.

    Args:
        mixers: as of every model. Default: three layers of `mamba2` to one of `attention`.
        rope_parameters: the rotary embedding of the layers with attention, in transformers' form; None: they have none,
            as in Jamba, and the order of the tokens comes from the layers with a state.
        max_position_embeddings: longest sequence the rotary embedding is meant for; a plain one does not enforce it.
    """

    model_type = "zoo_hybrid"
    default_mixers = ("mamba2", "mamba2", "mamba2", "attention")

    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048

    def settle_layers(self) -> None:
        """As `MixedConfig`, and check that the one rotary embedding fits every layer that uses it."""
        super().settle_layers()
        if self.rope_parameters is None:
            return
        widths = self._rotated_widths()
        if not widths:
            raise ValueError("rope_parameters rotate the heads of attention, which no layer has")
        if len(set(widths.values())) > 1:
            named = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(f"one rotary embedding serves all layers, and their head_dim differ: {named}")

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """As transformers, for which None stands for a plain rotary embedding."""
        return kwargs if self.rope_parameters is None else super().convert_rope_params_to_dict(**kwargs)

    def _rotated_widths(self) -> dict[str, int]:
        """The width of a head of each mixer that rotates its heads, by the mixer's name."""
        return {
            name: self.for_mixer(name).head_dim
            for name in dict.fromkeys(self.mixers)
            if registry.find_mixer(name).uses_rotary
        }

    @property
    def head_dim(self) -> int | None:
        """The width that the rotary embedding rotates."""
        return next(iter(self._rotated_widths().values()), None)


class HybridModel(ZooModel):
    config: HybridConfig


class HybridForCausalLM(ZooForCausalLM, GenerationMixin):
    config: HybridConfig
    model_class = HybridModel

    def _get_static_cache_init_shape(self) -> None:
        """The heads of attention may differ from layer to layer, so a static cache is allocated by the first keys."""


_, HybridForSequenceClassification, HybridForTokenClassification = heads_of(HybridModel)

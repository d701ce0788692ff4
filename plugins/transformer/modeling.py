"""The Transformer baseline, as Llama: RMS norm, grouped queries, rotary embedding, SwiGLU (arXiv:2302.13971)."""

from huggingface_hub.dataclasses import strict

from zoo.config import RotaryAttentionConfig
from zoo.heads import heads_of
from zoo.modeling import ZooModel
from zoo.moe import MoEConfig


@strict
class TransformerConfig(RotaryAttentionConfig, MoEConfig):
    """Configuration of the Transformer baseline: the fields of `RotaryAttentionConfig`, those of `MoEConfig` for the
    channel mixer `moe`, and one more.

    Args:
        sliding_window: tokens that a `sliding_attention` layer sees, the token itself included.
    """

    model_type = "zoo_transformer"
    default_mixers = ("attention",)
    sizes = (*MoEConfig.sizes, *RotaryAttentionConfig.sizes)

    sliding_window: int = 1024


class TransformerModel(ZooModel):
    config: TransformerConfig


TransformerForCausalLM, TransformerForSequenceClassification, TransformerForTokenClassification = heads_of(
    TransformerModel
)

"""The Transformer baseline, as Llama: RMS norm, grouped queries, rotary embedding, SwiGLU (arXiv:2302.13971)."""

from huggingface_hub.dataclasses import strict

from zoo.modeling import ZooModel, heads_of
from zoo.moe import MoEConfig


@strict
class TransformerConfig(MoEConfig):
    """Configuration of the Transformer baseline; the fields of `MoEConfig` are for the channel mixer `moe`.

    Args:
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads, each for a group of query heads. Default: one a query head.
        head_dim: width of a head. Default: hidden_size / num_attention_heads.
        attention_bias: whether the four projections of attention have biases.
        attention_dropout: rate of dropout on the attention weights in training.
        sliding_window: tokens that a `sliding_attention` layer sees, the token itself included.
        max_position_embeddings: longest sequence the rotary embedding is meant for; a plain one does not enforce it.
        rope_parameters: the rotary embedding, in transformers' form.
    """

    model_type = "zoo_transformer"
    default_mixers = ("attention",)
    sizes = (*MoEConfig.sizes, "num_attention_heads", "num_key_value_heads", "head_dim")
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.channel_mixer.gate_proj": "colwise",
        "layers.*.channel_mixer.up_proj": "colwise",
        "layers.*.channel_mixer.down_proj": "rowwise",
    }

    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    sliding_window: int = 1024
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None

    def fill_defaults(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}

    def validate_architecture(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.sliding_window < 2:
            raise ValueError(f"sliding_window counts the token itself, so it is at least 2; got {self.sliding_window}")


class TransformerModel(ZooModel):
    config: TransformerConfig


TransformerForCausalLM, TransformerForSequenceClassification, TransformerForTokenClassification = heads_of(
    TransformerModel
)

"""RWKV: the models of all versions (Peng et al., arXiv:2305.13048, 2404.05892, 2503.14456); a version is a mixer.

`rwkv4`, `rwkv5`, `rwkv6`, `rwkv7` mix tokens (rwkv4.py, rwkv6.py, rwkv7.py), `rwkv4_channel`, `rwkv6_channel`,
`rwkv7_channel` channels (channel_mixing.py).
"""

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers import initialization as init

from zoo.config import ZooConfig
from zoo.heads import ZooForCausalLM, heads_of
from zoo.mixer import Shared, Tokens
from zoo.modeling import Block, ZooModel
from zoo.nn import LayerNorm


@strict
class RWKVConfig(ZooConfig):
    """Configuration of RWKV; without `mixers` and `channel_mixers` it is version 7.

    Args:
        head_dim: width of a head, of versions 5 to 7; version 4 has no heads.
        intermediate_size: inner width of the channel mixer. Default: 4 * hidden_size, as versions 4 and 7 have.
        shift_rank: rank, for each of five inputs, of what version 6 adds to its token shift.
        decay_rank: rank of what versions 6 and 7 add to the decay. Default of the ranks: what the authors' training
            code of version 7 suggests for the width; published models have others.
        iclr_rank: rank of version 7's in-context learning rate.
        value_rank: rank of the gate by which version 7 mixes in the values of the first layer.
        gate_rank: rank of version 7's output gate.
    """

    model_type = "zoo_rwkv"
    default_mixers = ("rwkv7",)
    default_channel_mixers = ("rwkv7_channel",)
    ranks = ("shift_rank", "decay_rank", "iclr_rank", "value_rank", "gate_rank")
    sizes = (*ZooConfig.sizes, "head_dim", *ranks)
    base_model_tp_plan = {
        "layers.*.mixer.r_proj": "colwise_gather_output",
        "layers.*.mixer.k_proj": "colwise_gather_output",
        "layers.*.mixer.v_proj": "colwise_gather_output",
        "layers.*.channel_mixer.k_proj": "colwise",
        "layers.*.channel_mixer.v_proj": "rowwise",
    }

    norm_eps: float = 1e-5
    intermediate_size: int | None = None
    head_dim: int = 64
    shift_rank: int = 32
    decay_rank: int | None = None
    iclr_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None

    def fill_defaults(self):
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.decay_rank = self.decay_rank or self._suggested_rank(2.5)
        self.iclr_rank = self.iclr_rank or self._suggested_rank(2.5)
        self.value_rank = self.value_rank or self._suggested_rank(1.7)
        self.gate_rank = self.gate_rank or self._suggested_rank(5.0)

    def _suggested_rank(self, factor: float) -> int:
        return max(32, 32 * round(factor * self.hidden_size**0.5 / 32))

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    def validate_architecture(self):
        if self.hidden_size % self.head_dim and {"rwkv5", "rwkv6", "rwkv7"} & set(self.mixers):
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of head_dim ({self.head_dim})")


class RWKVBlock(Block):
    norm_class = LayerNorm


class RWKVModel(ZooModel):
    config: RWKVConfig
    block_class = RWKVBlock

    def __init__(self, config: RWKVConfig):
        super().__init__(config)
        self.embed_norm = LayerNorm(config)
        self.post_init()

    def run_layers(self, x: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Shared]:
        return super().run_layers(self.embed_norm(x), tokens, past_key_values)

    def _init_weights(self, module: nn.Module) -> None:
        """The embedding small, so that the norm behind it lets it learn fast (arXiv:2305.13048, "small init")."""
        super()._init_weights(module)
        if module is self.embed_tokens:
            init.uniform_(module.weight, -1e-4, 1e-4)


class RWKVForCausalLM(ZooForCausalLM, GenerationMixin):
    config: RWKVConfig
    model_class = RWKVModel

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            vocabulary, width = module.weight.shape
            init.orthogonal_(module.weight, gain=0.5 * max(1.0, vocabulary / width) ** 0.5)


_, RWKVForSequenceClassification, RWKVForTokenClassification = heads_of(RWKVModel)

"""The configuration fields that every model of the zoo shares; a plugin's config adds only its own."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from zoo import registry


@strict
class ZooConfig(PreTrainedConfig):
    """Configuration of a model built on the spine: embedding, a stack of blocks, norm, head.

    A subclass sets `model_type` (with the prefix `zoo_`, as transformers owns the bare names) and `default_mixers`.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width d of the residual stream.
        num_hidden_layers: number of blocks.
        intermediate_size: inner width of the channel mixer.
        hidden_act: activation of its gate, a name of `transformers.activations.ACT2FN`.
        mixers: names of registered mixers, one a layer; a shorter list repeats. Default: the architecture's own.
        rms_norm_eps: added to the mean square in every RMS norm.
        initializer_range: standard deviation of freshly drawn weights that have no rule of their own.
        use_cache: whether evaluation returns a cache unless told otherwise.
        tie_word_embeddings: whether the head shares the embedding's weights.
        pad_token_id, bos_token_id, eos_token_id: ids of the special tokens, if there are any.
        layer_types: derived from `mixers`: which cache layer and mask each layer takes.
    """

    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    default_mixers: ClassVar[tuple[str, ...]] = ()

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 1408
    hidden_act: str = "silu"
    mixers: list[str] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        pattern = self.mixers or list(self.default_mixers)
        if not 0 < len(pattern) <= self.num_hidden_layers:
            raise ValueError(f"mixers names {len(pattern)} layers, num_hidden_layers is {self.num_hidden_layers}")
        self.mixers = [pattern[i % len(pattern)] for i in range(self.num_hidden_layers)]
        self.layer_types = [registry.find_mixer(name).layer_type for name in self.mixers]
        super().__post_init__(**kwargs)

    def validate_layer_type(self):
        """The spine's own layer types are valid; transformers' list of names does not know them."""

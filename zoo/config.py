"""The configuration fields that every model of the zoo shares; a plugin's config adds only its own."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from zoo import registry
from zoo.errors import unknown_name
from zoo.ops.dispatch import NAMES as KERNELS

NO_MIXER = "none"
"""In `channel_mixers`, a layer that mixes tokens only."""


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
        channel_mixers: names of registered channel mixers, likewise, or "none" for a layer without one.
        norm_eps: added to the mean square or the variance in every norm.
        initializer_range: standard deviation of freshly drawn weights that have no rule of their own.
        use_cache: whether evaluation returns a cache unless told otherwise.
        tie_word_embeddings: whether the head shares the embedding's weights.
        pad_token_id, bos_token_id, eos_token_id: ids of the special tokens, if there are any.
        kernels: which form of each op runs, a name of `zoo.ops.dispatch.NAMES`: `auto` the fastest, `require` the
            kernels made for the device or an error. As `attn_implementation` it is not saved with a model.

    A field with a default that depends on others is None until `fill_defaults`, which a subclass extends. From the
    mixers follows `layer_types`: the kinds of the layers of a cache, one for each mixer that keeps something.
    """

    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    default_mixers: ClassVar[tuple[str, ...]] = ()
    default_channel_mixers: ClassVar[tuple[str, ...]] = ("swiglu",)
    sizes: ClassVar[tuple[str, ...]] = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    """Fields that must be positive."""

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 1408
    hidden_act: str = "silu"
    mixers: list[str] | None = None
    channel_mixers: list[str] | None = None
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    kernels: str = "auto"
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        for name in self.sizes:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if self.hidden_act not in ACT2FN:
            raise unknown_name("activation", self.hidden_act, ACT2FN)
        if self.kernels not in KERNELS:
            raise unknown_name("kernel backend", self.kernels, KERNELS)
        self.fill_defaults()
        self.settle_layers()
        super().__post_init__(**kwargs)

    def settle_layers(self) -> None:
        """Repeat `mixers` and `channel_mixers` to one a layer, and derive `layer_types`.

        Raises:
            ValueError: if either names more layers than there are, or a mixer that is unknown or needs other fields.
        """
        self.mixers = self._settle("mixers", self.mixers or self.default_mixers, registry.find_mixer)
        self.channel_mixers = self._settle(
            "channel_mixers", self.channel_mixers or self.default_channel_mixers, registry.find_channel_mixer
        )
        self.layer_types = [keeper.layer_type for keeper, _, _ in self.keepers()]

    def _settle(self, field: str, pattern: Sequence[str], find: Callable[[str], type]) -> list[str]:
        n = self.num_hidden_layers
        if not 0 < len(pattern) <= n:
            raise ValueError(f"{field} names {len(pattern)} layers, num_hidden_layers is {n}")
        for name in dict.fromkeys(pattern):
            if name == NO_MIXER and field == "channel_mixers":
                continue
            needed, config = find(name).config_fields, self.for_mixer(name)
            if missing := [field for field in needed if not hasattr(config, field)]:
                raise ValueError(
                    f"mixer {name!r} needs {', '.join(missing)}, which {type(self).__name__} does not have"
                )
        return [pattern[i % len(pattern)] for i in range(n)]

    def for_mixer(self, name: str) -> "ZooConfig | MixerConfig":
        """The configuration that the mixer or channel mixer of that name is built with: this one."""
        return self

    def keepers(self) -> list[tuple[type, "ZooConfig | MixerConfig", int]]:
        """The mixer classes that keep something of a sequence, in the order of a cache's layers.

        Each stands beside its configuration and its layer. The mixers come first, one a layer; behind them come the
        channel mixers with a state.
        """
        configs = {name: self.for_mixer(name) for name in {*self.mixers, *self.channel_mixers} - {NO_MIXER}}
        mixers = [(registry.find_mixer(name), configs[name], i) for i, name in enumerate(self.mixers)]
        channel_mixers = [
            (registry.find_channel_mixer(name), configs[name], i)
            for i, name in enumerate(self.channel_mixers)
            if name != NO_MIXER
        ]
        return mixers + [keeper for keeper in channel_mixers if keeper[0].layer_type is not None]

    @property
    def per_layer_config(self) -> list["ZooConfig"]:
        """One for each layer of a cache: transformers pairs them with `layer_types`, and stops at the shorter list."""
        return [self] * len(self.layer_types)

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        fields.pop("kernels", None)  # a choice of this machine, not of the model
        return fields

    @property
    def soft_cap(self) -> float | None:
        """The bound that the logits approach, c in c tanh(x / c); None: they have none."""
        return None

    def fill_defaults(self) -> None:
        """Fill the fields that are None from others."""

    def validate_layer_type(self):
        """The spine's own layer types are valid; transformers' list of names does not know them."""


# -- softmax attention -------------------------------------------------------------------------------------------------


@strict
class GroupedQueryConfig(ZooConfig):
    """The heads of grouped-query attention (arXiv:2305.13245); a configuration class derives from it.

    Args:
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads, each for a group of query heads. Default: one a query head.
        head_dim: width of a head. Default: hidden_size / num_attention_heads.
    """

    sizes = (*ZooConfig.sizes, "num_attention_heads", "num_key_value_heads", "head_dim")

    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None

    def fill_defaults(self):
        super().fill_defaults()
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    def validate_heads(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if (window := getattr(self, "sliding_window", None)) is not None and window < 2:
            raise ValueError(f"sliding_window counts the token itself, so it is at least 2; got {window}")


@strict
class AttentionConfig(GroupedQueryConfig):
    """What the mixer `attention` reads; `sliding_attention` reads `sliding_window` besides.

    Args:
        attention_bias: whether the four projections of attention have biases.
        attention_dropout: rate of dropout on the attention weights in training.
    """

    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.channel_mixer.gate_proj": "colwise",
        "layers.*.channel_mixer.up_proj": "colwise",
        "layers.*.channel_mixer.down_proj": "rowwise",
    }

    attention_bias: bool = False
    attention_dropout: float | int = 0.0


@strict
class RotaryAttentionConfig(AttentionConfig):
    """Attention with a rotary embedding (arXiv:2104.09864).

    Args:
        max_position_embeddings: longest sequence the embedding is meant for; a plain one does not enforce it.
        rope_parameters: the embedding, in transformers' form.
    """

    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None

    def fill_defaults(self):
        super().fill_defaults()
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}


# -- mixers that bring their fields along ------------------------------------------------------------------------------


class MixerConfig:
    """What a mixer of a `MixedConfig` reads: its own fields, and else the model's configuration as it is now."""

    def __init__(self, model: ZooConfig, fields: dict[str, Any]):
        self.__dict__.update(fields, model=model)

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name.startswith("__"):  # asked for while it is being copied and has nothing yet
            raise AttributeError(name)
        return getattr(self.model, name)


@strict
class MixedConfig(ZooConfig):
    """A configuration that need not have the fields of its mixers: each of them brings its own along.

    A field that a mixer names in its `config_fields` has the value that `mixer_options` gives it. Otherwise it is the
    model's if it is a field of `ZooConfig`; and if not, it has the default of the configuration that the mixer was
    written for, in a model of the same width and depth with nothing but this mixer.

    Args:
        mixer_options: by the name of a mixer or channel mixer, values of its `config_fields`.
    """

    mixer_options: dict[str, dict] | None = None

    def settle_layers(self) -> None:
        """As `ZooConfig`, and refuse options for a mixer that no layer has."""
        super().settle_layers()
        for name in self.mixer_options or {}:
            registry.find_owner(name)
            if name not in self.mixers + self.channel_mixers:
                raise ValueError(f"mixer_options has options for {name!r}, which no layer uses")

    def for_mixer(self, name: str) -> ZooConfig | MixerConfig:
        """The configuration that the mixer or channel mixer of that name is built with.

        Raises:
            ValueError: on an unknown mixer or option, where the nearest known ones are suggested; on a value that the
                configuration which the mixer was written for refuses.
        """
        plugin = registry.find_owner(name)
        config_class, needed = plugin.config_class, plugin.all_mixers[name].config_fields
        options = (self.mixer_options or {}).get(name, {})
        known = [field.name for field in dataclasses.fields(config_class) if field.name in needed]
        for option in options:
            if option not in known:
                raise unknown_name(f"option of mixer {name!r}", option, known)
        if not needed:
            return self
        model = {field: getattr(self, field) for field in _MODEL_FIELDS}
        model["mixers"] = model["channel_mixers"] = [name] * self.num_hidden_layers
        try:
            alone = _without_layers(config_class)(**{**model, **options})
        except (ValueError, StrictDataclassError) as error:  # the latter wraps what a validator said
            raise ValueError(f"mixer {name!r}: {error.__cause__ or error}") from error
        return MixerConfig(self, {field: getattr(alone, field) for field in needed if hasattr(alone, field)})


_MODEL_FIELDS = [
    field.name
    for field in dataclasses.fields(ZooConfig)
    if field.name in ZooConfig.__annotations__ and field.name not in ("mixers", "channel_mixers", "layer_types")
]
"""Fields that all mixers of a model share, unless an option says otherwise."""


@functools.cache
def _without_layers(config_class: type[ZooConfig]) -> type[ZooConfig]:
    """The same fields, defaults and checks, for one mixer: nothing is asked of the other half of a layer."""

    def settle_layers(self) -> None:
        pass

    return strict(type(config_class.__name__, (config_class,), {"settle_layers": settle_layers}))

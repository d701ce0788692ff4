"""RMT and ARMT: a model that reads segment by segment, with a memory that goes from one to the next.

RMT (Bulatov et al., 2022, arXiv:2207.06881) passes tokens of memory on, ARMT (Rodkin et al., 2024, arXiv:2407.04841) an
associative memory in every layer. Around any model of the zoo.

Letters: b batch, n tokens of a run, d width, m memory tokens, k width of phi(keys).
"""

import dataclasses

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import GenerationMixin
from zoo.plugins.armt.memory import AssociativeMemory, MemoryLayer
from zoo.plugins.armt.stacks import ARMT, RMT, window_of

from zoo import registry
from zoo.cache import RECURRENT
from zoo.config import MixerConfig, ZooConfig
from zoo.errors import unknown_name
from zoo.heads import ZooForCausalLM, heads_of
from zoo.mixer import RecurrentMixer
from zoo.modeling import ZooModel
from zoo.nn import Attention, SlidingWindowAttention
from zoo.segments import SegmentAttention, SegmentedModel

STACKS = {"associative": ARMT, "tokens": RMT}

_OF_BACKBONE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "hidden_act", "norm_eps"),
    *("initializer_range", "tie_word_embeddings", "mixers", "channel_mixers"),
)


@strict
class ARMTConfig(ZooConfig):
    """Configuration of a model with a memory around another, the backbone.

    The fields of every model (`vocab_size` to `channel_mixers`) are the backbone's; what is None is its default.

    Args:
        backbone: the architecture inside: the name of a plugin.
        backbone_options: fields of its configuration beyond those of every model.
        memory: "associative", as in ARMT, or "tokens", as in RMT.
        segment_length: tokens of a segment.
        num_memory_tokens: tokens m that are read behind each segment and written to the memory; in RMT they stand in
            front of the next one too.
        alignment: "left", the last segment of a sequence may be shorter; or "right", the first one is, of what the
            first call of a sequence brings.
        freeze_memory_in_generate: whether, with a cache, memory is written in the first call only, and not behind its
            last segment, which stays open for all that follows: as in the authors' `generate`.
        memory_layers: layers with an associative memory. Default: all.
        d_mem: width of its queries and keys, before phi.
        dpfp_nu: rolled products in phi (DPFP), which is 2 * dpfp_nu * d_mem wide.
        normalize_phi: whether phi has length 1. The paper's is not normalised.
        use_denominator: whether what is read is divided by the sum of the weights it was written with. If not, the
            memory is a plain delta rule.
    """

    model_type = "zoo_armt"
    sizes = (*ZooConfig.sizes, "segment_length", "num_memory_tokens", "d_mem", "dpfp_nu")

    backbone: str = "transformer"
    backbone_options: dict | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    intermediate_size: int | None = None
    hidden_act: str | None = None
    norm_eps: float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool | None = None
    memory: str = "associative"
    alignment: str = "left"
    freeze_memory_in_generate: bool = False
    segment_length: int = 512
    num_memory_tokens: int = 16
    memory_layers: list[int] | None = None
    d_mem: int = 64
    dpfp_nu: int = 3
    normalize_phi: bool = True
    use_denominator: bool = True

    def __post_init__(self, **kwargs):
        self.settle_layers()  # first of all, as the fields that are None come from the backbone
        super().__post_init__(**kwargs)

    def settle_layers(self) -> None:
        """Take over what the backbone settles, and check that all it keeps of a segment has a fixed size."""
        model, causal_lm = (self.find_backbone().model_class(kind) for kind in ("Model", "ForCausalLM"))
        if issubclass(model, SegmentedModel):
            raise ValueError(f"{model.__name__} reads segments with a memory of its own, and is no backbone")
        if causal_lm.compute_logits is not ZooForCausalLM.compute_logits:
            raise ValueError(f"{causal_lm.__name__} computes logits in a way of its own, and is no backbone")
        backbone = self.make_backbone()
        for name in _OF_BACKBONE:
            setattr(self, name, getattr(backbone, name))
        for keeper, _, layer in backbone.keepers():
            if keeper is not Attention and not issubclass(keeper, RecurrentMixer):
                raise ValueError(
                    f"layer {layer} of the backbone is a {keeper.__name__}: its state grows with a segment"
                )
        self.layer_types = [RECURRENT]

    def make_backbone(self) -> ZooConfig:
        """The backbone's own configuration.

        Raises:
            ValueError: on an unknown architecture or option, where the nearest known ones are suggested, and on sizes
                that do not go together.
        """
        config_class = self.find_backbone().config_class
        options = self.backbone_options or {}
        for key in options:
            if key not in (own := _own_fields(config_class)):
                raise unknown_name(f"field of {config_class.__name__}", key, own)
        fields = {name: value for name in _OF_BACKBONE if (value := getattr(self, name)) is not None}
        try:
            return config_class(**fields, **options, kernels=self.kernels)
        except StrictDataclassError as error:
            raise ValueError(f"backbone {self.backbone!r}: {error.__cause__ or error}") from error

    @classmethod
    def around(cls, backbone: ZooConfig, **fields) -> "ARMTConfig":
        """The configuration of a memory around a given model: `fields` are those of the memory."""
        name = next(name for name, plugin in registry.plugins().items() if plugin.config_class is type(backbone))
        options = {field: getattr(backbone, field) for field in _own_fields(type(backbone))}
        shared = (*_OF_BACKBONE, "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "kernels")
        same = {field: getattr(backbone, field) for field in shared}
        return cls(backbone=name, backbone_options=options, **same, **fields)

    @property
    def soft_cap(self) -> float | None:
        return self.make_backbone().soft_cap

    def find_backbone(self) -> registry.Plugin:
        """The plugin of the backbone."""
        if self.backbone not in registry.plugins():
            raise unknown_name("backbone", self.backbone, registry.plugins())
        return registry.plugins()[self.backbone]

    def for_mixer(self, name: str) -> ZooConfig | MixerConfig:
        """The configuration that a mixer of the backbone is built with."""
        return self.make_backbone().for_mixer(name)

    def keepers(self) -> list:
        return [(STACKS[self.memory], self, 0)]

    @property
    def layers_with_memory(self) -> list[int]:
        """The layers that have an associative memory."""
        return list(range(self.num_hidden_layers)) if self.memory_layers is None else sorted(self.memory_layers)

    @property
    def longest_segment(self) -> int:
        """Tokens that a segment can have: more where what is generated goes on in the last one of a prompt."""
        if not self.freeze_memory_in_generate:
            return self.segment_length
        return max(self.segment_length, getattr(self.make_backbone(), "max_position_embeddings", 0))

    @property
    def segment_window(self) -> int:
        """Tokens of a segment that attention sees, those of memory included."""
        return self.longest_segment + self.num_memory_tokens * (2 if self.memory == "tokens" else 1)

    def validate_architecture(self):
        if self.memory not in STACKS:
            raise unknown_name("memory", self.memory, STACKS)
        if self.alignment not in ("left", "right"):
            raise ValueError(f"alignment is 'left' or 'right', got {self.alignment!r}")
        if self.segment_length < 2:
            raise ValueError(f"a segment has at least 2 tokens; segment_length is {self.segment_length}")
        if self.memory_layers is not None and len(set(self.memory_layers)) != max(1, len(self.memory_layers)):
            raise ValueError(f"memory_layers names some layers, each once; got {self.memory_layers}")
        for layer in self.memory_layers or ():
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(f"memory_layers names layer {layer}, num_hidden_layers is {self.num_hidden_layers}")


def _own_fields(config_class: type[ZooConfig]) -> list[str]:
    """The fields that a configuration has beyond those of every model."""
    shared = {field.name for field in dataclasses.fields(ZooConfig)}
    return [field.name for field in dataclasses.fields(config_class) if field.name not in shared]


# -- the model ---------------------------------------------------------------------------------------------------------


class ARMTModel(SegmentedModel):
    """A backbone that runs on segments; all that a model has, from embedding to norm, is the backbone's."""

    config: ARMTConfig

    def __init__(self, config: ARMTConfig):
        super(ZooModel, self).__init__(config)  # what a ZooModel would make here, the backbone makes
        config.settle_layers()
        inside = config.make_backbone()
        inside._attn_implementation = config._attn_implementation
        self.backbone = config.find_backbone().model_class("Model")(inside)
        room = config.segment_window
        for block in self.backbone.layers:
            if (kind := type(block.mixer)) in (Attention, SlidingWindowAttention):
                window = window_of(kind, block.mixer.config, room)
                block.mixer = SegmentAttention.taking_over(block.mixer, window)
        keepers = self.backbone.keepers()
        if config.memory == "associative":
            for layer in config.layers_with_memory:
                memory = AssociativeMemory(config, layer)
                self.backbone.layers[layer] = MemoryLayer(self.backbone.layers[layer], memory)
        self.stack = STACKS[config.memory](config, self.backbone, keepers)
        self.rotary = None
        self.gradient_checkpointing = False
        outside = {type(layer).__name__ for layer in self.backbone.layers}
        self._no_split_modules = sorted(outside.union(self.backbone._no_split_modules))
        self.post_init()

    @property
    def embed_tokens(self) -> nn.Module:
        return self.backbone.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks of the backbone."""
        return [getattr(layer, "block", layer) for layer in self.backbone.layers]

    @property
    def norm(self) -> nn.Module:
        return self.backbone.norm


class ARMTForCausalLM(ZooForCausalLM, GenerationMixin):
    config: ARMTConfig
    model_class = ARMTModel
    _tied_weights_keys = {"lm_head.weight": "model.backbone.embed_tokens.weight"}

    @classmethod
    def around(cls, model: ZooForCausalLM, **fields) -> "ARMTForCausalLM":
        """A memory, not trained yet, around a trained model, whose weights are copied.

        Args:
            model: any model of the zoo.
            fields: of `ARMTConfig`, those of the memory.
        """
        new = cls(ARMTConfig.around(model.config, **fields)).to(device=model.device, dtype=model.dtype)
        backbone = new.model.backbone
        for name, parameter in backbone.state_dict().items():
            if ".memory." not in name:
                parameter.copy_(model.model.state_dict()[name.replace(".block.", ".", 1)])
        new.lm_head.load_state_dict(model.lm_head.state_dict())
        with torch.no_grad():  # tokens of memory shall look like tokens
            new.model.stack.memory_tokens.normal_(std=float(backbone.embed_tokens.weight.std()))
        return new


_, ARMTForSequenceClassification, ARMTForTokenClassification = heads_of(ARMTModel)

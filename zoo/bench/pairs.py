"""What `zoo bench models` measures: architectures, each with what it is measured beside.

Most stand beside transformers' class of the same architecture with the same weights, which has to compute the same. A
model with a memory that goes around a backbone stands beside the plain backbone.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
    xLSTMConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

import zoo
from zoo.bench.workloads.decay_attention import transformers_xlstm
from zoo.convert import import_checkpoint

TRAINING, DECODING = "training step", "decoding"

Models = tuple[PreTrainedModel, nn.Module]
"""The zoo's and the other one."""

_VOCABULARY = 8192


def make_models(config: PreTrainedConfig) -> Models:
    """Transformers' model of a configuration, with random weights, and the zoo's with the same."""
    return import_weights(AutoModelForCausalLM.from_config(config))


def import_weights(theirs: PreTrainedModel) -> Models:
    """The zoo's model of transformers' one, whose weights are disturbed, so that none of them is 0 or 1."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours, _ = import_checkpoint(folder)
            ours = copy.deepcopy(ours)  # out of the files
    finally:
        if progress:
            logging.enable_progress_bar()
    return ours, theirs


@dataclass(frozen=True)
class Pair:
    """An architecture, at about 25 million parameters where the other allows it, and what it is measured beside.

    Args:
        name: of the architecture.
        config: the configuration that both models are made from.
        training, decoding: how many times as fast as the other the zoo's has to be; None: no target.
        other: the name of the other.
        make: from the configuration, the zoo's model and the other.
        computes_the_same: whether losses, gradients and tokens have to agree.
        passes: which are measured.
        piece: tokens of a sequence that the other trains on, where a batch is cut into shorter ones for it.
        package: what has to be installed for the other.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    training: float | None = None
    decoding: float | None = None
    other: str = "transformers"
    make: Callable[[PreTrainedConfig], Models] = make_models
    computes_the_same: bool = True
    passes: tuple[str, ...] = (TRAINING, DECODING)
    piece: int | None = None
    package: str | None = None


def _mamba2() -> Mamba2Config:
    return Mamba2Config(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        num_hidden_layers=12,
        num_heads=16,
        head_dim=64,
        state_size=128,
        n_groups=1,
        tie_word_embeddings=True,
    )


def _xlstm() -> xLSTMConfig:
    return xLSTMConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        embedding_dim=512,
        num_heads=4,
        num_hidden_layers=6,
        num_blocks=6,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        autocast_kernel_dtype="float32",
    )


def _jamba() -> JambaConfig:
    return JambaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=384,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_experts=8,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.0,  # transformers leaves it out unless asked
    )


def _griffin() -> RecurrentGemmaConfig:
    return RecurrentGemmaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        num_hidden_layers=6,
        intermediate_size=3072,
        num_attention_heads=8,
        num_key_value_heads=1,
    )


_BACKBONE = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "intermediate_size": 1376,
    "tie_word_embeddings": True,
}
_SEGMENT = 128  # tokens


def _armt() -> PreTrainedConfig:
    return zoo.create_config(
        "armt-tiny",
        **_BACKBONE,
        vocab_size=_VOCABULARY,
        backbone_options={"num_attention_heads": 8},
        segment_length=_SEGMENT,
        num_memory_tokens=16,
        d_mem=64,
    )


def _lm2() -> PreTrainedConfig:
    return zoo.create_config(
        "lm2-tiny",
        **_BACKBONE,
        vocab_size=_VOCABULARY,
        num_attention_heads=8,
        num_key_value_heads=8,
        segment_length=_SEGMENT,
        num_memory_slots=16,
    )


def make_with_backbone(config: PreTrainedConfig) -> Models:
    """The zoo's model of a configuration, and the Transformer of the same sizes without the memory."""
    backbone = zoo.create_model(
        "transformer-tiny", **_BACKBONE, vocab_size=_VOCABULARY, num_attention_heads=8, num_key_value_heads=8
    )
    return AutoModelForCausalLM.from_config(config), backbone


def _beside_backbone(name: str, config: Callable[[], PreTrainedConfig]) -> Pair:
    """Training of a model with a memory beside its backbone, which trains on rows of a segment each."""
    return Pair(
        *(name, config, 0.6),
        other="backbone",
        make=make_with_backbone,
        computes_the_same=False,
        passes=(TRAINING,),
        piece=_SEGMENT,
    )


def _titans() -> PreTrainedConfig:
    """Small: titans-pytorch takes minutes for a step of 25 million parameters."""
    return zoo.create_config(
        "titans-tiny",
        mixers=["titans_mac"],
        num_hidden_layers=2,
        vocab_size=256,
        intermediate_size=341,
        chunk_size=16,
        segment_length=64,
    )


class TitansPytorch(nn.Module):
    """titans-pytorch's memory as context at the sizes of a configuration, which writes its memory for every token."""

    dtype = torch.float32

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        from titans_pytorch import MemoryAsContextTransformer, MemoryMLP  # noqa: PLC0415 (need not be installed)

        width = config.hidden_size // config.num_attention_heads
        sizes = {"heads": config.num_attention_heads, "dim_head": width}
        self.inner = MemoryAsContextTransformer(
            num_tokens=config.vocab_size,
            dim=config.hidden_size,
            depth=config.num_hidden_layers,
            segment_len=config.segment_length,
            num_persist_mem_tokens=config.num_persistent_tokens,
            **sizes,
            num_residual_streams=1,
            neural_memory_segment_len=1,
            neural_memory_batch_size=config.chunk_size,
            neural_memory_model=MemoryMLP(dim=width, depth=2, expansion_factor=2.0),
            neural_memory_kwargs=sizes,
        )
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()  # some are views that repeat, which no optimiser can write

    def forward(self, tokens: Tensor, labels: Tensor, use_cache: bool) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(loss=self.inner(tokens, return_loss=True))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.inner.token_emb

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def make_with_titans_pytorch(config: PreTrainedConfig) -> Models:
    """The zoo's model of a configuration, and titans-pytorch's of the same sizes."""
    return AutoModelForCausalLM.from_config(config), TitansPytorch(config)


PAIRS = (
    Pair(
        "llama",
        lambda: LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=512,
            num_hidden_layers=6,
            intermediate_size=1376,
            num_attention_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    Pair("mamba", lambda: MambaConfig(vocab_size=_VOCABULARY, hidden_size=512, num_hidden_layers=12), 6, 1.5),
    Pair("mamba2", _mamba2, 3, 1.5),
    Pair("rwkv4", lambda: RwkvConfig(vocab_size=_VOCABULARY, hidden_size=384, num_hidden_layers=12), 5, 1.5),
    Pair(
        *("xlstm", _xlstm, 3, 1.5),
        make=lambda config: import_weights(transformers_xlstm().xLSTMForCausalLM(config)),
    ),
    Pair("jamba", _jamba, 5, 5),
    Pair("griffin", _griffin, 5, 5),
    Pair(
        *("titans", _titans, 5),
        other="titans-pytorch",
        make=make_with_titans_pytorch,
        computes_the_same=False,
        passes=(TRAINING,),
        package="titans_pytorch",
    ),
    _beside_backbone("armt", _armt),
    _beside_backbone("lm2", _lm2),
)

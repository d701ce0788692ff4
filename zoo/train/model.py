"""The model of a run: checked before anything is read, made with fresh weights or those of a checkpoint."""

from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from zoo.inspection import state_grows
from zoo.registry import create_config, create_model
from zoo.segments import SegmentedModel
from zoo.train.config import TrainConfig
from zoo.train.tokenizer import count_entries


def check_model(config: TrainConfig) -> None:
    """Raise what is wrong with the model of a recipe that no tokenizer is needed to see.

    Raises:
        ValueError: on an unknown preset or field, rows that are longer than what the model reads, or a state that
            grows and shall be carried.
    """
    settings, length = config.model, config.data.sequence_length
    found = create_config(settings.preset, **settings.overrides)
    longest = getattr(found, "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise ValueError(
            f"data.sequence_length is {length}, the model reads {longest} tokens: set "
            "model.overrides.max_position_embeddings"
        )
    if config.train.carry_state and state_grows(found):
        raise ValueError(f"train.carry_state: a layer of {settings.preset} keeps more with every token it reads")


def check_sharing(config: TrainConfig, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Raise where processes share out layers that they would have to run in different ways.

    Rows decide how often, and with which weights, a model that reads segment by segment runs its layers.

    Raises:
        ValueError: on packed rows with ZeRO-3, or with FSDP2 where every document has runs of its own; on states that
            are carried with FSDP2.
    """
    if not isinstance(model.base_model, SegmentedModel):
        return
    stack, is_packed = model.base_model.stack, config.data.isolate_documents
    name, way_out = type(stack).__name__, "data.isolate_documents=false, or cpu.yaml or gpu8.yaml"
    if is_packed and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"ZeRO-3 gathers weights in all processes at once, {name} as rows need them: "
            "data.isolate_documents=false, or fsdp2.yaml"
        )
    if is_packed and accelerator.is_fsdp2 and not stack.documents_share_runs:
        raise ValueError(f"FSDP2 runs layers in all processes at once, {name} as rows need them: {way_out}")
    if config.train.carry_state and accelerator.is_fsdp2:
        raise ValueError(f"FSDP2 runs layers in all processes at once, {name} as states need: train.carry_state=false")


def make_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: Path | None) -> PreTrainedModel:
    """The model in training mode, with fresh weights or those of a checkpoint.

    Raises:
        ValueError: if the vocabulary that the recipe asks for has no room for the tokenizer's.
    """
    settings, entries = config.model, count_entries(tokenizer)
    vocab_size = settings.overrides.get("vocab_size", entries)
    if vocab_size < entries:
        raise ValueError(f"model.overrides.vocab_size is {vocab_size}, the tokenizer has {entries} entries")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {**settings.overrides, **special, "vocab_size": vocab_size}
    if checkpoint is None:
        model = create_model(settings.preset, **fields)
    else:  # a configuration file leaves out what is a choice of the machine, as kernels
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=create_config(settings.preset, **fields))
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()

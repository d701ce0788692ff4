"""The state contract: one cache layer that keeps any recurrent state, and files that keep a whole cache.

A recurrent state is a tuple of tensors whose first dimension is the batch and whose shapes do not grow with the length.
`RecurrentStateLayer` stores one for a layer of the model. transformers' `DynamicCache(config=...)` and
`StaticCache(config=...)` build it wherever `config.layer_types` says `RECURRENT`, so `generate` needs nothing else.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
from transformers.utils import is_torchdynamo_compiling

from zoo.files import whole_file

RECURRENT = "zoo_recurrent"
"""The entry of `config.layer_types` for a layer that keeps a recurrent state."""

MAX_ROLLBACK = 256
"""How many of the newest tokens `crop` can take back once `activate_past_recording` was called."""

_RECORD_COLUMNS = 64  # shorter calls share a record: rolling back re-runs some tokens, few states are kept

State = tuple[Tensor, ...]


@dataclass
class Record:
    """One or more calls that `crop` can take back: the state before them, what went in, and how to run it again."""

    before: State | None
    inputs: dict[str, Tensor]  # each (b t ...)
    replay: Callable[[dict[str, Tensor], State | None], State]

    @property
    def columns(self) -> int:
        return next(iter(self.inputs.values())).shape[1]


class RecurrentStateLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """The recurrent state of one layer.

    Dynamic by default: `write` keeps the tensors it is given, so gradients flow through a carried state. Built with
    `max_cache_len` (by `StaticCache`) it copies into buffers whose addresses never change, for compiled decoding.
    """

    _layer_type = RECURRENT  # CacheLayerMixin enters the class under this name for dynamic caches
    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, max_cache_len: int | None = None):
        CacheLayerMixin.__init__(self)
        self.number_of_states = 0  # transformers' own slots for states stay unused
        self.is_static = max_cache_len is not None
        self.cumulative_length = torch.zeros((), dtype=torch.long) if self.is_static else 0
        self.states: State | None = None
        self.record_past = False
        self._buffers: State | None = None
        self._records: list[Record] = []

    # -- the state -----------------------------------------------------------------------------------------------------

    def write(self, states: State, columns: int) -> None:
        """Keep the state after a call of `columns` token columns, padding included."""
        if not self.is_static:
            self.cumulative_length += columns
        else:
            self._allocate(states)
            self.cumulative_length.add_(columns)
        self._store(states)
        self.is_initialized = True

    def _store(self, states: State | None) -> None:
        if self.is_static and states is not None:
            for buffer, state in zip(self._buffers, states, strict=True):
                buffer.copy_(state)
            states = self._buffers
        self.states = states

    def _allocate(self, states: State) -> None:
        """Make the buffers of a static layer at the first write."""
        shapes = [state.shape for state in states]
        if self._buffers is not None and [buffer.shape for buffer in self._buffers] == shapes:
            return
        self._buffers = tuple(torch.zeros_like(state) for state in states)
        self.cumulative_length = self.cumulative_length.to(states[0].device)
        if not is_torchdynamo_compiling():
            for buffer in (*self._buffers, self.cumulative_length):
                torch._dynamo.mark_static_address(buffer)

    def detach(self) -> None:
        """Cut the gradient: what follows is not differentiated through what was read so far."""
        if self.is_static:
            for buffer in self._buffers or ():
                buffer.detach_()
        elif self.states is not None:
            self.states = tuple(state.detach() for state in self.states)

    # -- going back ----------------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """From now on remember enough to take back the newest `MAX_ROLLBACK` tokens that came since the last `crop`."""
        self.record_past = True

    def record(self, inputs: dict[str, Tensor], replay: Callable[[dict[str, Tensor], State | None], State]) -> None:
        """Remember a call about to be made, from the present state.

        Args:
            inputs: what the call reads, by name, each (b t ...).
            replay: runs any leading columns of such inputs from a state (None: the start) and gives the state after.
        """
        last = self._records[-1] if self._records else None
        if last is not None and last.columns < _RECORD_COLUMNS and last.inputs.keys() == inputs.keys():
            last.inputs = {name: torch.cat([last.inputs[name], new], dim=1) for name, new in inputs.items()}
            return
        before = self.states
        if self.is_static and before is not None:
            before = tuple(state.clone() for state in before)
        self._records.append(Record(before, inputs, replay))
        while sum(record.columns for record in self._records[1:]) >= MAX_ROLLBACK:
            del self._records[0]

    def forget(self) -> None:
        """Drop what was recorded: the next call cannot be taken back beyond its own start."""
        self._records.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, exactly, and forget what was recorded.

        Args:
            tokens_to_remove: minus the number of tokens, as everywhere in transformers; 0 only forgets.

        Raises:
            ValueError: on a positive number.
            RuntimeError: if fewer tokens were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        remaining = -int(tokens_to_remove)
        recorded = sum(record.columns for record in self._records)
        if remaining > recorded:
            raise RuntimeError(
                f"cannot roll back {remaining} tokens of a recurrent state, {recorded} are recorded; at most "
                f"{MAX_ROLLBACK} can go, and only if activate_past_recording() was called before they were read"
            )
        self.cumulative_length -= remaining
        while remaining:
            record = self._records.pop()
            kept = record.columns - remaining
            if kept <= 0:
                self._store(record.before)
                remaining = -kept
            else:
                inputs = {name: x[:, :kept] for name, x in record.inputs.items()}
                self._store(record.replay(inputs, record.before))
                remaining = 0
        self.forget()

    # -- the batch -----------------------------------------------------------------------------------------------------

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change`, which acts on the batch dimension, to everything that is kept."""
        for record in self._records:
            record.before = None if record.before is None else tuple(map(change, record.before))
            record.inputs = {name: change(x) for name, x in record.inputs.items()}
        if self.states is None:
            return
        states = tuple(map(change, self.states))
        if self.is_static:
            self._allocate(states)
        self._store(states)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor | list[int]) -> None:
        self._map(lambda x: x[torch.as_tensor(indices, device=x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Back to the start of a sequence; a static layer keeps its buffers."""
        self.states = None
        self.is_initialized = False
        self.forget()
        if self.is_static:
            self.cumulative_length.zero_()
        else:
            self.cumulative_length = 0

    def __getstate__(self) -> dict:
        """A copy or a pickle starts with nothing recorded: what is recorded belongs to the model that ran it."""
        return {**self.__dict__, "_records": []}

    # -- what transformers asks of any layer ---------------------------------------------------------------------------

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {0: self.states is not None}

    def get_seq_length(self) -> int | Tensor:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int | Tensor, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, *args, **kwargs) -> None:
        raise TypeError("a recurrent state is initialised by its mixer")

    update = update_conv_state = update_recurrent_state = lazy_initialization


def recurrent_mask(inputs_embeds: Tensor, attention_mask: Tensor | None, **unused) -> Tensor | None:
    """The padding mask of the newest tokens, (b t); None where all of them are real."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"a recurrent layer takes an attention mask of shape (batch, length), got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, -inputs_embeds.shape[1] :].bool()
    if not is_torchdynamo_compiling() and mask.all():
        return None
    return mask.contiguous()


# transformers has a hook for dynamic caches (`_layer_type`); for static ones and masks the tables are the interface.
STATIC_LAYER_TYPE_MAPPING[RECURRENT] = RecurrentStateLayer
LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[RECURRENT] = recurrent_mask


def detach_state(cache: Cache) -> None:
    """Cut the gradient between windows: truncated backpropagation through time carries values on, not derivatives.

    Args:
        cache: what a forward call returned as `past_key_values`; it is changed in place.
    """
    for layer in cache.layers:
        if isinstance(layer, RecurrentStateLayer):
            layer.detach()
        elif layer.is_initialized:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


# -- state files -------------------------------------------------------------------------------------------------------

_FORMAT = "zoo-state-1"


def save_state(cache: Cache, path: str | os.PathLike) -> None:
    """Write the state that `cache` carries to a safetensors file; the file appears whole or not at all.

    Padding is not part of the file: whoever continues a padded batch must pass its whole attention mask again.

    Args:
        cache: what a forward call or `generate` returned as `past_key_values`.
        path: the file.

    Raises:
        FileNotFoundError: if the file's folder does not exist.
        ValueError: if the cache is empty, or is of a kind that cannot be written.
    """
    tensors, lengths = {}, []
    for index, layer in enumerate(cache.layers):
        for name, tensor in _layer_tensors(layer, index).items():
            tensors[f"layers.{index}.{name}"] = tensor.detach().clone(memory_format=torch.contiguous_format)
        lengths.append(int(layer.get_seq_length()))
    if not tensors:
        raise ValueError("the cache is empty: run the model on some tokens first")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT, "lengths": json.dumps(lengths)})


def load_state(path: str | os.PathLike, model) -> DynamicCache:
    """Read a state file into a cache for `model`: continue from it, or fork it with `batch_repeat_interleave(n)`.

    Args:
        path: a file that `save_state` wrote.
        model: a model of the zoo of the same configuration; the tensors go to its device, and those that are kept in
            the precision of the activations to its dtype.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is no state file, or belongs to a model of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no state file at {path}")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is no state file of this version: its format is {metadata.get('format')!r}")
    cache, lengths = DynamicCache(config=model.config), json.loads(metadata["lengths"])
    if len(lengths) != len(cache.layers):
        raise ValueError(f"{path} holds {len(lengths)} layers, the model has {len(cache.layers)}")
    keepers = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model.keepers()
    for index, (layer, keeper, length) in enumerate(zip(cache.layers, keepers, lengths, strict=True)):
        expected = {name: tuple(shape) for name, shape in keeper.saved_shapes(length).items()}
        prefix = f"layers.{index}."
        found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        shapes = {name: tuple(x.shape[1:]) for name, x in found.items()}
        if shapes != expected:
            raise ValueError(f"{path} does not fit layer {index} of the model: it holds {shapes}, wanted {expected}")
        kept = keeper.saved_dtypes(model.dtype)
        tensors_of_layer = tuple(found[name].to(kept[name]) for name in expected)
        if isinstance(layer, RecurrentStateLayer):
            layer.write(tensors_of_layer, length)
        else:
            layer.update(*tensors_of_layer)
    return cache


def _layer_tensors(layer: CacheLayerMixin, index: int) -> dict[str, Tensor]:
    if isinstance(layer, RecurrentStateLayer):
        return {f"state.{i}": state for i, state in enumerate(layer.states or ())}
    if type(layer) is DynamicLayer:
        return {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
    raise ValueError(f"cannot write layer {index} of the cache: {type(layer).__name__} has no file form")

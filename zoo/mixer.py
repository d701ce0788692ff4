"""The mixer contract: what a layer that mixes tokens promises, and the padding and caching that the spine does for it.

A recurrent mixer is written as one pure function, `scan(x, state, tokens) -> (y, state)`, and the shapes of its state.
From these follow chunked and token-by-token evaluation, padding anywhere, packed documents, beam search, rollback,
saved and forked states, and truncated backpropagation, the same way for every architecture.

Letters: b batch, t tokens of the call, d width.
"""

from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from zoo.cache import MAX_ROLLBACK, RECURRENT, RecurrentStateLayer, State
from zoo.config import ZooConfig

Shared = dict[str, Tensor]
"""Values, each (b t ...), that layers share: what one leaves, those above it find (as the first values of RWKV-7)."""


@dataclass
class Tokens:
    """What one call knows of its tokens, besides their activations.

    In the `Tokens` that a recurrent mixer's `scan` is given, padding stands behind the real tokens of each row.
    """

    positions: Tensor
    """(b t) or (1 t), place of each token in its document."""
    mask: Tensor | None = None
    """(b t) bool, False at padding; None: no padding."""
    segments: Tensor | None = None
    """(b t) ids of the documents packed in a row, one after the other; None: one document a row."""
    starts_anew: Tensor | None = None
    """(b) bool, rows whose first document starts with this call, though they have a state; None: no row."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the rotary embedding at `positions`, each (b|1 t r)."""
    attention_masks: dict[str, Any] = field(default_factory=dict)
    """By layer type, the mask in the form that the attention implementation takes."""
    attention_options: dict[str, Any] = field(default_factory=dict)
    """What the caller passed on to the attention implementation."""
    order: Tensor | None = None
    """(b t), set where padding was moved behind: which column now stands at each place."""
    moved: "Tokens | None" = None
    """`left_aligned` where that is not these tokens: nothing holds itself, as FSDP looks through all that is passed."""

    @property
    def left_aligned(self) -> "Tokens":
        """The same tokens with padding moved behind, worked out once for all layers; themselves where there is none."""
        return self if self.moved is None else self.moved

    @left_aligned.setter
    def left_aligned(self, tokens: "Tokens") -> None:
        self.moved = None if tokens is self else tokens

    def align_left(self) -> "Tokens":
        """These tokens as `scan` sees them: in each row the real ones first, in their order."""
        if self.mask is None:
            return self
        b, t = self.mask.shape
        order = (~self.mask).int().sort(dim=1, stable=True).indices
        lengths = self.mask.sum(dim=1, keepdim=True)
        mask = torch.arange(t, device=order.device) < lengths
        moved = Tokens(self.positions, mask=mask, order=order, attention_options=self.attention_options)
        moved.positions = moved.gather(self.positions.expand(b, -1))
        if self.segments is not None:
            moved.segments = moved.gather(self.segments)
        if self.rotary is not None:
            moved.rotary = tuple(moved.gather(x.expand(b, -1, -1)) for x in self.rotary)
        return moved

    def gather(self, x: Tensor) -> Tensor:
        """(b t ...) in the caller's order -> the order of these tokens."""
        return x if self.order is None else x.gather(1, _expand_index(self.order, x))

    def scatter(self, x: Tensor) -> Tensor:
        """(b t ...) in the order of these tokens -> the caller's order."""
        return x if self.order is None else torch.empty_like(x).scatter(1, _expand_index(self.order, x), x)

    def places(self, before: Tensor, t: int) -> Tensor:
        """How many tokens each of t has before it in its document, (b t), if padding stands behind.

        Args:
            before: (b), how many tokens the first document of each row had before.
        """
        rank = torch.arange(t, device=before.device)
        if self.segments is None:
            return before[:, None] + rank
        starts = torch.diff(self.segments, dim=1, prepend=self.segments[:, :1]) != 0
        start = torch.where(starts, rank, -1).cummax(dim=1).values
        return torch.where(start < 0, before[:, None] + rank, rank - start)

    def count_last(self, before: Tensor, t: int) -> Tensor:
        """How many tokens the last document of each row has after t, (b); otherwise as `places`."""
        lengths = t if self.mask is None else self.mask.sum(dim=1)
        if self.segments is None:
            return before + lengths
        lengths = torch.as_tensor(lengths, device=before.device).expand_as(before)
        last = self.places(before, t).gather(1, (lengths - 1).clamp(min=0)[:, None])
        return torch.where(lengths > 0, last[:, 0] + 1, before)

    def columns(self, start: int, stop: int) -> "Tokens":
        """The tokens of some columns, in the caller's order, without the masks of attention: those are of the call."""
        part = replace(
            self,
            attention_masks={},
            positions=self.positions[:, start:stop],
            mask=None if self.mask is None else self.mask[:, start:stop],
            segments=None if self.segments is None else self.segments[:, start:stop],
            rotary=None if self.rotary is None else tuple(x[:, start:stop] for x in self.rotary),
        )
        part.left_aligned = part.align_left()
        return part

    def to(self, *args, **kwargs) -> "Tokens":
        """The same tokens on another device; what moves a model's inputs between devices calls this."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            if isinstance(value, tuple):
                return tuple(map(move, value))
            return value.to(*args, **kwargs) if hasattr(value, "to") else value

        return Tokens(**move({item.name: getattr(self, item.name) for item in fields(self)}))

    def as_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """`x` (b t d) and all that a recurrence reads of these tokens, each (b t ...)."""
        b = x.shape[0]
        inputs = {"x": x, "positions": self.positions.expand(b, -1)}
        if self.mask is not None:
            inputs["mask"] = self.mask
        if self.rotary is not None:
            inputs["cos"], inputs["sin"] = (part.expand(b, -1, -1) for part in self.rotary)
        return inputs

    @classmethod
    def from_inputs(cls, inputs: dict[str, Tensor]) -> "Tokens":
        """The tokens that `as_inputs` described."""
        rotary = (inputs["cos"], inputs["sin"]) if "cos" in inputs else None
        tokens = cls(inputs["positions"], mask=inputs.get("mask"), rotary=rotary)
        tokens.left_aligned = tokens.align_left()
        return tokens


class AuxiliaryLoss(NamedTuple):
    """A loss that training adds to that of the labels."""

    name: str
    """Losses of one name, as those of several layers, are averaged."""
    coefficient: float
    value: Tensor
    """Of each row of the batch, (b), so that a row's loss is the same whatever rows stand beside it."""


def _expand_index(order: Tensor, x: Tensor) -> Tensor:
    return order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand_as(x)


def choose_rows(rows: Tensor, new: State, old: State) -> State:
    """Of each row of two states `new` where `rows`, (b) bool, else `old`."""
    return tuple(torch.where(rows.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, old, strict=True))


class Mixer(nn.Module):
    """Half a layer: what lets tokens see earlier ones (attention, a recurrence), or what mixes the channels of each.

    Every mixer is built as `Mixer(config, layer_idx)` and called as `forward` says. Recurrent ones derive from
    `RecurrentMixer` and write `scan` instead.
    """

    layer_type: ClassVar[str | None] = None
    """Which cache layer and which mask it takes: an entry of `config.layer_types`; None: it keeps nothing."""
    ops: ClassVar[tuple[str, ...]] = ()
    """Names of the ops of `zoo.ops` it runs on."""
    config_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that it reads of a configuration: all of its own, which a model with this mixer must have, and those of
    `ZooConfig` that may differ from mixer to mixer, as the inner width. In a hybrid they are its options."""
    uses_rotary: ClassVar[bool] = False
    """Whether it rotates heads of `config.head_dim` by `tokens.rotary`."""
    parameter_options: ClassVar[dict[str, dict[str, float]]] = {}
    """By name of a parameter, what the optimiser shall do with it other than usual: `weight_decay`, `lr_scale`."""

    def __init__(self, config: ZooConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.cache_idx = layer_idx  # the model sets another for a channel mixer

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        """Mix the tokens of a call with each other and with what the cache holds.

        Args:
            x: activations, (b t d).
            shared: values that the layers below left.
            tokens: positions, padding and documents.
            cache: the model's cache, whose layer `cache_idx` is read and written; None: a whole sequence without one.

        Returns:
            The mixed activations, (b t d), and what the layers above shall find in `shared`.
        """
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, config: ZooConfig, layer_idx: int, length: int | None, dtype: torch.dtype) -> int:
        """Bytes that one sequence of `length` tokens keeps in this layer, with activations of `dtype`."""
        raise NotImplementedError

    def saved_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """What a state file holds of this layer after `length` tokens: shapes by name, without the batch."""
        raise NotImplementedError

    def saved_dtypes(self, activations: torch.dtype) -> dict[str, torch.dtype]:
        """The dtypes of the same tensors in a model whose activations are of the given one."""
        return dict.fromkeys(self.saved_shapes(0), activations)

    def auxiliary_losses(self, shared: Shared, mask: Tensor | None) -> list[AuxiliaryLoss]:
        """What training adds to the loss for this mixer, of figures that it left in `shared`; the mask is (b t).

        It is asked once a call, after the last layer, and in training only.
        """
        return []

    def reset_parameters(self) -> None:
        """Initialise the raw parameters of this module, with `transformers.initialization` only."""


class RecurrentMixer(Mixer):
    """A mixer whose memory is a tuple of tensors that do not grow: the plugin writes `scan` and `state_shapes`."""

    layer_type = RECURRENT

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        """Run the recurrence over the tokens of a call: a pure function of its arguments and the parameters.

        Where `tokens.mask` is False nothing may be written to the state nor decay it. At the first token of a document
        other than the row's first (`tokens.segments`) the state starts anew.

        Args:
            x: activations, (b t d).
            state: as `state_shapes` declares it, each with the batch in front.
            tokens: positions, padding (behind the real tokens) and documents.

        Returns:
            The mixed activations, (b t d), and the state after the last real token of each row, which is that of the
            document it stands in.
        """
        raise NotImplementedError

    def scan_shared(self, x: Tensor, state: State, tokens: Tokens, shared: Shared) -> tuple[Tensor, State, Shared]:
        """`scan` for a mixer that reads what layers below left, or leaves something; override one of the two."""
        y, state = self.scan(x, state, tokens)
        return y, state, shared

    @classmethod
    def state_shapes(cls, config: ZooConfig, layer_idx: int) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """The tensors of the state in their order: by name, the shape without the batch, and the dtype.

        A dtype of None is that of the activations; a float32 state becomes float64 where the activations are.
        """
        raise NotImplementedError

    def initial_state(self, x: Tensor) -> State:
        """The state before the first token, for activations `x` (b t d): zeros, unless a mixer learns it."""
        return tuple(
            x.new_zeros((x.shape[0], *shape), dtype=_resolve(dtype, x.dtype))
            for shape, dtype in self.state_shapes(self.config, self.layer_idx).values()
        )

    def restart(self, rows: Tensor, state: State, x: Tensor) -> State:
        """The state with that of some rows, (b) bool, set back to the initial one, for activations `x` (b t d)."""
        return choose_rows(rows, self.initial_state(x), state)

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        if cache is None:
            y, _, shared = self._run(x, shared, tokens, None)
            return y, shared
        memory = cache.layers[self.cache_idx]
        if memory.record_past:
            return self._run_recorded(x, shared, tokens, memory)
        y, state, shared = self._run(x, shared, tokens, memory.states)
        memory.write(state, x.shape[1])
        return y, shared

    def _run(self, x: Tensor, shared: Shared, tokens: Tokens, state: State | None) -> tuple[Tensor, State, Shared]:
        """Call `scan_shared` with padding moved behind, and give everything back in the caller's order."""
        aligned = tokens.left_aligned
        if state is None:
            state = self.initial_state(x)
        elif tokens.starts_anew is not None:
            state = self.restart(tokens.starts_anew, state, x)
        y, state, left = self.scan_shared(
            aligned.gather(x), state, aligned, {name: aligned.gather(value) for name, value in shared.items()}
        )
        return aligned.scatter(y), state, {name: aligned.scatter(value) for name, value in left.items()}

    def _run_recorded(
        self, x: Tensor, shared: Shared, tokens: Tokens, memory: RecurrentStateLayer
    ) -> tuple[Tensor, Shared]:
        """Run while the cache records: of a long call only the tail that may be taken back is kept."""
        pieces, t = [], x.shape[1]
        head = max(0, t - MAX_ROLLBACK)
        for start, stop in ((0, head), (head, t)):
            if start == stop:
                continue
            part = tokens.columns(start, stop)
            piece, below = x[:, start:stop], {name: value[:, start:stop] for name, value in shared.items()}
            if stop < t:
                memory.forget()
            else:
                memory.record(part.as_inputs(piece) | {f"shared.{name}": v for name, v in below.items()}, self._replay)
            y, state, left = self._run(piece, below, part, memory.states)
            memory.write(state, stop - start)
            pieces.append((y, left))
        ys, lefts = zip(*pieces, strict=True)
        return torch.cat(ys, dim=1), {name: torch.cat([left[name] for left in lefts], dim=1) for name in lefts[0]}

    def _replay(self, inputs: dict[str, Tensor], state: State | None) -> State:
        """The state after recorded inputs, which `crop` kept some columns of."""
        shared = {name.removeprefix("shared."): v for name, v in inputs.items() if name.startswith("shared.")}
        return self._run(inputs["x"], shared, Tokens.from_inputs(inputs), state)[1]

    @classmethod
    def state_bytes(cls, config: ZooConfig, layer_idx: int, length: int | None, dtype: torch.dtype) -> int:
        shapes = cls.state_shapes(config, layer_idx).values()
        return sum(prod(shape) * _resolve(kind, dtype).itemsize for shape, kind in shapes)

    def saved_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        shapes = self.state_shapes(self.config, self.layer_idx).values()
        return {f"state.{i}": shape for i, (shape, _) in enumerate(shapes)}

    def saved_dtypes(self, activations: torch.dtype) -> dict[str, torch.dtype]:
        shapes = self.state_shapes(self.config, self.layer_idx).values()
        return {f"state.{i}": _resolve(dtype, activations) for i, (_, dtype) in enumerate(shapes)}


def _resolve(dtype: torch.dtype | None, activations: torch.dtype) -> torch.dtype:
    if dtype is None:
        return activations
    return torch.promote_types(dtype, activations) if dtype.is_floating_point else dtype

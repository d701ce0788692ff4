"""All layers of a model as one recurrent mixer that reads segment by segment, with a memory.

Letters as in `zoo.segments`.
"""

from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache
from transformers.utils import is_torchdynamo_compiling

from zoo.cache import State
from zoo.config import ZooConfig
from zoo.mixer import RecurrentMixer, Shared, Tokens, choose_rows
from zoo.modeling import Block
from zoo.ops.packing import reorder, segment_starts
from zoo.segments.layout import Segmentation
from zoo.segments.run import RowsFlag, Run, record_input

_OF_WHOLE_ROWS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Options of attention that describe the rows of a call, which are not those of a run."""


class SegmentedStack(RecurrentMixer):
    """All layers of a model as one recurrent mixer that reads segment by segment, with a memory.

    An architecture has `segment_length` in its configuration and writes

        run_segment       the layers on a part of a segment, and the memory after it if that fills the segment
        memory_shapes     what is carried from segment to segment, and `initial_memory` where that is not zero
        keepers_inside    the classes of the mixers inside that keep something of the open segment

    A memory is written when a segment is full, not before: the state of a row between two segments is its memory.

    Args:
        config: the model's configuration.
        layers: what runs on a segment, blocks or modules that hold one; they have their places in the model. They are
            called as every block is, with an `OpenSegment` in place of a cache.
        keepers: the mixers inside of them that keep something, in the order of their `cache_idx`.
    """

    documents_share_runs = True
    """Whether `run_segment` takes several packed documents at once. If not, each begins a run of its own, whose number
    then depends on the data: packed rows cannot be compiled."""
    aligns_right = False
    """Whether the first call of a sequence has its segment of fewer tokens in front, and so ends with a full one."""
    freezes = False
    """Whether memory is written in the first call of a sequence only, and not behind its last segment, which stays open
    for all that follows."""

    def __init__(self, config: ZooConfig, layers: Iterable[nn.Module], keepers: Sequence[RecurrentMixer]):
        super().__init__(config, layer_idx=0)
        self._layers, self.keepers = list(layers), list(keepers)  # lists do not register them a second time
        self._sizes = [len(keeper.state_shapes(keeper.config, keeper.layer_idx)) for keeper in keepers]
        for layer in self._layers:
            layer.register_forward_pre_hook(record_input, with_kwargs=True)
            for block in layer.modules():
                if isinstance(block, Block):
                    block._can_checkpoint_with_cache = True  # an `OpenSegment` hands out the same states again

    # -- what an architecture writes -----------------------------------------------------------------------------------

    def run_segment(
        self, x: Tensor, memory: State, states: list[State] | None, run: Run
    ) -> tuple[Tensor, State, list[State] | None, Shared]:
        """Run the layers over a part of a segment.

        Args:
            x: embeddings, (b n d).
            memory: as the last full segment left it; tokens where `run.fresh` find the initial one.
            states: what each mixer inside keeps of the open segment; None: a segment opens in every row.
            run: what the slots hold.

        Returns:
            The residual stream after the last layer, (b n d); the memory, written, of which the rows that close are
            read (where documents restart the write is upon the initial one: `memory_of_last`); the states, unless
            `run.keeps` is False; what the layers left in `shared`, each (b n ...).
        """
        raise NotImplementedError

    @classmethod
    def memory_shapes(cls, config: ZooConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """The tensors that go from segment to segment, as in `state_shapes`."""
        raise NotImplementedError

    @classmethod
    def keepers_inside(cls, config: ZooConfig) -> list[tuple[type[RecurrentMixer], ZooConfig, int]]:
        """The classes of the mixers inside, each with its configuration and its layer, in their order."""
        raise NotImplementedError

    def initial_memory(self, x: Tensor) -> State:
        """The memory before the first segment, for embeddings x (b t d): zeros, unless an architecture learns it."""
        return tuple(
            x.new_zeros((x.shape[0], *shape), dtype=x.dtype if dtype is None else torch.promote_types(dtype, x.dtype))
            for shape, dtype in self.memory_shapes(self.config).values()
        )

    # -- the state -----------------------------------------------------------------------------------------------------

    @classmethod
    def state_shapes(cls, config: ZooConfig, layer_idx: int) -> dict:
        inside = {
            f"layers.{i}.{name}": shape
            for i, (keeper, view, layer) in enumerate(cls.keepers_inside(config))
            for name, shape in keeper.state_shapes(view, layer).items()
        }
        return {"position": ((), torch.long), **cls.memory_shapes(config), **inside}

    def initial_state(self, x: Tensor) -> State:
        nothing_read = -1 if self.aligns_right or self.freezes else 0  # the first call is told from later ones
        position = torch.full((x.shape[0],), nothing_read, device=x.device)
        return self._pack(position, self.initial_memory(x), self._nothing_open(x))

    def _nothing_open(self, x: Tensor) -> list[State]:
        """What the mixers inside keep where no segment is open."""
        return [keeper.initial_state(x) for keeper in self.keepers]

    def _pack(self, position: Tensor, memory: State, states: list[State]) -> State:
        return (position, *memory, *(part for state in states for part in state))

    def _unpack(self, state: State) -> tuple[Tensor, State, list[State]]:
        first = len(state) - sum(self._sizes)
        parts = iter(state[first:])
        return state[0], state[1:first], [tuple(islice(parts, size)) for size in self._sizes]

    def memory_of_last(self, memory: State, run: Run) -> State:
        """The memory that the last document of a run goes on with: the initial one where it starts in the run."""
        return memory if run.restarts is None else _choose(run.restarts, run.first_memory, memory)

    # -- reading -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        if cache is None and tokens.mask is None and tokens.segments is None:
            borders = self._segmentation.borders(x.shape[1], 0, is_first=True)
            y, _, _, shared = self._read_even(x, self.initial_memory(x), None, 0, borders, tokens, keeps=False)
            return y, shared
        if cache is not None and tokens.segments is not None and is_torchdynamo_compiling():
            raise ValueError(f"{type(self).__name__} takes packed rows with a cache or compiled, not both")
        if cache is not None and self.training and self._is_sharded:
            raise ValueError(
                "with carried states processes run the layers differently often, and FSDP2 runs them in all at once: "
                "train.carry_state=false, or leave the layers whole (DDP)"
            )
        return super().forward(x, shared, tokens, cache)

    def scan_shared(self, x: Tensor, state: State, tokens: Tokens, shared: Shared) -> tuple[Tensor, State, Shared]:
        position, memory, states = self._unpack(state)
        if tokens.mask is None and tokens.segments is None and not is_torchdynamo_compiling():
            places = set(position.tolist())
            if len(places) == 1:
                t, start = x.shape[1], places.pop()
                borders = self._segmentation.borders(t, max(start, 0), is_first=start < 0)
                y, memory, states, left = self._read_even(x, memory, states, max(start, 0), borders, tokens)
                after = t - borders[-1] if borders else max(start, 0) + t
                return y, self._pack(torch.full_like(position, after), memory, states), left
        return self._read_ragged(x, position, memory, states, tokens)

    @property
    def _segmentation(self) -> Segmentation:
        length = self.config.segment_length
        counts_ahead = is_torchdynamo_compiling() or self._is_sharded
        return Segmentation(length, self.aligns_right, self.freezes, self.documents_share_runs, counts_ahead)

    @property
    def _is_sharded(self) -> bool:
        """Whether processes share out the layers (FSDP2). Then a layer runs in all of them at once, equally often."""
        return isinstance(self._layers[0], FSDPModule)

    def _read_even(
        self,
        x: Tensor,
        memory: State,
        states: list[State] | None,
        start: int,
        borders: list[int],
        tokens: Tokens,
        keeps: bool = True,
    ) -> tuple[Tensor, State, list[State] | None, Shared]:
        """Read rows whose segments have the same borders; whose state is asked for only if it `keeps`."""
        t = x.shape[1]
        ends = borders if borders[-1:] == [t] else [*borders, t]
        pieces = []
        bounds = list(pairwise([0, *ends]))
        for (begin, end), piece in zip(bounds, x.split([end - begin for begin, end in bounds], dim=1), strict=True):
            place = 0 if begin else start
            closes = end in borders and (keeps or end < t)
            run = Run(
                torch.arange(place, place + end - begin, device=x.device)[None],
                opens=place == 0,
                closes=closes,
                is_first=begin == 0 and states is None,
                keeps=keeps and not closes,
                options=_options(tokens),
            )
            y, written, states, left = self.run_segment(piece, memory, None if place == 0 else states, run)
            memory = written if closes else memory
            pieces.append((y, left))
        if keeps and closes:
            states = self._nothing_open(x)
        y, left = _join(pieces)
        return y, memory, states, left

    def _read_ragged(
        self, x: Tensor, position: Tensor, memory: State, states: list[State], tokens: Tokens
    ) -> tuple[Tensor, State, Shared]:
        """Read rows whose segments, and documents, have borders of their own."""
        starts = segment_starts(tokens.segments, tokens.mask, x)
        if starts is not None:
            self._check_packed()
        layout = self._segmentation.lay_out(position, x, tokens.mask, starts)
        first_memory = None if starts is None else self.initial_memory(x)
        nothing_open, pieces = self._nothing_open(x), []
        for piece, run, begins in layout.runs(x, _options(tokens)):
            if begins is not None:
                memory = _choose(begins, first_memory, memory)
                states = [_choose(begins, *pair) for pair in zip(nothing_open, states, strict=True)]
            run.first_memory = first_memory
            y, written, states, left = self.run_segment(piece, memory, None if run.opens is True else states, run)
            memory = self.memory_of_last(memory, run)
            if run.closes is not False:
                memory = _choose(run.closes, written, memory)
                states = [_choose(run.closes, *pair) for pair in zip(nothing_open, states, strict=True)]
            pieces.append((y, left))
        y, left = _join(pieces)
        return (
            reorder(y, layout.slots),
            self._pack(layout.position, memory, states),
            {name: reorder(value, layout.slots) for name, value in left.items()},
        )

    def _check_packed(self) -> None:
        """Raise where the layers cannot be run as packed rows ask for."""
        name = type(self).__name__
        if self.aligns_right:
            raise ValueError("segments that are aligned right take one document a row")
        if is_torchdynamo_compiling() and not self.documents_share_runs:
            raise ValueError(f"packed rows do not compile: how often {name} runs depends on them")
        if self._is_sharded and not self.documents_share_runs:
            raise ValueError(
                f"{name} runs the layers as often as packed rows need, and FSDP2 runs them in all processes at once: "
                "data.isolate_documents=false, or leave the layers whole (DDP)"
            )


def _options(tokens: Tokens) -> dict[str, Any]:
    """What the caller passed on to the attention implementation, as far as it holds for a run."""
    return {name: value for name, value in tokens.attention_options.items() if name not in _OF_WHOLE_ROWS}


def _choose(rows: RowsFlag, new: State, old: State) -> State:
    """Of each row of the states, `new` where `rows`, else `old`."""
    if isinstance(rows, bool):
        return new if rows else old
    return choose_rows(rows, new, old)


def _join(pieces: list[tuple[Tensor, Shared]]) -> tuple[Tensor, Shared]:
    """What runs gave, behind each other."""
    ys, lefts = zip(*pieces, strict=True)
    if len(ys) == 1:
        return pieces[0]
    return torch.cat(ys, dim=1), {name: torch.cat([left[name] for left in lefts], dim=1) for name in lefts[0]}

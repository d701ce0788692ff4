"""Models that read segment by segment with a memory: all their layers together are one recurrent mixer.

A segment is a fixed number of tokens. Inside of it the layers work as ever; at its end a memory is written, what the
layers kept of the segment is dropped, and the next segment finds the memory only. So the state of the whole stack is
the place in the open segment, the memory, and what each layer keeps of the open segment, and all that the state
contract promises follows from it: padding, packing, rollback, beams, files.

    SegmentedStack      cuts rows into segments and carries the state; an architecture writes `run_segment`
    SegmentedModel      a model whose layers such a stack runs
    SegmentAttention    softmax attention over the open segment

Letters: b batch, t tokens of the call, d width, r runs of the layers, n slots of a run, s slots of a window.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.utils import can_return_tuple, is_torchdynamo_compiling

from zoo.cache import State
from zoo.config import MixerConfig, ZooConfig
from zoo.mixer import RecurrentMixer, Shared, Tokens, choose_rows
from zoo.modeling import Block, ZooModel, ZooModelOutput
from zoo.nn import Attention, SlidingWindowAttention, SoftmaxAttention
from zoo.ops.packing import reorder, segment_starts

_RECORDED = "hidden_state."
_OF_WHOLE_ROWS = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Options of attention that describe the rows of a call, which are not those of a run."""

RowsFlag = Tensor | bool
"""A truth for each row, (b) bool, or one for all of them that is known before anything runs."""


@dataclass
class Run:
    """What the layers read at once: of each row some tokens, the first of them in the first slots.

    They belong to one segment, which only the last of them may fill; or to several documents of which only the last may
    fill a segment, where `SegmentedStack.documents_share_runs`.
    """

    positions: Tensor
    """(b n) or (1 n), place of each token in its segment."""
    opens: RowsFlag
    """Whether a segment opens with the first token."""
    closes: RowsFlag
    """Whether the last token fills its segment: then the memory is to be written."""
    lengths: Tensor | None = None
    """(b), how many of the slots hold tokens; None: all."""
    segments: Tensor | None = None
    """(b n), ids of the documents; None: no document starts behind the first slot."""
    restarts: Tensor | None = None
    """(b), whether one does."""
    first_memory: State | None = None
    """The memory before the first segment, where a document starts in the run."""
    is_first: bool = False
    """Whether it is known that nothing was read before, by any row: the memory is the initial one."""
    keeps: bool = True
    """Whether what the layers keep of the open segment is asked for."""
    options: dict[str, Any] | None = None
    """What the caller passed on to the attention implementation."""

    @property
    def mask(self) -> Tensor | None:
        """(b n), False in slots without a token; None: there are none."""
        if self.lengths is None:
            return None
        return torch.arange(self.positions.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def fresh(self) -> Tensor | None:
        """(b n), True at tokens of documents that start in this run: they find the initial memory. None: nowhere."""
        return None if self.segments is None else self.segments != self.segments[:, :1]

    def tokens(self) -> Tokens:
        """The same as mixers read it; the caller adds a rotary embedding at `positions`."""
        tokens = Tokens(self.positions, mask=self.mask, segments=self.segments, attention_options=self.options or {})
        tokens.left_aligned = tokens
        return tokens


class _Slot:
    """Stands for one layer of a cache. What is written does not replace what is read: a block may run twice."""

    record_past = False

    def __init__(self, states: State | None, wanted: bool):
        self.states, self.wanted, self.after = states, wanted, None

    def write(self, states: State, columns: int) -> None:
        self.after = states


class OpenSegment:
    """The cache that blocks are called with inside of a run: it hands them their states, and takes the new ones.

    Args:
        states: what each of the mixers that keep something kept before the run; None: nothing yet.
        count: how many there are.
        run: the run.
    """

    def __init__(self, states: Sequence[State] | None, count: int, run: Run):
        self.layers = [_Slot(None if states is None else states[i], run.keeps) for i in range(count)]
        self.hidden_states: list[Tensor] | None = [] if (run.options or {}).get("output_hidden_states") else None

    @property
    def after(self) -> list[State]:
        """The states of all of them after the run; of attention only if the run keeps them."""
        return [slot.after for slot in self.layers]

    def recorded(self) -> Shared:
        """The inputs of all layers if the caller asked for hidden states, to be returned with `shared`."""
        return {f"{_RECORDED}{i}": x for i, x in enumerate(self.hidden_states or ())}


def _record_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook that keeps what goes into a layer, where the caller asked for hidden states."""
    segment = kwargs["past_key_values"]
    if segment.hidden_states is not None:
        segment.hidden_states.append(args[0])


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
        self.keepers = list(keepers)  # a list does not register them a second time
        self._sizes = [len(keeper.state_shapes(keeper.config, keeper.layer_idx)) for keeper in keepers]
        for layer in layers:
            layer.register_forward_pre_hook(_record_input, with_kwargs=True)
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

    # -- cutting rows into segments ------------------------------------------------------------------------------------

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        if cache is None and tokens.mask is None and tokens.segments is None:
            borders = self._borders(x.shape[1], 0, is_first=True)
            y, _, _, shared = self._read_even(x, self.initial_memory(x), None, 0, borders, tokens, keeps=False)
            return y, shared
        if cache is not None and tokens.segments is not None and is_torchdynamo_compiling():
            raise ValueError(f"{type(self).__name__} takes packed rows with a cache or compiled, not both")
        return super().forward(x, shared, tokens, cache)

    def scan_shared(self, x: Tensor, state: State, tokens: Tokens, shared: Shared) -> tuple[Tensor, State, Shared]:
        position, memory, states = self._unpack(state)
        if tokens.mask is None and tokens.segments is None and not is_torchdynamo_compiling():
            places = set(position.tolist())
            if len(places) == 1:
                t, start = x.shape[1], places.pop()
                borders = self._borders(t, max(start, 0), is_first=start < 0)
                y, memory, states, left = self._read_even(x, memory, states, max(start, 0), borders, tokens)
                after = t - borders[-1] if borders else max(start, 0) + t
                return y, self._pack(torch.full_like(position, after), memory, states), left
        return self._read_ragged(x, position, memory, states, tokens)

    def _borders(self, t: int, start: int, is_first: bool) -> list[int]:
        """Behind how many of t tokens segments are full, where the open one has `start` before them."""
        if self.freezes and not is_first:
            return []
        length = self.config.segment_length
        missing = -t % length if self.aligns_right and is_first else 0
        borders = list(range(length - missing - start, t + 1, length))
        return borders[:-1] if self.freezes and borders[-1:] == [t] else borders

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
        if starts is not None and is_torchdynamo_compiling() and not self.documents_share_runs:
            raise ValueError(f"packed rows do not compile: how often {type(self).__name__} runs depends on them")
        if starts is not None and self.aligns_right:
            raise ValueError("segments that are aligned right take one document a row")
        layout = self._lay_out(position, x, tokens.mask, starts)
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

    def _lay_out(self, position: Tensor, x: Tensor, mask: Tensor | None, starts: Tensor | None) -> "_Layout":
        """Cut the rows of x (b t d), whose padding stands behind, into runs.

        A run ends where a segment is full, and after 2 length - 1 tokens where short documents share it. Such a run and
        the next together have 2 length tokens or more, so there are never more runs than if all segments were full.

        Args:
            position: (b), tokens that the open segment has before the first; -1: none, and this is the first call.
            mask: (b t), False at padding.
            starts: (b t), True where a document starts; None: nowhere.
        """
        (b, t), length, device = x.shape[:2], self.config.segment_length, x.device
        rank = torch.arange(t, device=device).expand(b, t)
        real = torch.ones_like(rank, dtype=torch.bool) if mask is None else mask
        total, is_first = real.sum(dim=1, keepdim=True), (position < 0)[:, None]

        places = position.clamp(min=0)[:, None] + rank  # in the document, or since the open segment began
        if starts is not None:
            begin = torch.where(starts, rank, -1).cummax(dim=1).values
            places = torch.where(begin < 0, places, rank - begin)
        index = places + (-total % length).masked_fill(~is_first, 0) if self.aligns_right else places
        fills = real & (index % length == length - 1)
        in_segment = torch.where(index < length, places, index % length)
        if self.freezes:
            fills = fills & is_first & (rank < total - 1)
            in_segment = torch.where(is_first, in_segment, places)

        cuts = F.pad(fills[:, :-1], (1, 0), value=True)
        if starts is not None and not self.documents_share_runs:
            cuts = cuts | starts
        width = min(2 * length - 1, t)
        within = (rank - torch.where(cuts, rank, 0).cummax(dim=1).values) % width
        run = (within == 0).cumsum(dim=1) - 1
        if is_torchdynamo_compiling():  # packed rows are never cached: they have read nothing before
            count = min(t, (t + (length - 1 if starts is None else 0) + length - 1) // length)
        else:
            count = int(run.masked_fill(~real, 0).max()) + 1
        run = run.masked_fill(~real, count)

        def per_run(values: Tensor) -> Tensor:
            """The sum over the tokens (b t) of each run, (b r)."""
            return values.new_zeros(b, count + 1, dtype=torch.long).scatter_add(1, run, values.long())[:, :count]

        lengths = per_run(real)
        first = lengths.cumsum(dim=1) - lengths
        tokens = (first[..., None] + torch.arange(width, device=device)).clamp(max=t - 1)
        first, is_used = tokens[:, :, 0], lengths > 0
        begins = restarts = documents = None
        if starts is not None:
            begins = is_used & starts.gather(1, first)
            restarts = per_run(starts & real) > begins
            documents = starts.cumsum(dim=1)
        widths = [width] * count if is_torchdynamo_compiling() else lengths.amax(dim=0).clamp(min=1).tolist()
        offsets = torch.tensor([0, *widths], device=device).cumsum(dim=0)
        last = (total - 1).clamp(min=0)
        after = (in_segment.gather(1, last) + 1).masked_fill(fills.gather(1, last), 0)
        return _Layout(
            slots=(offsets[run.clamp(max=count - 1)] + within).masked_fill(~real, 0),
            tokens=tokens,
            lengths=lengths,
            places=in_segment,
            opens=is_used & (in_segment.gather(1, first) == 0),
            closes=per_run(fills) > 0,
            begins=begins,
            restarts=restarts,
            documents=documents,
            widths=widths,
            position=torch.where(total > 0, after, position[:, None]).squeeze(1),
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


class _Layout(NamedTuple):
    """Where the tokens of a call go: r runs, one after the other, each of some slots for every row.

    slots: (b t), of each token; 0 for padding.
    tokens: (b r n), which token a slot holds, where it holds one.
    lengths: (b r), how many it holds.
    places: (b t), of each token in its segment.
    opens, closes: (b r), as in `Run`.
    begins, restarts: (b r), whether a document starts with the run, or inside of it; None: nowhere.
    documents: (b t), ids; None: one a row.
    widths: of each run.
    position: (b), how many tokens the open segment has at the end.
    """

    slots: Tensor
    tokens: Tensor
    lengths: Tensor
    places: Tensor
    opens: Tensor
    closes: Tensor
    begins: Tensor | None
    restarts: Tensor | None
    documents: Tensor | None
    widths: list[int]
    position: Tensor

    def runs(self, x: Tensor, options: dict[str, Any]) -> Iterator[tuple[Tensor, Run, RowsFlag | None]]:
        """Each run: its embeddings (b n d) of x (b t d), what it holds, and in which rows a document starts with it."""
        for r, width in enumerate(self.widths):
            tokens, lengths = self.tokens[:, r, :width], self.lengths[:, r]
            restarts = None if self.restarts is None else _settle(self.restarts[:, r])
            several = self.documents is not None and restarts is not False
            run = Run(
                self.places.gather(1, tokens),
                opens=_settle(self.opens[:, r]),
                closes=_settle(self.closes[:, r]),
                lengths=None if _settle(lengths == width) is True else lengths,
                segments=self.documents.gather(1, tokens) if several else None,
                restarts=self.restarts[:, r] if several else None,
                options=options,
            )
            yield reorder(x, tokens), run, None if self.begins is None else _settle(self.begins[:, r])


def _settle(rows: Tensor) -> RowsFlag:
    """(b) bool -> the one truth of all rows if they agree; a graph cannot look."""
    if is_torchdynamo_compiling() or (rows.any() and not rows.all()):
        return rows
    return bool(rows[0])


# -- models ------------------------------------------------------------------------------------------------------------


class SegmentedModel(ZooModel):
    """A model whose layers a `SegmentedStack` runs: `self.stack`, which the subclass makes."""

    stack: SegmentedStack

    def keepers(self) -> list[RecurrentMixer]:
        """The stack alone; while the model is being built, what stands inside of it."""
        return [self.stack] if hasattr(self, "stack") else super().keepers()

    def run_layers(self, x: Tensor, tokens: Tokens, past_key_values: Cache | None) -> tuple[Tensor, Shared]:
        return self.stack(x, {}, tokens, past_key_values)

    @can_return_tuple
    def forward(self, *args, **kwargs) -> ZooModelOutput:
        """As of every model. Hidden states are (b t d); the attention weights of a layer are a tuple, one for each run
        of the layers, with the slots of that run for tokens."""
        kwargs.setdefault("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        outputs = super().forward(*args, **kwargs)
        if outputs.hidden_states is not None:
            recorded = {name: x for name, x in outputs.shared.items() if name.startswith(_RECORDED)}
            outputs.shared = {name: x for name, x in outputs.shared.items() if name not in recorded} or None
            outputs.hidden_states = (*recorded.values(), outputs.last_hidden_state)
        if outputs.attentions is not None:
            layers = sum(isinstance(module, SoftmaxAttention) for module in self.modules())
            outputs.attentions = tuple(outputs.attentions[i::layers] for i in range(layers))
        return outputs


class SegmentAttention(SlidingWindowAttention):
    """Causal softmax attention to the open segment: what `attention` is where layers run segment by segment.

    It is a window that all tokens of a segment have room in, and costs no more than attention where a segment opens.
    """

    @classmethod
    def taking_over(cls, attention: Attention, window: int) -> "SegmentAttention":
        """The same attention, its weights and their names, inside of segments of up to `window` tokens."""
        with torch.device("meta"):
            mixer = cls(cls.view(attention.config, window), attention.layer_idx)
        for name, module in attention.named_children():
            setattr(mixer, name, module)
        mixer.cache_idx = attention.cache_idx
        return mixer

    @staticmethod
    def view(config: ZooConfig | MixerConfig, window: int) -> MixerConfig:
        """The configuration of an attention as that of this mixer."""
        return MixerConfig(config, {"sliding_window": window})

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: OpenSegment) -> tuple[Tensor, Shared]:
        slot = cache.layers[self.cache_idx]
        if slot.states is not None:
            return super().forward(x, shared, tokens, cache)
        q, k, v = self._project(x, tokens)
        y, _ = self.attention(q, k, v, self._whole_mask(x, tokens.segments), **tokens.attention_options)
        if slot.wanted:
            empty = self.initial_state(x)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(empty, (k, v), strict=False))
            slot.write(self._newest(keys, values, empty[2], tokens), x.shape[1])
        return self.o_proj(y), shared

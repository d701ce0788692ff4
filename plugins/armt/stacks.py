"""How RMT and ARMT run the layers of a backbone on a segment, with memory tokens around it.

Letters: b batch, n tokens of a run, d width, m memory tokens, k width of phi(keys).
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import is_torchdynamo_compiling
from zoo.plugins.armt.memory import AssociativeMemory, MemorySegment

from zoo.cache import State
from zoo.config import ZooConfig
from zoo.mixer import RecurrentMixer, Shared, Tokens
from zoo.modeling import ZooModel
from zoo.nn import Attention, SlidingWindowAttention
from zoo.ops.packing import reorder
from zoo.segments import OpenSegment, Run, SegmentAttention, SegmentedStack


def window_of(attention: type, config: ZooConfig, room: int) -> int:
    """Tokens that an attention of the backbone sees of a segment that has `room` for so many."""
    return min(config.sliding_window, room) if attention is SlidingWindowAttention else room


class MemoryStack(SegmentedStack):
    """The layers of a backbone, run on segments with memory tokens behind them."""

    tokens_in_front = False
    """Whether the memory tokens stand in front of a segment too."""

    def __init__(self, config: ZooConfig, backbone: ZooModel, keepers: list[RecurrentMixer]):
        super().__init__(config, backbone.layers, keepers)
        self.aligns_right = config.alignment == "right"
        self.freezes = config.freeze_memory_in_generate
        self._sees_all = any(isinstance(keeper, SegmentAttention) for keeper in keepers)
        self._backbone = [backbone]  # a list does not register it a second time
        self.memory_tokens = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))

    @classmethod
    def keepers_inside(cls, config: ZooConfig) -> list:
        room = config.segment_window
        return [
            (SegmentAttention, SegmentAttention.view(own, window_of(keeper, own, room)), layer)
            if keeper in (Attention, SlidingWindowAttention)
            else (keeper, own, layer)
            for keeper, own, layer in config.make_backbone().keepers()
        ]

    def scan_shared(self, x: Tensor, state: State, tokens: Tokens, shared: Shared) -> tuple[Tensor, State, Shared]:
        if self.freezes and self._sees_all and not is_torchdynamo_compiling():
            room, read = self.config.longest_segment, int(state[0].max())
            if read >= 0 and read + x.shape[1] > room:
                raise ValueError(f"a segment that memory is not written behind has room for {room} tokens, not more")
        return super().scan_shared(x, state, tokens, shared)

    def run_segment(
        self, x: Tensor, memory: State, states: list[State] | None, run: Run
    ) -> tuple[Tensor, State, list[State], Shared]:
        n, backbone = x.shape[1], self._backbone[0]
        x, tokens, place, behind = self._add_memory_tokens(x, memory, run)
        if backbone.rotary is not None:
            tokens.rotary = backbone.rotary(x, tokens.positions)
        segment = self._open(x, memory, states, run, tokens, behind)
        y, shared = backbone.run_layers(x, tokens, segment)
        written = memory if behind is None else self._written(y, behind, shared)
        shared |= segment.recorded()
        if x.shape[1] > n:
            y, shared = reorder(y, place), {name: reorder(value, place) for name, value in shared.items()}
        return y, written, segment.after, shared

    def _open(
        self, x: Tensor, memory: State, states: list[State] | None, run: Run, tokens: Tokens, behind: Tensor | None
    ) -> OpenSegment:
        """What the layers are called with, for x (b n+m d) and the slots of the memory tokens to write (b m)."""
        raise NotImplementedError

    def _written(self, y: Tensor, behind: Tensor, shared: Shared) -> State:
        """The memory after a run that gave y (b n+m d), and what the layers left; it is taken out of `shared`."""
        raise NotImplementedError

    def _memory_tokens(self, x: Tensor, memory: State) -> Tensor:
        """The memory tokens (b m d) for a run."""
        return self.memory_tokens.to(x.dtype).expand(x.shape[0], -1, -1)

    def _add_memory_tokens(
        self, x: Tensor, memory: State, run: Run
    ) -> tuple[Tensor, Tokens, Tensor | None, Tensor | None]:
        """Put the memory tokens behind the tokens of a run, x (b n d), in rows that close their segment.

        Where there are `tokens_in_front`, also before them in rows that open one.

        Returns:
            The sequence and what the layers are told of it; of the run's tokens the slots in it, (b n), and of the
            memory tokens to write, (b m), which mean something in rows that close; None: no row does.
        """
        opens = run.opens if self.tokens_in_front else False
        if opens is False and run.closes is False:
            tokens = run.tokens()
            tokens.positions = tokens.positions + self._in_front
            return x, tokens, None, None
        (b, n), m, device = x.shape[:2], self.config.num_memory_tokens, x.device
        before, after = (torch.as_tensor(flag, device=device).expand(b)[:, None] * m for flag in (opens, run.closes))
        lengths = torch.full((b, 1), n, device=device) if run.lengths is None else run.lengths[:, None]
        slot = torch.arange(n + m * ((opens is not False) + (run.closes is not False)), device=device)
        text = slot - before  # which token of the run stands in a slot, if one does
        source = torch.where(text < 0, n + slot, torch.where(text < lengths, text, n + text - lengths))
        source = source.clamp(max=n + m - 1)
        number = torch.arange(m, device=device)

        def by_slot(values: Tensor, step: int) -> Tensor:
            """Numbers of the run's tokens (b|1 n), which go on by `step` behind the last of them."""
            values = values.expand(b, -1)
            last = values.gather(1, (lengths - 1).clamp(min=0))
            return torch.cat([values, last + step * (number + 1)], dim=1).gather(1, source)

        ragged = run.lengths is not None or isinstance(opens, Tensor) or isinstance(run.closes, Tensor)
        tokens = Tokens(
            torch.where(text < 0, slot, by_slot(run.positions, 1) + self._in_front),
            mask=slot < before + lengths + after if ragged else None,
            segments=None if run.segments is None else by_slot(run.segments, 0),
            attention_options=run.options or {},
        )
        tokens.left_aligned = tokens
        x = reorder(torch.cat([x, self._memory_tokens(x, memory)], dim=1), source)
        behind = None if run.closes is False else before + lengths + number
        return x, tokens, before + torch.arange(n, device=device), behind

    @property
    def _in_front(self) -> int:
        """How many memory tokens stand in front of a segment."""
        return self.config.num_memory_tokens if self.tokens_in_front else 0

    def reset_parameters(self) -> None:
        init.normal_(self.memory_tokens, std=self.config.initializer_range)


class ARMT(MemoryStack):
    """The associative memory of ARMT: the same learned memory tokens behind every segment, a memory in each layer."""

    @classmethod
    def memory_shapes(cls, config: ZooConfig) -> dict:
        layers = (AssociativeMemory.memory_shapes(config, layer) for layer in config.layers_with_memory)
        return {name: shape for shapes in layers for name, shape in shapes.items()}

    def _open(
        self, x: Tensor, memory: State, states: list[State] | None, run: Run, tokens: Tokens, behind: Tensor | None
    ) -> MemorySegment:
        fresh = None if run.segments is None else (tokens.segments != run.segments[:, :1])[..., None]
        found = None if run.is_first else self._by_layer(memory)  # what is initial is empty
        latest = self._by_layer(self.memory_of_last(memory, run))
        return MemorySegment(states, len(self.keepers), run, found, latest, fresh, behind)

    def _by_layer(self, memory: State) -> dict[int, State]:
        layers = self.config.layers_with_memory
        parts = len(memory) // len(layers)
        return {layer: memory[i * parts : (i + 1) * parts] for i, layer in enumerate(layers)}

    def _written(self, y: Tensor, behind: Tensor, shared: Shared) -> State:
        return tuple(shared.pop(name) for name in self.memory_shapes(self.config))


class RMT(MemoryStack):
    """The memory of RMT: what its last memory tokens became are the memory tokens of the next segment."""

    tokens_in_front = True
    documents_share_runs = False

    @classmethod
    def memory_shapes(cls, config: ZooConfig) -> dict:
        return {"memory": ((config.num_memory_tokens, config.hidden_size), None)}

    def initial_memory(self, x: Tensor) -> State:
        return (super()._memory_tokens(x, ()),)

    def _memory_tokens(self, x: Tensor, memory: State) -> Tensor:
        return memory[0].to(x.dtype)

    def _open(
        self, x: Tensor, memory: State, states: list[State] | None, run: Run, tokens: Tokens, behind: Tensor | None
    ) -> OpenSegment:
        return OpenSegment(states, len(self.keepers), run)

    def _written(self, y: Tensor, behind: Tensor, shared: Shared) -> State:
        memory = self._backbone[0].norm(reorder(y, behind))
        return (memory.to(self.memory_tokens.dtype),)

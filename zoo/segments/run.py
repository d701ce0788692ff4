"""What the layers of a segmented model read at once, and the cache that they are called with.

Letters as in `zoo.segments`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo.cache import State
from zoo.mixer import Shared, Tokens

_RECORDED = "hidden_state."

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


class _Slot:
    """Stands for one layer of a cache. What is written does not replace what is read: a block may run twice."""

    record_past = False

    def __init__(self, states: State | None, wanted: bool):
        self.states, self.wanted, self.after = states, wanted, None

    def write(self, states: State, columns: int) -> None:
        self.after = states


def record_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A hook that keeps what goes into a layer, where the caller asked for hidden states."""
    segment = kwargs["past_key_values"]
    if segment.hidden_states is not None:
        segment.hidden_states.append(args[0])


def take_recorded(shared: Shared) -> tuple[list[Tensor], Shared]:
    """What `OpenSegment.recorded` put into `shared`, in the order of the layers, and the rest."""
    recorded = [x for name, x in shared.items() if name.startswith(_RECORDED)]
    return recorded, {name: x for name, x in shared.items() if not name.startswith(_RECORDED)}

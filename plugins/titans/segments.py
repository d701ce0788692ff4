"""Memory as a context (MAC): segments that attend to themselves and to what the memory answers (arXiv:2501.00663, 4.1).

Letters: b batch, t tokens, c slots of a segment, s slots seen, p persistent tokens, d width, h heads, g heads of keys
and values, k width of a head, w all weights of a head's memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from zoo.plugins.titans.attention import (
    PersistentAttention,
    Windowed,
    empty_window,
    filled,
    join,
    keep_newest,
    token_counts,
)
from zoo.plugins.titans.memory import CAUSAL, BranchGate, NeuralMemory, PersistentTokens, StartState, TitansConfig

from zoo.cache import State
from zoo.mixer import Shared, Tokens
from zoo.nn import Linear, RMSNorm
from zoo.ops.packing import ChunkLayout, lay_out_chunks, segment_starts


class Cut(NamedTuple):
    """Where the tokens of a call lie: in runs of slots, one a segment, of which only the first may go on with one.

    layout: the slots of the tokens; None: they lie as they come.
    real: (b s), which slots hold a token; None: all.
    opens, restarts: (b n), whether a segment, a document starts with a run; None: every one does, none does.
    count: (b), tokens of the segment that is open at the end.
    """

    layout: ChunkLayout | None
    real: Tensor | None
    opens: Tensor | None
    restarts: Tensor | None
    count: Tensor


def cut_into_segments(x: Tensor, tokens: Tokens, count: Tensor, length: int, at_border: bool) -> Cut:
    """Cut the tokens of x (b t d) into segments of `length`, where those before left one open with `count` (b) tokens.

    With `at_border` it is known that `count` is 0.
    """
    t, mask = x.shape[1], tokens.mask
    if t == 1:
        new = 1 if mask is None else mask[:, 0]
        return Cut(None, mask, (count == 0)[:, None], None, (count + new) % length)
    if at_border and mask is None and tokens.segments is None:
        return Cut(None, None, None, None, torch.full_like(count, t % length))
    everywhere = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    starts = segment_starts(tokens.segments, mask, x)
    layout = lay_out_chunks(everywhere, starts, None if at_border else count, length, min(t, length))
    return Cut(layout, layout.real, layout.opens, layout.restarts, layout.position)


def gather_seen(groups: list[tuple[tuple[Tensor, Tensor], Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of keys and values, each (b s g k), with who sees them, (b|1 t s) -> all of them, behind each other."""
    rows = max(len(visible) for _, visible in groups)
    visible = torch.cat([visible.expand(rows, -1, -1) for _, visible in groups], dim=-1)
    return *join([seen for seen, _ in groups]), visible


class TitansMAC(Windowed):
    """A segment's tokens ask the memory as it was before the segment, and attend to the answers h beside themselves:

        h_t = M(q_t)    y = Attention([persistent ; h ; x])    M learns from y    o_t = y_t (x) M_t(y_t)

    The state has the memory, its weights before the open segment, and the keys and values of what is in it.
    """

    config_fields = (
        *dict.fromkeys(NeuralMemory.config_fields + PersistentAttention.config_fields + BranchGate.config_fields),
        *("num_persistent_tokens", "segment_length", "mac_prefix", "train_with_leak"),
    )
    ops = NeuralMemory.ops

    def __init__(self, config: TitansConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory = NeuralMemory(config)
        self.retrieved_norm = RMSNorm(config)
        self.persistent = PersistentTokens(config)
        self.attention = PersistentAttention(config)
        self.attended_norm = RMSNorm(config)
        self.gate = BranchGate(config)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    @classmethod
    def state_shapes(cls, config: TitansConfig, layer_idx: int) -> dict:
        memory = NeuralMemory.state_shapes(config)
        window = (config.segment_length - 1, 2, config.num_key_value_heads, config.head_dim)
        return {
            **memory,
            "asking_taps": memory["q_taps"],
            "weights_before": memory["weights"],
            "retrieved": (window, None),
            "tokens": (window, None),
            "count": ((), torch.long),
        }

    def initial_state(self, x: Tensor) -> State:
        memory, taps = self.memory.start(len(x))
        window = empty_window(x, self.state_shapes(self.config, self.layer_idx)["tokens"][0])
        return StartState((*memory, *taps, taps[0], memory.weights, window, window, memory.position))

    def forward(self, x: Tensor, shared: Shared, tokens: Tokens, cache: Cache | None) -> tuple[Tensor, Shared]:
        if self.config.mac_prefix != CAUSAL:
            if cache is not None:
                raise ValueError("mac_prefix='paper' looks ahead in a segment, so it keeps no cache: use_cache=False")
            if self.training and torch.is_grad_enabled() and not self.config.train_with_leak:
                raise ValueError(
                    "mac_prefix='paper' shows tokens later ones, so what it learns to predict it is told: train with "
                    "mac_prefix='causal', or set train_with_leak=True"
                )
        return super().forward(x, shared, tokens, cache)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        config, at_border = self.config, isinstance(state, StartState)
        learner = self.memory.unpack(state, at_border)
        asking_taps, before, *windows, count = state[7:]
        queries, asking_taps = self.memory.queries(x, asking_taps, tokens)
        cut = cut_into_segments(x, tokens, count, config.segment_length, at_border)
        slots, queries = (x, queries) if cut.layout is None else cut.layout.into_slots(x, queries)
        width = min(x.shape[1], config.segment_length)
        position = (torch.arange(slots.shape[1], device=x.device) % width)[None]
        if cut.opens is not None:  # the first run may go on with a segment
            open_count = count.masked_fill(cut.opens[:, 0], 0)
            position = torch.cat([position[:, :width] + open_count[:, None], position[:, width:].expand(len(x), -1)], 1)
        rotary = self.attention.rotary(position, x)
        q, (k, v) = self.attention.queries(slots, rotary), self.attention.keys_and_values(slots, rotary)
        prefix = self.attention.persistent(self.persistent.weight, x)

        runs = zip(*(y.split(width, dim=1) for y in (queries, position, q, k, v, *rotary)), strict=True)
        found = []
        for n, (queries_n, position_n, q_n, k_n, v_n, *rotary_n) in enumerate(runs):
            c = q_n.shape[1]
            real = None if cut.real is None else cut.real[:, n * width : n * width + c]
            if n and cut.restarts is not None:
                learner = self.memory.restart(learner, cut.restarts[:, n])
            weights = learner.memory.weights
            before = weights if cut.opens is None else torch.where(cut.opens[:, n, None, None], weights, before)
            h = self.retrieved_norm(self.memory.read(before, queries_n))

            retrieved, own = self.attention.keys_and_values(h, rotary_n), (k_n, v_n)
            triangle = torch.ones(1, c, c, dtype=torch.bool, device=x.device).tril()
            if config.mac_prefix == CAUSAL:
                sees_retrieved = triangle
            else:
                sees_retrieved = torch.ones_like(triangle) if real is None else real[:, None].expand(-1, c, -1)
            groups = [(prefix, triangle.new_ones(1, c, prefix[0].shape[1]))]
            if n == 0 and cut.opens is not None:
                is_filled = filled(open_count, windows[0].shape[1], windows[0].shape[1])[:, None].expand(-1, c, -1)
                groups += [(window.unbind(2), is_filled) for window in windows]
            groups += [(retrieved, sees_retrieved), (own, triangle)]
            y = self.attention(q_n, *gather_seen(groups))

            m, learner = self.memory(self.attended_norm(y), learner, Tokens(position_n, mask=real))
            found.append((y, m, retrieved, own))
            learner = self.memory.unpack((*learner.memory, *learner.taps), at_border=True)  # chunks end with segments

        *mixed, all_retrieved, all_own = zip(*found, strict=True)
        y, m = (torch.cat(parts, dim=1) for parts in mixed)
        if cut.layout is None:  # runs before the last one are whole segments, which leave nothing
            newest = [torch.stack(parts[-1], dim=2) for parts in (all_retrieved, all_own)]
        else:
            y, m = (cut.layout.out_of_slots(part) for part in (y, m))
            newest = [cut.layout.out_of_slots(torch.stack(join(parts), dim=2)) for parts in (all_retrieved, all_own)]
        kept, lengths = config.segment_length - 1, token_counts(tokens)
        windows = (keep_newest(*pair, lengths, kept, cut.count) for pair in zip(windows, newest, strict=True))
        memory = learner.memory._replace(position=cut.count % config.chunk_size)
        state = (*memory, *learner.taps, asking_taps, before, *windows, cut.count)
        return self.o_proj(self.gate(y, m)), state

    def reset_parameters(self) -> None:
        self.memory.reset_parameters()
        self.persistent.reset_parameters()

"""Titans: attention beside a memory that learns at test time (Behrouz et al., 2024, arXiv:2501.00663).

Letters: b batch, t tokens, d width, h heads, g heads of keys and values, k width of a head, p persistent tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from zoo.plugins.titans.attention import WindowAttention, Windowed, empty_window
from zoo.plugins.titans.memory import (
    BranchGate,
    NeuralMemory,
    PersistentTokens,
    StartState,
    TitansConfig,
    prefix_documents,
)

from zoo.cache import State
from zoo.heads import heads_of
from zoo.mixer import RecurrentMixer, Tokens
from zoo.modeling import ZooModel
from zoo.nn import Linear, RMSNorm


class TitansLMM(RecurrentMixer):
    """The neural memory as the only mixer of tokens (LMM), with a norm and a gate behind it (section 4.4)."""

    config_fields = NeuralMemory.config_fields
    ops = NeuralMemory.ops

    def __init__(self, config: TitansConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory = NeuralMemory(config)
        self.norm = RMSNorm(config)
        self.g_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    @classmethod
    def state_shapes(cls, config: TitansConfig, layer_idx: int) -> dict:
        return NeuralMemory.state_shapes(config)

    def initial_state(self, x: Tensor) -> State:
        memory, taps = self.memory.start(len(x))
        return StartState((*memory, *taps))

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        y, (memory, taps) = self.memory(x, self.memory.unpack(state, isinstance(state, StartState)), tokens)
        return self.o_proj(self.norm(y) * F.silu(self.g_proj(x))), (*memory, *taps)

    def reset_parameters(self) -> None:
        self.memory.reset_parameters()


class _WithPrefix(Windowed):
    """A mixer whose memory reads the persistent tokens in front of every document (sections 4.2 and 4.3).

    It writes `read` and `blank_state`. What the prefix of a row's first document leaves is the initial state; where
    documents are packed, those of the others stand in the row.
    """

    def __init__(self, config: TitansConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.persistent = PersistentTokens(config)
        self.attention = WindowAttention(config)

    def blank_window(self, x: Tensor) -> State:
        """The state of attention before anything was read."""
        window, _ = WindowAttention.state_shapes(self.config)["window"]
        return empty_window(x, window), torch.zeros(len(x), dtype=torch.long, device=x.device)

    def read(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        """What the persistent tokens go through too: x (b t d), the state before -> (b t d), the state."""
        raise NotImplementedError

    def blank_state(self, x: Tensor) -> StartState:
        """The state of `read` before anything was read."""
        raise NotImplementedError

    def initial_state(self, x: Tensor) -> State:
        prefix, state = self.persistent.weight.to(x.dtype)[None], self.blank_state(x[:1])
        p = prefix.shape[1]
        if p:
            _, state = self.read(prefix, state, Tokens(torch.arange(-p, 0, device=x.device)[None]))
        state = StartState(part.expand(len(x), *part.shape[1:]) for part in state)
        return tuple(state) if p % self.config.chunk_size else state

    def read_with_prefix(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        """`read`, with the persistent tokens in front of each further document of the rows."""
        if tokens.segments is None or len(self.persistent.weight) == 0:
            return self.read(x, state, tokens)
        rows, longer, places = prefix_documents(x, tokens, self.persistent.weight, self.config.chunk_size)
        y, state = self.read(rows, state, longer)
        return y.gather(1, places[..., None].expand(-1, -1, y.shape[-1])), state

    def reset_parameters(self) -> None:
        self.persistent.reset_parameters()


_PREFIXED_FIELDS = NeuralMemory.config_fields + WindowAttention.config_fields + PersistentTokens.config_fields


class TitansMAG(_WithPrefix):
    """Memory as a gate (section 4.2): sliding-window attention and the memory, one the gate of the other."""

    config_fields = tuple(dict.fromkeys(_PREFIXED_FIELDS + BranchGate.config_fields))
    ops = NeuralMemory.ops

    def __init__(self, config: TitansConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory = NeuralMemory(config)
        self.gate = BranchGate(config)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    @classmethod
    def state_shapes(cls, config: TitansConfig, layer_idx: int) -> dict:
        return NeuralMemory.state_shapes(config) | WindowAttention.state_shapes(config)

    def blank_state(self, x: Tensor) -> StartState:
        memory, taps = self.memory.start(len(x))
        return StartState((*memory, *taps))

    def initial_state(self, x: Tensor) -> State:
        memory = super().initial_state(x)
        return type(memory)((*memory, *self.blank_window(x)))

    def read(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        m, (memory, taps) = self.memory(x, self.memory.unpack(state, isinstance(state, StartState)), tokens)
        return m, (*memory, *taps)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        m, memory = self.read_with_prefix(x, type(state)(state[:-2]), tokens)
        y, window = self.attention.scan(x, state[-2:], tokens, self.persistent.weight)
        return self.o_proj(self.gate(y, m)), (*memory, *window)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.memory.reset_parameters()


class TitansMAL(_WithPrefix):
    """Memory as a layer (section 4.3): the memory reads the persistent tokens and the text, attention what it says."""

    config_fields = tuple(dict.fromkeys(_PREFIXED_FIELDS))
    ops = NeuralMemory.ops

    def __init__(self, config: TitansConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory_layer = TitansLMM(config, layer_idx)
        self.attention_norm = RMSNorm(config)

    @classmethod
    def state_shapes(cls, config: TitansConfig, layer_idx: int) -> dict:
        return NeuralMemory.state_shapes(config) | WindowAttention.state_shapes(config)

    def blank_state(self, x: Tensor) -> StartState:
        return StartState((*self.memory_layer.initial_state(x), *self.blank_window(x)))

    def read(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        y, memory = self.memory_layer.scan(x, type(state)(state[:-2]), tokens)
        y, window = self.attention.scan(self.attention_norm(y), state[-2:], tokens)
        return y, (*memory, *window)

    def scan(self, x: Tensor, state: State, tokens: Tokens) -> tuple[Tensor, State]:
        return self.read_with_prefix(x, state, tokens)


class TitansModel(ZooModel):
    config: TitansConfig


TitansForCausalLM, TitansForSequenceClassification, TitansForTokenClassification = heads_of(TitansModel)

"""LM2: a Transformer that reads a memory in every block (Kang et al., 2025, arXiv:2502.06049), causal.

Letters: b batch, t tokens, n tokens of a run, m slots, d width, l layers.
"""

from collections.abc import Sequence

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import initialization as init
from zoo.plugins.lm2.memory import KeptSegment, SlotMemory

from zoo.cache import RECURRENT, State
from zoo.config import RotaryAttentionConfig
from zoo.errors import unknown_name
from zoo.heads import heads_of
from zoo.mixer import RecurrentMixer, Shared, Tokens, choose_rows
from zoo.modeling import Block
from zoo.nn import Attention
from zoo.segments import OpenSegment, Run, SegmentAttention, SegmentedModel, SegmentedStack

_FLOWS = ("cross_layer", "per_layer")
_STARTS = ("learned", "identity")


@strict
class LM2Config(RotaryAttentionConfig):
    """Configuration of LM2: the fields of `RotaryAttentionConfig`, and more.

    Args:
        segment_length: tokens of a segment: attention sees the open one, the memory holds those before.
        num_memory_slots: slots n of a bank.
        num_memory_heads: heads with which tokens look at slots, and slots at tokens. Default: num_attention_heads.
        memory_flow: "cross_layer", one bank that the blocks write one after the other at the end of a segment; or
            "per_layer", a bank for each block.
        initial_memory: what the slots hold before the first segment: "learned", or "identity", rows of the unit matrix.
    """

    model_type = "zoo_lm2"
    default_mixers = ("attention",)
    sizes = (*RotaryAttentionConfig.sizes, "segment_length", "num_memory_slots", "num_memory_heads")

    segment_length: int = 256
    num_memory_slots: int = 64
    num_memory_heads: int | None = None
    memory_flow: str = "cross_layer"
    initial_memory: str = "learned"

    def fill_defaults(self):
        super().fill_defaults()
        self.num_memory_heads = self.num_memory_heads or self.num_attention_heads

    def validate_architecture(self):
        if self.hidden_size % self.num_memory_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_memory_heads ({self.num_memory_heads})"
            )
        if self.memory_flow not in _FLOWS:
            raise unknown_name("memory_flow", self.memory_flow, _FLOWS)
        if self.initial_memory not in _STARTS:
            raise unknown_name("initial_memory", self.initial_memory, _STARTS)
        if self.initial_memory == "identity" and self.num_memory_slots > self.hidden_size:
            raise ValueError(
                f"the unit matrix has {self.hidden_size} rows for num_memory_slots {self.num_memory_slots}: pass "
                "initial_memory='learned'"
            )
        if self.segment_length < 2:
            raise ValueError(f"a segment has at least 2 tokens; segment_length is {self.segment_length}")
        if set(self.mixers) != {"attention"}:
            raise ValueError(f"the blocks of LM2 have attention beside the memory; mixers are {self.mixers}")

    def settle_layers(self) -> None:
        super().settle_layers()
        self.layer_types = [RECURRENT]

    def keepers(self) -> list:
        return [(LM2Stack, self, 0)]

    def in_blocks(self) -> list:
        """The mixers of the blocks that keep something of a segment, as `keepers` would be without a stack."""
        return super().keepers()


class BankSegment(OpenSegment):
    """An open segment with what is the same for the memories of all blocks.

    Args:
        states, count, run: as of `OpenSegment`.
        config: the model's configuration.
    """

    def __init__(self, states: list[State] | None, count: int, run: Run, config: LM2Config):
        super().__init__(states, count, run)
        self.run = run
        self.newest = _newest_tokens(run, config.segment_length)
        self.stale = _stale_slots(run, config.segment_length)
        self.visible = _visible_slots(run, config.num_memory_slots)


class LM2Block(Block):
    """A block of the Transformer baseline, with the memory beside its attention."""

    def __init__(self, config: LM2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mixer = SegmentAttention.taking_over(self.mixer, config.segment_length)
        self.memory = SlotMemory(config)
        self.kept = KeptSegment(config, layer_idx)

    def forward(
        self, x: Tensor, shared: Shared, tokens: Tokens, past_key_values: BankSegment, bank: Tensor, latest: Tensor
    ) -> tuple[Tensor, Shared, Tensor]:
        """As `Block`, with the bank (b m d) to read, as it was at the end of the segment before.

        Its weights are used here only, and what comes of them is returned or kept: so FSDP can shard a block.

        Args:
            latest: the bank (b m d) to write upon when the segment is full.

        Returns:
            Besides, that bank, written in a run that closes rows.
        """
        segment, run = past_key_values, past_key_values.run
        kept = segment.layers[self.kept.cache_idx]
        seen = self.mixer_norm(x)
        slots, after = self._slots(bank, kept.states, run, x.dtype)
        if run.keeps or run.closes is not False:
            inputs = self.kept.collect(seen, None if kept.states is None else kept.states[0], segment.newest)
        if run.closes is not False:
            latest = self.memory.write(latest, inputs)
        if run.keeps:
            inputs = inputs[:, 1:] if segment.stale is None else inputs[:, 1:].masked_fill(segment.stale, 0.0)
            kept.write((inputs, *after), x.shape[1])
        y, shared = self.mixer(seen, shared, tokens, segment)
        x = x + y + self.memory.read(seen, *slots, segment.visible)
        if self.channel_mixer is None:
            return x, shared, latest
        y, shared = self.channel_mixer(self.channel_norm(x), shared, tokens, segment)
        return x + y, shared, latest

    def _slots(self, bank: Tensor, kept: State | None, run: Run, dtype: torch.dtype) -> tuple[State, State]:
        """The keys and values of the slots that tokens find, (b m d) or (b 2m d) as in `_visible_slots`, and of those
        that the last document of each row goes on with, (b m d)."""
        if kept is None:
            own = self._project(bank[:1] if run.is_first else bank, bank, dtype)
        elif run.opens is False:
            own = kept[1:]
        else:
            own = choose_rows(run.opens, self._project(bank, bank, dtype), kept[1:])
        if run.segments is None:
            return own, own
        first = self._project(_bank_of(run.first_memory, self.kept.layer_idx)[:1], bank, dtype)
        both = tuple(torch.cat(pair, dim=1) for pair in zip(own, first, strict=True))
        return both, choose_rows(run.restarts, first, own)

    def _project(self, bank: Tensor, rows: Tensor, dtype: torch.dtype) -> State:
        """The keys and values of a bank (b|1 m d) for as many rows as another has."""
        return tuple(part.expand(len(rows), -1, -1) for part in self.memory.project(bank, dtype))

    def reset_parameters(self) -> None:
        init.ones_(self.memory.forget_gate.bias)


class LM2Stack(SegmentedStack):
    """The blocks, one segment at a time.

    Inside a segment all of them read what was written at the end of the one before, so nothing of a token reaches
    those in front of it. When it is full, the banks are written: with memory_flow "cross_layer" the one bank by the
    first block, what comes out by the second, and so on.
    """

    parameter_options = {"initial_bank": {"weight_decay": 0.0}}

    def __init__(self, config: LM2Config, blocks: Sequence[LM2Block], keepers: list[RecurrentMixer], rotary: nn.Module):
        kept = [block.kept for block in blocks]
        for index, keeper in enumerate(kept, len(keepers)):
            keeper.cache_idx = index
        super().__init__(config, blocks, keepers + kept)
        self._rotary = [rotary]  # a list does not register it again
        if config.initial_memory == "learned":
            self.initial_bank = nn.Parameter(torch.empty(_bank_shape(config)))

    @classmethod
    def memory_shapes(cls, config: LM2Config) -> dict:
        return {"bank": (_bank_shape(config), torch.float32)}

    @classmethod
    def keepers_inside(cls, config: LM2Config) -> list:
        attention = SegmentAttention.view(config, config.segment_length)
        return [
            *(
                (SegmentAttention, attention, i) if keeper is Attention else (keeper, own, i)
                for keeper, own, i in config.in_blocks()
            ),
            *((KeptSegment, config, i) for i in range(config.num_hidden_layers)),
        ]

    def initial_memory(self, x: Tensor) -> State:
        dtype = torch.promote_types(torch.float32, x.dtype)
        if self.config.initial_memory == "learned":
            bank = self.initial_bank.to(dtype)
        else:
            shape = _bank_shape(self.config)
            bank = torch.eye(*shape[1:], dtype=dtype, device=x.device).expand(shape)
        return (bank.expand(x.shape[0], -1, -1, -1),)

    def run_segment(
        self, x: Tensor, memory: State, states: list[State] | None, run: Run
    ) -> tuple[Tensor, State, list[State], Shared]:
        segment = BankSegment(states, len(self.keepers), run, self.config)
        tokens = run.tokens()
        tokens.rotary = self._rotary[0](x, run.positions)
        latest = list(self.memory_of_last(memory, run)[0].unbind(1))
        shared: Shared = {}
        for i, block in enumerate(self._layers):
            bank, place = _bank_of(memory, i), i % len(latest)
            x, shared, latest[place] = block(
                x, shared, tokens=tokens, past_key_values=segment, bank=bank, latest=latest[place]
            )
        if run.closes is not False:
            memory = (torch.stack(latest, dim=1),)
        return x, memory, segment.after, shared | segment.recorded()

    def reset_parameters(self) -> None:
        if self.config.initial_memory == "learned":
            init.normal_(self.initial_bank)  # of the size of what blocks see of tokens: normed, 1 on average


def _newest_tokens(run: Run, length: int) -> Tensor | None:
    """Where the newest tokens of a run stand behind the length - 1 of before, (b length); None: at the end."""
    if run.lengths is None:
        return None
    newest = run.lengths[:, None] - 1 + torch.arange(length, device=run.lengths.device)
    return newest.clamp(min=0)  # a row without tokens keeps those of before


def _stale_slots(run: Run, length: int) -> Tensor | None:
    """Which of the newest length - 1 tokens are of documents before the last of a run, (b length-1 1); None: none."""
    if run.segments is None:
        return None
    n = run.positions.shape[1]
    lengths = torch.full_like(run.segments[:, 0], n) if run.lengths is None else run.lengths
    count = run.positions.gather(1, (lengths - 1).clamp(min=0)[:, None]) + 1
    stale = torch.arange(length - 1, device=count.device) < length - 1 - count
    return (stale & (lengths > 0)[:, None])[..., None]


def _visible_slots(run: Run, count: int) -> Tensor | None:
    """Which slots each token sees, (b n 2m): those of the memory, or behind them those of the initial one. None: m."""
    if run.segments is None:
        return None
    fresh = run.fresh[..., None].expand(-1, -1, count)
    return torch.cat([~fresh, fresh], dim=-1)


def _bank_of(memory: State, layer: int) -> Tensor:
    """The bank of a memory, (b m d), that a layer reads and writes."""
    return memory[0][:, layer % memory[0].shape[1]]


def _bank_shape(config: LM2Config) -> tuple[int, int, int]:
    banks = 1 if config.memory_flow == "cross_layer" else config.num_hidden_layers
    return banks, config.num_memory_slots, config.hidden_size


class LM2Model(SegmentedModel):
    config: LM2Config
    block_class = LM2Block

    def __init__(self, config: LM2Config):
        super().__init__(config)
        self.stack = LM2Stack(config, self.layers, self.keepers(), self.rotary)
        self.post_init()


LM2ForCausalLM, LM2ForSequenceClassification, LM2ForTokenClassification = heads_of(LM2Model)

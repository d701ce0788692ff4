"""LM2: a Transformer that reads a memory in every block (Kang et al., 2025, arXiv:2502.06049), causal.

Letters: b batch, t tokens, n tokens of a run, m slots, d width, l layers.
"""

from collections.abc import Sequence

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init
from zoo.plugins.lm2.memory import SegmentInput, SlotMemory

from zoo.cache import RECURRENT, State
from zoo.config import RotaryAttentionConfig
from zoo.errors import unknown_name
from zoo.heads import heads_of
from zoo.mixer import RecurrentMixer, Shared, Tokens
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


class LM2Block(Block):
    """A block of the Transformer baseline, with the memory beside its attention."""

    def __init__(self, config: LM2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mixer = SegmentAttention.taking_over(self.mixer, config.segment_length)
        self.memory = SlotMemory(config)

    def forward(
        self,
        x: Tensor,
        shared: Shared,
        tokens: Tokens,
        past_key_values: Cache | OpenSegment,
        slots: tuple[Tensor, Tensor],
        visible: Tensor | None = None,
    ) -> tuple[Tensor, Shared, Tensor]:
        """As `Block`, with the keys and values of the slots (b m d) and which of them tokens see (b n m).

        Returns:
            Besides, what attention and memory saw, (b n d): the tokens that the slots look at when the segment is full.
        """
        seen = self.mixer_norm(x)
        y, shared = self.mixer(seen, shared, tokens, past_key_values)
        x = x + y + self.memory.read(seen, *slots, visible)
        if self.channel_mixer is None:
            return x, shared, seen
        y, shared = self.channel_mixer(self.channel_norm(x), shared, tokens, past_key_values)
        return x + y, shared, seen

    def reset_parameters(self) -> None:
        init.ones_(self.memory.forget_gate.bias)


class LM2Stack(SegmentedStack):
    """The blocks, one segment at a time.

    Inside a segment all of them read what was written at the end of the one before, so nothing of a token reaches
    those in front of it. When it is full, the banks are written: with memory_flow "cross_layer" the one bank by the
    first block, what comes out by the second, and so on. The keys and values of the slots are kept for the segment.
    """

    parameter_options = {"initial_bank": {"weight_decay": 0.0}}

    def __init__(self, config: LM2Config, blocks: Sequence[LM2Block], keepers: list[RecurrentMixer], rotary: nn.Module):
        inputs = [SegmentInput(config, i) for i in range(len(blocks))]
        super().__init__(config, blocks, keepers + inputs)
        self._blocks, self._inputs, self._rotary = list(blocks), inputs, [rotary]  # lists do not register them again
        if config.initial_memory == "learned":
            self.initial_bank = nn.Parameter(torch.empty(_bank_shape(config)))

    @classmethod
    def memory_shapes(cls, config: LM2Config) -> dict:
        slots = (config.num_hidden_layers, config.num_memory_slots, config.hidden_size)
        return {"bank": (_bank_shape(config), torch.float32), "slot_keys": (slots, None), "slot_values": (slots, None)}

    @classmethod
    def keepers_inside(cls, config: LM2Config) -> list:
        attention = SegmentAttention.view(config, config.segment_length)
        return [
            *(
                (SegmentAttention, attention, i) if keeper is Attention else (keeper, own, i)
                for keeper, own, i in config.in_blocks()
            ),
            *((SegmentInput, config, i) for i in range(config.num_hidden_layers)),
        ]

    def initial_memory(self, x: Tensor) -> State:
        dtype = torch.promote_types(torch.float32, x.dtype)
        if self.config.initial_memory == "learned":
            bank = self.initial_bank.to(dtype)
        else:
            shape = _bank_shape(self.config)
            bank = torch.eye(*shape[1:], dtype=dtype, device=x.device).expand(shape)
        return tuple(part.expand(x.shape[0], -1, -1, -1) for part in self._with_slots(bank[None], x.dtype))

    def run_segment(
        self, x: Tensor, memory: State, states: list[State] | None, run: Run
    ) -> tuple[Tensor, State, list[State] | None, Shared]:
        count = len(self.keepers) - len(self._inputs)
        segment = OpenSegment(None if states is None else states[:count], count, run)
        tokens = run.tokens()
        tokens.rotary = self._rotary[0](x, run.positions)
        keys, values, visible = self._readable(memory, run)
        shared: Shared = {}
        inputs = []
        for i, block in enumerate(self._blocks):
            slots = keys[:, i], values[:, i]
            x, shared, seen = block(x, shared, tokens=tokens, past_key_values=segment, slots=slots, visible=visible)
            inputs.append(seen)
        if run.keeps or run.closes is not False:
            past = [None] * len(inputs) if states is None else states[count:]
            newest = _newest_tokens(run, self.config.segment_length)
            inputs = [
                keeper.collect(seen, before, newest)
                for keeper, seen, before in zip(self._inputs, inputs, past, strict=True)
            ]
        if run.closes is not False:
            memory = self._write(self.memory_of_last(memory, run), inputs)
        if not run.keeps:
            return x, memory, None, shared | segment.recorded()
        stale = _stale_slots(run, self.config.segment_length)
        kept = (seen[:, 1:] if stale is None else seen[:, 1:].masked_fill(stale, 0.0) for seen in inputs)
        return x, memory, [*segment.after, *((seen,) for seen in kept)], shared | segment.recorded()

    def _readable(self, memory: State, run: Run) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the slots that tokens find (b l m d), and which of them each sees (b n m)."""
        _, keys, values = memory
        if run.segments is None:
            return keys, values, None
        _, first_keys, first_values = run.first_memory
        fresh = (run.segments != run.segments[:, :1])[..., None].expand(-1, -1, keys.shape[2])
        visible = torch.cat([~fresh, fresh], dim=-1)
        return torch.cat([keys, first_keys], dim=2), torch.cat([values, first_values], dim=2), visible

    def _write(self, memory: State, inputs: list[Tensor]) -> State:
        """The memory after a segment, of which each block saw the inputs (b t d)."""
        banks = list(memory[0].unbind(1))
        for i, (block, seen) in enumerate(zip(self._blocks, inputs, strict=True)):
            place = i % len(banks)
            banks[place] = block.memory.write(banks[place], seen)
        return self._with_slots(torch.stack(banks, dim=1), inputs[0].dtype)

    def _with_slots(self, bank: Tensor, dtype: torch.dtype) -> State:
        """Banks (b 1 m d) or (b l m d), and the keys and values of their slots for every block, both (b l m d)."""
        banks = bank.unbind(1) * (len(self._blocks) // bank.shape[1])
        slots = [block.memory.project(own, dtype) for block, own in zip(self._blocks, banks, strict=True)]
        keys, values = zip(*slots, strict=True)
        return bank, torch.stack(keys, dim=1), torch.stack(values, dim=1)

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

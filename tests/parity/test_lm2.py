"""LM2 against its equations, token by token in float64, and what the authors' own memory module does instead.

The authors' code must not be copied (CC BY-NC) and runs at one length only; `OfficialMemory` below does what it does,
written from a description, and serves to show why the model of the zoo is another one.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import zoo

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_memory_heads": 3,
    "num_memory_slots": 5,
    "segment_length": 7,
}
LENGTH = 3 * SIZES["segment_length"] + 4  # three borders, and a segment that is open
TOLERANCE = 1e-9  # float64, relative to the largest entry

BLOCK = "model.layers.{}."
BANK = "model.stack.initial_bank"

flows = pytest.mark.parametrize("flow", ["cross_layer", "per_layer"])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
FREQUENCIES = (10000.0 ** -(torch.arange(HALF, dtype=torch.float64) / HALF)).float()
"""Of the rotary embedding. It is computed in float32 whatever the weights are, here and there from the same bits."""


def make(**changes):
    """A model in float64, its weights away from their initial values."""
    model = zoo.create_model("lm2-tiny", **SIZES, tie_word_embeddings=False, **changes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    assert relative_error(model.model.rotary.inv_freq, FREQUENCIES) <= 1e-7
    model.model.rotary.inv_freq = FREQUENCIES.clone()
    return model


def tokens(b: int = 2, t: int = LENGTH) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (b, t), generator=torch.Generator().manual_seed(0))


# -- the equations, one sequence, one token, one head at a time --------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean() + eps).sqrt() * weight


def rotate(x: Tensor, place: int) -> Tensor:
    """The rotary embedding of one head's vector at one place, features i and i + half together."""
    angle = place * FREQUENCIES
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def look(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query (c) of one head over keys and values (s c)."""
    return torch.softmax(keys @ q / len(q) ** 0.5, dim=0) @ values


def look_by_heads(q: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """One query (d) over keys and values (s d), each head with its part of the width."""
    parts = zip(q.chunk(heads), keys.chunk(heads, dim=1), values.chunk(heads, dim=1), strict=True)
    return torch.cat([look(*part) for part in parts])


def reference(weights: dict[str, Tensor], config, row: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (t vocabulary) of a sequence (t), and the banks after every whole segment, (layers or 1, n, d)."""
    layers, length, eps = config.num_hidden_layers, config.segment_length, config.norm_eps
    shared = config.memory_flow == "cross_layer"
    if config.initial_memory == "identity":
        start = torch.eye(config.num_memory_slots, config.hidden_size, dtype=weights["model.norm.weight"].dtype)
        banks = [start] * (1 if shared else layers)
    else:
        banks = list(weights[BANK])
    logits, history = [], []
    for begin in range(0, len(row), length):
        segment = row[begin : begin + length]
        stream = list(weights["model.embed_tokens.weight"][segment])
        seen: list[Tensor] = []  # by block, what its attention and memory saw of the segment
        for block in range(layers):
            own = BLOCK.format(block)
            w = {name.removeprefix(own): value for name, value in weights.items() if name.startswith(own)}
            bank = banks[0] if shared else banks[block]
            e = [rms_norm(x, w["mixer_norm.weight"], eps) for x in stream]
            seen.append(torch.stack(e))
            attended = attend(e, w, config)
            slot_keys, slot_values = bank @ w["memory.k_proj.weight"].T, bank @ w["memory.v_proj.weight"].T
            for i, token in enumerate(e):
                q = w["memory.q_proj.weight"] @ token
                e_mem = look_by_heads(q, slot_keys, slot_values, config.num_memory_heads)
                gate = torch.sigmoid(w["memory.output_gate.weight"] @ e_mem)
                x = stream[i] + attended[i] + gate * (w["memory.o_proj.weight"] @ e_mem)
                y = rms_norm(x, w["channel_norm.weight"], eps)
                inner = F.silu(w["channel_mixer.gate_proj.weight"] @ y) * (w["channel_mixer.up_proj.weight"] @ y)
                stream[i] = x + w["channel_mixer.down_proj.weight"] @ inner
        logits += [weights["lm_head.weight"] @ rms_norm(x, weights["model.norm.weight"], eps) for x in stream]
        if len(segment) < length:
            break
        for block in range(layers):  # at the border, from block to block
            own = BLOCK.format(block)
            w = {name.removeprefix(own): value for name, value in weights.items() if name.startswith(own)}
            place = 0 if shared else block
            banks[place] = write(banks[place], seen[block], w, config)
        history.append(torch.stack(banks))
    return torch.stack(logits), history


def attend(e: list[Tensor], w: dict[str, Tensor], config) -> list[Tensor]:
    """Causal attention inside a segment, by groups of heads."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    queries = [(w["mixer.q_proj.weight"] @ x).chunk(heads) for x in e]
    keys = [(w["mixer.k_proj.weight"] @ x).chunk(groups) for x in e]
    values = [(w["mixer.v_proj.weight"] @ x).chunk(groups) for x in e]
    found = []
    for i in range(len(e)):
        parts = []
        for head in range(heads):
            group = head * groups // heads
            past = torch.stack([rotate(keys[j][group], j) for j in range(i + 1)])
            parts.append(look(rotate(queries[i][head], i), past, torch.stack([values[j][group] for j in range(i + 1)])))
        found.append(w["mixer.o_proj.weight"] @ torch.cat(parts))
    return found


def write(bank: Tensor, e: Tensor, w: dict[str, Tensor], config) -> Tensor:
    """Every slot looks through the segment, e (t d), and takes from it what its gates let in."""
    slots = []
    for slot in bank:
        c = look_by_heads(slot, e, e, config.num_memory_heads)
        g_in = torch.sigmoid(w["memory.input_gate.weight"] @ c + w["memory.input_gate.bias"])
        g_forget = torch.sigmoid(w["memory.forget_gate.weight"] @ c + w["memory.forget_gate.bias"])
        slots.append(g_in * torch.tanh(c) + g_forget * slot)
    return torch.stack(slots)


@flows
@pytest.mark.parametrize("start", ["learned", "identity"])
def test_equations(flow, start):
    """Logits, the banks behind every border, and all gradients."""
    model, rows = make(memory_flow=flow, initial_memory=start), tokens()
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    expected, banks = zip(*(reference(weights, model.config, row) for row in rows), strict=True)
    expected = torch.stack(expected)
    logits = model(rows).logits
    assert relative_error(logits, expected) <= TOLERANCE
    for border in range(3):
        out = model(rows[:, : (border + 1) * SIZES["segment_length"]], use_cache=True)
        bank = torch.stack([bank[border] for bank in banks])
        assert relative_error(bank_of(out.past_key_values), bank) <= TOLERANCE
    assert relative_error(bank_of(model(rows, use_cache=True).past_key_values), bank) <= TOLERANCE
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, weights[name].grad) <= TOLERANCE, name


def bank_of(cache) -> Tensor:
    """(b, layers or 1, n, d)."""
    (layer,) = cache.layers
    return layer.states[1]


@flows
@torch.no_grad()
def test_token_by_token(flow):
    model, rows = make(memory_flow=flow), tokens()
    cache = DynamicCache(config=model.config)
    pieces = [model(rows[:, t : t + 1], past_key_values=cache).logits for t in range(LENGTH)]
    whole = model(rows, use_cache=True)
    assert relative_error(torch.cat(pieces, dim=1), whole.logits) <= TOLERANCE
    assert relative_error(bank_of(cache), bank_of(whole.past_key_values)) <= TOLERANCE


@flows
@torch.no_grad()
def test_causality(flow):
    """A token changes nothing in front of it, to the last bit, and everything behind it over three borders."""
    model, rows = make(memory_flow=flow), tokens(1)
    before = model(rows).logits
    for t in range(LENGTH):
        changed = rows.clone()
        changed[0, t] = (changed[0, t] + 1) % SIZES["vocab_size"]
        difference = (model(changed).logits - before).abs().amax(dim=-1)[0]
        assert (difference[:t] == 0).all()
        assert difference[t:].min() > 1e-12


@flows
@torch.no_grad()
def test_memory_is_all_that_crosses_a_border(flow):
    """With what is read closed off, a segment is a sequence of its own: the plain Transformer's."""
    model, rows = make(memory_flow=flow), tokens()
    for layer in model.model.layers:
        layer.memory.o_proj.weight.zero_()
    alone = [model(segment).logits for segment in rows.split(SIZES["segment_length"], dim=1)]
    assert relative_error(model(rows).logits, torch.cat(alone, dim=1)) <= TOLERANCE
    plain = {field: value for field, value in SIZES.items() if "memory" not in field and field != "segment_length"}
    backbone = zoo.create_model("transformer-tiny", **plain, tie_word_embeddings=False).double().eval()
    weights = {name: value for name, value in model.state_dict().items() if "memory" not in name and name != BANK}
    backbone.load_state_dict(weights)
    backbone.model.rotary.inv_freq = FREQUENCIES.clone()
    assert relative_error(torch.cat(alone, dim=1)[:, : SIZES["segment_length"]], backbone(rows[:, :7]).logits) <= 1e-9


@flows
@pytest.mark.parametrize("start", ["learned", "identity"])
@torch.no_grad()
def test_ragged_rows(flow, start):
    """Rows of other lengths, and documents packed in one, are what they are alone, over borders at other places."""
    model, row = make(memory_flow=flow, initial_memory=start), tokens(1)
    lengths = [LENGTH, 16, 3]
    alone = [model(row[:, :n]).logits for n in lengths]
    padded, mask = torch.zeros(3, LENGTH, dtype=torch.long), torch.zeros(3, LENGTH, dtype=torch.long)
    for i, n in enumerate(lengths):
        padded[i, LENGTH - n :], mask[i, LENGTH - n :] = row[0, :n], 1
    logits = model(padded, attention_mask=mask).logits
    for i, n in enumerate(lengths):
        assert relative_error(logits[i, LENGTH - n :], alone[i][0]) <= TOLERANCE
    packed = torch.cat([row[:, :n] for n in reversed(lengths)], dim=1)
    positions = torch.cat([torch.arange(n) for n in reversed(lengths)])[None]
    expected = torch.cat(list(reversed(alone)), dim=1)
    assert relative_error(model(packed, position_ids=positions).logits, expected) <= TOLERANCE


def test_gradient_reaches_the_first_segment():
    """Through the memory alone, over three borders."""
    model = make()
    embeds = model.get_input_embeddings()(tokens(1)).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, -1].pow(2).sum().backward()
    assert (embeds.grad[0, : SIZES["segment_length"]].abs().amax(dim=-1) > 1e-12).all()


# -- what a configuration says -----------------------------------------------------------------------------------------


def test_initialisation():
    model = zoo.create_model("lm2-tiny")
    stack = model.model.stack
    assert stack.initial_bank.shape == (1, 16, 128)
    assert abs(stack.initial_bank.std() - 1) <= 0.05
    assert abs(stack.initial_bank.mean()) <= 0.05
    for layer in model.model.layers:
        assert (layer.memory.forget_gate.bias == 1).all()
        assert (layer.memory.input_gate.bias == 0).all()
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                assert abs(module.weight.std() - 0.02) <= 0.001
    identity = zoo.create_model("lm2-tiny", initial_memory="identity")
    assert BANK not in dict(identity.named_parameters())
    (group,) = (
        group
        for group in model.parameter_groups(learning_rate=1e-3, weight_decay=0.1)
        if any(parameter is stack.initial_bank for parameter in group["params"])
    )
    assert group["weight_decay"] == 0


def test_published_size():
    """Llama-3.2-1B, counted by transformers' class, and in each block seven d x d matrices and two biases."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128256,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=16,
                num_attention_heads=32,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            )
        )
    assert llama.num_parameters() == 1_235_814_400
    count = zoo.summarize("lm2-1.7b").parameters
    assert count == llama.num_parameters() + 16 * (7 * 2048**2 + 2 * 2048) == 1_705_641_984


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_flow": "upwards"}, "unknown memory_flow 'upwards'"),
        ({"initial_memory": "zeros"}, "unknown initial_memory 'zeros'"),
        ({"initial_memory": "identity", "num_memory_slots": 129}, "128 rows for num_memory_slots 129"),
        ({"num_memory_heads": 3}, r"hidden_size \(128\) must be a multiple of num_memory_heads \(3\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple"),
        ({"segment_length": 1}, "at least 2 tokens; segment_length is 1"),
        ({"num_memory_slots": 0}, "num_memory_slots must be positive"),
        ({"mixers": ["mamba"]}, "mamba"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_config("lm2-tiny", **changes)


# -- the authors' module, as it behaves --------------------------------------------------------------------------------


class OfficialMemory(nn.Module):
    """What the module of github.com/convergence-ai/lm2 computes, for slots n of width n and a backbone of width d.

    It takes attention's output (b t d) and its memory (b n n), and gives what the block goes on with and a new memory.
    Slots are read under a causal mask, as if slot j were token j; the update adds what tokens read to the slots.
    """

    def __init__(self, n: int, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_proj, self.key_proj, self.value_proj = nn.Linear(d, n), nn.Linear(n, n), nn.Linear(n, n)
        self.mlp = nn.Linear(n, n)  # one layer, applied twice
        self.norm1, self.norm2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.input_scale = nn.Parameter(torch.ones(d))
        self.input_part, self.memory_part = nn.Linear(d, 2 * n), nn.Linear(n, 2 * n)
        self.input_bias, self.forget_bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def read(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.query_proj(x), self.key_proj(memory), self.value_proj(memory)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        mask = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != memory.shape[1]:
            raise ValueError(f"{x.shape[1]} tokens for {memory.shape[1]} slots")
        a = self.norm1(memory + self.read(x, memory))
        candidate = self.norm2(a + self.mlp(torch.relu(self.mlp(a))))
        pooled = torch.relu(self.input_scale * x).mean(dim=1, keepdim=True)  # over all tokens, later ones too
        gates = self.input_part(pooled) + self.memory_part(torch.tanh(memory))
        g_in, g_forget = gates.chunk(2, dim=-1)
        new = torch.sigmoid(g_in + self.input_bias) * torch.tanh(candidate)
        new = new + torch.sigmoid(g_forget + self.forget_bias) * memory
        return x + new, new  # no output gate


@pytest.fixture
def official():
    """The module at the sizes it takes, slots = tokens = width, and the identity that its memory starts from."""
    n = 24
    module = OfficialMemory(n, n, heads=4).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module, torch.eye(n, dtype=torch.float64)[None].repeat(2, 1, 1)


def perturb_last(x: Tensor) -> Tensor:
    return torch.cat([x[:, :-1], x[:, -1:] + 5], dim=1)


@torch.no_grad()
def test_official_module_leaks_the_future(official):
    """Its input gate looks at the mean of all tokens: the last one changes what comes out at the first."""
    module, memory = official
    x = torch.randn(2, 24, 24, dtype=torch.float64)
    changed = perturb_last(x)
    assert torch.equal(module.read(changed, memory)[:, :-1], module.read(x, memory)[:, :-1])
    leak = (module(changed, memory)[0] - module(x, memory)[0])[:, 0].abs().max()
    assert leak > 1e-3


@pytest.mark.parametrize(("length", "width"), [(12, 24), (36, 24), (1, 24), (24, 48)])
@torch.no_grad()
def test_official_module_runs_at_one_size_only(length, width):
    """As many tokens as slots, and slots as wide as there are: no other length, no decoding, no other width."""
    module, memory = OfficialMemory(24, width, heads=4), torch.eye(24)[None]
    with pytest.raises((ValueError, RuntimeError), match=r"must match|tokens for"):
        module(torch.randn(1, length, width), memory)

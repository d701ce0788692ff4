"""Titans against its equations one token at a time by autograd, titans-pytorch 0.5.5, and the rules it reduces to.

Letters: t tokens, h heads, k width of a head, d width.
"""

import itertools
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.ops.delta_rule import delta_rule
from zoo.ops.memory_gd import initial_state, memory_gd
from zoo.ops.memory_gd.chunked import _gradients
from zoo.ops.memory_gd.gates import gate_coefficients
from zoo.ops.memory_gd.layers import split_layers

SIZES = {
    "vocab_size": 50,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_persistent_tokens": 3,
    "segment_length": 8,
    "sliding_window": 5,
}
TOLERANCE = 1e-9  # float64, relative to the largest entry
VARIANTS = ("lmm", "mac", "mag", "mal")


def make_model(variant: str, **options):
    """A model in float64 with weights away from the initial ones, and gates away from their middle."""
    torch.manual_seed(0)
    model = zoo.create_model("titans-tiny", mixers=[f"titans_{variant}"], **{**SIZES, **options}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.3 if "proj" in name else 0.1) * torch.randn_like(parameter))
    return model


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


# -- the paper, one token at a time ------------------------------------------------------------------------------------


class Learner:
    """Equations 8 to 15 with the gradients of a chunk at its start (3.2), for one sequence, by autograd.

    Its parameters are those of a memory of ours, by their names; nothing else of ours is used.
    """

    def __init__(self, memory: nn.Module):
        self.memory, self.config = memory, memory.config
        self.weights = list(memory.initial_weights)
        self.surprise = [torch.zeros_like(w) for w in self.weights]
        self.anchor, self.read_so_far = self.weights, []

    def project(self, which: str, sequence: list[Tensor]) -> Tensor:
        """The last token of a sequence, projected, filtered with the tokens before it, and activated: (h k)."""
        proj, conv = getattr(self.memory, f"{which}_proj").weight, getattr(self.memory, f"{which}_conv").weight
        taps = conv.shape[-1]
        past = [torch.zeros_like(sequence[0])] * (taps - 1) + sequence
        x = sum(conv[:, 0, j] * (proj @ past[len(past) - taps + j]) for j in range(taps))
        x = (x * torch.sigmoid(x)).view(self.config.num_attention_heads, -1)
        return x / x.shape[-1] ** 0.5 if which == "v" else x / x.norm(dim=-1, keepdim=True)

    @staticmethod
    def answer(weights: list[Tensor], x: Tensor) -> Tensor:
        """M(x), (h k) -> (h k)."""
        for layer, weight in enumerate(weights):
            x = x if layer == 0 else x * torch.sigmoid(x)
            x = torch.stack([x[head] @ weight[head] for head in range(len(x))])
        return x

    def learn(self, x: Tensor) -> Tensor:
        """One token (d): update, then y = M_t(q_t), (d)."""
        if len(self.read_so_far) % self.config.chunk_size == 0:
            self.anchor = self.weights
        self.read_so_far.append(x)
        q, k, v = (self.project(which, self.read_so_far) for which in "qkv")
        gates = torch.sigmoid(self.memory.gates_proj.weight @ x + self.memory.gates_proj.bias).view(3, -1)
        theta, eta, alpha = gates[0] * (1 - gates[1]) / self.config.chunk_size, gates[1], gates[2]
        anchor = [w.clone() for w in self.anchor]  # which k and v, where they come from the memory, do not come from
        loss = (self.answer(anchor, k) - v).pow(2).sum()
        gradient = torch.autograd.grad(loss, anchor, create_graph=True)
        theta, eta, alpha = (gate[:, None, None] for gate in (theta, eta, alpha))
        self.surprise = [eta * s - theta * u for s, u in zip(self.surprise, gradient, strict=True)]
        self.weights = [(1 - alpha) * w + s for w, s in zip(self.weights, self.surprise, strict=True)]
        return self.answer(self.weights, q).flatten()


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return x / (x.pow(2).mean() + norm.eps).sqrt() * norm.weight


def joined(gate: nn.Module, y: Tensor, m: Tensor) -> Tensor:
    y, m = rms(y, gate.attention_norm), rms(m, gate.memory_norm)
    return y * (torch.sigmoid(m) if gate.config.branch_gate == "sigmoid" else m)


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """The rotary embedding of heads (h k), as complex numbers whose parts are k/2 apart."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def attend(attention: nn.Module, x: Tensor, position: int, seen: list[tuple[Tensor, int]]) -> Tensor:
    """Softmax attention of a token (d) at a position to tokens (d) at theirs."""
    config = attention.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q = turned((attention.q_proj.weight @ x).view(heads, -1), position, config.rope_theta)
    k = torch.stack([turned((attention.k_proj.weight @ y).view(groups, -1), p, config.rope_theta) for y, p in seen])
    v = torch.stack([(attention.v_proj.weight @ y).view(groups, -1) for y, _ in seen])
    ys = []
    for head in range(heads):
        group = head * groups // heads
        ys.append(torch.softmax(k[:, group] @ q[head] / q.shape[-1] ** 0.5, dim=0) @ v[:, group])
    return attention.o_proj.weight @ torch.cat(ys)


def run_lmm(mixer: nn.Module, xs: list[Tensor], learner: Learner) -> list[Tensor]:
    return [mixer.o_proj.weight @ (rms(learner.learn(x), mixer.norm) * F.silu(mixer.g_proj.weight @ x)) for x in xs]


def run_mac(mixer: nn.Module, xs: list[Tensor], learner: Learner) -> list[Tensor]:
    config, ys = mixer.config, []
    p, length = config.num_persistent_tokens, config.segment_length
    prefix = [(mixer.persistent.weight[i], i - p) for i in range(p)]
    for start in range(0, len(xs), length):
        segment = [(x, i) for i, x in enumerate(xs[start : start + length])]
        queries = [learner.project("q", xs[: start + i + 1]) for _, i in segment]
        retrieved = [
            (rms(learner.answer(learner.weights, q).flatten(), mixer.retrieved_norm), i) for i, q in enumerate(queries)
        ]
        for x, i in segment:
            seen = retrieved if config.mac_prefix == "paper" else retrieved[: i + 1]
            y = attend(mixer.attention, x, i, prefix + seen + segment[: i + 1])
            ys.append(mixer.o_proj.weight @ joined(mixer.gate, y, learner.learn(rms(y, mixer.attended_norm))))
    return ys


def run_mag(mixer: nn.Module, xs: list[Tensor], learner: Learner) -> list[Tensor]:
    config, ys = mixer.config, []
    prefix = [(x, i - config.num_persistent_tokens) for i, x in enumerate(mixer.persistent.weight)]
    for x, _ in prefix:
        learner.learn(x)
    for i, x in enumerate(xs):
        window = [(xs[j], j) for j in range(max(0, i + 1 - config.sliding_window), i + 1)]
        ys.append(
            mixer.o_proj.weight @ joined(mixer.gate, attend(mixer.attention, x, i, prefix + window), learner.learn(x))
        )
    return ys


def run_mal(mixer: nn.Module, xs: list[Tensor], learner: Learner) -> list[Tensor]:
    p = mixer.config.num_persistent_tokens
    told = run_lmm(mixer.memory_layer, [*mixer.persistent.weight, *xs], learner)
    told = [(rms(x, mixer.attention_norm), i - p) for i, x in enumerate(told)]
    windows = [told[max(0, i + 1 - mixer.config.sliding_window) : i + 1] for i in range(p, len(told))]
    return [attend(mixer.attention, *window[-1], window) for window in windows]


RUN = {"lmm": run_lmm, "mac": run_mac, "mag": run_mag, "mal": run_mal}


def memory_of(mixer: nn.Module) -> nn.Module:
    return mixer.memory_layer.memory if hasattr(mixer, "memory_layer") else mixer.memory


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        *(("lmm", {"memory_depth": depth, "chunk_size": b}) for depth in (1, 2, 3, 4) for b in (1, 5, 8, 40)),
        *((variant, {"chunk_size": 4}) for variant in VARIANTS[1:]),
        *((variant, {"chunk_size": 8, "memory_depth": 3, "num_key_value_heads": 1}) for variant in VARIANTS[1:]),
        *((variant, {"chunk_size": 4, "branch_gate": "product"}) for variant in ("mac", "mag")),
        *((variant, {"chunk_size": 1, "num_persistent_tokens": 0}) for variant in VARIANTS[1:]),
        ("mac", {"chunk_size": 2, "mac_prefix": "paper"}),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(f"{key}={value}" for key, value in x.items()),
)
def test_one_token_at_a_time(variant, options):
    """Outputs, memories, momenta and outer gradients of the equations as the paper has them, in float64."""
    mixer = make_model(variant, **options).model.layers[0].mixer
    t = 21
    x = torch.randn(t, SIZES["hidden_size"], dtype=torch.float64, requires_grad=True)
    learner = Learner(memory_of(mixer))
    expected = torch.stack(RUN[variant](mixer, list(x), learner))
    tokens = zoo.Tokens(torch.arange(t)[None])
    y, state = mixer.scan(x[None], mixer.initial_state(x[None]), tokens)
    assert_near(y[0], expected)
    for found, wanted in zip(state[:3], (learner.weights, learner.surprise, learner.anchor), strict=True):
        assert_near(found[0], torch.cat([w.flatten(1) for w in wanted], dim=-1))

    leaves = [x, *mixer.parameters()]
    weight = torch.randn_like(expected)
    end = (learner.weights[-1].pow(2).sum(), state[0][0, :, -learner.weights[-1][0].numel() :].pow(2).sum())
    wanted = torch.autograd.grad((expected * weight).sum() + end[0], leaves, allow_unused=True)
    found = torch.autograd.grad((y[0] * weight).sum() + end[1], leaves, allow_unused=True)
    for actual, gradient in zip(found, wanted, strict=True):
        if gradient is not None and gradient.numel():
            assert_near(actual, gradient)


# -- titans-pytorch ----------------------------------------------------------------------------------------------------


class SiluMemory(nn.Module):
    """A memory model for titans-pytorch whose activation is ours; theirs is GELU."""

    def __init__(self, *sizes: int):
        super().__init__()
        shapes = itertools.pairwise(sizes)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape) * shape[0] ** -0.5) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        for layer, weight in enumerate(self.weights):
            x = (F.silu(x) if layer else x) @ weight
        return x


def make_oracle(chunk: int, batch: int | None, depth: int, momentum: bool = True):
    assert version("titans-pytorch") == "0.5.5"
    from titans_pytorch import NeuralMemory

    torch.manual_seed(0)
    d = 6
    return NeuralMemory(
        dim=d,
        chunk_size=chunk,
        batch_size=batch,
        model=SiluMemory(*[d, 10, 10][:depth], d),
        momentum=momentum,
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
    ).double()


def read_oracle(oracle: nn.Module, x: Tensor):
    """Its queries, keys, values (b t 1 d); step (b t 1), of a loss that is a mean; momentum, decay of each chunk."""
    with torch.no_grad():
        q, k, v = (proj(x)[:, :, None] for proj in (oracle.to_queries, oracle.to_keys, oracle.to_values))
        step = oracle.to_adaptive_step[0](x).sigmoid() / x.shape[-1]
        means = x.unflatten(1, (-1, oracle.store_chunk_size)).mean(2)
        momentum = oracle.to_momentum[0](means).sigmoid() if oracle.to_momentum else torch.zeros_like(means[..., :1])
        decay = oracle.to_decay_factor[0](means).sigmoid()
    return SimpleNamespace(q=q, k=k, v=v, step=step, momentum=momentum, decay=decay)


def flat(weights) -> Tensor:
    """The memory (1 h w) in a dict of matrices, each ([orders] b*h in out)."""
    return torch.cat([w.flatten(-2).flatten(0, -2) for _, w in sorted(weights.items())], dim=-1)[:, None]


@pytest.mark.parametrize("batch", [None, 1, 8, 16])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_titans_pytorch_by_tokens(depth, batch):
    """Its `batch_size` is our chunk, and where its `chunk_size` is 1 its gates are the paper's."""
    oracle, t = make_oracle(1, batch, depth), 40
    x = torch.randn(2, t, 6, dtype=torch.float64)
    expected, after = oracle(x)
    its = read_oracle(oracle, x)
    initial = tuple(oracle.memory_model_parameters)
    y, state = memory_gd(
        *(its.q, its.k, its.v, its.step, its.momentum, its.decay, None, initial), chunk_size=batch or t
    )
    assert_near(y[:, :, 0], expected)
    weights, momenta = after.states
    assert_near(state.weights, flat(weights))
    assert_near(state.surprise, flat(momenta))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("batch", [None, 8, 16])
@pytest.mark.parametrize("depth", [1, 2])
def test_titans_pytorch_in_its_own_mode(depth, batch, momentum):
    """Chunks of 4 whose mean gives the gates, one update a chunk, read at the chunks' ends: our algebra, at its grain.

    No gates of single tokens are the same as its momentum, so this takes the coefficients and the gradients of the
    closed form, where the test above takes the op.
    """
    oracle, t, chunk = make_oracle(4, batch, depth, momentum), 32, 4
    x = torch.randn(2, t, 6, dtype=torch.float64)
    expected, after = oracle(x)
    its = read_oracle(oracle, x)
    memory = initial_state(tuple(oracle.memory_model_parameters), 2)
    weights, surprise, ends = memory.weights, memory.surprise, [memory.weights]
    hidden = 10 if depth > 1 else 0
    for at in range(0, t, batch or t):
        tokens, chunks = slice(at, at + (batch or t)), slice(at // chunk, (at + (batch or t)) // chunk)
        k, v, step = (z[:, tokens].transpose(1, 2) for z in (its.k, its.v, its.step))
        pairs = _gradients(split_layers(weights, 6, 6, hidden), k, v)
        by_chunk = [
            torch.einsum("bhnci,bhncj,bhnc->bhnij", *(z.unflatten(2, (-1, chunk)) for z in (inputs, errors, step)))
            for inputs, errors in pairs
        ]
        gradients = torch.cat([g.flatten(-2) for g in by_chunk], dim=-1)  # b h n w
        n = gradients.shape[2]
        ones = torch.ones_like(its.momentum[:, chunks])
        learned, surprised = gate_coefficients(ones, its.momentum[:, chunks], its.decay[:, chunks], None, n)
        before = torch.stack([surprise, weights], dim=2)
        ends += (learned[:, :, 0] @ torch.cat([-gradients, before], dim=2)).unbind(2)
        surprise = (surprised[:, :, 0] @ torch.cat([-gradients, before[:, :, :1]], dim=2))[:, :, 0]
        weights = ends[-1]
    ys = []
    for place in range(t):
        y = its.q[:, place, :, None]
        for layer, matrix in enumerate(split_layers(ends[(place + 1) // chunk], 6, 6, hidden)):
            y = (F.silu(y) if layer else y) @ matrix
        ys.append(y[:, 0, 0])
    assert_near(torch.stack(ys, dim=1), expected)
    assert_near(weights, flat(after.states[0]))
    if momentum:
        assert_near(surprise, flat(after.states[1]))


# -- what it reduces to ------------------------------------------------------------------------------------------------


def draw(t: int, d: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k = (F.normalize(normal(1, t, 1, d), dim=-1) for _ in range(2))
    gate = torch.rand(1, t, 1, dtype=torch.float64, generator=generator)
    return q, k, normal(1, t, 1, d), gate, normal(1, d, d) / d**0.5


def test_without_momentum_and_decay_it_is_test_time_training():
    """TTT-Linear (arXiv:2407.04620, eq. 4 and 6), without the norm in its loss: descent by batches of 8."""
    q, k, v, gate, initial = draw(27)
    none = torch.zeros_like(gate)
    y, state = memory_gd(q, k, v, gate, none, none, None, (initial,), chunk_size=8)
    weights = start = initial[0]
    for i in range(27):
        if i % 8 == 0:
            start = weights
        weights = weights - gate[0, i, 0] * 2 * torch.outer(k[0, i, 0], k[0, i, 0] @ start - v[0, i, 0])
        assert_near(y[0, i, 0], q[0, i, 0] @ weights)
    assert_near(state.weights[0, 0], weights.flatten())


def test_without_momentum_and_chunks_it_is_a_delta_rule():
    """M_t = (1 - alpha) M - 2 theta k^T (k M - v): the decay is not in what the token reads before it writes."""
    q, k, v, theta, initial = draw(27)
    alpha = draw(27, seed=1)[3] * 0.3
    y, state = memory_gd(q, k, v, theta, torch.zeros_like(theta), alpha, None, (initial,), chunk_size=1)
    written = 2 * theta[..., None] * k
    expected, end = delta_rule(q, written, v, k, -written, torch.log1p(-alpha), initial[None])
    assert_near(y, expected)
    assert_near(state.weights.view_as(end), end)


# -- what momentum and decay are for -----------------------------------------------------------------------------------


def recall_error(pairs: int, step: float, momentum: float, decay: float, seed: int) -> float:
    """|M(k) - v|^2 of the newest 8 of so many random pairs that a matrix of 16 x 16 read once, by chunks of 8."""
    rows, d, chunk = 16, 16, 8
    generator = torch.Generator().manual_seed(seed)
    k, v = (F.normalize(torch.randn(rows, pairs, 1, d, generator=generator), dim=-1) for _ in range(2))

    def gates(*values: float) -> list[Tensor]:
        return [torch.full((rows, pairs, 1), value) for value in values]

    initial = (torch.zeros(1, d, d),)
    _, state = memory_gd(k, k, v, *gates(step, momentum, decay), None, initial, chunk)
    learned = state._replace(surprise=torch.zeros_like(state.surprise))
    y, _ = memory_gd(k, k, v, *gates(0.0, 0.0, 0.0), learned, initial, chunk)
    return (y - v)[:, -8:].pow(2).sum(-1).mean().item()


@pytest.mark.parametrize("seed", range(5))
def test_momentum_and_decay(seed):
    """Of the inner regression alone, at the same step: what the paper's ablation finds in language models.

    A small step learns more of few pairs with momentum. Of more pairs than the matrix can hold momentum piles up what
    is of no use any more, unless it decays; where there is room, decay costs a little.
    """
    small, large = 1 / 16, 1 / 8
    assert recall_error(8, small, 0.8, 0.0, seed) < 0.7 * recall_error(8, small, 0.0, 0.0, seed)
    assert recall_error(256, large, 0.8, 0.05, seed) < 0.5 * recall_error(256, large, 0.8, 0.0, seed)
    assert recall_error(256, large, 0.8, 0.0, seed) > 2 * recall_error(256, large, 0.0, 0.0, seed)
    assert recall_error(8, small, 0.8, 0.05, seed) > recall_error(8, small, 0.8, 0.0, seed)


# -- causality of MAC --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_prefix_of_the_paper_leaks():
    """A token changes nothing before it; with the paper's prefix it changes its whole segment, from the second on."""
    tokens = torch.randint(1, 50, (1, 32), generator=torch.Generator().manual_seed(0))
    for t in (5, 12, 22, 31):
        changed = tokens.clone()
        changed[0, t] = changed[0, t] % 49 + 1
        difference = {}
        for prefix in ("causal", "paper"):
            model = make_model("mac", mac_prefix=prefix, chunk_size=4)
            logits = (model(row, use_cache=False).logits for row in (tokens, changed))
            difference[prefix] = torch.sub(*logits)[0].abs().amax(-1)
        start = t - t % SIZES["segment_length"]
        assert (difference["causal"][:t] == 0).all()
        assert (difference["paper"][:start] == 0).all()
        assert (difference["paper"][start:t] > 1e-6).all()


def test_the_prefix_of_the_paper_refuses_to_train():
    tokens = torch.randint(1, 50, (1, 20))
    model = make_model("mac", mac_prefix="paper", chunk_size=4)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens)
    with pytest.raises(ValueError, match="train_with_leak=True"):
        model.train()(tokens, labels=tokens)
    with torch.no_grad():
        model(tokens, labels=tokens)
    model = make_model("mac", mac_prefix="paper", chunk_size=4, train_with_leak=True).train()
    model(tokens, labels=tokens).loss.backward()

"""Griffin and Hawk against transformers 5.23.0's RecurrentGemma, and against the paper's equations token by token.

transformers is the oracle of whole sequences only. It keeps the recurrent state on its modules, not in the cache, so
what it makes of a sequence in pieces is stated here where it is wrong.
"""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru
from zoo.plugins.griffin import modeling
from zoo.plugins.griffin.convert import RECURRENT_GEMMA

import zoo

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,  # its square root is no number of bfloat16
    "num_hidden_layers": 5,
    "lru_width": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "logits_soft_cap": 3.0,
}
KINDS = {
    "griffin": {},
    "hawk": {"block_types": ["recurrent"]},
    "options": {
        "block_types": ["attention", "recurrent"],
        "attention_bias": True,
        "num_key_value_heads": 2,
        "conv1d_width": 3,
        "tie_word_embeddings": False,
    },
}
WINDOW = 9
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest entry


def stir(model) -> None:
    """Move every parameter away from its initial value, and the decays all over (0, 1)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("recurrent_param"):
                parameter.uniform_(-6, 1, generator=generator)
            elif "gate_weight" in name:
                parameter.normal_(generator=generator)


def make_pair(kind: str, dtype: torch.dtype = torch.float32):
    """A model of the zoo and its oracle with the same weights."""
    config = RecurrentGemmaConfig(**SIZES | KINDS[kind], intermediate_size=144, attention_window_size=WINDOW)
    oracle = RecurrentGemmaForCausalLM(config)
    stir(oracle)
    mixers = {"recurrent": "rglru", "attention": "local_attention"}
    model = zoo.create_model(
        "griffin-tiny",
        **{key: getattr(config, key) for key in (*SIZES, "attention_bias", "tie_word_embeddings")},
        intermediate_size=72,
        sliding_window=WINDOW,
        conv_kernel=config.conv1d_width,
        mixers=[mixers[name] for name in config.block_types],
    )
    model.load_state_dict({rule.ours: _ours(oracle, rule) for rule in RECURRENT_GEMMA.rules(model.config)})
    return model.to(dtype).eval(), oracle.to(dtype).eval()


def _ours(oracle, rule) -> Tensor:
    return rule.change.to_ours(oracle.get_parameter(rule.theirs).detach())


@pytest.fixture(params=[(kind, dtype) for kind in KINDS for dtype in TOLERANCE], ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request):
    return make_pair(*request.param)


@pytest.fixture
def in_its_precision(monkeypatch):
    """Runs an oracle on a whole sequence; in float64, what it casts to float32 by name stays in float64.

    But for the angles of the rotary embedding, which are float32 in both.
    """
    to_float = torch.Tensor.float

    def run(oracle, *args, **kwargs):
        with monkeypatch.context() as patch:
            if oracle.dtype == torch.float64:
                patch.setattr(torch, "float32", torch.float64)
                patch.setattr(torch.Tensor, "float", lambda x: x.double() if x.is_floating_point() else to_float(x))
                patch.setattr(RecurrentGemmaRglru._rnn_scan, "__defaults__", (torch.float64,))
            return oracle(*args, use_cache=False, **kwargs)

    return run


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.dtype == expected.dtype
    assert error <= TOLERANCE[expected.dtype], f"{what}: relative error {error:.1e}"


def ids(b: int, t: int) -> Tensor:
    """Without 0, whose embedding gets no gradient in transformers."""
    return torch.randint(1, SIZES["vocab_size"], (b, t), generator=torch.Generator().manual_seed(0))


def assert_same_gradients(model, oracle) -> None:
    ours = dict(model.named_parameters())
    for rule in RECURRENT_GEMMA.rules(model.config):
        if rule.ours in ours:  # a tied head is the embedding
            expected = rule.change.to_ours(oracle.get_parameter(rule.theirs).grad)
            assert_close(ours[rule.ours].grad, expected, rule.ours)


# -- whole sequences ---------------------------------------------------------------------------------------------------


def test_logits_and_gradients(pair, in_its_precision):
    model, oracle = pair
    tokens = ids(2, 40)
    logits, expected = model(tokens).logits, in_its_precision(oracle, tokens).logits
    assert_close(logits, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same_gradients(model, oracle)


def read_token_by_token(model, tokens: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The paper's equations for a sequence (t), in float64: logits (t vocabulary), and h (e) of recurrent layers."""
    config, w = model.config, {name: x.double() for name, x in model.state_dict().items()}
    d, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    past = [[] for _ in config.mixers]  # inputs of the convolution, or keys and values
    h: list[Tensor | None] = [None] * len(config.mixers)

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def norm(name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean() + config.norm_eps).sqrt() * (1 + w[f"{name}.weight"])

    def gelu(x: Tensor) -> Tensor:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def gate(name: str, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ torch.block_diag(*w[f"{name}.weight"]) + w[f"{name}.bias"])

    def recur(i: int, name: str, x: Tensor) -> Tensor:
        y = gelu(linear(f"{name}.y_proj", x))
        past[i] = [*past[i], linear(f"{name}.x_proj", x)][-config.conv_kernel :]
        taps = w[f"{name}.conv1d.weight"][:, 0].unbind(1)[-len(past[i]) :]
        x = w[f"{name}.conv1d.bias"] + sum(tap * z for tap, z in zip(taps, past[i], strict=True))
        a = torch.sigmoid(-w[f"{name}.Lambda"]) ** (8 * gate(f"{name}.recurrence_gate", x))
        gated = gate(f"{name}.input_gate", x) * x
        h[i] = gated if h[i] is None else a * h[i] + (1 - a**2).sqrt() * gated
        return linear(f"{name}.out_proj", h[i] * y)

    def rotate(x: Tensor, place: int) -> Tensor:
        r = width // 2
        angle = place * 10000.0 ** -(torch.arange(0, r, 2, dtype=torch.float32) / r)  # float32 as in the model
        cos, sin = angle.cos().double(), angle.sin().double()
        first, second, rest = x.split((r // 2, r // 2, width - r), dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def attend(i: int, name: str, x: Tensor, place: int) -> Tensor:
        q, k, v = (linear(f"{name}.{proj}_proj", x).view(-1, width) for proj in "qkv")
        past[i] = [*past[i], (rotate(k, place), v)][-config.sliding_window :]
        keys, values = (torch.stack(z).repeat_interleave(heads // len(k), dim=1) for z in zip(*past[i], strict=True))
        scores = torch.einsum("hc,shc->hs", rotate(q, place), keys) / math.sqrt(width)
        return linear(f"{name}.o_proj", torch.einsum("hs,shc->hc", scores.softmax(1), values).flatten())

    logits = []
    for place, token in enumerate(tokens):
        x = torch.tensor(math.sqrt(d)).bfloat16().double() * w["model.embed_tokens.weight"][token]
        for i, mixer in enumerate(config.mixers):
            name = f"model.layers.{i}"
            normed = norm(f"{name}.mixer_norm", x)
            x = x + (
                recur(i, f"{name}.mixer", normed) if mixer == "rglru" else attend(i, f"{name}.mixer", normed, place)
            )
            normed, mlp = norm(f"{name}.channel_norm", x), f"{name}.channel_mixer"
            x = x + linear(
                f"{mlp}.down_proj", gelu(linear(f"{mlp}.gate_proj", normed)) * linear(f"{mlp}.up_proj", normed)
            )
        cap = config.logits_soft_cap
        logits.append(cap * torch.tanh(w["lm_head.weight"] @ norm("model.norm", x) / cap))
    return torch.stack(logits), h


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_equations(kind):
    """Whole, in pieces and token by token, logits and states."""
    model, _ = make_pair(kind, torch.float64)
    tokens = ids(1, 30)
    expected, states = read_token_by_token(model, tokens[0])
    assert_close(model(tokens).logits[0], expected)
    for lengths in ([1] * 30, [3, 10, 1, 16]):
        cache, logits = DynamicCache(config=model.config), []
        for piece in tokens.split(lengths, dim=1):
            logits.append(model(piece, past_key_values=cache).logits)
        assert_close(torch.cat(logits, dim=1)[0], expected, f"pieces {lengths}")
        for layer, h in zip(cache.layers, states, strict=True):
            if h is not None:
                assert_close(layer.states[1][0], h, f"state, pieces {lengths}")


@torch.no_grad()
def test_states():
    """Those that transformers leaves on its modules after a first call on a whole sequence."""
    model, oracle = make_pair("griffin")
    tokens = ids(2, 20)
    oracle(tokens, use_cache=True)
    cache = model(tokens, use_cache=True).past_key_values
    for layer, block in zip(cache.layers, oracle.model.layers, strict=True):
        if hasattr(block.temporal_block, "rg_lru"):
            conv, h, begun = layer.states
            assert_close(h, block.temporal_block.rg_lru.recurrent_states)
            assert_close(conv.mT, block.temporal_block.conv1d_state)
            assert begun.all()


# -- where a document starts -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents(kind, in_its_precision):
    """As alone. transformers resets the recurrence at position 0, but its convolution reads the document before."""
    model, oracle = make_pair(kind, torch.float64)
    lengths = [7, 1, 20, 12]
    tokens, positions = ids(1, 40), torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([in_its_precision(oracle, part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    assert_close(model(tokens, position_ids=positions).logits, expected)
    theirs = in_its_precision(oracle, tokens, position_ids=positions).logits
    assert_close(theirs[:, :7], expected[:, :7])
    assert (theirs - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_a_document_starts_with_its_first_token(in_its_precision):
    """Wherever its positions start: for transformers, and the authors' code, only where they start at 0."""
    model, oracle = make_pair("hawk", torch.float64)  # nothing else in it reads positions
    tokens, positions = ids(2, 20), torch.arange(5, 25)[None]
    expected = in_its_precision(oracle, tokens).logits
    assert_close(model(tokens, position_ids=positions).logits, expected)
    theirs = in_its_precision(oracle, tokens, position_ids=positions).logits
    assert (theirs - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_a_row_may_start_later_than_others():
    """One that is all padding in the first call starts in the second."""
    model, _ = make_pair("griffin", torch.float64)
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :9] = 0
    cache = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    assert cache.layers[0].states[2].tolist() == [False, True]
    logits = model(tokens[:, 6:], attention_mask=mask, past_key_values=cache).logits
    assert_close(logits[:1, 3:], model(tokens[:1, 9:]).logits)
    assert_close(logits[1:], model(tokens[1:]).logits[:, 6:])


def test_logits_are_capped_behind_an_adapter():
    """Of the head, whose weight is then not all that makes logits: with the loss from hidden states or not."""
    options = {"logits_soft_cap": 1.5, "vocab_size": 97, "tie_word_embeddings": False}
    model, tokens = zoo.create_model("griffin-tiny", **options), ids(2, 20)
    config = LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    expected = adapted(tokens, labels=tokens)
    assert_close(adapted(tokens, labels=tokens, skip_logits=True).loss, expected.loss)
    merged = adapted.merge_and_unload()
    assert_close(merged(tokens).logits, expected.logits)
    assert_close(merged(tokens, labels=tokens, skip_logits=True).loss, expected.loss)


# -- the bound on the derivative of the square root --------------------------------------------------------------------


def test_bounded_square_root():
    x = torch.tensor([0.0, 1e-12, 2.5e-7, 1e-4, 1.0], dtype=torch.float64, requires_grad=True)
    modeling.BoundedSqrt.apply(x).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([1000.0, 1000.0, 1000.0, 50.0, 0.5], dtype=torch.float64))
    assert torch.equal(torch.func.vmap(torch.func.grad(modeling.BoundedSqrt.apply))(x.detach()), x.grad)


def test_decays_near_one_get_bounded_gradients(in_its_precision, monkeypatch):
    """Where 1 - a^2 is about 1e-9 a square root's own derivative is ten times what Lambda is given."""
    model, oracle = make_pair("hawk", torch.float64)
    for layer, block in zip(model.model.layers, oracle.model.layers, strict=True):
        layer.mixer.Lambda.data.fill_(-22.0)
        block.temporal_block.rg_lru.recurrent_param.data.fill_(-22.0)
    tokens = ids(2, 20)
    in_its_precision(oracle, tokens).logits.pow(2).sum().backward()
    model(tokens).logits.pow(2).sum().backward()
    last, rg_lru = model.model.layers[-1].mixer, oracle.model.layers[-1].temporal_block.rg_lru
    clipped = last.Lambda.grad.clone()
    assert_close(clipped, rg_lru.recurrent_param.grad)
    assert_close(last.recurrence_gate.weight.grad, rg_lru.recurrent_gate_weight.grad)
    model.zero_grad()
    monkeypatch.setattr(modeling.BoundedSqrt, "apply", torch.sqrt)
    model(tokens).logits.pow(2).sum().backward()
    assert last.Lambda.grad.abs().max() > 5 * clipped.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decay_of_one_is_finite(dtype):
    model = zoo.create_model("griffin-tiny", dtype=dtype)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "Lambda"):
            layer.mixer.Lambda.data.fill_(-200.0)  # its softplus is 0
    tokens = torch.arange(40)[None]
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# -- where transformers' own cached path is wrong ----------------------------------------------------------------------


def assert_only_ours_is_right(ours: Tensor, theirs: Tensor, expected: Tensor) -> None:
    assert_close(ours, expected)
    assert (theirs - expected).abs().max() > 1e-2 * expected.abs().max()


@torch.no_grad()
def test_transformers_goes_on_with_the_sequence_before():
    """Its convolution finds the inputs of another where a new one, with a new cache, is read token by token."""
    model, oracle = make_pair("griffin")
    first, second = ids(2, 30).split(1)

    def second_of(of) -> Tensor:
        of(first, past_key_values=DynamicCache(config=of.config), use_cache=True)
        cache = DynamicCache(config=of.config)
        logits = [of(token, past_key_values=cache, use_cache=True).logits for token in second.split(1, dim=1)]
        return torch.cat(logits, dim=1)

    assert_only_ours_is_right(second_of(model), second_of(oracle), oracle(second, use_cache=False).logits)


@torch.no_grad()
def test_transformers_forgets_the_convolution_in_a_continuation():
    """Of several tokens."""
    model, oracle = make_pair("griffin")
    tokens = ids(2, 21)

    def continued(of) -> Tensor:
        cache = DynamicCache(config=of.config)
        of(tokens[:, :10], past_key_values=cache, use_cache=True)
        return of(tokens[:, 10:], past_key_values=cache, use_cache=True).logits

    assert_only_ours_is_right(continued(model), continued(oracle), oracle(tokens, use_cache=False).logits[:, 10:])


@torch.no_grad()
def test_transformers_has_no_cache_for_hawk():
    """A cache without a layer of attention cannot say how long it is."""
    _, oracle = make_pair("hawk")
    with pytest.raises(ValueError, match="only be called on Attention layers"):
        oracle(ids(1, 5), past_key_values=DynamicCache(config=oracle.config), use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_left_padding(kind):
    model, oracle = make_pair(kind)
    tokens, mask = ids(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[0, :7] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = oracle(tokens[:, 7:], use_cache=False).logits
    theirs = oracle(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 7:]
    assert_only_ours_is_right(model(tokens, attention_mask=mask).logits[:, 7:], theirs, expected)


# -- Hawk --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_hawk_is_a_list_of_mixers():
    """Its state does not depend on the length, and it generates what it gives without a cache."""
    model, _ = make_pair("hawk", torch.float64)
    assert set(model.config.mixers) == {"rglru"}
    cache = model(ids(2, 20), use_cache=True).past_key_values
    size = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.states) / 2
    assert size == zoo.state_bytes(model.config, dtype=torch.float64)
    options = {"do_sample": False, "max_new_tokens": 15}
    expected = model.generate(ids(2, 20), use_cache=False, **options)
    assert torch.equal(model.generate(ids(2, 20), **options), expected)
    assert torch.equal(model.generate(ids(2, 20)[:1], prompt_lookup_num_tokens=3, **options), expected[:1])


# -- sizes and initial weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "without_embedding"), [("recurrentgemma-2b", 2.7, 2.0), ("recurrentgemma-9b", 8.6, 7.5)]
)
def test_published_sizes(name, billions, without_embedding):
    """As many parameters as transformers' class has with the sizes of the published files, and as the report says.

    Botev et al., 2024, arXiv:2404.07839, table 1.
    """
    width, depth, heads = {"recurrentgemma-2b": (2560, 26, 10), "recurrentgemma-9b": (4096, 38, 16)}[name]
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "lru_width": width}
    with torch.device("meta"):
        oracle = RecurrentGemmaForCausalLM(
            RecurrentGemmaConfig(**sizes, intermediate_size=6 * width, num_key_value_heads=1)
        )
    summary = zoo.summarize(name)
    assert summary.parameters == oracle.num_parameters()
    assert round(summary.parameters / 1e9, 1) == billions
    assert round((summary.parameters - summary.embedding_parameters) / 1e9, 1) == without_embedding


def test_initialisation():
    """Every parameter as the authors draw it (google-deepmind/recurrentgemma), exact or by its moments."""
    d, e, depth = 512, 768, 5
    sizes = {"hidden_size": d, "lru_width": e, "num_hidden_layers": depth, "intermediate_size": 1024}
    model = zoo.create_model("griffin-tiny", **sizes, mixers=["rglru", "local_attention"], conv_kernel=4)
    drawn = {name: p.detach() for name, p in model.named_parameters()}
    onto_stream = {"out_proj": e, "o_proj": d, "down_proj": 1024}
    for name, x in drawn.items():
        module, kind = name.split(".")[-2:]
        if kind == "Lambda":
            radii = torch.exp(-F.softplus(x.double()))  # of the decay at a gate of 1, before it is taken to the c
            squares = radii.square()
            assert squares.min() >= 0.9**2 - 1e-6
            assert squares.max() <= 0.999**2 + 1e-6
            spread = 0.999**2 - 0.9**2
            assert abs(squares.mean() - (0.9**2 + spread / 2)) <= 5 * spread / math.sqrt(12 * e)
            continue
        if kind == "bias" or "norm" in name:
            assert (x == 0).all(), name
            continue
        if module in onto_stream:
            deviation = math.sqrt(2 / depth / onto_stream[module])
        elif module == "conv1d":
            deviation = math.sqrt(0.01 / 4)
        elif module.endswith("_gate"):
            deviation = math.sqrt(4 / e)  # of four blocks
        else:
            deviation = math.sqrt(1 / d)
        error = 5 * deviation / math.sqrt(x.numel())
        assert abs(x.mean()) <= error, name
        assert abs(x.std() - deviation) <= error, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lru_width": 130}, "lru_width 130 over num_attention_heads 4"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"sliding_window": 1}, "sliding_window counts the token itself, so it is at least 2; got 1"),
        ({"logits_soft_cap": 0}, "logits_soft_cap must be positive, got 0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}},
            "turns pairs: partial_rotary_factor 0.3 of head_dim 32 is 9",
        ),
    ],
)
def test_configurations_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_config("griffin-tiny", **changes)

"""RWKV-4 to 7 against the authors' package `rwkv` 0.8.32 (float32) and transformers 5.23's RwkvForCausalLM (RWKV-4).

The package computes in float32 and has no gradients, transformers rounds keys to float32. So every version is compared
a second time, in float64 and with gradients, with its recurrence written out below, in the letters of the papers.
"""

import math
import re
from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import RwkvConfig, RwkvForCausalLM

import zoo
from zoo.mixer import Tokens
from zoo.registry import find_preset

VERSIONS = (4, 5, 6, 7)
SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "head_dim": 16, "intermediate_size": 96}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest entry
LENGTHS = [17, 12, 1]  # a sequence in pieces, the last one token


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make(number: int, dtype: torch.dtype = torch.float32):
    """A model whose weights are all away from their initial values."""
    torch.manual_seed(number)
    model = zoo.create_model(f"rwkv{number}-tiny", **SIZES).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def random_tokens(b: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (b, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


# -- names and shapes of the published checkpoints ---------------------------------------------------------------------

SHIFTS = {4: "time_mix_{}", 5: "time_mix_{}", 6: "time_maa_{}", 7: "x_{}"}
MIXED = {4: "kvr", 5: "kvrg", 6: "wkvrg", 7: "rwkvag"}
MODULES = {
    "model.embed_tokens": "emb",
    "model.embed_norm": "blocks.0.ln0",
    "model.norm": "ln_out",
    "lm_head": "head",
    "model.layers": "blocks",
    "mixer_norm": "ln1",
    "channel_norm": "ln2",
    "channel_mixer": "ffn",
    "mixer": "att",
    "r_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "g_proj": "gate",
    "o_proj": "output",
    "att.norm": "att.ln_x",
}
VECTORS = {  # (1, 1, d) in the files of versions 6 and 7
    "decay.bias": {6: "time_decay", 7: "w0"},
    "shift.mu_x": {6: "time_maa_x"},
    "iclr.bias": {7: "a0"},
    "value_gate.bias": {7: "v0"},
    "removal_scale": {7: "k_k"},
    "iclr_mix": {7: "k_a"},
}
MATRICES = {  # factors that multiply from the right
    "shift.down.weight": {6: "time_maa_w1"},
    "decay.down.weight": {6: "time_decay_w1", 7: "w1"},
    "decay.up.weight": {6: "time_decay_w2", 7: "w2"},
    "iclr.down.weight": {7: "a1"},
    "iclr.up.weight": {7: "a2"},
    "value_gate.down.weight": {7: "v1"},
    "value_gate.up.weight": {7: "v2"},
    "gate.down.weight": {7: "g1"},
    "gate.up.weight": {7: "g2"},
}
OTHERS = {
    "bonus": {4: "time_first", 5: "time_faaaa", 6: "time_faaaa", 7: "r_k"},
    "shift.up": {6: "time_maa_w2"},
}


def published(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Tensors by our names (weights, or their gradients) under the names and in the shapes of the authors' files."""
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in MODULES.items():
            name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
        layer, part = re.match(r"(blocks\.\d+\.(?:att|ffn)\.)?(.*)", name).groups()
        if part == "shift.mu":
            letters = MIXED[number] if ".att." in layer else "kr" if number < 7 else "k"
            for letter, row in zip(letters, tensor, strict=True):
                found[layer + SHIFTS[number].format(letter)] = row[None, None]
        elif layer and part in VECTORS:
            found[layer + VECTORS[part][number]] = tensor[None, None]
        elif layer and part in MATRICES:
            found[layer + MATRICES[part][number]] = tensor.T
        elif layer and part in OTHERS:
            found[layer + OTHERS[part][number]] = tensor
        else:
            found[name] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


# -- the authors' package ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", VERSIONS)
@torch.no_grad()
def test_logits_of_the_authors_package(number, tmp_path, rwkv_package):
    """A whole sequence, and pieces of it."""
    assert version("rwkv") == "0.8.32"
    model, tokens = make(number), random_tokens(1)
    file = tmp_path / "tiny.pth"
    torch.save(published(model.state_dict(), number), file)
    whole, in_pieces = rwkv_package(file, number, tokens, [sum(LENGTHS)], LENGTHS)
    assert relative_error(model(tokens).logits, whole) <= TOLERANCE[torch.float32]
    cache, logits = None, []
    for piece in tokens.split(LENGTHS, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert relative_error(torch.cat(logits, dim=1), in_pieces) <= TOLERANCE[torch.float32]


# -- transformers ------------------------------------------------------------------------------------------------------


def transformers_name(name: str) -> str:
    for theirs, ours in {
        r"^(emb|blocks|ln_out)\.": r"rwkv.\1.",
        r"rwkv\.emb\.": "rwkv.embeddings.",
        r"\.ln0\.": ".pre_ln.",
        r"\.att\.": ".attention.",
        r"\.ffn\.": ".feed_forward.",
        r"time_mix_k$": "time_mix_key",
        r"time_mix_v$": "time_mix_value",
        r"time_mix_r$": "time_mix_receptance",
    }.items():
        name = re.sub(theirs, ours, name)
    return name


def test_transformers_rwkv4():
    """Logits of sequences and of their pieces, and gradients; a single token of several rows is wrong over there."""
    model, tokens = make(4), random_tokens(2)
    oracle = RwkvForCausalLM(
        RwkvConfig(
            vocab_size=SIZES["vocab_size"],
            hidden_size=SIZES["hidden_size"],
            num_hidden_layers=SIZES["num_hidden_layers"],
            intermediate_size=SIZES["intermediate_size"],
            rescale_every=0,  # else evaluation divides weights in place
        )
    ).eval()
    oracle.load_state_dict({transformers_name(k): v for k, v in published(model.state_dict(), 4).items()})
    logits, expected = model(tokens).logits, oracle(tokens, use_cache=False).logits
    assert relative_error(logits, expected) <= TOLERANCE[torch.float32]

    with torch.no_grad():
        state, cache = None, None
        for piece in tokens.split([17, 13], dim=1):
            theirs = oracle(piece, state=state, use_cache=True)
            ours = model(piece, past_key_values=cache, use_cache=True)
            state, cache = theirs.state, ours.past_key_values
            assert relative_error(ours.logits, theirs.logits) <= TOLERANCE[torch.float32]

    weight = torch.randn(logits.shape)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    ours = published({name: parameter.grad for name, parameter in model.named_parameters()}, 4)
    theirs = dict(oracle.named_parameters())
    for name, gradient in ours.items():
        assert relative_error(gradient, theirs[transformers_name(name)].grad) <= TOLERANCE[torch.float32], name


# -- the papers, a token at a time, in float64 -------------------------------------------------------------------------


PROJECTIONS = ("receptance", "key", "value", "gate")


def shifted(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, -1))


def head_norm(y: Tensor, p: dict[str, Tensor], heads: int) -> Tensor:
    return F.group_norm(y, heads, p["ln_x.weight"], p["ln_x.bias"], eps=64e-5)


def recurrence_4(x: Tensor, p: dict[str, Tensor], _: dict) -> Tensor:
    """Dove (arXiv:2305.13048, eq. 11 to 17), x (t d)."""
    mixed = (x * p[f"time_mix_{c}"][0] + shifted(x) * (1 - p[f"time_mix_{c}"][0]) for c in "rkv")
    r, k, v = (m @ p[f"{name}.weight"].T for m, name in zip(mixed, PROJECTIONS[:3], strict=True))
    w, u = torch.exp(p["time_decay"]), p["time_first"]
    a = b = torch.zeros_like(k[0])
    wkv = []
    for k_t, v_t in zip(k, v, strict=True):
        wkv.append((a + torch.exp(u + k_t) * v_t) / (b + torch.exp(u + k_t)))
        a = torch.exp(-w) * a + torch.exp(k_t) * v_t
        b = torch.exp(-w) * b + torch.exp(k_t)
    return (torch.sigmoid(r) * torch.stack(wkv)) @ p["output.weight"].T


def recurrence_5(x: Tensor, p: dict[str, Tensor], _: dict) -> Tensor:
    """Eagle (arXiv:2404.05892, section 4.1)."""
    mixed = (x * p[f"time_mix_{c}"][0] + shifted(x) * (1 - p[f"time_mix_{c}"][0]) for c in "rkvg")
    r, k, v, g = (m @ p[f"{name}.weight"].T for m, name in zip(mixed, PROJECTIONS, strict=True))
    return attend(r, k, v, g, torch.exp(-torch.exp(p["time_decay"])).flatten().expand_as(k), p)


def recurrence_6(x: Tensor, p: dict[str, Tensor], _: dict) -> Tensor:
    """Finch (section 4.2)."""
    change = shifted(x) - x
    low = torch.tanh((x + change * p["time_maa_x"][0]) @ p["time_maa_w1"]).chunk(5, dim=-1)
    mu = {
        c: p[f"time_maa_{c}"][0] + part @ p["time_maa_w2"][i]
        for i, (c, part) in enumerate(zip("wkvrg", low, strict=True))
    }
    r, k, v, g = ((x + change * mu[c]) @ p[f"{name}.weight"].T for c, name in zip("rkvg", PROJECTIONS, strict=True))
    decay = p["time_decay"][0] + torch.tanh((x + change * mu["w"]) @ p["time_decay_w1"]) @ p["time_decay_w2"]
    return attend(r, k, v, g, torch.exp(-torch.exp(decay)), p)


def attend(r: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, p: dict[str, Tensor]) -> Tensor:
    u = p["time_faaaa"]
    h, n = u.shape
    state, outputs = torch.zeros(h, n, n, dtype=r.dtype), []
    for r_t, k_t, v_t, w_t in zip(*(s.view(-1, h, n) for s in (r, k, v, w)), strict=True):
        kv = k_t[:, :, None] * v_t[:, None]
        outputs.append(torch.einsum("hn,hnm->hm", r_t, state + u[:, :, None] * kv).flatten())
        state = w_t[:, :, None] * state + kv
    return (head_norm(torch.stack(outputs), p, h) * F.silu(g)) @ p["output.weight"].T


def recurrence_7(x: Tensor, p: dict[str, Tensor], shared: dict) -> Tensor:
    """Goose (arXiv:2503.14456, section 4): S (values by keys), kappa-hat the removal key, a the learning rate."""
    h, n = p["r_k"].shape
    r_, w_, k_, v_, a_, g_ = (x + (shifted(x) - x) * p[f"x_{c}"][0] for c in "rwkvag")
    r, k, v = r_ @ p["receptance.weight"].T, k_ @ p["key.weight"].T, v_ @ p["value.weight"].T
    first = shared.setdefault("v", v)
    if "v0" in p:
        v = v + (first - v) * torch.sigmoid(p["v0"][0] + v_ @ p["v1"] @ p["v2"])
    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(p["w0"][0] + torch.tanh(w_ @ p["w1"]) @ p["w2"]))
    a = torch.sigmoid(p["a0"][0] + a_ @ p["a1"] @ p["a2"])
    g = torch.sigmoid(g_ @ p["g1"]) @ p["g2"]
    kappa = F.normalize((k * p["k_k"][0]).view(-1, h, n), dim=-1)
    k = k * (1 + (a - 1) * p["k_a"][0])
    r, w, k, v, a = (s.view(-1, h, n) for s in (r, w, k, v, a))
    state, outputs = torch.zeros(h, n, n, dtype=x.dtype), []
    for r_t, w_t, k_t, v_t, a_t, kappa_t in zip(r, w, k, v, a, kappa, strict=True):
        removed = torch.einsum("hvk,hk->hv", state, kappa_t)
        state = state * w_t[:, None] - removed[:, :, None] * (kappa_t * a_t)[:, None] + v_t[:, :, None] * k_t[:, None]
        outputs.append(torch.einsum("hvk,hk->hv", state, r_t).flatten())
    y = head_norm(torch.stack(outputs), p, h) + ((r * k * p["r_k"]).sum(-1, keepdim=True) * v).flatten(1)
    return (y * g) @ p["output.weight"].T


@pytest.mark.parametrize("number", VERSIONS)
def test_recurrences(number):
    """Time mixing layer by layer: outputs and the gradients of every parameter."""
    model = make(number, torch.float64)
    oracle = published(dict(model.named_parameters()), number)
    shared, expected_shared = {}, {}
    recurrence = {4: recurrence_4, 5: recurrence_5, 6: recurrence_6, 7: recurrence_7}[number]
    for i, layer in enumerate(model.model.layers):
        prefix = f"blocks.{i}.att."
        p = {k.removeprefix(prefix): v for k, v in oracle.items() if k.startswith(prefix)}
        x, weight = torch.randn(2, 20, SIZES["hidden_size"], dtype=torch.float64).unbind()
        tokens = Tokens(torch.arange(20)[None])
        tokens.left_aligned = tokens
        y, shared = layer.mixer(x[None], shared, tokens, None)
        expected = recurrence(x, p, expected_shared)
        assert relative_error(y[0], expected) <= TOLERANCE[torch.float64]
        parameters = list(layer.mixer.parameters())
        ours = torch.autograd.grad((y[0] * weight).sum(), parameters, retain_graph=True)
        theirs = torch.autograd.grad((expected * weight).sum(), parameters, retain_graph=True)
        for (name, _), gradient, wanted in zip(layer.mixer.named_parameters(), ours, theirs, strict=True):
            assert relative_error(gradient, wanted) <= TOLERANCE[torch.float64], f"layer {i}: {name}"


# -- sizes -------------------------------------------------------------------------------------------------------------


def count(name: str) -> int:
    config = zoo.create_config(name)
    with torch.device("meta"):
        model = find_preset(name).model_class("ForCausalLM")(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", zoo.list_models("rwkv4-*[0-9][bm]"))
def test_parameters_of_rwkv4(name):
    """Counted in transformers' model of the same sizes, and by the formula of arXiv:2305.13048, appendix C."""
    config = zoo.create_config(name)
    v, d, n = config.vocab_size, config.hidden_size, config.num_hidden_layers
    with torch.device("meta"):
        oracle = RwkvForCausalLM(RwkvConfig(vocab_size=v, hidden_size=d, num_hidden_layers=n))
    assert count(name) == sum(parameter.numel() for parameter in oracle.parameters())
    assert count(name) == 2 * v * d + 13 * d**2 * n + d * (11 * n + 4)


@pytest.mark.parametrize("name", zoo.list_models("rwkv[56]-*b"))
def test_parameters_of_rwkv5_and_6(name):
    """By the formulas of arXiv:2404.05892, appendix: 464 is for ranks 32 and 64, which Finch 7B has twice as large."""
    config = zoo.create_config(name)
    v, d, n = config.vocab_size, config.hidden_size, config.num_hidden_layers
    small = {"rwkv5": 14, "rwkv6": 464 if d < 4096 else 912}[config.mixers[0]]
    assert count(name) == 13 * d**2 * n + small * d * n + 4 * d + 2 * d * v


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("rwkv7-0.1b", 191_034_624),
        ("rwkv7-0.4b", 450_767_872),
        ("rwkv7-1.5b", 1_527_404_544),
        ("rwkv7-2.9b", 2_947_735_040),
    ],
)
def test_parameters_of_rwkv7(name, parameters):
    """By the table of released models in arXiv:2503.14456."""
    assert count(name) == parameters


def test_heads_fill_the_width():
    with pytest.raises(ValueError, match=r"hidden_size \(128\) must be a multiple of head_dim \(48\)"):
        zoo.create_config("rwkv7-tiny", head_dim=48)
    zoo.create_config("rwkv4-tiny", head_dim=48)  # it has no heads


# -- initialisation ----------------------------------------------------------------------------------------------------


def expected_vectors(number: int, i: int, config) -> dict[str, list[float]]:
    """Initial values of layer i, channel by channel, as the authors' training code computes them."""
    d, layers, n = config.hidden_size, config.num_hidden_layers, config.head_dim
    rise, fall = i / (layers - 1), 1 - i / layers
    share = [c / d for c in range(d)]
    ramp = [c / (d - 1) for c in range(d)]
    linear = [c - 0.5 for c in ramp]
    zigzag = [(c % n - (n - 1) / 2) / ((n - 1) / 2) for c in range(d)]
    zigzag = [z * abs(z) for z in zigzag]
    thirds = [(c + 1) % 3 - 1 for c in range(d)]
    if number == 7:
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        return {
            **{f"att.x_{c}": [1 - s ** (power * fall) for s in share] for c, power in powers.items()},
            "att.w0": [-6 + 6 * c ** (1 + rise**0.3) + 0.5 + 2.5 * z for c, z in zip(ramp, zigzag, strict=True)],
            "att.a0": [-0.19 + 0.3 * z + 0.4 * c for c, z in zip(linear, zigzag, strict=True)],
            "att.k_k": [0.71 - 0.1 * c for c in linear],
            "att.k_a": [1.02] * d,
            "att.r_k": [-0.04] * d,
            "att.ln_x.weight": [((1 + i) / layers) ** 0.7] * d,
            "att.ln_x.bias": [0.0] * d,
            "ffn.x_k": [1 - s ** (fall**4) for s in share],
        } | ({"att.v0": [0.73 - 0.4 * c for c in linear]} if i else {})
    shares = {
        "k": [s**fall for s in share],
        "v": [s**fall + 0.3 * rise for s in share],
        "r": [s ** (0.5 * fall) for s in share],
        "g": [s ** (0.5 * fall) for s in share],
    }
    norm = {"att.ln_x.weight": [((1 + i) / layers) ** 0.7] * d, "att.ln_x.bias": [0.0] * d}
    if number == 4:
        return {
            **{f"att.time_mix_{c}": shares[c] for c in "kvr"},
            "att.time_decay": [-5 + 8 * c ** (0.7 + 1.3 * rise) for c in ramp],
            "att.time_first": [math.log(0.3) + 0.5 * z for z in thirds],
            "ffn.time_mix_k": shares["k"],
            "ffn.time_mix_r": shares["k"],
        }
    decay = [-6 + 5 * c ** (0.7 + 1.3 * rise) for c in ramp]
    bonus = [rise * (1 - c) + 0.1 * z for c, z in zip(ramp, thirds, strict=True)]
    common = {**norm, "att.time_decay": decay, "att.time_faaaa": bonus}
    if number == 5:
        return common | {
            **{f"att.time_mix_{c}": shares[c] for c in "kvrg"},
            "ffn.time_mix_k": shares["k"],
            "ffn.time_mix_r": shares["k"],
        }
    shares |= {"x": shares["k"], "w": shares["k"]}
    return common | {
        **{f"att.time_maa_{c}": [1 - s for s in shares[c]] for c in "xwkvrg"},
        "ffn.time_maa_k": [1 - s ** (fall**3) for s in share],
        "ffn.time_maa_r": [1 - s ** (fall**3) for s in share],
    }


GAINS = {  # of orthogonal matrices; 0: zeros
    4: {"att.receptance": 0, "att.key": 0, "att.value": 1, "att.output": 0, "ffn.receptance": 0, "ffn.value": 0},
    5: {"att.receptance": 1, "att.key": 1, "att.value": 1, "att.gate": 1, "att.output": 0, "ffn.receptance": 0},
    6: {"att.receptance": 1, "att.key": 0.1, "att.value": 1, "att.gate": 0.1, "att.output": 0, "ffn.receptance": 0},
    7: {"att.receptance": 1, "att.key": 0.1, "att.value": 1, "att.output": 0, "ffn.value": 0},
}


@pytest.mark.parametrize("number", VERSIONS)
def test_initialisation(number):
    """Every parameter against the authors' code: RWKV-LM of August 2026, for version 5 that of November 2023."""
    torch.manual_seed(0)
    model = zoo.create_model(f"rwkv{number}-tiny")
    config = model.config
    d, inner = config.hidden_size, config.intermediate_size
    tensors = published(model.state_dict(), number)
    gains = GAINS[number] | {"ffn.key": (inner / d) ** 0.5 if number in (4, 5) else 1.0, "ffn.value": 0}
    checked = set()

    def take(name: str) -> Tensor:
        checked.add(name)
        return tensors[name].double()

    def assert_orthogonal(name: str, gain: float) -> None:
        matrix = take(name)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        assert torch.allclose(matrix @ matrix.T, gain**2 * torch.eye(len(matrix), dtype=torch.float64), atol=1e-5), name

    for i in range(config.num_hidden_layers):
        layer = f"blocks.{i}."
        for name, values in expected_vectors(number, i, config).items():
            wanted = torch.tensor(values, dtype=torch.float64)
            assert torch.allclose(take(layer + name).flatten(), wanted, atol=1e-6), layer + name
        for name, gain in gains.items():
            assert_orthogonal(f"{layer}{name}.weight", gain)
        low_ranks = {6: [("time_maa_w1", "time_maa_w2"), ("time_decay_w1", "time_decay_w2")]}.get(number, [])
        for down, up in low_ranks:
            assert (take(f"{layer}att.{down}") == 0).all()
            drawn = take(f"{layer}att.{up}")
            assert 0.009 <= drawn.abs().max() <= 0.01
            assert abs(drawn.std() - 0.01 / 3**0.5) <= 3e-4
        for c in {7: "wavg"}.get(number, ""):
            if c != "v" or i:
                assert (take(f"{layer}att.{c}1") == 0).all()
                assert_orthogonal(f"{layer}att.{c}2", 0.1)
    for name in [name for name in tensors if re.search(r"ln(0|1|2|_out)\.", name)]:
        assert (take(name) == float(name.endswith("weight"))).all(), name
    assert_orthogonal("head.weight", 0.5 * (config.vocab_size / d) ** 0.5)
    embedding = take("emb.weight")
    assert 0.9e-4 <= embedding.abs().max() <= 1e-4
    assert abs(embedding.std() - 1e-4 / 3**0.5) <= 1e-6
    assert checked == set(tensors)


@pytest.mark.parametrize("number", VERSIONS)
def test_optimiser_groups(number):
    """As the authors group them: linear weights and the embedding decay, the log of the decay rate learns faster."""
    model = zoo.create_model(f"rwkv{number}-tiny")
    found = {}
    for group in model.parameter_groups(learning_rate=1.0, weight_decay=0.1):
        found |= {id(parameter): (group["lr"], group["weight_decay"]) for parameter in group["params"]}
    tensors = {name: torch.full_like(p, i) for i, (name, p) in enumerate(model.named_parameters())}
    parameters = list(model.parameters())
    faster = {4: {"time_decay": 2.0, "time_first": 3.0}, 5: {"time_decay": 2.0}, 6: {"time_decay": 2.0}, 7: {"w0": 2.0}}
    for name, marked in published(tensors, number).items():
        is_matrix = name.endswith(".weight") and marked.dim() == 2
        wanted = (faster[number].get(name.split(".")[-1], 1.0), 0.1 if is_matrix else 0.0)
        assert found[id(parameters[int(marked.flatten()[0])])] == wanted, name

"""Mamba and Mamba-2 against transformers 5.23.0 (Mamba, Falcon Mamba, Mamba-2), and Mamba against mambapy 1.2.0.

transformers' own continuation of a sequence is right only token by token for Mamba, and only without a limit on the
time step for Mamba-2: where it is wrong, the whole sequence is the oracle of the pieces.
"""

import math
from importlib.metadata import version

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import zoo

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "conv_kernel": 3, "expand": 2}
FIRST = {**SIZES, "state_size": 5, "time_step_rank": 6}
SECOND = {**SIZES, "state_size": 12, "head_dim": 16}
LIMIT = [0.02, 0.3]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest entry
ORACLES = {
    "mamba": (MambaForCausalLM, MambaConfig, FIRST, {"use_bias": True, "use_conv_bias": False}),
    "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig, FIRST, {}),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config, {**SECOND, "n_groups": 1}, {"chunk_size": 16, "use_bias": True}),
    "mamba2_groups": (Mamba2ForCausalLM, Mamba2Config, {**SECOND, "n_groups": 4}, {"chunk_size": 16}),
    "mamba2_limit": (
        *(Mamba2ForCausalLM, Mamba2Config, {**SECOND, "n_groups": 2}),
        {"chunk_size": 16, "time_step_limit": LIMIT},
    ),
}
NAMES = {
    "backbone": "model",
    "embeddings": "embed_tokens",
    "norm_f": "norm",
    "dt_proj.bias": "dt_bias",
}


def renamed(name: str) -> str:
    """The name in the zoo of a parameter of transformers."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name if ".mixer." in name else name.replace(".norm.", ".mixer_norm.").replace("model.mixer_", "model.")


def stir(model) -> None:
    """Move every parameter away from its initial value, and the decays away from 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.uniform_(-4, 1, generator=generator)


def make_pair(kind: str, dtype: torch.dtype):
    """A model of the zoo and its oracle with the same weights."""
    oracle_class, config_class, sizes, options = ORACLES[kind]
    heads = {"num_heads": 2 * SIZES["hidden_size"] // sizes["head_dim"]} if "head_dim" in sizes else {}
    oracle = oracle_class(config_class(**sizes, **options, **heads, tie_word_embeddings=True))
    stir(oracle)
    ours = {key: value for key, value in options.items() if key != "chunk_size"}
    if kind == "falcon_mamba":
        ours["mixer_rms_eps"] = oracle.config.mixer_rms_eps
    model = zoo.create_model("mamba2-tiny" if "mamba2" in kind else "mamba-tiny", **sizes, **ours)
    model.load_state_dict({renamed(name): value for name, value in oracle.state_dict().items()})
    return model.to(dtype).eval(), oracle.to(dtype).eval()


@pytest.fixture(params=[(kind, dtype) for kind in ORACLES for dtype in TOLERANCE], ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request):
    return make_pair(*request.param)


@pytest.fixture
def in_its_precision(monkeypatch):
    """Runs an oracle; in float64, what it casts to float32 by name stays in float64."""

    def run(oracle, *args, **kwargs):
        with monkeypatch.context() as patch:
            if oracle.dtype == torch.float64:
                patch.setattr(torch, "float32", torch.float64)
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return oracle(*args, **kwargs)

    return run


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.dtype == expected.dtype
    assert error <= TOLERANCE[expected.dtype], f"{what}: relative error {error:.1e}"


def ids(b: int, t: int) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (b, t), generator=torch.Generator().manual_seed(0))


def test_logits_and_gradients(pair, in_its_precision):
    model, oracle = pair
    tokens = ids(2, 40)
    logits, expected = model(tokens).logits, in_its_precision(oracle, tokens).logits
    assert_close(logits, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        assert_close(ours[renamed(name)].grad, parameter.grad, name)


@torch.no_grad()
def test_token_by_token(pair, in_its_precision):
    """Logits and, at the end, the states. With a limit, transformers has it in whole sequences only."""
    model, oracle = pair
    tokens, cache, theirs, limited = ids(2, 12), None, None, getattr(oracle.config, "time_step_limit", None) == LIMIT
    whole = in_its_precision(oracle, tokens, use_cache=True)
    for t in range(tokens.shape[1]):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        step = in_its_precision(oracle, tokens[:, t : t + 1], cache_params=theirs, use_cache=True)
        cache, theirs = out.past_key_values, step.cache_params
        assert_close(out.logits, whole.logits[:, t : t + 1])
        if t > 0 and limited:
            assert (step.logits - whole.logits[:, t : t + 1]).abs().max() > 1e-2
        else:
            assert_close(out.logits, step.logits)
    for index, layer in enumerate(cache.layers):
        state = whole.cache_params.get_recurrent_state(index, state_idx=0)
        assert_close(layer.states[1], state.mT if model.config.mixers[0] == "mamba2" else state, f"state {index}")


@torch.no_grad()
def test_continuation_of_several_tokens(pair, in_its_precision):
    """transformers' Mamba and Falcon Mamba start their recurrence anew in each call of more than one token."""
    model, oracle = pair
    tokens = ids(2, 21)
    expected = in_its_precision(oracle, tokens).logits[:, 10:]
    cache = model(tokens[:, :10], use_cache=True).past_key_values
    assert_close(model(tokens[:, 10:], past_key_values=cache).logits, expected)
    theirs = in_its_precision(oracle, tokens[:, :10], use_cache=True).cache_params
    theirs = in_its_precision(oracle, tokens[:, 10:], cache_params=theirs, use_cache=True).logits
    if model.config.mixers[0] == "mamba":
        assert (theirs - expected).abs().max() > 1e-2 * expected.abs().max()
    else:
        assert_close(theirs, expected)


@torch.no_grad()
def test_left_padding(pair, in_its_precision):
    """transformers clears padding before `in_proj`, whose bias, where there is one, then reaches the convolution."""
    model, oracle = pair
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    logits = model(tokens, attention_mask=mask).logits[0, 7:]
    assert_close(logits, in_its_precision(oracle, tokens[:1, 7:]).logits[0])
    theirs = in_its_precision(oracle, tokens, attention_mask=mask).logits[0, 7:]
    if oracle.config.use_bias:
        assert (theirs - logits).abs().max() > 1e-2 * logits.abs().max()
    else:
        assert_close(logits, theirs)


def test_mambapy():
    """A second implementation, whose scan is a parallel one: the layers alone, in float32."""
    assert version("mambapy") == "1.2.0"
    from mambapy.mamba import Mamba
    from mambapy.mamba import MambaConfig as Config

    sizes = {"d_model": 64, "n_layers": 3, "d_state": 5, "dt_rank": 6, "d_conv": 3}
    oracle = Mamba(Config(**sizes, bias=True))
    stir(oracle)
    model = zoo.create_model("mamba-tiny", **FIRST, use_bias=True).model
    weights = {renamed(name): value for name, value in oracle.state_dict().items()}
    assert model.load_state_dict(weights, strict=False).missing_keys == ["embed_tokens.weight", "norm.weight"]
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    y = model(inputs_embeds=x).last_hidden_state
    expected = F.rms_norm(oracle(x), (64,), eps=1e-5)
    assert_close(y, expected)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        assert_close(ours[renamed(name)].grad, parameter.grad, name)


PUBLISHED = {  # the figures of model cards, where they have them
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "mamba2-130m": None,
    "mamba2-370m": None,
    "mamba2-780m": None,
    "mamba2-1.3b": None,
    "mamba2-2.7b": None,
    "falcon-mamba-7b": 7_272_665_088,
    "codestral-mamba-7b": 7_285_403_648,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """As many parameters as transformers' class has with the same fields, and as the model card says."""
    with torch.device("meta"):
        model = zoo.create_model(name)
        config = model.config
        kind = "falcon_mamba" if "falcon" in name else config.mixers[0]
        oracle_class, config_class, *_ = ORACLES[kind]
        fields = ["vocab_size", "hidden_size", "num_hidden_layers", "state_size", "tie_word_embeddings"]
        fields += ["n_groups", "head_dim"] if kind == "mamba2" else ["time_step_rank"]
        heads = {"num_heads": 2 * config.hidden_size // config.head_dim} if kind == "mamba2" else {}
        oracle = oracle_class(config_class(**{field: getattr(config, field) for field in fields}, **heads))
    assert model.num_parameters() == oracle.num_parameters()
    assert PUBLISHED[name] in (None, model.num_parameters())


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_initialisation(mixer):
    """Every parameter by the rule of the authors' code (state-spaces/mamba): exact, or in its bounds and moments."""
    config = {"hidden_size": 512, "num_hidden_layers": 5, "state_size": 16, "n_groups": 1, "use_bias": True}
    model = zoo.create_model(f"{mixer}-tiny", **config)
    mixer = model.model.layers[0].mixer
    drawn = {name: p.detach() for name, p in mixer.named_parameters()}

    def assert_uniform(name: str, values: torch.Tensor, low: float, high: float):
        width = high - low
        assert values.min() >= low - 1e-4 * width, name
        assert values.max() <= high + 1e-4 * width, name
        sigma = width / math.sqrt(12 * values.numel())
        assert abs(values.mean() - (low + high) / 2) <= 5 * sigma, name
        assert abs(values.std() - width / math.sqrt(12)) <= 5 * sigma, name

    bounds = {
        "in_proj.weight": 512**-0.5,
        "x_proj.weight": 1024**-0.5,
        "dt_proj.weight": 32**-0.5,
        "conv1d.weight": 4**-0.5,
        "conv1d.bias": 4**-0.5,
        "out_proj.weight": (1024 * 5) ** -0.5,
    }
    for name in bounds.keys() & drawn.keys():
        assert_uniform(name, drawn.pop(name), -bounds[name], bounds[name])
    assert_uniform("dt_bias", F.softplus(drawn.pop("dt_bias").double()).log(), math.log(1e-3), math.log(1e-1))
    rates = drawn.pop("A_log").exp()
    if rates.dim() == 2:
        assert (rates - torch.arange(1, 17)).abs().max() <= 1e-5
    else:
        assert_uniform("A_log", rates, 1, 16)
    for name in {"D", "norm.weight"} & drawn.keys():
        assert (drawn.pop(name) == 1).all(), name
    for name in ("in_proj.bias", "out_proj.bias"):
        assert (drawn.pop(name) == 0).all(), name
    assert not drawn
    embedding = model.get_input_embeddings().weight
    assert abs(embedding.std() - 0.02) <= 1e-4
    norms = [p for name, p in model.named_parameters() if "norm.weight" in name]
    assert all((norm == 1).all() for norm in norms)


def test_what_does_not_decay():
    """As the authors': A, D, the bias of the time step, norms and other vectors."""
    model = zoo.create_model("mamba-tiny")
    decays = {id(p): group["weight_decay"] for group in model.parameter_groups(1e-3, 0.1) for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if parameter.dim() < 2 or name.endswith("A_log") else 0.1), name

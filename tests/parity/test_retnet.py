"""RetNet against torchscale 0.3.0, the code of its authors: parallel, chunkwise and recurrent forms, and gradients."""

import sys
from importlib.metadata import version
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import zoo

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "num_heads": 2}
VALUE_SIZE = 96
TOLERANCE = 1e-4  # float32, relative to the largest logit


@pytest.fixture(scope="module")
def make_decoder():
    """Makes a torchscale decoder. The two parts of other packages that it imports, and never uses here, are stubbed."""
    for name in ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["fairscale.nn"].checkpoint_wrapper = sys.modules["fairscale.nn"].wrap = lambda module: module
    sys.modules["timm.models.layers"].drop_path = lambda x, *_: x
    assert version("torchscale") == "0.3.0"
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    def make(vocab_size, hidden_size, num_hidden_layers, intermediate_size, num_heads, value_size):
        config = RetNetConfig(
            vocab_size=vocab_size,
            decoder_embed_dim=hidden_size,
            decoder_value_embed_dim=value_size,
            decoder_retention_heads=num_heads,
            decoder_ffn_embed_dim=intermediate_size,
            decoder_layers=num_hidden_layers,
            recurrent_chunk_size=8,
        )
        return RetNetDecoder(config, embed_tokens=nn.Embedding(vocab_size, hidden_size))

    return make


@pytest.fixture(scope="module")
def oracle(make_decoder):
    torch.manual_seed(0)
    decoder = make_decoder(**SIZES, value_size=VALUE_SIZE).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():  # away from the initial values, norms included
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


NAMES = {
    "embed_tokens": "model.embed_tokens",
    "output_projection": "lm_head",
    "layer_norm": "model.norm",
    "retention_layer_norm": "mixer_norm",
    "final_layer_norm": "channel_norm",
    "retention": "mixer",
    "out_proj": "o_proj",
    "ffn": "channel_mixer",
    "fc1": "gate_proj",
    "gate": "up_proj",
    "fc2": "down_proj",
    "layers": "model.layers",
}


@pytest.fixture(scope="module")
def renamed(renamer):
    return renamer(NAMES)


@pytest.fixture(scope="module")
def model(oracle, renamed):
    model = zoo.create_model("retnet-tiny", **SIZES, value_size=VALUE_SIZE, tie_word_embeddings=False).eval()
    model.load_state_dict({renamed(name): parameter for name, parameter in oracle.named_parameters()})
    return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, SIZES["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_parallel_and_chunkwise_forms(oracle, model, tokens):
    logits = model(tokens).logits
    for chunkwise in (False, True):
        oracle.chunkwise_recurrent = chunkwise
        assert relative_error(logits, oracle(tokens)[0]) <= TOLERANCE
    oracle.chunkwise_recurrent = False


@torch.no_grad()
def test_recurrent_form(oracle, model, tokens):
    """Token by token on both sides; torchscale takes the position from the length of the prefix."""
    state, cache = {}, None
    for t in range(tokens.shape[1]):
        expected = oracle(tokens[:, : t + 1], incremental_state=state)[0]
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert relative_error(out.logits, expected) <= TOLERANCE


def test_gradients(oracle, model, tokens, renamed):
    """Of the parallel form, whose normalisers torchscale detaches; the norm behind them makes that no difference."""
    weight = torch.randn(2, 50, SIZES["vocab_size"], generator=torch.Generator().manual_seed(1))
    (oracle(tokens)[0] * weight).sum().backward()
    (model(tokens).logits * weight).sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        assert relative_error(ours[renamed(name)].grad, parameter.grad) <= TOLERANCE, name


def test_initialisation(make_decoder, renamed):
    """Every kind of weight is drawn as torchscale draws it: same bounds or deviation, by moments."""
    torch.manual_seed(0)
    theirs = make_decoder(**SIZES, value_size=VALUE_SIZE)
    ours = zoo.create_model("retnet-tiny", **SIZES, value_size=VALUE_SIZE, tie_word_embeddings=False)
    ours = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if name == "embed_tokens.weight":
            continue  # the caller's own in torchscale; here the deviation of its output projection
        drawn = ours[renamed(name)]
        assert abs(drawn.std() - parameter.std()) <= 0.05 * parameter.std() + 1e-8, name
        assert abs(drawn.abs().max() - parameter.abs().max()) <= 0.25 * parameter.abs().max(), name


@pytest.mark.parametrize("name", ["retnet-1.3b", "retnet-2.7b", "retnet-6.7b"])
def test_published_sizes(make_decoder, name):
    config = zoo.create_config(name)
    with torch.device("meta"):
        theirs = make_decoder(**{field: getattr(config, field) for field in SIZES}, value_size=config.value_size)
    count = zoo.summarize(name).parameters
    assert count == sum(p.numel() for p in theirs.parameters())
    billions = float(name.removeprefix("retnet-").removesuffix("b"))
    assert abs(count / 1e9 - billions) < 0.1 * billions


@torch.no_grad()
def test_far_from_the_start(model, tokens):
    """Only distances count: 16 million tokens into a stream, the same tokens have the same logits."""
    expected = model(tokens).logits
    cache = DynamicCache(config=model.config)
    for layer, block in zip(cache.layers, model.model.layers, strict=True):
        matrix, position = block.mixer.initial_state(expected)
        layer.write((matrix, position + 2**24), columns=0)
    assert relative_error(model(tokens, past_key_values=cache).logits, expected) <= TOLERANCE

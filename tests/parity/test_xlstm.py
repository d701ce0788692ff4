"""xLSTM against its authors' package xlstm 2.0.6 (with mlstm-kernels 2.0.6) and transformers' own code.

The large form is compared with xLSTMLarge and xLSTMForCausalLM, the blocks of the first paper with xLSTMLMModel. All
is in float64 but what meets transformers, which normalises in float32.
"""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.bench.workloads.decay_attention import transformers_xlstm

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest entry
VOCABULARY, HEADS = 97, 4
LARGE = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "hidden_size": 128, "num_heads": HEADS}
FIRST_PAPER = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128}
LARGE_NAMES = {
    "embedding": "model.embed_tokens",
    "embeddings": "embed_tokens",
    "backbone": "model",
    "blocks": "layers",
    "norm_mlstm": "mixer_norm",
    "mlstm_layer": "mixer",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "igate_preact": "igate",
    "fgate_preact": "fgate",
    "ogate_preact": "ogate",
    "norm_ffn": "channel_norm",
    "ffn": "channel_mixer",
    "proj_up_gate": "gate_proj",
    "proj_up": "up_proj",
    "proj_down": "down_proj",
    "out_norm": "norm",
}
FIRST_PAPER_NAMES = {
    "token_embedding": "model.embed_tokens",
    "xlstm_block_stack": "model",
    "blocks": "layers",
    "xlstm_norm": "mixer_norm",
    "xlstm": "mixer",
    "conv1d": "conv",
    "outnorm": "multihead_norm",
    "group_norm": "multihead_norm",
    "ffn_norm": "channel_norm",
    "ffn": "channel_mixer",
    "proj_up": "up_proj",
    "proj_down": "down_proj",
    "post_blocks_norm": "norm",
}
# The package's sLSTM takes the input gate from the tensor that it calls `fgate`, and the forget gate from `igate`.
SLSTM_GATES = {"fgate": "igate", "igate": "fgate", "zgate": "zgate", "ogate": "ogate"}


@pytest.fixture(scope="module")
def of_large(renamer):
    """A state dict of xLSTMLarge or xLSTMForCausalLM under our names."""
    renamed = renamer(LARGE_NAMES)
    return lambda tensors: {renamed(name): x for name, x in tensors.items()}


@pytest.fixture(scope="module")
def of_first_paper(renamer):
    """A state dict of xLSTMLMModel, with its vanilla sLSTM, under our names and in our layouts."""
    renamed = renamer(FIRST_PAPER_NAMES)

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for theirs, x in tensors.items():
            name = renamed(theirs.replace("conv1d.conv", "conv1d").replace("mlstm_cell.", ""))
            mixer, _, part = name.partition(".mixer.")
            if name.endswith("channel_mixer.up_proj.weight"):
                gate, up = x.chunk(2)
                found |= {name.replace("up_proj", "gate_proj"): gate, name: up}
            elif part == "slstm_cell._recurrent_kernel_":
                found[f"{mixer}.mixer.recurrent_weight"] = x.transpose(1, 2)
            elif part == "slstm_cell._bias_":
                found[f"{mixer}.mixer.bias"] = x.view(4, HEADS, -1).transpose(0, 1).flatten(1)
            elif x.dim() == 3 and part.removesuffix(".weight") in SLSTM_GATES:
                found[f"{mixer}.mixer.{SLSTM_GATES[part.removesuffix('.weight')]}_weight"] = x
            elif x.dim() == 3 and part.endswith("_proj.weight"):
                found[name.replace("_proj.weight", "_weight")] = x
            else:
                found[name] = x
        return found

    return convert


def make_large(vocab_size: int, num_hidden_layers: int, hidden_size: int, num_heads: int) -> nn.Module:
    assert version("xlstm") == version("mlstm-kernels") == "2.0.6"
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    sizes = {"embedding_dim": hidden_size, "num_heads": num_heads, "num_blocks": num_hidden_layers}
    kernels = {
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
    }
    dtypes = {
        "autocast_kernel_dtype": "float32",
        "inference_state_dtype": "float64",
        "norm_reduction_force_float32": False,
    }
    options = {"mode": "inference", "return_last_states": True, "chunk_size": 8}
    return xLSTMLarge(xLSTMLargeConfig(vocab_size=vocab_size, **sizes, **kernels, **dtypes, **options))


def make_transformers(**sizes) -> nn.Module:
    module = transformers_xlstm()
    return module.xLSTMForCausalLM(module.xLSTMConfig(**sizes, autocast_kernel_dtype="float32"))


def make_first_paper(
    vocab_size: int, num_hidden_layers: int, hidden_size: int, slstm_at: tuple[int, ...] = (), **unused
) -> nn.Module:
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    config = xLSTMLMModelConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=HEADS)),
        slstm_block=sLSTMBlockConfig(
            slstm=sLSTMLayerConfig(backend="vanilla", num_heads=HEADS),
            feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
        ),
        context_length=64,
        num_blocks=num_hidden_layers,
        embedding_dim=hidden_size,
        slstm_at=list(slstm_at),
        vocab_size=vocab_size,
    )
    return xLSTMLMModel(config)


def draw(make: Callable[..., nn.Module], *args, **sizes) -> nn.Module:
    """A module with weights away from their initial values, with gates that open and forget."""
    torch.manual_seed(0)
    oracle = make(*args, **sizes)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("fgate_preact.bias"):
                parameter.add_(2.0)
    return oracle.eval()


@pytest.fixture(scope="module")
def large(of_large):
    oracle = draw(make_large, **LARGE).double()
    model = zoo.create_model("xlstm-tiny", **LARGE).double().eval()
    model.load_state_dict(of_large(oracle.state_dict()))
    return model, oracle


@pytest.fixture(scope="module")
def ported(of_large):
    oracle = draw(make_transformers, **LARGE)
    model = zoo.create_model("xlstm-tiny", **LARGE).eval()
    model.load_state_dict(of_large(oracle.state_dict()))
    return model, oracle


@pytest.fixture(scope="module")
def first_paper(of_first_paper):
    oracle = draw(make_first_paper, **FIRST_PAPER, slstm_at=(1, 3)).double()
    model = zoo.create_model("xlstm-1-1-tiny", **FIRST_PAPER).double().eval()
    model.load_state_dict(of_first_paper(oracle.state_dict()))
    return model, oracle


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(1, VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(0))


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE[expected.dtype], f"{what}: relative error {error:.1e}"


def assert_same_gradients(logits: Tensor, expected: Tensor, model: nn.Module, oracle: nn.Module, convert) -> None:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=logits.dtype)
    for module, y in ((model, logits), (oracle, expected)):
        module.zero_grad()
        (y * weight).sum().backward()
    ours = dict(model.named_parameters())
    theirs = convert({name: parameter.grad for name, parameter in oracle.named_parameters()})
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert_close(ours[name].grad, gradient, name)


# -- the large form ----------------------------------------------------------------------------------------------------


def test_large(large, of_large, tokens):
    """Logits, states and gradients of whole chunks and a rest; at every end m is the same, so the states are."""
    model, oracle = large
    out, (expected, states) = model(tokens, use_cache=True), oracle(tokens)
    assert_close(out.logits, expected)
    for layer, theirs in zip(out.past_key_values.layers, states.values(), strict=True):
        for ours, state in zip(layer.states, theirs, strict=True):
            assert_close(ours, state.view_as(ours))
    whole = tokens[:, :48]  # its recurrent rest is not differentiable
    assert_same_gradients(model(whole).logits, oracle(whole)[0], model, oracle, of_large)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1] * 50, [20, 30], [33, 1, 16]], ids=str)
def test_large_in_pieces(large, tokens, lengths):
    model, oracle = large
    cache, states = None, None
    for piece in tokens.split(lengths, dim=1):
        expected, states = oracle(piece, states)
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_close(out.logits, expected)


def test_transformers(ported, of_large, tokens):
    model, oracle = ported
    assert_close(model(tokens).logits, oracle(tokens).logits)
    whole = tokens[:, :48]
    logits, expected = model(whole).logits, oracle(whole).logits
    assert_same_gradients(logits, expected, model, oracle, of_large)


@torch.no_grad()
def test_transformers_in_pieces(ported, tokens):
    model, oracle = ported
    cache, theirs = None, None
    for piece in tokens.split([20, 1, 1, 28], dim=1):
        expected = oracle(piece, cache_params=theirs, use_cache=True)
        out = model(piece, past_key_values=cache, use_cache=True)
        cache, theirs = out.past_key_values, expected.cache_params
        assert_close(out.logits, expected.logits)
    greedy = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **greedy), oracle.generate(tokens, **greedy))


def test_large_initialisation():
    """As the authors' training code draws it (NX-AI/xlstm-jax, commit 0f3ebc2: layer_v1.py, feedforward.py).

    xlstm 2.0.6 has no initialisation of its large form. That of transformers zeroes the gate of the channel mixer also,
    whose name contains "gate", and scales its output by another width.
    """
    depth, d = 8, 256
    model = zoo.create_model("xlstm-tiny", num_hidden_layers=depth, hidden_size=d)
    small, output = (2 / (5 * d)) ** 0.5, 2 / depth / d**0.5
    deviations = dict.fromkeys(("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), small)
    deviations |= {"out_proj": output, "down_proj": output, "igate": 0.0, "fgate": 0.0, "ogate": 0.0}
    for name, parameter in model.named_parameters():
        *_, module, kind = name.split(".")
        if kind == "bias":
            expected = torch.full((HEADS,), -10.0) if module == "igate" else torch.linspace(3, 6, HEADS)
            assert torch.equal(parameter, expected), name
        elif "norm" in module:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert abs(parameter.std() - deviations[module]) <= 0.05 * deviations[module], name
            assert abs(parameter.mean()) <= 4 * deviations[module] / parameter.numel() ** 0.5, name


# -- the first paper ---------------------------------------------------------------------------------------------------


def test_first_paper(first_paper, of_first_paper, tokens, monkeypatch):
    """Logits and gradients of the quadratic form, without the epsilon beside the normaliser.

    The oracle's m is that of the tokens alone, ours begins at 0, and the epsilon is in units of exp(m). With it logits
    differ by 1e-7.
    """
    model, oracle = first_paper
    modeling = __import__(type(model).__module__, fromlist=["normalized_decay_attention"])
    without = partial(modeling.normalized_decay_attention, eps=0.0)
    monkeypatch.setattr(modeling, "normalized_decay_attention", without)
    for module in oracle.modules():
        if hasattr(module, "backend_fn"):
            monkeypatch.setattr(module, "backend_fn", partial(module.backend_fn, eps=0.0))
    logits, expected = model(tokens).logits, oracle(tokens)
    assert_close(logits, expected)
    assert_same_gradients(logits, expected, model, oracle, of_first_paper)


@torch.no_grad()
def test_first_paper_token_by_token(first_paper, tokens):
    """Logits and states; the package keeps the keys divided by the root of their width."""
    model, oracle = first_paper
    cache, states = None, None
    for t in range(tokens.shape[1]):
        expected, states = oracle.step(tokens[:, t : t + 1], states)
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_close(out.logits, expected)
    for layer, state in zip(cache.layers, states.values(), strict=True):
        conv, *cell = layer.states
        assert_close(conv, state["conv_state"][0][:, 1:])
        if "slstm_state" in state:
            theirs = state["slstm_state"]
        else:
            matrix, normalizer, maximum = state["mlstm_state"]
            root = matrix.shape[-1] ** 0.5
            theirs = (matrix * root, normalizer * root, maximum)
        for ours, expected in zip(cell, theirs, strict=True):
            assert_close(ours, expected.reshape(ours.shape))


def test_layouts_of_the_slstm(of_first_paper):
    """Our recurrent weights are those of the package's cuda kernel as they lie in memory."""
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla, sLSTMCellConfig

    config = {"hidden_size": 64, "num_heads": HEADS}
    vanilla = draw(sLSTMCell_vanilla, sLSTMCellConfig(**config, backend="vanilla"))
    cuda = sLSTMCell_cuda(sLSTMCellConfig(**config), skip_backend_init=True)
    cuda.recurrent_kernel[:] = vanilla.recurrent_kernel[:]
    cuda.bias[:] = vanilla.bias[:]
    ours = of_first_paper({f"0.xlstm.slstm_cell.{name}": x for name, x in vanilla.state_dict().items()})
    assert torch.equal(ours["0.mixer.recurrent_weight"], cuda._recurrent_kernel_)
    assert torch.equal(ours["0.mixer.bias"], cuda._bias_.view(HEADS, -1))


def test_first_paper_initialisation(of_first_paper):
    """By parameter against the package: exactly where it is deterministic, by moments where it is drawn."""
    sizes = {"vocab_size": 300, "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 384}
    torch.manual_seed(0)
    oracle = make_first_paper(**sizes, slstm_at=(1, 3))
    oracle.reset_parameters()
    theirs = of_first_paper(oracle.state_dict())
    ours = dict(zoo.create_model("xlstm-1-1-tiny", **sizes).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        drawn = ours[name]
        if name.endswith("igate.bias"):  # four numbers of deviation 0.1
            assert 0 < drawn.abs().max() <= 0.5, name
        elif "conv" in name:
            assert drawn.abs().max() <= expected.shape[-1] ** -0.5 if drawn.dim() == 3 else 0.5, name
            assert abs(drawn.std() - 0.5 / 3**0.5) <= 0.03, name
        elif expected.std() == 0 or name.endswith(("fgate.bias", "mixer.bias")):
            assert torch.allclose(drawn, expected, rtol=1e-6, atol=1e-6), name
        else:
            assert abs(drawn.std() - expected.std()) <= 0.05 * expected.std(), name
            assert abs(drawn.mean()) <= 4 * expected.std() / drawn.numel() ** 0.5, name


# -- the published sizes -----------------------------------------------------------------------------------------------

COUNTS = {
    "xlstm-7b": 6_865_424_896,
    "xlstm-1-0-125m": 163_806_144,
    "xlstm-1-0-350m": 409_290_112,
    "xlstm-1-0-760m": 840_427_392,
    "xlstm-1-0-1.3b": 1_422_559_616,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    """As many as the oracle's own class has at the same sizes."""
    config = zoo.create_config(name)
    fields = ("vocab_size", "num_hidden_layers", "hidden_size", "num_heads")
    sizes = {field: getattr(config, field) for field in fields}
    with torch.device("meta"):
        oracles = (
            [make_large(**sizes), make_transformers(**sizes)] if name == "xlstm-7b" else [make_first_paper(**sizes)]
        )
        model = zoo.create_model(name)
    for counted in (model, *oracles):
        assert sum(parameter.numel() for parameter in counted.parameters()) == COUNTS[name]


def test_sizes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"key_size \(50\) must be a multiple of num_heads \(4\)"):
        zoo.create_config("xlstm-tiny", key_size=50)
    with pytest.raises(ValueError, match=r"inner_size \(200\) must be a multiple of qkv_block_size \(16\)"):
        zoo.create_config("xlstm-1-1-tiny", inner_size=200, qkv_block_size=16)
    with pytest.raises(ValueError, match="norm_type is 'rms_norm' or 'layer_norm', got 'batch_norm'"):
        zoo.create_config("xlstm-tiny", norm_type="batch_norm")

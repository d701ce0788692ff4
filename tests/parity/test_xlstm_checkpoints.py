"""Checkpoints of xLSTM as transformers 5.23.0 and its authors' package, xlstm 2.0.6, write them."""

import json
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from zoo.bench.workloads.decay_attention import transformers_xlstm

SIZES = {"vocab_size": 97, "num_hidden_layers": 3, "hidden_size": 128, "num_heads": 4}
OPTIONS = {
    "num_heads": 2,
    "qk_dim_factor": 1.0,
    "v_dim_factor": 1.5,
    "ffn_proj_factor": 1.3,
    "ffn_round_up_to_multiple_of": 24,
    "norm_eps": 1e-3,
    "gate_soft_cap": 2.0,
    "output_logit_soft_cap": 3.0,
}
STACK = "xlstm_block_stack"


@pytest.fixture(scope="module")
def transformers():
    """transformers' own code, which gives way to the package where that is installed."""
    return transformers_xlstm()


def stir(oracle: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Move every parameter away from its initial value, with gates that open and forget.

    The norm of a head blows up an output that is all but 0, and its rounding with it; the seeds are such that none is.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("igate_preact.bias"):
                parameter.uniform_(-3, 1, generator=generator)
    return oracle.to(dtype).eval()


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# -- transformers ------------------------------------------------------------------------------------------------------


def save_transformers(module, folder, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = stir(module.xLSTMForCausalLM(module.xLSTMConfig(**SIZES | options)), dtype)
    model.save_pretrained(folder, max_shard_size="400KB")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
def test_transformers(transformers, options, dtype, tmp_path, assert_imports):
    source = save_transformers(transformers, tmp_path / "source", dtype, **options)
    assert len(list(source.glob("*.safetensors"))) > 2
    load = transformers.xLSTMForCausalLM.from_pretrained
    oracle = load(source, dtype=torch.float32)
    model = assert_imports(source, lambda tokens: oracle(tokens).logits, load)
    assert model.dtype == dtype
    written = load(tmp_path / "theirs").config
    for name in ("hidden_size", "num_hidden_layers", "qk_dim", "v_dim", "norm_eps", "gate_soft_cap", "eos_token_id"):
        assert getattr(written, name) == getattr(oracle.config, name)


def test_published_configurations(transformers, tmp_path):
    """They have width and depth under their second names alone, and name kernels that transformers does not have."""
    source = save_transformers(transformers, tmp_path / "source")
    expected, _ = zoo.import_checkpoint(source)
    edit_config(source, hidden_size=None, num_hidden_layers=None, chunkwise_kernel="chunkwise--triton_xl_chunk")
    model, _ = zoo.import_checkpoint(source)
    assert model.config.to_dict() == expected.config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "use_bias is True, it knows False"),
        ({"add_out_norm": False}, "add_out_norm is False, it knows True"),
        ({"eps": 1e-3}, "eps is 0.001, it knows 1e-06"),
        ({"weight_mode": "fused"}, "weight_mode is 'fused', it knows 'single'"),
        ({"embedding_dim": 64}, "hidden_size is 128, it knows 64"),
        ({"num_blocks": 2}, "num_hidden_layers is 3, it knows 2"),
    ],
)
def test_variants_that_are_not_here(transformers, changes, message, tmp_path):
    source = save_transformers(transformers, tmp_path / "source")
    edit_config(source, **changes)
    with pytest.raises(ValueError, match=f"this variant is not in the zoo: {message}"):
        zoo.import_checkpoint(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": "many"}, "is not valid: .*num_blocks"),
        (
            {"num_hidden_layers": 4, "num_blocks": 4},
            r"missing backbone.blocks.3.ffn.proj_down.weight.* unexpected none",
        ),
        ({"num_heads": 8}, r"igate_preact.weight is \(4, 128\) .* wanted \(8, 128\)"),
        ({"num_heads": 5}, r"is not valid: key_size \(64\) must be a multiple of num_heads \(5\)"),
    ],
)
def test_damaged_configurations(transformers, changes, message, tmp_path):
    source = save_transformers(transformers, tmp_path / "source")
    edit_config(source, **changes)
    with pytest.raises(ValueError, match=message):
        zoo.import_checkpoint(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_size": 32}, "its cache has room for a key_size in multiples of 64, not 32"),
        ({"output_logit_soft_cap": None}, "it caps the logits: output_logit_soft_cap is None"),
        ({"norm_type": "layer_norm"}, "its norm_type is 'rms_norm', not 'layer_norm'"),
        ({"hidden_act": "gelu"}, "its hidden_act is 'silu', not 'gelu'"),
        ({"tie_word_embeddings": True}, "its tie_word_embeddings is False, not True"),
        ({"mixers": ["mlstm", "slstm"]}, "it has layers of mlstm and SwiGLU only, not .*slstm"),
    ],
)
def test_what_transformers_has_no_room_for(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"transformers has no architecture for this model .*{message}"):
        zoo.export_checkpoint(zoo.create_model("xlstm-tiny", **changes), tmp_path / "out")


def test_every_size_has_its_factor(transformers):
    """Of the width, in float64, and rounded down."""
    for d in (128, 192, 768, 4096):
        for size in range(64, 3 * d, 64):
            config = zoo.create_config("xlstm-tiny", hidden_size=d, key_size=size, intermediate_size=size + 1)
            layout = next(x for x in zoo.registry.plugins()["xlstm"].layouts if x.write_config is not None)
            theirs = layout.write_config(config)
            assert (theirs.qk_dim, int(d * theirs.qk_dim_factor)) == (size, size)
            assert int(d * theirs.ffn_proj_factor) == size + 1


# -- the package's large models ----------------------------------------------------------------------------------------


def make_large(weight_mode: str = "single", embedding_dim: int = 64, **options) -> nn.Module:
    assert version("xlstm") == version("mlstm-kernels") == "2.0.6"
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    sizes = {"vocab_size": 97, "num_blocks": 3, "num_heads": 4}
    kernels = {"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native"}
    kernels |= {"step_kernel": "native", "autocast_kernel_dtype": "float32", "mode": "inference", "chunk_size": 8}
    torch.manual_seed(0)
    return stir(xLSTMLarge(xLSTMLargeConfig(embedding_dim, **sizes, **kernels, weight_mode=weight_mode, **options)))


@torch.no_grad()
def assert_reads(source, oracle: nn.Module, sizes: dict[str, int]) -> nn.Module:
    """Import `source`, a file of the package's, and compare with the package's model."""
    model, _ = zoo.import_checkpoint(source)
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    tokens = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = oracle(tokens)
    assert (model(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    return model


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_package_large(weight_mode, suffix, tmp_path):
    oracle = make_large(weight_mode, qk_dim_factor=0.25, v_dim_factor=0.75, ffn_proj_factor=1.5)
    source, weights = tmp_path / f"weights.{suffix}", oracle.state_dict()
    torch.save(weights, source) if suffix == "pth" else save_file(weights, source)
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_heads": 4}
    sizes |= {"key_size": 16, "value_size": 48, "intermediate_size": 128}
    model = assert_reads(source, oracle, sizes)
    layer = model.model.layers[2]
    if weight_mode == "fused":
        parts = [layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj, layer.mixer.ogate]
        fused = weights["backbone.blocks.2.mlstm_layer.qkv_opreact.weight"]
        assert torch.equal(torch.cat([part.weight for part in parts]), fused)
    else:
        assert torch.equal(layer.mixer.q_proj.weight, weights["backbone.blocks.2.mlstm_layer.q.weight"])


def test_package_large_says_its_variant(tmp_path):
    """The package keeps a `config.yaml` beside the weights."""
    oracle = make_large(output_logit_soft_cap=3.0, gate_soft_cap=2.0, norm_eps=1e-3)
    save_file(oracle.state_dict(), tmp_path / "model.safetensors")
    variant = {"output_logit_soft_cap": 3.0, "gate_soft_cap": 2.0, "norm_eps": 1e-3}
    config = tmp_path / "config.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in variant.items()))
    assert_reads(tmp_path, oracle, variant)
    for text, message in (
        ("eps: 0.1", "this variant is not in the zoo: eps is 0.1, it knows 1e-06"),
        ("gate_soft_cap: high", "is not valid: .*gate_soft_cap"),
        ("[1, 2]", "config.yaml holds a list, wanted a table"),
        ("{", "config.yaml is no YAML"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            zoo.import_checkpoint(tmp_path)


def test_package_large_in_the_layout_of_transformers(transformers, tmp_path):
    """Its model becomes transformers': the same logits, with the widths that transformers has room for."""
    oracle = make_large(embedding_dim=128)
    torch.save(oracle.state_dict(), tmp_path / "weights.pth")
    model, _ = zoo.import_checkpoint(tmp_path / "weights.pth")
    zoo.export_checkpoint(model, tmp_path / "theirs")
    theirs = transformers.xLSTMForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = oracle(tokens)
        assert (theirs(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


# -- the package's models of the first paper ---------------------------------------------------------------------------


def make_first_paper(slstm_at: list[int], with_mlp: bool = True, **options) -> nn.Module:
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    mlstm = mLSTMLayerConfig(num_heads=2, qkv_proj_blocksize=8, conv1d_kernel_size=3, proj_factor=3.0)
    slstm = sLSTMLayerConfig(backend="vanilla", num_heads=2, conv1d_kernel_size=3)
    config = xLSTMLMModelConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mlstm),
        slstm_block=sLSTMBlockConfig(slstm=slstm, feedforward=FeedForwardConfig() if with_mlp else None),
        context_length=40,
        num_blocks=4,
        embedding_dim=64,
        slstm_at=slstm_at,
        vocab_size=97,
        **options,
    )
    torch.manual_seed(0)
    return stir(xLSTMLMModel(config))


def as_cuda_cells(oracle: nn.Module) -> dict[str, Tensor]:
    """The weights of a model whose sLSTMs run in CUDA, through the package's own cells."""
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla

    weights = oracle.state_dict()
    for name, cell in oracle.named_modules():
        if isinstance(cell, sLSTMCell_vanilla):
            cuda = sLSTMCell_cuda(cell.config, skip_backend_init=True)
            cuda.recurrent_kernel[:] = cell.recurrent_kernel[:]
            cuda.bias[:] = cell.bias[:]
            weights |= {f"{name}.{part}": x for part, x in cuda.state_dict().items()}
    return weights


@pytest.mark.parametrize("cells", ["vanilla", "cuda"])
@pytest.mark.parametrize("slstm_at", [[], [1, 2], [0, 1, 2, 3]], ids=str)
def test_package_first_paper(slstm_at, cells, tmp_path):
    oracle = make_first_paper(slstm_at, with_mlp=len(slstm_at) < 4)
    weights = oracle.state_dict() if cells == "vanilla" else as_cuda_cells(oracle)
    torch.save(weights, tmp_path / "weights.pt")
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_heads": 2, "conv_kernel": 3}
    sizes |= {"mixers": ["slstm" if i in slstm_at else "mlstm_preup" for i in range(4)]}
    sizes |= {"inner_size": 192, "qkv_block_size": 8} if len(slstm_at) < 4 else {"channel_mixers": ["none"] * 4}
    sizes |= {"intermediate_size": 128} if len(slstm_at) == 2 else {}
    model = assert_reads(tmp_path / "weights.pt", oracle, sizes)
    for i in slstm_at:  # the package's names of these two are exchanged
        gate = weights[f"xlstm_block_stack.blocks.{i}.xlstm.fgate.weight"]
        assert torch.equal(model.model.layers[i].mixer.igate_weight, gate)
    with pytest.raises(ValueError, match="transformers has no architecture for this model"):
        zoo.export_checkpoint(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_read_as_it_is(dtype, tmp_path):
    """And the rules turn around: what is made of ours is theirs again."""
    weights = make_first_paper([1, 2]).to(dtype).state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    model, _ = zoo.import_checkpoint(tmp_path / "weights.pt")
    ours, count = model.state_dict(), 0
    for x in weights.values():
        assert x.dtype == model.dtype == dtype
        count += x.numel()
    assert sum(x.numel() for x in ours.values()) == count
    layout = next(x for x in zoo.registry.plugins()["xlstm"].layouts if "vanilla" in x.name)
    for rule in layout.rules(model.config):
        parts = [ours[name] for name in ([rule.ours] if isinstance(rule.ours, str) else rule.ours)]
        assert torch.equal(rule.change.to_theirs(*parts), weights[rule.theirs]), rule


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_is_the_same_tensor(tied, tmp_path):
    oracle = make_first_paper([], tie_weights=tied)
    torch.save(oracle.state_dict(), tmp_path / "weights.pt")
    assert_reads(tmp_path / "weights.pt", oracle, {"tie_word_embeddings": tied})


def rename_one(weights: dict[str, Tensor], name: str, other: str) -> None:
    weights[other] = weights.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("lm_head.weight"),
            "not a whole checkpoint of xlstm's xLSTMLMModel .*: missing lm_head.weight; unexpected none",
        ),
        (
            lambda w: rename_one(w, f"{STACK}.blocks.1.xlstm.zgate.weight", f"{STACK}.blocks.1.xlstm.agate.weight"),
            f"missing {STACK}.blocks.1.xlstm.zgate.weight; unexpected {STACK}.blocks.1.xlstm.agate.weight",
        ),
        (
            lambda w: rename_one(w, f"{STACK}.blocks.0.xlstm_norm.weight", f"{STACK}.blocks.7.xlstm_norm.weight"),
            "does not know the layout of",
        ),
        (
            lambda w: rename_one(w, f"{STACK}.blocks.3.xlstm_norm.weight", f"{STACK}.blocks.9.xlstm_norm.weight"),
            "missing xlstm_block_stack.blocks.4.xlstm.conv1d.conv.weight, which tells sizes",
        ),
        (
            lambda w: w.update({f"{STACK}.blocks.0.xlstm.learnable_skip": torch.ones(3, 3)}),
            r"xlstm_block_stack.blocks.0.xlstm.learnable_skip is \(3, 3\), wanted rank 1",
        ),
        (
            lambda w: w.update({f"{STACK}.blocks.1.xlstm.slstm_cell._bias_": torch.ones(3)}),
            r"xlstm_block_stack.blocks.1.xlstm.slstm_cell._bias_ of \(3,\) make no model.layers.1.mixer.bias",
        ),
        (
            lambda w: w.update({f"{STACK}.blocks.1.ffn.proj_up.weight": torch.ones(3, 64)}),
            r"blocks.1.ffn.proj_up.weight of \(3, 64\) make no .*gate_proj.weight \+ .*up_proj.weight",
        ),
    ],
)
def test_damaged_files(change, message, tmp_path):
    weights = dict(make_first_paper([1, 2]).state_dict())
    change(weights)
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        zoo.import_checkpoint(tmp_path / "weights.pt")

"""Checkpoints of Mamba as transformers 5.23.0 and state-spaces/mamba write them.

The latter's code runs on GPUs alone; its tensors are transformers' under other names.
"""

import json
import math

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import zoo
from zoo.checkpoint import Checkpoint

SIZES = {"vocab_size": 104, "hidden_size": 32, "num_hidden_layers": 3, "conv_kernel": 3, "layer_norm_epsilon": 1e-4}
SIZES |= {"eos_token_id": 5, "pad_token_id": None, "tie_word_embeddings": True}
FIRST = {**SIZES, "state_size": 5}
SECOND = {**SIZES, "state_size": 12, "head_dim": 8, "num_heads": 8, "chunk_size": 16}
VARIANTS = {
    "mamba": (MambaForCausalLM, MambaConfig, FIRST),
    "mamba_options": (
        *(MambaForCausalLM, MambaConfig),
        {**FIRST, "expand": 3, "use_bias": True, "use_conv_bias": False, "time_step_rank": 6},
    ),
    "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig, {**FIRST, "mixer_rms_eps": 1e-3}),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config, {**SECOND, "n_groups": 1}),
    "mamba2_options": (
        *(Mamba2ForCausalLM, Mamba2Config),
        {**SECOND, "n_groups": 4, "use_bias": True, "use_conv_bias": False, "time_step_limit": [0.02, 0.3]},
    ),
}
WITHOUT_EFFECT = {"_name_or_path": "", "chunk_size": 256}


def draw(kind: str, dtype: torch.dtype = torch.float32, **changes):
    """A model of transformers with every parameter away from its initial value."""
    model_class, config_class, fields = VARIANTS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**fields | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.uniform_(-4, 1)
    return model.to(dtype).eval()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", VARIANTS)
def test_transformers(kind, tied, dtype, tmp_path, assert_imports):
    model = draw(kind, dtype, tie_word_embeddings=tied, residual_in_fp32=tied)
    model.save_pretrained(tmp_path / "theirs_first", max_shard_size="15KB")
    assert len(list((tmp_path / "theirs_first").glob("*.safetensors"))) > 2
    oracle = type(model).from_pretrained(tmp_path / "theirs_first", dtype=torch.float32)
    imported = assert_imports(
        tmp_path / "theirs_first", lambda tokens: oracle(tokens).logits, type(model).from_pretrained
    )
    assert imported.dtype == dtype
    first, written = (type(model.config).from_pretrained(tmp_path / name) for name in ("theirs_first", "theirs"))
    assert written.to_dict() | WITHOUT_EFFECT == first.to_dict() | WITHOUT_EFFECT


@torch.no_grad()
def test_the_inner_width_is_stated_twice(tmp_path):
    """The published Falcon Mamba says `expand` 16 and means its `intermediate_size`, twice the width."""
    model = draw("falcon_mamba")
    model.save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", expand=16, intermediate_size=64)
    oracle = FalconMambaForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    imported, _ = zoo.import_checkpoint(tmp_path / "theirs")
    assert imported.config.expand == 2
    tokens = torch.arange(40)[None]
    expected = oracle(tokens).logits
    assert (imported(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu', it knows 'silu'"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act is 'relu', it knows 'silu'"),
        ("mamba", {"intermediate_size": "wide"}, r"intermediate_size \(wide\) is no multiple of hidden_size \(32\)"),
        ("mamba", {"hidden_size": 0}, r"intermediate_size \(64\) is no multiple of hidden_size \(0\)"),
        ("falcon_mamba", {"intermediate_size": 72}, r"intermediate_size \(72\) is no multiple of hidden_size \(32\)"),
    ],
)
def test_variants_that_are_not_here(kind, changes, message, tmp_path):
    draw(kind).save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **changes)
    with pytest.raises(ValueError, match=f"this variant is not in the zoo: {message}"):
        zoo.import_checkpoint(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ["mamba", "mamba2"]}, r"mamba: it has layers of mamba only, not \['mamba', 'mamba2', 'mamba', 'm"),
        ({"channel_mixers": ["swiglu"]}, "mamba2: it has layers of mamba2 only, .*swiglu"),
    ],
)
def test_what_transformers_has_no_room_for(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"transformers has no architecture for this model .*{message}"):
        zoo.export_checkpoint(zoo.create_model("mamba-tiny", **changes), tmp_path / "out")


# -- state-spaces ------------------------------------------------------------------------------------------------------


def save_as_state_spaces(model, folder, **changes):
    """A model of transformers as the authors' package saves it: there is no other difference than names."""
    config = model.config
    options = {"d_state": config.state_size, "d_conv": config.conv_kernel, "dt_max": 0.2}
    if config.model_type == "mamba2":
        options |= {"layer": "Mamba2", "headdim": config.head_dim, "ngroups": config.n_groups, "chunk_size": 16}
        options |= {"dt_limit": list(config.time_step_limit), "rmsnorm": True}
    else:
        options |= {"dt_rank": config.time_step_rank}
    stated = {"d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": 101}
    stated |= {"ssm_cfg": options, "rms_norm": True, "residual_in_fp32": False, "fused_add_norm": True}
    stated |= {"pad_vocab_size_multiple": 8, "tie_embeddings": config.tie_word_embeddings}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(stated | changes))
    names = {name: name.replace("embeddings", "embedding") for name in model.state_dict()}
    torch.save({names[name]: x for name, x in model.state_dict().items()}, folder / "pytorch_model.bin")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "mamba2_options"])
def test_state_spaces(kind, tied, dtype, tmp_path):
    same = {"use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5}
    oracle = draw(kind, dtype, tie_word_embeddings=tied, **same)
    source = save_as_state_spaces(oracle, tmp_path / "theirs")
    model, _ = zoo.import_checkpoint(source)
    assert (model.config.vocab_size, model.config.time_step_max, model.config.residual_in_fp32) == (104, 0.2, False)
    wide, _ = zoo.import_checkpoint(source, dtype=torch.float32)
    tokens = torch.randint(1, 101, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = oracle.float()(tokens).logits
    assert (wide(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    zoo.export_checkpoint(model, tmp_path / "out")
    original, written = Checkpoint(source), Checkpoint(tmp_path / "out")
    assert len(written.shapes) == len(original.shapes) - tied
    for name in written.shapes:
        x = written.read(name)
        assert x.dtype == dtype
        assert torch.equal(x, original.read(name.replace("embeddings", "embedding"))), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\], it knows \[\]"),
        ({"d_intermediate": 64}, "d_intermediate is 64, it knows 0"),
        ({"rms_norm": False}, "rms_norm is False, it knows True"),
        ({"n_experts": 8}, "n_experts is 8"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer is 'Mamba3', it knows Mamba1, Mamba2"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate is True, it knows False"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim is True, it knows False"),
        ({"ssm_cfg": {"headdim": 8}}, "headdim is 8"),
    ],
)
def test_variants_of_state_spaces_that_are_not_here(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"this variant is not in the zoo: {message}"):
        zoo.import_checkpoint(save_as_state_spaces(draw("mamba2"), tmp_path / "theirs", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": "large"}, "vocab_size is 'large', wanted a positive number"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0, wanted a positive number"),
        ({"ssm_cfg": [1]}, r"ssm_cfg is \[1\], wanted an object"),
        ({"ssm_cfg": {"layer": ["Mamba2"]}}, r"layer is \['Mamba2'\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.1]}}, r"is not valid: time_step_limit .* got \[0.1\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_max": math.inf}}, "is not valid: .* time_step_max inf"),
        ({"n_layer": "few"}, "is not valid: .*num_hidden_layers"),
        ({"vocab_size": 90}, r"backbone.embedding.weight is \(104, 32\) .* wanted \(96, 32\)"),
        ({"n_layer": 2}, r"missing none; unexpected backbone.layers.2.mixer.A_log, .* and 1 more"),
        ({"n_layer": 4}, r"missing backbone.layers.3.mixer.A_log, .* and 1 more; unexpected none"),
    ],
)
def test_damaged_configurations_of_state_spaces(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        zoo.import_checkpoint(save_as_state_spaces(draw("mamba2"), tmp_path / "theirs", **changes))

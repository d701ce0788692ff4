"""Checkpoints of RecurrentGemma as transformers 5.23.0 writes them, and as they are published."""

import json

import pytest
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

import zoo

SIZES = {
    "vocab_size": 104,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "intermediate_size": 144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "attention_window_size": 12,
    "rms_norm_eps": 1e-4,
}
VARIANTS = {
    "griffin": {},
    "hawk": {"block_types": ["recurrent"], "pad_token_id": None, "use_cache": False},
    "options": {
        "block_types": ["attention", "recurrent", "recurrent"],
        "lru_width": 64,
        "conv1d_width": 3,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "logits_soft_cap": 5.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    },
}


def draw(kind: str, dtype: torch.dtype = torch.float32, **changes):
    """A model of transformers with every parameter away from its initial value."""
    torch.manual_seed(0)
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES | VARIANTS[kind] | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("recurrent_param"):
                parameter.uniform_(-6, 1)
    return model.to(dtype).eval()


def edit_config(folder, *left_out, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in left_out}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", VARIANTS)
def test_transformers(kind, tied, dtype, tmp_path, assert_imports):
    model = draw(kind, dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "theirs_first", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs_first").glob("*.safetensors"))) > 2
    oracle = RecurrentGemmaForCausalLM.from_pretrained(tmp_path / "theirs_first", dtype=torch.float32)
    imported = assert_imports(
        tmp_path / "theirs_first",
        lambda tokens: oracle(tokens, use_cache=False).logits,
        RecurrentGemmaForCausalLM.from_pretrained,
    )
    assert imported.dtype == dtype
    first, written = (RecurrentGemmaConfig.from_pretrained(tmp_path / name) for name in ("theirs_first", "theirs"))
    assert written.to_dict() | {"_name_or_path": ""} == first.to_dict() | {"_name_or_path": ""}


@torch.no_grad()
def test_a_configuration_as_published(tmp_path):
    """Files on the Hub are of an older transformers: the rotary embedding in two fields, and fields of no effect."""
    model = draw("griffin", rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5})
    model.save_pretrained(tmp_path / "theirs")
    types = ["recurrent", "recurrent", "attention"]
    older = {"rope_theta": 100.0, "partial_rotary_factor": 0.5, "embeddings_scale_by_sqrt_dim": True, "head_dim": 12}
    older |= {"_block_types": types, "block_types": types, "final_w_init_variance_scale": 0.5}
    edit_config(tmp_path / "theirs", "rope_parameters", **older)
    imported, _ = zoo.import_checkpoint(tmp_path / "theirs")
    assert imported.config.mixers == ["rglru", "rglru", "local_attention", "rglru"]
    assert imported.config.rope_parameters == model.config.rope_parameters
    tokens = torch.arange(1, 41)[None]
    expected = model(tokens, use_cache=False).logits
    assert (imported(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_types": ["recurrent", "global"]}, "block_types has 'global', it knows recurrent, attention"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'linear', it knows 'default'",
        ),
    ],
)
def test_variants_that_are_not_here(changes, message, tmp_path):
    draw("griffin").save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **changes)
    with pytest.raises(ValueError, match=f"this variant is not in the zoo: {message}"):
        zoo.import_checkpoint(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "is not valid: .*"),
        ({"hidden_size": "wide"}, "is not valid: .*hidden_size"),
        ({"lru_width": 50}, "is not valid: .*lru_width 50 over num_attention_heads 4"),
        ({"num_hidden_layers": 3}, "unexpected model.layers.3.channel_pre_norm.weight"),
        ({"block_types": []}, r"is not valid: .*`layer_types` \(0\)"),
        ({"intermediate_size": 100}, r"mlp_block.gate_proj.weight is \(72, 48\) .* wanted \(50, 48\)"),
    ],
)
def test_damaged_configurations(changes, message, tmp_path):
    draw("griffin").save_pretrained(tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **changes)
    with pytest.raises(ValueError, match=message):
        zoo.import_checkpoint(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_mixers": ["swiglu"]}, "it has layers of rglru, local_attention with griffin_mlp only, .*swiglu"),
        ({"mixers": ["rglru", "sliding_attention"]}, "it has layers of rglru, local_attention .*sliding_attention"),
        ({"head_dim": 16}, r"its heads divide hidden_size \(128\): num_attention_heads is 4, head_dim 16"),
    ],
)
def test_what_transformers_has_no_room_for(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"transformers has no architecture for this model .*{message}"):
        zoo.export_checkpoint(zoo.create_model("griffin-tiny", **changes), tmp_path / "out")

"""The Transformer baseline against transformers' Llama (full attention) and Mistral (sliding window)."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import zoo

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
NAMES = {
    "self_attn": "mixer",
    "mlp": "channel_mixer",
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "channel_norm",
}


@pytest.fixture
def renamed(renamer):
    return renamer(NAMES)


@pytest.fixture(params=["full", "sliding"])
def pair(request, renamed):
    if request.param == "full":
        oracle = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-6, max_position_embeddings=2048))
        changes = {"mixers": ["attention"]}
    else:
        oracle = MistralForCausalLM(MistralConfig(**SIZES, rms_norm_eps=1e-6, sliding_window=9))
        changes = {"mixers": ["sliding_attention"], "sliding_window": 9}
    oracle = oracle.double().eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = zoo.create_model("transformer-tiny", **SIZES, **changes).double().eval()
    model.load_state_dict({renamed(name): value for name, value in oracle.state_dict().items()})
    return model, oracle


def test_logits_and_gradients(pair, renamed):
    """In float64, to 1e-6: transformers normalises in float32 whatever the weights are, the zoo does not."""
    model, oracle = pair
    tokens = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    logits, expected = model(tokens).logits, oracle(tokens).logits
    assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
    logits.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        error = (ours[renamed(name)].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_checkpoints(tied, dtype, tmp_path, assert_imports):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    config = LlamaConfig(**SIZES | {"tie_word_embeddings": tied}, attention_bias=True, rope_parameters=rope)
    oracle = LlamaForCausalLM(config).to(dtype).eval()
    oracle.save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    oracle = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    model = assert_imports(tmp_path / "llama", lambda tokens: oracle(tokens).logits, LlamaForCausalLM.from_pretrained)
    assert model.dtype == dtype
    assert model.config.tie_word_embeddings == tied


def test_what_llama_has_no_room_for(tmp_path):
    with pytest.raises(ValueError, match=r"transformers has no architecture for this model .*sliding_attention"):
        zoo.export_checkpoint(zoo.create_model("transformer-sliding-tiny"), tmp_path / "out")
    LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="this variant is not in the zoo: mlp_bias is True"):
        zoo.import_checkpoint(tmp_path / "llama")

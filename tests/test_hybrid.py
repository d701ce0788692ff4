"""Every registered mixer and channel mixer in a hybrid, alone and among others, and the options a hybrid gives them.

Like the contract test it is parametrised over the registry: a mixer of a new plugin is tested by existing.
"""

import copy
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import zoo
from zoo import registry
from zoo.cache import RecurrentStateLayer
from zoo.config import NO_MIXER

LENGTH = 21
OPTIONS = {
    "attention": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "sliding_attention": {"num_attention_heads": 4, "head_dim": 32, "sliding_window": 6},
    "mamba": {"state_size": 4, "conv_kernel": 3},
    "mamba2": {"state_size": 8, "head_dim": 16, "n_groups": 2},
    "retention": {"num_heads": 2},
    "rwkv5": {"head_dim": 16},
    "rwkv6": {"head_dim": 16, "shift_rank": 4},
    "rwkv7": {"head_dim": 16, "value_rank": 8},
    "mlstm": {"num_heads": 2, "key_size": 16},
    "mlstm_preup": {"num_heads": 2, "inner_size": 64},
    "slstm": {"num_heads": 2, "conv_kernel": 2},
    "swiglu": {"intermediate_size": 80, "hidden_act": "gelu"},
    "rwkv7_channel": {"intermediate_size": 72},
}
"""Of mixers that the zoo has always had; others run with their defaults."""


def registered(kind: str) -> list[str]:
    return [name for plugin in registry.plugins().values() for name in getattr(plugin, kind)]


MIXERS, CHANNEL_MIXERS = registered("mixers"), registered("channel_mixers")
ALONE = [{"mixers": [name], "channel_mixers": [NO_MIXER]} for name in MIXERS]
AMONG_MIXERS = [{"mixers": ["mamba2", name, "attention", name], "channel_mixers": ["swiglu"]} for name in MIXERS]
AMONG_CHANNEL_MIXERS = [
    {"mixers": ["rwkv7", "retention"], "channel_mixers": [name, "rwkv4_channel", name, NO_MIXER]}
    for name in CHANNEL_MIXERS
]
every_hybrid = pytest.mark.parametrize(
    "layers",
    [*ALONE, *AMONG_MIXERS, *AMONG_CHANNEL_MIXERS],
    ids=[
        *(f"{name}-alone" for name in MIXERS),
        *(f"{name}-among" for name in MIXERS),
        *(f"{name}-among" for name in CHANNEL_MIXERS),
    ],
)


def make(mixers: list[str], channel_mixers: list[str], **overrides):
    """A small hybrid with options for its mixers, and weights away from their initial values."""
    used = {*mixers, *channel_mixers}
    options = {name: fields for name, fields in OPTIONS.items() if name in used}
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "mixer_options": options}
    model = zoo.create_model("hybrid-tiny", mixers=mixers, channel_mixers=channel_mixers, **{**sizes, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double().eval()


def token_by_token(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    return torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, dim=1)], dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).norm() <= 1e-9 * expected.norm().clamp(min=1e-30)


def state_tensors(cache) -> list[torch.Tensor]:
    layers = (x.states if isinstance(x, RecurrentStateLayer) else (x.keys, x.values) for x in cache.layers)
    return [tensor for states in layers for tensor in states]


@every_hybrid
@torch.no_grad()
def test_one_call_equals_token_by_token(layers, tmp_path):
    """The states and their bytes too; and a state that was saved half-way goes on."""
    model, tokens = make(**layers), torch.randint(50, (2, LENGTH))
    whole, cache = model(tokens, use_cache=True), DynamicCache(config=model.config)
    first = token_by_token(model, tokens[:, :9], cache)
    zoo.save_state(cache, tmp_path / "state.safetensors")
    cache = zoo.load_state(tmp_path / "state.safetensors", model)
    assert_close(torch.cat([first, token_by_token(model, tokens[:, 9:], cache)], dim=1), whole.logits)
    states = state_tensors(cache)
    for state, expected in zip(states, state_tensors(whole.past_key_values), strict=True):
        assert_close(state.double(), expected.double())
    size = sum(state.numel() * state.element_size() for state in states) / 2
    assert size == zoo.state_bytes(model.config, LENGTH, torch.float64)


@every_hybrid
def test_every_parameter_gets_a_gradient(layers):
    model, tokens = make(**layers).train(), torch.randint(50, (2, LENGTH))
    model(tokens, labels=tokens).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@every_hybrid
@torch.no_grad()
def test_a_file_keeps_the_options(layers, tmp_path):
    model, tokens = make(**layers), torch.randint(50, (1, LENGTH))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.mixer_options == model.config.mixer_options
    assert_close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_is_the_one_of_its_own_architecture(name):
    """Without options: its fields, the shapes of its parameters, and how these are drawn."""
    plugin = registry.find_owner(name)
    own = plugin.config_class(vocab_size=50, hidden_size=128, num_hidden_layers=4, mixers=[name])
    fields = ("vocab_size", "mixers", "channel_mixers", "norm_eps", "initializer_range")
    fields += ("intermediate_size", "hidden_act")
    expected = plugin.model_class("ForCausalLM")(own).model.layers
    found = zoo.create_model("hybrid-tiny", **{field: getattr(own, field) for field in fields}).model.layers
    for layer, block in zip(found, expected, strict=True):
        for field in type(block.mixer).config_fields:
            assert getattr(layer.mixer.config, field) == getattr(own, field), field
        actual, parameters = dict(layer.mixer.named_parameters()), dict(block.mixer.named_parameters())
        assert actual.keys() == parameters.keys()
        for key, parameter in parameters.items():
            assert actual[key].shape == parameter.shape
            mean, deviation = parameter.mean(), parameter.std()
            tolerance = 6 * deviation / parameter.numel() ** 0.5 + 1e-6
            assert abs(actual[key].mean() - mean) <= tolerance, key
            assert abs(actual[key].std() - deviation) <= tolerance, key


# -- what a mixer reads ------------------------------------------------------------------------------------------------


def test_each_mixer_has_its_own_defaults_and_options():
    """mamba and mamba2 share a field of which they have different defaults; a layer of each kind in one model."""
    model = zoo.create_model("hybrid-tiny", mixers=["mamba", "mamba2"], mixer_options={"mamba2": {"n_groups": 2}})
    first, second = (layer.mixer.config for layer in model.model.layers[:2])
    assert (first.state_size, hasattr(first, "n_groups")) == (16, False)
    assert (second.state_size, second.n_groups) == (128, 2)
    assert first.hidden_size == second.hidden_size == 128


def test_what_changes_later_reaches_the_mixers():
    model = zoo.create_model("hybrid-tiny", attn_implementation="sdpa")
    copied = copy.deepcopy(model)
    mixers = [layer.mixer for layer in model.model.layers]
    model.set_attn_implementation("eager")
    model.config.kernels = "reference"
    model.config.num_hidden_layers = 3
    for mixer in mixers:
        assert mixer.config.kernels == "reference"
        assert mixer.config._attn_implementation == "eager"
        assert mixer.config.num_hidden_layers == 3
    for layer in copied.model.layers:
        assert layer.mixer.config.kernels == "auto"
        assert layer.mixer.config._attn_implementation == "sdpa"


def test_options_can_be_changed_when_a_model_is_loaded(tmp_path):
    model = zoo.create_model("hybrid-tiny", mixers=["sliding_attention"], channel_mixers=["swiglu"])
    model.save_pretrained(tmp_path)
    options = {"sliding_attention": {"sliding_window": 5}}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, mixer_options=options)
    assert loaded.model.layers[3].mixer.config.sliding_window == 5
    assert zoo.state_bytes(loaded.config) < zoo.state_bytes(model.config)
    loaded.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).mixer_options == options
    assert json.loads((tmp_path / "config.json").read_text())["mixer_options"] == options
    with pytest.raises(ValueError, match="sliding_window counts the token itself"):
        AutoModelForCausalLM.from_pretrained(tmp_path, mixer_options={"sliding_attention": {"sliding_window": 1}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixers": ["mamba3"]}, r"unknown mixer 'mamba3'; did you mean .*mamba2"),
        ({"mixer_options": {"mamba3": {}}}, r"unknown mixer 'mamba3'; did you mean .*mamba2"),
        ({"mixer_options": {"mamba": {}}}, "options for 'mamba', which no layer uses"),
        ({"mixer_options": {"mamba2": {"state": 8}}}, "option of mixer 'mamba2' 'state'; did you mean state_size"),
        ({"mixer_options": {"mamba2": {"hidden_size": 8}}}, "option of mixer 'mamba2' 'hidden_size'; there are: state"),
        ({"mixer_options": {"mamba2": {"state_size": 0}}}, "mixer 'mamba2': state_size must be positive, got 0"),
        ({"mixer_options": {"mamba2": {"state_size": "x"}}}, "mixer 'mamba2': .*'state_size' expected int, got str"),
        ({"mixer_options": {"mamba2": {"head_dim": 96}}}, "mixer 'mamba2': groups need whole heads: .* head_dim 96"),
        ({"mixer_options": {"swiglu": {"hidden_act": "silo"}}}, "mixer 'swiglu': unknown activation 'silo'"),
        ({"mixer_options": {"mamba2": 8}}, "mixer_options"),
        (
            {"mixers": ["rwkv7"], "hidden_size": 100},
            r"mixer 'rwkv7': hidden_size \(100\) must be a multiple of head_dim \(64\)",
        ),
    ],
)
def test_mistakes_are_told(overrides, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_config("hybrid-tiny", **{"mixers": ["mamba2", "rwkv7"], **overrides})


def test_a_channel_mixer_asks_nothing_of_the_mixers_of_its_architecture():
    """Heads of 64 do not go into 96 channels, and RWKV's channel mixers have none."""
    model = zoo.create_model(
        "hybrid-tiny",
        hidden_size=96,
        mixers=["mamba2"],
        channel_mixers=["rwkv7_channel"],
        mixer_options={"rwkv7_channel": {"intermediate_size": 200}},
    )
    assert model.model.layers[0].channel_mixer.k_proj.out_features == 200


# -- what layers share -------------------------------------------------------------------------------------------------


def test_the_first_layer_of_rwkv7_is_not_the_first_layer():
    """Its values reach the later ones past layers of other kinds."""
    layers = {"mixers": ["attention", "mamba2", "rwkv7", "retention", "rwkv7"], "channel_mixers": ["swiglu"]}
    model, tokens = make(**layers, num_hidden_layers=5), torch.randint(50, (1, LENGTH))
    first, second = model.model.layers[2].mixer, model.model.layers[4].mixer
    assert first.value_gate is None
    assert second.value_gate is not None
    with torch.no_grad():
        before = model(tokens).logits
        assert_close(token_by_token(model, tokens, DynamicCache(config=model.config)), before)
        second.value_gate.bias.add_(1.0)
        assert not torch.allclose(model(tokens).logits, before)


@torch.no_grad()
def test_rotary_embedding():
    """None unless asked for; then one for all layers with attention."""
    layers = {"mixers": ["attention", "sliding_attention", "mamba"], "channel_mixers": ["swiglu"]}
    heads = {name: {"num_attention_heads": 4, "head_dim": 24} for name in layers["mixers"][:2]}
    tokens, logits = torch.randint(50, (1, LENGTH)), []
    for rope in (None, {"rope_theta": 500.0}):
        torch.manual_seed(1)
        model = make(**layers, mixer_options=heads, rope_parameters=rope)
        assert (model.model.rotary is None) is (rope is None)
        logits.append(model(tokens).logits)
        assert_close(token_by_token(model, tokens, DynamicCache(config=model.config)), logits[-1])
    assert not torch.allclose(*logits)
    assert model.model.rotary.inv_freq.shape == (12,)
    assert model.config.rope_parameters["rope_theta"] == 500.0
    heads["attention"]["head_dim"] = 16
    with pytest.raises(ValueError, match="head_dim differ: attention 16, sliding_attention 24"):
        make(**layers, mixer_options=heads, rope_parameters=rope)
    with pytest.raises(ValueError, match="rotate the heads of attention, which no layer has"):
        make(["mamba"], ["swiglu"], rope_parameters=rope)

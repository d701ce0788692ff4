"""Jamba against transformers 5.23.0: the model, its initial weights, its sizes and its checkpoints.

transformers' own continuation of a sequence is right only token by token: where it is wrong, the whole sequence is the
oracle of the pieces.
"""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import JambaConfig, JambaForCausalLM
from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

import zoo

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
}
OPTIONS = {  # ours: theirs, and a value other than its default
    "state_size": ("mamba_d_state", 6),
    "time_step_rank": ("mamba_dt_rank", 7),
    "conv_kernel": ("mamba_d_conv", 3),
    "use_bias": ("mamba_proj_bias", True),
    "use_conv_bias": ("mamba_conv_bias", False),
    "expand": ("mamba_expand", 3),
}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest entry
NAMES = {
    "mamba": "mixer",
    "self_attn": "mixer",
    "feed_forward": "channel_mixer",
    "input_layernorm": "mixer_norm",
    "pre_ff_layernorm": "channel_norm",
    "final_layernorm": "norm",
    "dt_layernorm": "dt_norm",
    "b_layernorm": "B_norm",
    "c_layernorm": "C_norm",
}


@pytest.fixture
def renamed(renamer):
    rename = renamer(NAMES)
    return lambda name: rename(name).replace("dt_proj.bias", "dt_bias")


def stir(model) -> None:
    """Move every parameter away from its initial value, the decays away from 1 and the experts away from a draw."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("dt_proj.bias"):
                parameter.uniform_(-4, 1, generator=generator)
            if name.endswith("router.weight"):
                parameter.mul_(4)


def draw(dtype: torch.dtype = torch.float32, **changes) -> JambaForCausalLM:
    torch.manual_seed(0)
    oracle = JambaForCausalLM(JambaConfig(**SIZES | changes))
    oracle.set_experts_implementation("eager")  # the only one in float64
    stir(oracle)
    return oracle.to(dtype).eval()


@pytest.fixture
def make_pair(renamed):
    """Makes a model of the zoo and its oracle with the same weights."""

    def make(dtype: torch.dtype, options: tuple[str, ...] = (), **changes):
        fields = {name: OPTIONS[name][1] for name in options}
        oracle = draw(dtype, **changes, **{OPTIONS[name][0]: value for name, value in fields.items()})
        model = zoo.create_model("jamba-tiny", **SIZES | changes, **fields)
        model.load_state_dict({renamed(name): value for name, value in oracle.state_dict().items()})
        return model.to(dtype).eval(), oracle

    return make


@pytest.fixture(params=TOLERANCE, ids=["fp32", "fp64"])
def pair(request, make_pair):
    return make_pair(request.param)


@pytest.fixture
def in_its_precision(monkeypatch):
    """Runs an oracle; in float64, what it casts to float32 by name stays in float64."""

    def run(oracle, *args, **kwargs):
        with monkeypatch.context() as patch:
            if oracle.dtype == torch.float64:
                patch.setattr(torch, "float32", torch.float64)
                patch.setattr(torch, "float", torch.float64)
                patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return oracle(*args, **kwargs)

    return run


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.dtype == expected.dtype
    assert error <= TOLERANCE[expected.dtype], f"{what}: relative error {error:.1e}"


def ids(b: int, t: int) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (b, t), generator=torch.Generator().manual_seed(0))


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("options", [(), tuple(OPTIONS)], ids=["published", "options"])
def test_logits_and_gradients(options, dtype, make_pair, in_its_precision, renamed):
    model, oracle = make_pair(dtype, options)
    assert model.config.mixers == ["jamba_mamba", "attention", "jamba_mamba", "jamba_mamba", "attention"]
    assert model.config.channel_mixers == ["swiglu", "moe", "swiglu", "moe", "swiglu"]
    tokens = ids(2, 40)
    logits, expected = model(tokens).logits, in_its_precision(oracle, tokens).logits
    assert_close(logits, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in oracle.named_parameters():
        assert_close(ours[renamed(name)].grad, parameter.grad, name)


@torch.no_grad()
def test_token_by_token(pair, in_its_precision):
    """Logits and, at the end, the states of the recurrence."""
    model, oracle = pair
    tokens, cache, theirs = ids(2, 12), None, None
    whole = model(tokens, use_cache=True)
    for t in range(tokens.shape[1]):
        out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        step = in_its_precision(oracle, tokens[:, t : t + 1], past_key_values=theirs, use_cache=True)
        cache, theirs = out.past_key_values, step.past_key_values
        assert_close(out.logits, step.logits)
        assert_close(out.logits, whole.logits[:, t : t + 1])
    for index in (0, 2, 3):
        assert_close(cache.layers[index].states[1], theirs.get_recurrent_state(index, state_idx=0), f"state {index}")


@torch.no_grad()
def test_continuation_of_several_tokens(pair, in_its_precision):
    """transformers starts the recurrence anew in each call of more than one token; the zoo goes on."""
    model, oracle = pair
    tokens = ids(2, 21)
    expected = in_its_precision(oracle, tokens).logits[:, 10:]
    cache = model(tokens[:, :10], use_cache=True).past_key_values
    continued = model(tokens[:, 10:], past_key_values=cache).logits
    assert_close(continued, expected)
    assert_close(continued, model(tokens).logits[:, 10:])
    theirs = in_its_precision(oracle, tokens[:, :10], use_cache=True).past_key_values
    theirs = in_its_precision(oracle, tokens[:, 10:], past_key_values=theirs, use_cache=True).logits
    assert (theirs - expected).abs().max() > 0.1 * expected.abs().max()


@torch.no_grad()
def test_left_padding(pair, in_its_precision):
    model, oracle = pair
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    logits = model(tokens, attention_mask=mask).logits
    theirs = in_its_precision(oracle, tokens, attention_mask=mask).logits
    assert_close(logits[0, 7:], theirs[0, 7:])
    assert_close(logits[1], theirs[1])
    assert_close(logits[0, 7:], in_its_precision(oracle, tokens[:1, 7:]).logits[0])


@pytest.mark.parametrize("has_padding", [False, True])
def test_loss_of_the_router(has_padding, make_pair, in_its_precision, renamed):
    """One layer of experts: the loss and its gradient are the means of transformers' of each row."""
    layers = {"expert_layer_period": 5, "router_aux_loss_coef": 0.3}
    model, oracle = make_pair(torch.float64, **layers)
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    if has_padding:
        mask[0, :7] = 0
    out = model.train()(tokens, attention_mask=mask, labels=tokens)
    rows = zip(tokens.split(1), mask.split(1), strict=True)
    theirs = [in_its_precision(oracle, x, attention_mask=m, output_router_logits=True).aux_loss for x, m in rows]
    theirs = sum(theirs) / len(theirs)
    assert_close(out.aux_losses["load_balancing_loss"], theirs)
    assert_close(out.aux_loss, 0.3 * theirs)
    out.aux_loss.backward()
    (0.3 * theirs).backward()
    ours = dict(model.named_parameters())
    reached = {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
    assert any(name.endswith("router.weight") for name in reached)
    for name, gradient in reached.items():
        assert_close(ours[renamed(name)].grad, gradient, name)


def test_loss_of_several_routers(make_pair):
    """The zoo averages over layers, each even by itself; transformers counts the tokens of all layers together."""
    model, oracle = make_pair(torch.float32)
    tokens = ids(1, 20)
    found = model.train()(tokens, labels=tokens).aux_losses["load_balancing_loss"]
    theirs = oracle(tokens, output_router_logits=True)
    of_layers = [load_balancing_loss_func((logits,), 5, 2) for logits in theirs.router_logits]
    assert_close(found, sum(of_layers) / len(of_layers))
    assert abs(found - theirs.aux_loss) > 1e-2


# -- sizes and initial weights -----------------------------------------------------------------------------------------


PUBLISHED = {"jamba-v0.1": 52, "jamba-1.5-mini": 52, "jamba-1.5-large": 398}  # billions, of the model cards


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """As many parameters as transformers' class has with the same fields, and as the model card says."""
    with torch.device("meta"):
        model = zoo.create_model(name)
        fields = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
        oracle = JambaForCausalLM(JambaConfig(**{field: getattr(model.config, field) for field in fields}))
    assert model.num_parameters() == oracle.num_parameters()
    assert abs(model.num_parameters() / 1e9 - PUBLISHED[name]) < 1
    assert {name: getattr(model.config, name) for name in ("num_key_value_heads", "time_step_rank")} == {
        "num_key_value_heads": 8,
        "time_step_rank": model.config.hidden_size // 16,
    }


def test_initialisation(renamed):
    """As transformers', whose code AI21 wrote, but for Mamba's projections, convolution and time steps.

    Those are Mamba's authors': in transformers' class every time step starts as log 2, and no channel remembers much.
    """
    changes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.03}
    model = zoo.create_model("jamba-tiny", **changes)
    theirs = JambaForCausalLM(JambaConfig(**SIZES | changes))
    branches = 2 * model.config.num_hidden_layers
    bounds = {
        "mixer.in_proj.weight": 256**-0.5,
        "mixer.x_proj.weight": 512**-0.5,
        "mixer.dt_proj.weight": 16**-0.5,
        "mixer.conv1d.weight": 4**-0.5,
        "mixer.conv1d.bias": 4**-0.5,
        "mixer.out_proj.weight": (512 * branches) ** -0.5,
    }

    def by_kind(parameters) -> dict[str, torch.Tensor]:
        """By name, but for the number of the layer, the last parameter of that name."""
        return {re.sub(r"^model\.layers\.\d+\.", "", name): x.detach() for name, x in parameters}

    expected = by_kind((renamed(name), x) for name, x in theirs.named_parameters())
    drawn = by_kind(model.named_parameters())
    assert drawn.keys() == expected.keys()
    steps = F.softplus(drawn.pop("mixer.dt_bias").double()).log()
    assert steps.min() >= math.log(1e-3) - 1e-3
    assert steps.max() <= math.log(1e-1) + 1e-3
    assert abs(steps.mean() - math.log(1e-2)) <= 5 * math.log(100) / math.sqrt(12 * steps.numel())
    for name, bound in bounds.items():
        values = drawn.pop(name)
        assert values.abs().max() <= bound, name
        assert abs(values.std() / bound - 3**-0.5) <= 5 / math.sqrt(6 * values.numel()), name
    for name, values in drawn.items():
        if name in ("mixer.A_log", "mixer.D") or "norm" in name:
            assert torch.equal(values, expected[name]), name
        else:
            for drawing in (values, expected[name]):
                assert abs(drawing.std() - 0.03) <= 5 * 0.03 / math.sqrt(2 * drawing.numel()), name
                assert abs(drawing.mean()) <= 5 * 0.03 / math.sqrt(drawing.numel()), name


# -- checkpoints -------------------------------------------------------------------------------------------------------


WITHOUT_EFFECT = {"max_position_embeddings": 0, "_name_or_path": ""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), tuple(OPTIONS)], ids=["published", "options"])
def test_an_expert_a_tensor(options, dtype, tmp_path, assert_imports):
    """As AI21 published them and transformers writes them."""
    fields = {OPTIONS[name][0]: OPTIONS[name][1] for name in options}
    oracle = draw(dtype, tie_word_embeddings=bool(options), eos_token_id=5, **fields)
    oracle.save_pretrained(tmp_path / "theirs_first", max_shard_size="150KB")
    assert len(list((tmp_path / "theirs_first").glob("*.safetensors"))) > 2
    wide = JambaForCausalLM.from_pretrained(tmp_path / "theirs_first", dtype=torch.float32).eval()
    imported = assert_imports(
        tmp_path / "theirs_first", lambda tokens: wide(tokens).logits, JambaForCausalLM.from_pretrained
    )
    assert imported.dtype == dtype
    first, written = (JambaConfig.from_pretrained(tmp_path / name) for name in ("theirs_first", "theirs"))
    assert written.to_dict() | WITHOUT_EFFECT == first.to_dict() | WITHOUT_EFFECT


@torch.no_grad()
def test_packed_experts(tmp_path):
    """As they stand in memory in transformers 5."""
    oracle = draw()
    oracle.save_pretrained(tmp_path / "theirs")
    expected, _ = zoo.import_checkpoint(tmp_path / "theirs")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
    save_file(dict(oracle.state_dict()), tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    model, _ = zoo.import_checkpoint(tmp_path / "packed")
    assert model.config.to_dict() == expected.config.to_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    zoo.export_checkpoint(model, tmp_path / "back")
    loaded = JambaForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in oracle.state_dict().items())


@torch.no_grad()
def test_no_experts(tmp_path, assert_imports):
    """With one expert their layers have an MLP in its place."""
    oracle = draw(num_experts=1)
    oracle.save_pretrained(tmp_path / "theirs_first")
    model = assert_imports(
        tmp_path / "theirs_first", lambda tokens: oracle(tokens).logits, JambaForCausalLM.from_pretrained
    )
    assert set(model.config.channel_mixers) == {"swiglu"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "variant is not in the zoo: hidden_act is 'gelu', it knows 'silu'"),
        (
            {"mamba_inner_layernorms": False},
            "variant is not in the zoo: mamba_inner_layernorms is False, it knows True",
        ),
        ({"num_experts": 4}, r"missing none; unexpected model.layers.1.feed_forward.experts.4.down_proj.weight"),
        ({"num_experts": 6}, r"missing model.layers.1.feed_forward.experts.5.down_proj.weight"),
        ({"num_experts_per_tok": 9}, r"is not valid: .* num_experts_per_tok \(9\) of num_experts \(5\)"),
        ({"attn_layer_offset": 3}, r"is not valid: .*offset \(3\)"),
    ],
)
def test_checkpoints_that_are_refused(changes, message, tmp_path):
    draw().save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        zoo.import_checkpoint(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ["jamba_mamba"]}, "its layers follow from periods and offsets"),
        ({"channel_mixers": ["moe"]}, "its layers follow from periods and offsets"),
        ({"n_shared_experts": 1}, "it has no n_shared_experts but 0: it is 1"),
        ({"norm_topk_prob": True}, "it has no norm_topk_prob but False: it is True"),
        ({"attention_bias": True}, "it has no attention_bias but False"),
        ({"head_dim": 8}, "its heads are hidden_size / num_attention_heads wide, not head_dim 8"),
        ({"moe_intermediate_size": 32}, "its experts are of intermediate_size, not of 32"),
    ],
)
def test_what_transformers_has_no_room_for(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"transformers has no architecture for this model .*{message}"):
        zoo.export_checkpoint(zoo.create_model("jamba-tiny", **changes), tmp_path / "out")

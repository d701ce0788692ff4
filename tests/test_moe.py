"""The mixture of experts: against a dense reference, its losses by hand and transformers', and what must not run."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import zoo
from zoo.moe import MoE
from zoo.ops import grouped_linear as ops
from zoo.ops.grouped_linear import choose_grouped_linear, grouped_linear

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "channel_mixers": ["moe", "swiglu", "moe"]}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
B, T = 3, 7


def make_model(**changes):
    """A transformer with two layers of experts, its weights away from their initial values."""
    model = zoo.create_model("transformer-tiny", **SIZES | EXPERTS | changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_layer(**changes) -> MoE:
    return make_model(**changes).double().model.layers[0].channel_mixer


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ids(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (b, t), generator=torch.Generator().manual_seed(seed))


def tokens_with(mask: Tensor | None, t: int = T) -> zoo.Tokens:
    return zoo.Tokens(torch.arange(t)[None], mask=mask)


def run(layer: MoE, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return layer(x, {}, tokens_with(mask, x.shape[1]), None)[0]


def padding(b: int = B, t: int = T) -> Tensor:
    """Some padding in all rows but the last."""
    mask = torch.ones(b, t, dtype=torch.bool)
    mask[0, :3] = mask[1, 2] = False
    return mask


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def dense(layer: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by a probability that is 0 where it was not chosen."""
    p = torch.softmax(x @ layer.router.weight.T, dim=-1)
    least = p.sort(dim=-1, descending=True).values[..., layer.config.num_experts_per_tok - 1, None]
    p = p * (p >= least)
    if layer.config.norm_topk_prob:
        p = p / p.sum(-1, keepdim=True)
    y = torch.zeros_like(x)
    for e, (gate_up, down) in enumerate(zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True)):
        y = y + p[..., e, None] * gated(x, *gate_up.chunk(2), down)
    if (shared := layer.shared_experts) is not None:
        y = y + gated(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    return y


# -- one layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts_per_tok": 5, "norm_topk_prob": False},
        {"n_shared_experts": 2, "moe_intermediate_size": 10},
        {"num_experts": 40, "num_experts_per_tok": 3},
    ],
    ids=str,
)
def test_equals_the_dense_sum(changes, has_padding):
    layer, mask = make_layer(**changes), padding() if has_padding else None
    x = draw(B, T, 32).requires_grad_()
    y, expected = run(layer, x, mask), dense(layer, x)
    weight = draw(B, T, 32)
    if mask is not None:  # where the outputs of padding are nobody's business
        weight = weight * mask[..., None]
    assert ((y - expected) * weight).abs().max() <= 1e-12
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad((y * weight).sum(), wanted)
    for gradient, theirs in zip(found, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        assert (gradient - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@torch.no_grad()
def test_a_single_token():
    layer, x = make_layer(n_shared_experts=1), draw(1, 9, 32)
    alone = torch.cat([run(layer, token) for token in x.split(1, dim=1)], dim=1)
    assert (alone - run(layer, x)).abs().max() <= 1e-12


@pytest.fixture
def products(monkeypatch) -> list[int]:
    """Rows of every product with a matrix of an expert."""
    rows: list[int] = []

    def record(x: Tensor, *args) -> Tensor:
        rows.append(len(x))
        return F.linear(x, *args)

    monkeypatch.setattr(ops, "linear", record)
    return rows


def prefer(layer: MoE, *experts: int) -> None:
    """Let the router send every token of ones to some experts."""
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[list(experts)] = 1.0


def test_experts_without_tokens_do_not_run(products):
    layer = make_layer()
    prefer(layer, 1, 4)
    x = torch.ones(B, T, 32, dtype=torch.float64, requires_grad=True)
    run(layer, x).sum().backward()
    assert products == [B * T, B * T, B * T, B * T]  # two experts, each with two products
    used = layer.experts.gate_up_proj.grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [False, True, False, False, True]


def test_padding_takes_no_expert(products):
    layer, mask = make_layer(), padding()
    prefer(layer, 0, 3)
    x = torch.ones(B, T, 32, dtype=torch.float64, requires_grad=True)
    y = run(layer, x, mask)
    assert products == [mask.sum()] * 4
    assert (y[~mask] == 0).all()
    y.sum().backward()
    assert (x.grad[~mask] == 0).all()
    products.clear()
    assert (run(layer, x, torch.zeros_like(mask)) == 0).all()
    assert not products


def test_half_precision_routes_in_float32():
    layer = make_layer().bfloat16()
    logits = draw(B, T, 5).bfloat16()
    weights, chosen = layer.route(logits)
    expected = logits.float().softmax(-1).topk(2, dim=-1)
    assert weights.dtype == torch.float32
    assert torch.equal(chosen, expected.indices)
    assert torch.equal(weights, expected.values / expected.values.sum(-1, keepdim=True))
    assert run(layer, draw(B, T, 32).bfloat16(), padding()).dtype == torch.bfloat16


def test_autocast():
    layer, x = make_layer(n_shared_experts=1).float(), draw(B, T, 32).float()
    expected = run(layer, x, padding())
    with torch.autocast("cpu", torch.bfloat16):
        y = run(layer, x, padding())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 0.02 * expected.norm()


# -- grouped products --------------------------------------------------------------------------------------------------

ENDS = torch.tensor([0, 4, 4, 9])  # the first and the third group have no rows


def test_forms_of_grouped_products(monkeypatch):
    """One by one, as one operator, and PyTorch's for GPUs, which has a CPU form in float32: values and gradients."""
    x, weight, factor = draw(11, 8), draw(4, 12, 8), draw(11, 12)
    parts = zip(x.split([0, 4, 0, 5, 2]), [*weight, torch.zeros(12, 8, dtype=torch.float64)], strict=True)
    expected = torch.cat([rows @ matrix.T for rows, matrix in parts])

    def check(form, dtype: torch.dtype, tolerance: float) -> list[Tensor]:
        inputs = [part.to(dtype).requires_grad_() for part in (x, weight)]
        y = form(*inputs, ENDS)
        assert y.dtype == dtype
        assert (y - expected).abs().max() <= tolerance
        return torch.autograd.grad((y * factor.to(dtype)).sum(), inputs)

    wanted = check(grouped_linear, torch.float64, 1e-12)
    assert (wanted[0][9:] == 0).all()
    for form, dtype, tolerance in (
        (ops._operator, torch.float64, 1e-12),
        (ops._multiply_at_once, torch.float32, 1e-5),
    ):
        for found, gradient in zip(check(form, dtype, tolerance), wanted, strict=True):
            assert (found - gradient).abs().max() <= 2 * tolerance
    monkeypatch.setattr(ops, "choose_grouped_linear", lambda *_: ops.Choice("grouped_mm", "for the test"))
    with pytest.raises(RuntimeError, match="Double"):  # so it is torch's that runs
        grouped_linear(x, weight, ENDS)


def test_the_operator_is_a_good_citizen():
    inputs = (draw(11, 8).requires_grad_(), draw(4, 12, 8).requires_grad_(), ENDS)
    torch.library.opcheck(ops._operator, inputs)
    assert torch.autograd.gradcheck(lambda x, w: ops._operator(x, w, ENDS), inputs[:2])


def test_which_form_runs():
    assert choose_grouped_linear("cuda", torch.bfloat16).backend == "grouped_mm"
    assert choose_grouped_linear("cuda", torch.float32).backend == "loop"
    assert choose_grouped_linear("cpu", torch.bfloat16).backend == "loop"
    with zoo.ops.dispatch.use_backend("chunked"):
        assert choose_grouped_linear("cuda", torch.bfloat16).backend == "loop"
    rows = [row for row in zoo.kernel_report(make_model()) if row.op == "grouped_linear"]
    assert [row.module for row in rows] == [f"model.layers.{i}.channel_mixer.experts" for i in (0, 2)]


# -- losses ------------------------------------------------------------------------------------------------------------


def losses_of(layer: MoE, logits: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    return {loss.name: loss.value for loss in layer.auxiliary_losses({"router_logits.0": logits}, mask)}


@pytest.mark.parametrize("has_padding", [False, True])
def test_losses_by_hand_and_transformers(has_padding):
    """Of each row; transformers gives one of all rows together."""
    layer, logits = make_layer(), 3 * draw(B, T, 5)
    mask = padding() if has_padding else None
    found = losses_of(layer, logits, mask)
    for row in range(B):
        real = logits[row] if mask is None else logits[row, mask[row]]
        share, probability, z = [0.0] * 5, [0.0] * 5, 0.0
        for token in real.tolist():
            total = sum(math.exp(value) for value in token)
            z += math.log(total) ** 2 / len(real)
            for e, value in enumerate(token):
                probability[e] += math.exp(value) / total / len(real)
                share[e] += (sorted(token, reverse=True).index(value) < 2) / len(real)
        balance = 5 * sum(f * p for f, p in zip(share, probability, strict=True))
        assert abs(found["load_balancing_loss"][row] - balance) <= 1e-12
        assert abs(found["router_z_loss"][row] - z) <= 1e-12
        theirs = load_balancing_loss_func((logits[row],), 5, 2, None if mask is None else mask[row : row + 1])
        assert abs(found["load_balancing_loss"][row] - theirs) <= 1e-6


def test_an_even_router_has_the_least_loss():
    even = torch.eye(5).repeat(2, 1).roll(1, 0) + torch.eye(5).repeat(2, 1)  # each expert twice
    assert abs(losses_of(make_layer(), even[None], None)["load_balancing_loss"] - 2) <= 1e-6
    uneven = torch.tensor([[1.0, 1, 0, 0, 0]]).repeat(10, 1)
    assert losses_of(make_layer(), uneven[None], None)["load_balancing_loss"] > 2.2


def test_the_loss_of_a_model():
    """Added and reported in training: of each kind the mean over layers; in evaluation there is the labels' alone."""
    model, tokens = make_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.25), ids(2, 20)
    plain = model(tokens, labels=tokens)
    assert plain.aux_loss is None
    assert plain.aux_losses is None
    out = model.train()(tokens, labels=tokens)
    assert out.aux_losses.keys() == {"load_balancing_loss", "router_z_loss"}
    balance, z = out.aux_losses.values()
    assert abs(out.aux_loss - (0.5 * balance + 0.25 * z)) <= 1e-6
    assert abs(out.loss - (plain.loss + out.aux_loss)) <= 1e-6
    assert torch.equal(out.logits, plain.logits)
    logits = [layer.channel_mixer.router(hidden) for layer, hidden in _routed(model, tokens)]
    of_rows = [load_balancing_loss_func((row,), 5, 2) for x in logits for row in x]
    assert abs(balance - sum(of_rows) / 4) <= 1e-6
    assert abs(z - sum(x.logsumexp(-1).square().mean() for x in logits) / 2) <= 1e-5
    out.aux_loss.backward()
    assert all(
        layer.channel_mixer.router.weight.grad.abs().sum() > 0 for layer in (model.model.layers[i] for i in (0, 2))
    )


def _routed(model, tokens: Tensor) -> list:
    """The layers with experts, each beside what its router saw."""
    seen = []
    layers = [layer for layer in model.model.layers if isinstance(layer.channel_mixer, MoE)]
    handles = [
        layer.channel_mixer.router.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers
    ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return list(zip(layers, seen, strict=True))


@pytest.mark.parametrize("name", ["transformer-tiny", "jamba-tiny"])
def test_padding_has_no_part_in_the_losses(name):
    """Nor where recurrent layers above have moved it behind."""
    model = make_model() if name == "transformer-tiny" else zoo.create_model(name, vocab_size=97)
    model = model.double().train()
    tokens = ids(1, 12)
    expected = model(tokens, labels=tokens).aux_losses
    for place in (slice(5, 17), slice(0, 12)):
        padded, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
        padded[:, place], mask[:, place] = tokens, 1
        found = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).aux_losses
        assert all(abs(found[name] - value) <= 1e-12 for name, value in expected.items())


def test_accumulated_gradients():
    """As `Trainer` accumulates: a call is told how many tokens all predict, and counts by its share of them."""
    model = make_model(router_aux_loss_coef=1.0).double().train()
    calls = [ids(1, 9), ids(2, 12, seed=1)]
    count = sum(x[:, 1:].numel() for x in calls)
    for tokens in calls:
        alone = model(tokens, labels=tokens)
        out = model(tokens, labels=tokens, num_items_in_batch=count)
        share = tokens[:, 1:].numel() / count
        assert abs(out.loss - share * alone.loss) <= 1e-6  # transformers computes the labels' loss in float32


def test_rows_together_and_apart():
    """The losses of a batch are the means of those of its rows, weighted by what the rows are to predict."""
    model = make_model(router_aux_loss_coef=1.0).double().train()
    tokens = ids(3, 12)
    labels = tokens.index_fill(1, torch.arange(2), -100).clone()
    labels[1, 4:] = -100
    together = model(tokens, labels=labels)
    share = (labels[:, 1:] != -100).sum(1).double()
    share /= share.sum()
    apart = [model(tokens[i : i + 1], labels=labels[i : i + 1]).aux_losses for i in range(3)]
    for name, value in together.aux_losses.items():
        assert abs(value - sum(s * row[name] for s, row in zip(share, apart, strict=True))) <= 1e-12


# -- a model -----------------------------------------------------------------------------------------------------------


def gradients(model) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_training_compiled_and_checkpointed():
    model = make_model(n_shared_experts=1, router_aux_loss_coef=1.0).double().train()
    tokens, mask = ids(B, 20), padding(B, 20).long()
    inputs = {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    model(tokens, **inputs).loss.backward()
    expected = gradients(model)
    model.activation_checkpointing_enable()
    model(tokens, **inputs).loss.backward()
    checkpointed = gradients(model)
    model.gradient_checkpointing_disable()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, **inputs).loss.backward()
    compiled = gradients(model)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert (checkpointed[name] - gradient).abs().max() <= 1e-12 * scale, name
        assert (compiled[name] - gradient).abs().max() <= 1e-12 * scale, name


@torch.no_grad()
def test_saved_and_decoded(tmp_path):
    model, prompt = make_model(n_shared_experts=1).double(), ids(2, 10)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    expected = model.generate(prompt, use_cache=False, do_sample=False, max_new_tokens=12)
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=12), expected)


@torch.no_grad()
def test_taking_tokens_back_in_training():
    """What routers leave behind in training is recorded with the inputs of recurrent layers, and does them no harm."""
    model = zoo.create_model("jamba-tiny", vocab_size=97).double().train()
    tokens, rest = ids(2, 30), ids(2, 5, seed=1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for piece in tokens.split([20, 10], dim=1):
        model(piece, past_key_values=cache)
    cache.crop(-6)
    logits = model(rest, past_key_values=cache).logits
    expected = model(torch.cat([tokens[:, :24], rest], dim=1)).logits[:, 24:]
    assert (logits - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_initialisation():
    layer = zoo.create_model("transformer-tiny", channel_mixers=["moe"], initializer_range=0.03).model.layers[1]
    for name, parameter in layer.channel_mixer.named_parameters():
        assert abs(parameter.std() - 0.03) <= 0.03 * 5 / math.sqrt(2 * parameter.numel()), name
        assert abs(parameter.mean()) <= 0.03 * 5 / math.sqrt(parameter.numel()), name


def test_lora_reaches_the_experts():
    from peft import LoraConfig, get_peft_model

    base, tokens = make_model(), ids(2, 20)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(target_modules=["q_proj"], target_parameters=parameters, r=2, init_lora_weights=False)
    model = get_peft_model(base, config)
    model(tokens, labels=tokens).loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum(".experts." in name for name in adapters) == 2 * 2 * 2
    assert all(grad.abs().sum() > 0 for grad in adapters.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok \(3\) of num_experts \(2\)"),
        ({"n_shared_experts": -1}, "n_shared_experts must not be negative, got -1"),
        ({"router_z_loss_coef": -0.5}, "router_z_loss_coef must not be negative, got -0.5"),
        ({"num_experts": 0}, "num_experts must be positive, got 0"),
    ],
)
def test_fields_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        zoo.create_config("transformer-tiny", **changes)

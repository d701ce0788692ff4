"""What every model promises, for every `*-tiny` preset the registry lists: a new plugin is tested by existing.

Unless a test says otherwise, two ways of computing the same thing are compared by the norm of their difference relative
to the norm of what is expected, to `TOLERANCE`: float32 shows that it is usable, float64 that it is the same function.
(The norm, not the largest entry: a normalised output that is almost zero, as retention's at a first token whose query
and key are orthogonal, is a matter of rounding in float32 however it is computed. One wrong token is far above either.)
"""

import copy
import dataclasses
import functools
import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CompileConfig,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

import zoo
from zoo.cache import RECURRENT, RecurrentStateLayer
from zoo.nn import SoftmaxAttention
from zoo.ops import dispatch
from zoo.ops.dispatch import use_backend
from zoo.registry import find_preset

NAMES = zoo.list_models("*-tiny")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
VOCABULARY = 120
LENGTH = 70  # more than a chunk of the ops and more than two windows of the sliding preset

both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])


def promise(test=None, slow: tuple[str, ...] = ()):
    """Mark a test as a promise; where a plugin declares it unkept, the test must end in the declared error instead.

    Args:
        test: the test, which takes the name of a model.
        slow: models with which it takes long: there it is a slow test.
    """
    if test is None:
        return functools.partial(promise, slow=slow)

    @pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in slow)) for x in NAMES])
    @functools.wraps(test)
    def checked(name, **kwargs):
        reason = find_preset(name).unkept.get(test.__name__.removeprefix("test_"))
        if reason is None:
            return test(name, **kwargs)
        with pytest.raises((ValueError, NotImplementedError), match=re.escape(reason)):
            test(name, **kwargs)
        return None

    return checked


def test_an_unkept_promise_must_raise_its_reason(monkeypatch):
    """The mark itself: a declared gap counts as tested only if the call ends in the declared error."""
    declared = dataclasses.replace(find_preset(NAMES[0]), unkept={"wing": "it cannot fly"})
    monkeypatch.setattr(f"{__name__}.find_preset", lambda name: declared)

    def test_wing(name, error):
        if error:
            raise error

    wing = promise(test_wing)
    wing(name=NAMES[0], error=ValueError("sorry, it cannot fly"))
    for error in (None, ValueError("something else")):
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            wing(name=NAMES[0], error=error)


@functools.cache
def _trained_look(name: str) -> dict[str, Tensor]:
    """Weights that are away from their initial values, so that no norm is 1 and no projection 0."""
    torch.manual_seed(1)
    model = zoo.create_model(name, vocab_size=VOCABULARY)
    return {key: value + 0.05 * torch.randn_like(value) for key, value in model.state_dict().items()}


def make(name: str, dtype: torch.dtype = torch.float32, **overrides):
    model = zoo.create_model(name, vocab_size=VOCABULARY, **overrides)
    model.load_state_dict(_trained_look(name))
    return model.to(dtype).eval()


def smaller_config(name: str):
    """The preset with its last layer left out."""
    config = zoo.create_config(name, vocab_size=VOCABULARY)
    n = config.num_hidden_layers - 1
    mixers = {"mixers": config.mixers[:n], "channel_mixers": config.channel_mixers[:n]}
    return zoo.create_config(name, vocab_size=VOCABULARY, num_hidden_layers=n, **mixers)


def ids(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error <= TOLERANCE[expected.dtype], f"{what}: relative error {error:.1e}"


def in_pieces(model, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, DynamicCache]:
    """Logits of a sequence that is read in pieces with a cache, and the cache."""
    cache, logits = DynamicCache(config=model.config), []
    for piece in tokens.split(lengths, dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    return torch.cat(logits, dim=1), cache


def state_tensors(cache) -> list[Tensor]:
    tensors = []
    for layer in cache.layers:
        tensors += layer.states if isinstance(layer, RecurrentStateLayer) else (layer.keys, layer.values)
    return tensors


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    scale = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / torch.maximum(gradient.norm(), 1e-3 * scale)
        assert error <= TOLERANCE[gradient.dtype], f"gradient of {name}: relative error {error:.1e}"


# -- one sequence, read in any pieces ----------------------------------------------------------------------------------


@promise
@both_dtypes
@torch.no_grad()
def test_any_split(name, dtype):
    model, tokens = make(name, dtype), ids(2, LENGTH)
    whole = model(tokens, use_cache=True)
    two = [[n, LENGTH - n] for n in range(1, LENGTH)]
    three = [[a, b, LENGTH - a - b] for a, b in ((1, 1), (1, 64), (3, 5), (20, 33), (64, 1), (64, 5), (31, 32))]
    for lengths in [*two, *three, [1] * LENGTH]:
        logits, cache = in_pieces(model, tokens, lengths)
        assert_close(logits, whole.logits, f"logits, pieces {lengths}")
        for state, expected in zip(state_tensors(cache), state_tensors(whole.past_key_values), strict=True):
            assert_close(state.to(dtype), expected.to(dtype), f"state, pieces {lengths}")
        assert cache.get_seq_length() == LENGTH


@promise
@torch.no_grad()
def test_every_backend(name):
    model, tokens = make(name, torch.float64), ids(2, LENGTH)
    expected = model(tokens).logits
    with use_backend("reference"):
        assert_close(model(tokens).logits, expected)


@pytest.mark.slow
@promise
def test_the_kernels_of_gpus(name, monkeypatch):
    """Logits and gradients by what a GPU would choose, its Triton kernels interpreted, equal those of C++."""
    model, tokens = make(name), ids(2, 24)

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        return outputs.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = logits_and_gradient()
    monkeypatch.setitem(dispatch.KERNEL_FOR, "cpu", "triton")
    dispatch._choose_once.cache_clear()
    try:
        for use in zoo.kernel_report(model):
            has_kernel = (Path(dispatch.__file__).parent / use.op / "triton.py").exists()
            assert (use.backend == "triton") == has_kernel, use
        for actual, wanted in zip(logits_and_gradient(), expected, strict=True):
            assert_close(actual, wanted)
    finally:
        dispatch._choose_once.cache_clear()


@promise
@both_dtypes
@torch.no_grad()
def test_solo_equals_batched(name, dtype):
    model, tokens = make(name, dtype), ids(4, LENGTH)
    batched = model(tokens).logits
    for row in range(4):
        assert_close(model(tokens[row : row + 1]).logits, batched[row : row + 1], f"row {row}")


@promise
@torch.no_grad()
def test_causality(name):
    """Changing token t changes nothing before t, to the last bit, and something at every later place."""
    model, tokens = make(name), ids(1, LENGTH)
    before = model(tokens).logits
    for t in (0, 1, 31, 32, 63, 64, LENGTH - 1):
        changed = tokens.clone()
        changed[0, t] = changed[0, t] % (VOCABULARY - 1) + 1
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} leaks into the past"
        assert (after[:, t] != before[:, t]).any()


# -- padding -----------------------------------------------------------------------------------------------------------


def padded_rows(kind: str, lengths: list[int], width: int, seed: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of real tokens in a padded batch: tokens (b t), mask (b t), and the rows alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.long),
    )
    rows = []
    for row, length in enumerate(lengths):
        place = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "interior": torch.randperm(width, generator=generator)[:length].sort().values,
        }[kind]
        real = torch.randint(1, VOCABULARY, (length,), generator=generator)
        tokens[row, place], mask[row, place] = real, 1
        rows.append(real[None])
    return tokens, mask, rows


@promise
@both_dtypes
@pytest.mark.parametrize("lengths", [[50], [50, LENGTH, 1, 33]], ids=["batch1", "batch4"])
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_padding(name, dtype, kind, lengths):
    """Logits and input gradients of real tokens are those of the row alone; the gradient at padding is exactly 0."""
    model = make(name, dtype)
    tokens, mask, rows = padded_rows(kind, lengths, LENGTH)
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits
    sum(logits[row, mask[row].bool()].pow(2).sum() for row in range(len(rows))).backward()
    assert embeds.grad[mask == 0].abs().sum() == 0
    for row, real in enumerate(rows):
        alone = model.get_input_embeddings()(real).detach().requires_grad_()
        expected = model(inputs_embeds=alone).logits
        expected.pow(2).sum().backward()
        assert_close(logits[row, mask[row].bool()], expected[0], f"row {row}")
        assert_close(embeds.grad[row, mask[row].bool()], alone.grad[0], f"gradient of row {row}")


@promise
@both_dtypes
@pytest.mark.parametrize("kinds", list(itertools.product(["left", "right", "interior"], repeat=2)), ids="-".join)
@torch.no_grad()
def test_padding_in_a_continuation(name, dtype, kinds):
    model = make(name, dtype)
    first, first_mask, first_rows = padded_rows(kinds[0], [20, 45, 3], 45)
    second, second_mask, second_rows = padded_rows(kinds[1], [25, 7, 1], 25, seed=1)
    cache = DynamicCache(config=model.config)
    model(first, attention_mask=first_mask, past_key_values=cache)
    logits = model(second, attention_mask=torch.cat([first_mask, second_mask], dim=1), past_key_values=cache).logits
    for row, real in enumerate(zip(first_rows, second_rows, strict=True)):
        expected = model(torch.cat(real, dim=1)).logits[0, real[0].shape[1] :]
        assert_close(logits[row, second_mask[row].bool()], expected, f"row {row}")


@promise
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_padding_in_a_continuation_gets_no_gradient(name, kind):
    model = make(name)
    tokens, mask, _ = padded_rows(kind, [12], 20)
    cache = model(ids(1, 15), use_cache=True).past_key_values
    embeds = model.get_input_embeddings()(tokens).detach().requires_grad_()
    whole = torch.cat([torch.ones(1, 15, dtype=torch.long), mask], dim=1)
    logits = model(inputs_embeds=embeds, attention_mask=whole, past_key_values=cache).logits
    logits[mask.bool()].pow(2).sum().backward()
    assert (embeds.grad[mask == 0] == 0).all()
    assert (embeds.grad[mask == 1] != 0).any(dim=-1).all()


@promise
@torch.no_grad()
def test_a_row_may_have_nothing_new(name):
    """One row of a batch goes on while the other only has padding; positions are given, as `generate` gives them."""
    model, tokens, rest = make(name), ids(2, 20), ids(2, 6, seed=1)
    cache = model(tokens, use_cache=True).past_key_values
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, 20:26] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    for part in (slice(20, 26), slice(26, 29)):
        piece = torch.cat([rest, tokens[:, :3]], dim=1)[:, part.start - 20 : part.stop - 20]
        options = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
        logits = model(piece, past_key_values=cache, **options).logits
    assert_close(logits[:1], model(torch.cat([tokens, rest, tokens[:, :3]], dim=1)).logits[:1, -3:], "row 0")
    assert_close(logits[1:], model(torch.cat([tokens, tokens[:, :3]], dim=1)).logits[1:, -3:], "row 1")


@promise
@torch.no_grad()
def test_padding_token_by_token(name):
    """A single token may be padding too, as when one row of a batch has nothing to say."""
    model = make(name)
    tokens, mask, rows = padded_rows("interior", [12, 20], 20)
    cache = DynamicCache(config=model.config)
    logits = torch.cat(
        [model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in range(20)],
        dim=1,
    )
    for row, real in enumerate(rows):
        assert_close(logits[row, mask[row].bool()], model(real).logits[0], f"row {row}")


@promise
def test_nothing_to_read_is_refused(name):
    with pytest.raises(ValueError, match="length 0"):
        make(name)(torch.zeros(1, 0, dtype=torch.long))


def test_a_mask_that_does_not_fit_is_refused():
    model = make(NAMES[0])
    with pytest.raises(ValueError, match=r"\(2, 5\).*must be \(2, 6\)"):
        model(ids(2, 6), attention_mask=torch.tensor([[0, 1, 1, 1, 1]] * 2))


# -- packed documents --------------------------------------------------------------------------------------------------


DOCUMENTS = [3, 1, 40, 21, 5]


@promise
@both_dtypes
@pytest.mark.parametrize("mask", [None, "ones", "padded"])
def test_packing(name, dtype, mask):
    """Documents that position_ids alone tell apart have the logits, loss and gradients they have alone.

    Gradients are compared in float64: documents of one token meet the ill-conditioned case named above.
    """
    model, row = make(name, dtype), ids(2, sum(DOCUMENTS))
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None].expand(2, -1)
    documents = list(zip(row.split(DOCUMENTS, dim=1), DOCUMENTS, strict=True))
    kwargs = {"position_ids": positions}
    place = torch.arange(sum(DOCUMENTS))
    packed = row
    if mask == "ones":
        kwargs["attention_mask"] = torch.ones_like(row)
    elif mask == "padded":  # padding in front, inside a document, between two, and behind
        place = place + 2 + (place >= 20).long() + 3 * (place >= 44).long()
        width = sum(DOCUMENTS) + 8
        packed, kwargs = torch.zeros(2, width, dtype=torch.long), {}
        packed[:, place] = row
        kwargs["attention_mask"] = torch.zeros_like(packed).index_fill(1, place, 1)
        kwargs["position_ids"] = torch.zeros_like(packed).index_copy(1, place, positions.contiguous())
    out = model(packed, **kwargs)
    assert out.past_key_values is None
    expected = torch.cat([model(document).logits for document, _ in documents], dim=1)
    assert_close(out.logits[:, place], expected, "logits")
    if mask != "padded":  # with padding inside a row, which token comes next is a matter of the labels
        count = sum(n - 1 for n in DOCUMENTS)
        alone = sum(model(document, labels=document).loss * (n - 1) / count for document, n in documents if n > 1)
        assert_close(model(packed, labels=packed, **kwargs).loss, alone, "loss")
    if dtype == torch.float64:
        weight = torch.randn(expected.shape, dtype=dtype)
        (out.logits[:, place] * weight).sum().backward()
        together = gradients(model)
        model.zero_grad()
        (expected * weight).sum().backward()
        assert_same_gradients(together, gradients(model))


STREAM = [[13, 1, 24, 4, 8], [26, 14, 1, 9]]
WINDOWS = [14, 12, 1, 13, 10]  # a document goes on in both rows, or starts in one of them, or in both


@promise
def test_documents_in_windows(name):
    """A stream of packed documents, cut anywhere, gives what each document gives alone, if every layer is recurrent.

    Logits, the state that is left of the last document, and gradients, which go back through all windows.
    """
    model, tokens = make(name, torch.float64), ids(2, sum(WINDOWS))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in STREAM])
    cache, logits = DynamicCache(config=model.config), []
    windows = list(zip(tokens.split(WINDOWS, dim=1), positions.split(WINDOWS, dim=1), strict=True))
    if set(model.config.layer_types) != {RECURRENT}:
        for kwargs in ({"use_cache": True}, {"past_key_values": cache}):
            with pytest.raises(ValueError, match="use_cache=False"):
                model(tokens, position_ids=positions, **kwargs)
        model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match="use a new cache"):
            model(tokens[:, :6], position_ids=torch.arange(6)[None], past_key_values=cache)
        return
    for window, places in windows:
        logits.append(model(window, position_ids=places, past_key_values=cache).logits)
    alone = [[model(x[None], use_cache=True) for x in row.split(n)] for row, n in zip(tokens, STREAM, strict=True)]
    logits = torch.cat(logits, dim=1)
    expected = torch.cat([torch.cat([out.logits for out in row], dim=1) for row in alone])
    assert_close(logits, expected, "logits")
    last = zip(*(state_tensors(row[-1].past_key_values) for row in alone), strict=True)
    for state, rows in zip(state_tensors(cache), last, strict=True):
        assert_close(state.double(), torch.cat(rows).double(), "state")
    weight = torch.randn(expected.shape, dtype=expected.dtype)
    (logits * weight).sum().backward()
    found = gradients(model)
    model.zero_grad()
    (expected * weight).sum().backward()
    assert_same_gradients(found, gradients(model))

    cache.activate_past_recording()
    with pytest.raises(ValueError, match="records takes one document a row"):
        model(tokens, position_ids=positions, past_key_values=cache)


@promise
def test_packed_rows_are_told_by_their_positions(name):
    with pytest.raises(ValueError, match="position_ids"):
        make(name)(ids(1, 6), seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]]))


# -- gradients through a carried state ---------------------------------------------------------------------------------


@promise
@both_dtypes
def test_carried_state_carries_gradients(name, dtype):
    model, tokens = make(name, dtype), ids(2, LENGTH)
    whole = model(tokens).logits
    whole.pow(2).mean().backward()
    expected = gradients(model)
    model.zero_grad()
    logits, _ = in_pieces(model, tokens, [20, 1, 30, LENGTH - 51])
    logits.pow(2).mean().backward()
    assert_same_gradients(gradients(model), expected)


@promise
def test_detached_state_carries_values_alone(name):
    model, tokens = make(name), ids(2, 30)
    expected = model(tokens).logits[:, 20:]
    embeds = model.get_input_embeddings()(tokens[:, :20]).detach().requires_grad_()
    for detached in (False, True):
        cache = DynamicCache(config=model.config)
        zoo.detach_state(cache)  # an empty one too
        model(inputs_embeds=embeds, past_key_values=cache)
        if detached:
            zoo.detach_state(cache)
        logits = model(tokens[:, 20:], past_key_values=cache).logits
        assert_close(logits, expected)
        (gradient,) = torch.autograd.grad(logits.pow(2).sum(), embeds, allow_unused=True)
        assert (gradient is None) is detached


@promise
def test_an_overridden_configuration_is_whole(name, tmp_path):
    """What from_pretrained changes in a configuration is checked like what was there from the start."""
    make(name).save_pretrained(tmp_path)
    config = smaller_config(name)
    changes = {key: getattr(config, key) for key in ("num_hidden_layers", "mixers", "channel_mixers")}
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    assert len(smaller.model.layers) == config.num_hidden_layers
    assert smaller.config.layer_types == config.layer_types == [x.layer_type for x in smaller.model.keepers()]
    smaller.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mixers names"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=config.num_hidden_layers - 1)


@promise
def test_gradient_checkpointing(name):
    model, tokens = make(name).train(), ids(2, LENGTH)
    model(tokens, labels=tokens).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    assert_same_gradients(gradients(model), expected)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(tokens, past_key_values=DynamicCache(config=model.config))
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(tokens)


@promise
def test_every_parameter_gets_a_gradient(name):
    model, tokens = make(name).train(), ids(2, LENGTH)
    model(tokens, labels=tokens).loss.backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@promise(slow=("armt-tiny", "lm2-tiny", "titans-tiny"))
def test_compiled_training(name):
    """A training step, packed rows included, is one graph."""
    torch._dynamo.reset()
    model, tokens = make(name).train(), ids(2, LENGTH)
    positions = torch.arange(LENGTH).remainder(30)[None].expand(2, -1)
    model(tokens, labels=tokens, position_ids=positions).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(tokens, labels=tokens, position_ids=positions).loss.backward()
    assert_same_gradients(gradients(model), expected)


@promise
def test_autocast(name):
    """Under bfloat16 autocast the loss stays near and recurrent states stay float32."""
    model, tokens = make(name), ids(2, LENGTH)
    expected = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens, use_cache=True)
    out.loss.backward()
    assert (out.loss - expected).abs() <= 0.02 * expected
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for keeper, layer in zip(model.model.keepers(), out.past_key_values.layers, strict=True):
        if isinstance(layer, RecurrentStateLayer):
            declared = keeper.state_shapes(keeper.config, keeper.layer_idx).values()
            assert all(s.dtype == d for s, (_, d) in zip(layer.states, declared, strict=True) if d is not None)


@promise
def test_parallel_plans_name_real_modules(name):
    model = make(name)
    modules = dict(model.named_modules())
    for pattern in model.config.base_model_tp_plan or {}:
        assert any(re.fullmatch(re.escape(f"model.{pattern}").replace(r"\*", r"\d+"), key) for key in modules), pattern
    assert "lm_head" in modules
    assert type(model.model.layers[0]).__name__ in model._no_split_modules


@promise
@torch.no_grad()
def test_tied_weights(name, tmp_path):
    for tied in (True, False):
        model = zoo.create_model(name, vocab_size=VOCABULARY, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(tied))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


@promise
def test_parameter_groups_hold_every_parameter_once(name):
    model = make(name)
    grouped = [p for group in model.parameter_groups(learning_rate=1e-3, weight_decay=0.1) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


# -- loss --------------------------------------------------------------------------------------------------------------


@promise
def test_labels_with_ignored_positions(name):
    model, tokens = make(name), ids(2, 20)
    labels = tokens.clone()
    labels[0, :7] = labels[1, 13:] = -100
    out = model(tokens, labels=labels)
    predicted, target = out.logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1)
    assert_close(out.loss, torch.nn.functional.cross_entropy(predicted[target != -100], target[target != -100]))


def _loss_in_float64(logits, labels, num_items_in_batch=None, shift_labels=None, **unused) -> Tensor:
    """transformers' loss, but for the logits, which that rounds to float32."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@promise
def test_loss_without_logits(name):
    """It comes straight from the hidden states, with all gradients and auxiliary losses, and is the same."""
    model, tokens = make(name, torch.float64).train(), ids(2, 24)
    model.loss_function = _loss_in_float64
    packed = {"labels": tokens, "position_ids": torch.arange(24).remainder(10)[None].expand(2, -1)}
    shifted = {"shift_labels": ids(2, 24, seed=1).index_fill(1, torch.arange(3, 9), -100), "num_items_in_batch": 50}
    for kwargs in (packed | {"z_loss": 0.1}, shifted | {"z_loss": 0.1}, shifted):
        expected = model(tokens, **kwargs)
        expected.loss.backward()
        wanted = gradients(model)
        model.zero_grad()
        out = model(tokens, **kwargs, skip_logits=True)
        assert out.logits is None
        assert_close(out.loss, expected.loss)
        assert out.aux_loss == expected.aux_loss
        out.loss.backward()
        assert_same_gradients(gradients(model), wanted)
        model.zero_grad()


def test_skipped_logits_leave_a_loss():
    model, tokens = make(NAMES[0]), ids(1, 5)
    with pytest.raises(ValueError, match="pass labels or shift_labels"):
        model(tokens, skip_logits=True)
    with pytest.raises(ValueError, match="none for logits_to_keep"):
        model(tokens, labels=tokens, skip_logits=True, logits_to_keep=1)


@promise
@torch.no_grad()
def test_logits_to_keep(name):
    model, tokens = make(name), ids(2, 20)
    expected = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=3).logits, expected[:, -3:])
    assert_close(model(tokens, logits_to_keep=torch.tensor([0, 7])).logits, expected[:, [0, 7]])


@promise
@torch.no_grad()
def test_recorded_outputs(name):
    """Hidden states of every layer, and from eager attention, which equals SDPA, its weights."""
    model, tokens = make(name, attn_implementation="eager"), ids(2, LENGTH)
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert len(out.attentions or ()) == sum(isinstance(module, SoftmaxAttention) for module in model.modules())
    assert_close(make(name, attn_implementation="sdpa")(tokens).logits, out.logits)


# -- files -------------------------------------------------------------------------------------------------------------


def _distinct(model) -> dict[str, Tensor]:
    """Every parameter of the model set to random values of its own."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return {key: value.clone() for key, value in model.state_dict().items()}


@promise
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=["default", "bf16", "map"]
)
def test_save_and_load(name, options, tmp_path):
    model = zoo.create_model(name, vocab_size=VOCABULARY)
    saved = _distinct(model)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert type(loaded) is type(model)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, saved[key].to(value.dtype)), key


@promise
def test_load_with_a_missing_key(name, tmp_path):
    model = zoo.create_model(name, vocab_size=VOCABULARY, tie_word_embeddings=False)
    saved = _distinct(model)
    for missing in [key for key in saved if ".layers." not in key or ".layers.0." in key]:
        state = {key: value for key, value in saved.items() if key != missing}
        model.save_pretrained(tmp_path, state_dict=state)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {missing}
        loaded = loaded.state_dict()
        assert not torch.equal(loaded[missing], saved[missing])
        for key in state:
            assert torch.equal(loaded[key], saved[key]), f"{key} changed because {missing} was missing"


@promise
def test_model_on_meta_is_initialised_like_any(name):
    """Weights do not depend on values that a constructor wrote: those are lost when a model is built without memory."""
    torch.manual_seed(0)
    expected = zoo.create_model(name)
    with torch.device("meta"):
        model = type(expected)(expected.config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    for key, value in model.state_dict().items():
        deviation = expected.state_dict()[key].std(correction=0)
        assert abs(value.std(correction=0) - deviation) <= 4 * deviation / value.numel() ** 0.5 + 1e-6, key


@promise
@torch.no_grad()
def test_state_file(name, tmp_path):
    """A saved state continues as if nothing had happened, and forks into several continuations."""
    model, prompt, rest = make(name), ids(1, 40), ids(3, 25, seed=1)
    cache = model(prompt, use_cache=True).past_key_values
    zoo.save_state(cache, tmp_path / "state.safetensors")
    loaded = zoo.load_state(tmp_path / "state.safetensors", model)
    expected = torch.cat([model(torch.cat([prompt, row[None]], dim=1)).logits[:, 40:] for row in rest])
    assert torch.equal(
        model(rest[:1], past_key_values=copy.deepcopy(loaded)).logits, model(rest[:1], past_key_values=cache).logits
    )
    loaded.batch_repeat_interleave(3)
    assert_close(model(rest, past_key_values=loaded).logits, expected)


@promise
def test_state_file_of_another_model_is_refused(name, tmp_path):
    path = tmp_path / "state.safetensors"
    model = make(name)
    with pytest.raises(ValueError, match="empty"):
        zoo.save_state(DynamicCache(config=model.config), path)
    zoo.save_state(model(ids(1, 5), use_cache=True).past_key_values, path)
    smaller = AutoModelForCausalLM.from_config(smaller_config(name))
    held, wanted = len(model.config.layer_types), len(smaller.config.layer_types)
    reason = f"{held} layers, the model has {wanted}" if held != wanted else "does not fit layer 0"
    with pytest.raises(ValueError, match=reason):
        zoo.load_state(path, smaller)
    wider = zoo.create_model(name, hidden_size=2 * model.config.hidden_size)
    with pytest.raises(ValueError, match="does not fit layer 0"):
        zoo.load_state(path, wider)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        zoo.load_state(path, model)
    with pytest.raises(FileNotFoundError):
        zoo.load_state(tmp_path / "none", model)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@promise
@torch.no_grad()
def test_state_bytes(name, tmp_path):
    model, measured = make(name), {}
    is_recurrent = set(model.config.layer_types) == {RECURRENT}
    half = make(name, dtype=torch.bfloat16)
    cache = half(ids(2, 40), use_cache=True).past_key_values
    size = sum(x.numel() * x.element_size() for x in state_tensors(cache)) / 2
    half.save_pretrained(tmp_path)  # which turns the dtype of the configuration into a name
    assert size == zoo.state_bytes(half.config, 40)
    for length in (40, 80):
        cache = model(ids(2, length), use_cache=True).past_key_values
        measured[length] = sum(x.numel() * x.element_size() for x in state_tensors(cache)) / 2
        assert measured[length] == zoo.state_bytes(model.config, length)
        assert measured[length] == zoo.state_bytes(model.config, length, torch.float32)
    if is_recurrent:
        assert measured[40] == measured[80] == zoo.state_bytes(model.config)
    else:
        assert measured[40] < measured[80]
        with pytest.raises(ValueError, match="length"):
            zoo.state_bytes(model.config)


# -- generation --------------------------------------------------------------------------------------------------------


def without_cache(model, prompt: Tensor, **kwargs) -> Tensor:
    torch.manual_seed(0)
    return model.generate(prompt, use_cache=False, max_new_tokens=24, **kwargs)


def with_cache(model, prompt: Tensor, **kwargs) -> Tensor:
    torch.manual_seed(0)
    return model.generate(prompt, **{"max_new_tokens": 24, **kwargs})


@promise
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 3},
    ],
    ids=["greedy", "sampling", "beam", "several", "several_beams"],
)
def test_generation(name, options):
    model, prompt = make(name, torch.float64), ids(2, 50)
    expected = without_cache(model, prompt, **options)
    assert torch.equal(with_cache(model, prompt, **options), expected)
    assert torch.equal(with_cache(model, prompt, prefill_chunk_size=7, **options), expected)


@promise
def test_generation_from_a_padded_batch(name):
    model = make(name, torch.float64)
    tokens, mask, rows = padded_rows("left", [50, 3, 31], 50)
    together = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=24)
    chunked = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=24, prefill_chunk_size=7)
    assert torch.equal(chunked, together)
    for row, real in enumerate(rows):
        assert torch.equal(together[row, 50:], without_cache(model, real, do_sample=False)[0, real.shape[1] :])


@promise
def test_generation_with_candidates(name):
    """Prompt lookup and assisted decoding give what greedy decoding gives, whatever the assistant proposes."""
    model, prompt = make(name, torch.float64), ids(1, 12).repeat(1, 6)
    expected = without_cache(model, prompt, do_sample=False)
    assert torch.equal(with_cache(model, prompt, do_sample=False, prompt_lookup_num_tokens=5), expected)
    torch.manual_seed(3)
    stranger = AutoModelForCausalLM.from_config(smaller_config(name)).double().eval()
    for assistant in (stranger, make(name, torch.float64)):
        assert torch.equal(with_cache(model, prompt, do_sample=False, assistant_model=assistant), expected)


@promise
@torch.no_grad()
def test_inputs_embeds(name):
    model, prompt = make(name, torch.float64), ids(2, 30)
    embeds = model.get_input_embeddings()(prompt)
    assert_close(model(inputs_embeds=embeds).logits, model(prompt).logits)
    expected = without_cache(model, prompt, do_sample=False)[:, 30:]
    assert torch.equal(with_cache(model, None, inputs_embeds=embeds, do_sample=False), expected)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(prompt, inputs_embeds=embeds)


@promise
def test_a_conversation_goes_on_from_its_cache(name):
    model, prompt, turn = make(name, torch.float64), ids(2, 30), ids(2, 9, seed=1)
    for more in (turn[:, :0], turn):
        first = model.generate(prompt, do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
        so_far = torch.cat([first.sequences, more], dim=1)
        expected = without_cache(model, so_far, do_sample=False)
        assert torch.equal(with_cache(model, so_far, past_key_values=first.past_key_values, do_sample=False), expected)


@promise
def test_static_cache(name):
    model, prompt = make(name, torch.float64), ids(2, 50)
    expected = without_cache(model, prompt, do_sample=False)
    assert torch.equal(with_cache(model, prompt, do_sample=False, cache_implementation="static"), expected)
    chunked = with_cache(model, prompt, do_sample=False, cache_implementation="static", prefill_chunk_size=7)
    assert torch.equal(chunked, expected)
    tokens, mask, _ = padded_rows("left", [50, 3, 31], 50)
    dynamic = with_cache(model, tokens, attention_mask=mask, do_sample=False)
    static = with_cache(model, tokens, attention_mask=mask, do_sample=False, cache_implementation="static")
    assert torch.equal(static, dynamic)


@promise
@torch.no_grad()
def test_compiled_forward_with_a_cache(name):
    """A model that is compiled whole still generates, positions and all."""
    torch._dynamo.reset()
    model, prompt = make(name, torch.float64), ids(2, 20)
    expected = without_cache(model, prompt, do_sample=False)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(with_cache(model, prompt, do_sample=False), expected)


@promise
def test_compiled_decoding(name):
    """Decoding compiles into one graph that is not compiled again from step to step."""
    torch._dynamo.reset()
    model, prompt = make(name, torch.float64), ids(2, 20)
    expected = without_cache(model, prompt, do_sample=False)
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    compiled = with_cache(model, prompt, do_sample=False, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -- the cache's own operations ----------------------------------------------------------------------------------------


@promise
@torch.no_grad()
def test_a_cache_of_another_kind_is_refused(name):
    model = make(name)
    other = smaller_config(name)
    caches = []
    if other.layer_types != model.config.layer_types:  # an empty cache for a stack that is one mixer fits any depth
        caches = [DynamicCache(config=other), StaticCache(config=other, max_cache_len=9)]
    if RECURRENT in model.config.layer_types:
        caches.append(DynamicCache())
    else:
        assert_close(model(ids(1, 5), past_key_values=DynamicCache()).logits, model(ids(1, 5)).logits)
    for cache in caches:
        with pytest.raises(ValueError, match="make it with DynamicCache"):
            model(ids(1, 5), past_key_values=cache)


@promise
@torch.no_grad()
def test_crop(name):
    """Tokens that are taken back leave no trace, whether they came in one call or one by one."""
    model, tokens, rest = make(name, torch.float64), ids(2, 60), ids(2, 10, seed=1)
    for lengths, back in (([50, 10], 4), ([50, 10], 10), ([50, 6, 4], 7), ([50] + [1] * 10, 6), ([60], 12), ([60], 0)):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        for piece in tokens.split(lengths, dim=1):
            model(piece, past_key_values=cache)
        cache.crop(-back)
        assert cache.get_seq_length() == 60 - back
        logits = model(rest, past_key_values=cache).logits
        expected = model(torch.cat([tokens[:, : 60 - back], rest], dim=1)).logits[:, -10:]
        assert_close(logits, expected, f"pieces {lengths}, {back} taken back")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(tokens[:, :50], past_key_values=cache)
    for t in range(50, 60):  # the batch is changed while the cache records
        model(tokens[:, t : t + 1], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-4)
    expected = model(torch.cat([tokens[[1, 0], :56], rest], dim=1)).logits[:, -10:]
    assert_close(model(rest, past_key_values=cache).logits, expected, "reordered while recording")
    if any(isinstance(layer, RecurrentStateLayer) for layer in cache.layers):
        cache.crop(0)
        with pytest.raises(RuntimeError, match="cannot roll back 65"):
            cache.crop(-65)


@promise
@torch.no_grad()
def test_a_copied_cache_does_not_carry_the_model(name):
    model, tokens = make(name), ids(1, 30)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(tokens[:, :20], past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert len(pickle.dumps(copied)) <= 2 * zoo.state_bytes(model.config, 20) + 10_000
    assert_close(model(tokens[:, 20:], past_key_values=copied).logits, model(tokens).logits[:, 20:])


@promise
@torch.no_grad()
def test_reset(name):
    model, tokens = make(name), ids(2, 30)
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80)]
    for cache in caches:
        model(ids(2, 50, seed=1), past_key_values=cache)
        if RECURRENT in model.config.layer_types:
            with pytest.raises(ValueError, match="carries 2 rows, the call has 3"):
                model(ids(3, 5), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits, type(cache).__name__)


@promise
@torch.no_grad()
def test_batch_operations(name):
    model, tokens, rest = make(name), ids(3, 40), ids(6, 12, seed=1)

    def check(change, rows: list[int]) -> None:
        cache = model(tokens, use_cache=True).past_key_values
        change(cache)
        expected = model(torch.cat([tokens[rows], rest[: len(rows)]], dim=1)).logits[:, 40:]
        assert_close(model(rest[: len(rows)], past_key_values=cache).logits, expected, str(rows))

    check(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])
    check(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1])
    check(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])


# -- low precision -----------------------------------------------------------------------------------------------------


@promise
def test_bfloat16_with_extreme_gates(name):
    """Large activations drive gates to their ends; losses and gradients stay finite, recurrent states float32."""
    model, tokens = make(name).to(torch.bfloat16), ids(2, LENGTH)
    embeds = (50 * model.get_input_embeddings()(tokens)).detach().requires_grad_()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(4)
    out = model(inputs_embeds=embeds, labels=tokens, use_cache=True)
    out.loss.backward()
    assert out.loss.isfinite()
    assert embeds.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for keeper, layer in zip(model.model.keepers(), out.past_key_values.layers, strict=True):
        if isinstance(layer, RecurrentStateLayer):
            declared = keeper.state_shapes(keeper.config, keeper.layer_idx).values()
            for state, (_, dtype) in zip(layer.states, declared, strict=True):
                assert state.dtype == (dtype or torch.bfloat16)


# -- the rest of Hugging Face ------------------------------------------------------------------------------------------


@promise
@torch.no_grad()
def test_classification_heads(name):
    tokens, mask, rows = padded_rows("right", [20, 30, 7], 30)
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        config = zoo.create_config(name, vocab_size=VOCABULARY, num_labels=3, pad_token_id=0)
        model = auto.from_config(config).eval()
        logits = model(tokens, attention_mask=mask).logits
        for row, real in enumerate(rows):
            expected = model(real).logits[0]
            assert_close(logits[row][: real.shape[1]] if logits.dim() == 3 else logits[row], expected, f"row {row}")


@promise
def test_text_generation_pipeline(name, tokenizer):
    model = zoo.create_model(name, vocab_size=len(tokenizer))
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = generate(["import torch", "def"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert [text[0]["generated_text"][:3] for text in texts] == ["imp", "def"]
    alone = generate("def", max_new_tokens=5, do_sample=False)
    assert alone[0]["generated_text"] == texts[1][0]["generated_text"]


@promise
def test_trainer(name, tmp_path):
    model = make(name)
    rows = [{"input_ids": row, "labels": row} for row in ids(8, 16)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, logging_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@promise
def test_lora(name):
    from peft import LoraConfig, get_peft_model

    base, tokens = make(name), ids(2, 20)
    modules = dict(base.named_modules())
    linear = [key for key, module in modules.items() if isinstance(module, torch.nn.Linear)]
    mixers = {  # the sLSTM has block-diagonal weights only, which are no linear modules
        key
        for key, module in modules.items()
        if isinstance(module, zoo.Mixer) and any(key in other for other in linear)
    }
    config = LoraConfig(target_modules=list(find_preset(name).lora_targets), r=4, init_lora_weights=False)
    model = get_peft_model(base, config)
    adapters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all(any(mixer in key for key in adapters) for mixer in mixers)
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters.values())
    with torch.no_grad():
        model.eval()
        expected = model(tokens).logits
        assert_close(model.merge_and_unload()(tokens).logits, expected)


def test_unkept_promises_are_promises():
    known = {key.removeprefix("test_") for key in globals()}
    for name in NAMES:
        assert set(find_preset(name).unkept) <= known, name

"""Every form of every op on every case, against the reference in float64: outputs, final state, all gradients.

Each op lists its cases in `zoo/ops/<op>/cases.py`; a new op or case is tested without an edit here. Triton runs
interpreted, on the same cases at fewer lengths, since the interpreter takes up to a second a call.
"""

import functools
import importlib
from typing import NamedTuple

import pytest
import torch
from torch.autograd import gradcheck

from zoo.ops.linear_cross_entropy import linear_cross_entropy
from zoo.ops.testing import (
    TOLERANCE,
    Case,
    Draw,
    Inputs,
    assert_close,
    differentiable,
    flatten,
    largest_errors,
    map_tensors,
    op_names,
    run_case,
    split_case,
    to_dtype,
)

LENGTHS = (1, 2, 63, 64, 65, 200)
PACKINGS = ("plain", "mask", "segments", "both")
ROWS = 3
CASES = [(op, case) for op in op_names() for case in importlib.import_module(f"zoo.ops.{op}.cases").CASES]


def forms_of(op: str) -> tuple[str, ...]:
    return importlib.import_module(f"zoo.ops.{op}").OP.forms


def each(*skip: str, slow: tuple[str, ...] = ()):
    """Parametrise a test by op, case and form, without the forms named; those in `slow` are slow tests."""
    values = [
        pytest.param(op, case, form, id=f"{op}-{case.name}-{form}", marks=[pytest.mark.slow] * (form in slow))
        for op, case in CASES
        for form in forms_of(op)
        if form not in skip
    ]
    return pytest.mark.parametrize(("op", "case", "form"), values)


def dtypes_of(form: str) -> tuple[torch.dtype, ...]:
    """The precisions a form computes in, the highest first."""
    return (torch.float32,) if form == "triton" else (torch.float64, torch.float32)


def draw_packing(t: int) -> dict[str, dict[str, torch.Tensor]]:
    draw = Draw(1000 + t)
    mask, segments = {"mask": draw.mask(ROWS, t)}, {"segments": draw.segments(ROWS, t)}
    return dict(zip(PACKINGS, ({}, mask, segments, mask | segments), strict=True))


class Example(NamedTuple):
    """Inputs and what the reference makes of them in float64."""

    inputs: Inputs
    packing: dict[str, torch.Tensor]
    exact: dict[str, list[torch.Tensor]]


def work_out(case: Case, inputs: Inputs, packing: dict[str, torch.Tensor]) -> Example:
    return Example(inputs, packing, run_case(case, to_dtype(inputs, torch.float64), "reference", **packing))


@functools.lru_cache(maxsize=16)  # for the next form
def example(case: Case, t: int, packing: str, dtype: torch.dtype = torch.float32, small: bool = False) -> Example:
    """Inputs rounded to a dtype, so that all precisions from there up are given the same."""
    return work_out(case, to_dtype(case.draw(Draw(t, small=small), t), dtype), draw_packing(t)[packing])


@functools.lru_cache(maxsize=16)
def random_example(case: Case, seed: int, small: bool = False) -> Example:
    """Sizes from 1 up, of which hardly any is a power of two, and lengths to match."""
    draw = Draw(seed, random_sizes=True, small=small)
    t = draw.size(100)
    inputs = to_dtype(case.draw(draw, t), torch.float32)
    return work_out(case, inputs, {"mask": draw.mask(ROWS, t), "segments": draw.segments(ROWS, t)})


def assert_exact(case: Case, form: str, given: Example, *dtypes: torch.dtype) -> None:
    for dtype in dtypes or dtypes_of(form):
        found = run_case(case, to_dtype(given.inputs, dtype), form, **given.packing)
        for kind, error in largest_errors(found, given.exact).items():
            assert error <= TOLERANCE[dtype], f"{dtype}, {', '.join(given.packing) or 'plain'}, {kind}: {error:.1e}"


@each("reference", "triton")
@pytest.mark.parametrize("t", LENGTHS)
def test_equals_reference(op, case, form, t):
    for packing in PACKINGS:
        assert_exact(case, form, example(case, t, packing))


@each("reference", "chunked", "native")
@pytest.mark.parametrize("t", [1, 2, 17])
def test_triton_equals_reference(op, case, form, t):
    """Interpreted kernels take chunks of 16 tokens."""
    for packing in ("both",) if t > 2 else ("plain", "both"):
        assert_exact(case, form, example(case, t, packing))


@pytest.mark.slow
@each("reference", "chunked", "native")
@pytest.mark.parametrize("t", [63, 64, 65, 200])
def test_triton_equals_reference_at_length(op, case, form, t):
    assert_exact(case, form, example(case, t, "both"))


@each("reference", "chunked", "triton")
@pytest.mark.parametrize("t", [1, 65])
def test_without_gradients(op, case, form, t):
    """As in decoding: C++ is then called directly, and may take a shorter way for a single token."""
    for packing in PACKINGS:
        given = example(case, t, packing)
        for dtype in dtypes_of(form):
            with torch.no_grad():
                found = flatten(case.call(to_dtype(given.inputs, dtype), form, **given.packing))
            for x, exact in zip(found, given.exact["outputs"], strict=True):
                assert_close(x, exact, TOLERANCE[dtype])


@each("reference", slow=("triton",))
def test_low_precision_inputs(op, case, form):
    """bfloat16 inputs: the state stays in float32, and the result is that of the rounded inputs, nearly."""
    t = 17 if form == "triton" else 65
    assert_exact(case, form, example(case, t, "plain", torch.bfloat16), torch.bfloat16)
    inputs = to_dtype(case.draw(Draw(0), 3), torch.bfloat16)
    _, *state = run_case(case, inputs, form)["outputs"]
    assert {x.dtype for x in state} <= {torch.float32, torch.complex64, torch.long}


@each("triton")
def test_split_and_carry(op, case, form):
    """A sequence cut into two calls, the second from the state of the first: gradients pass through what is carried."""
    assert_splits(case, form, 200, {1: "plain", 30: "mask", 64: "plain", 65: "mask", 199: "plain"})


@each("reference", "chunked", "native")
def test_triton_split_and_carry(op, case, form):
    assert_splits(case, form, 7, {3: "mask"}, small=True)


def assert_splits(case: Case, form: str, t: int, packings: dict[int, str], small: bool = False) -> None:
    if not case.splits:
        return
    for at, packing in packings.items():
        assert_exact(split_case(case, at), form, example(case, t, packing, small=small), dtypes_of(form)[0])


@each("triton")
def test_padding_is_not_read(op, case, form):
    assert_padding_is_not_read(case, form, 70)


@each("reference", "chunked", "native")
def test_triton_does_not_read_padding(op, case, form):
    assert_padding_is_not_read(case, form, 5)


def assert_padding_is_not_read(case: Case, form: str, t: int) -> None:
    """What stands at padding, NaN and ids included, reaches no output, state or gradient, and gets no gradient."""
    inputs = to_dtype(case.draw(Draw(t), t), dtypes_of(form)[0])
    mask, segments = Draw(t).mask(ROWS, t), Draw(t + 1).segments(ROWS, t)

    def poison(x: torch.Tensor) -> torch.Tensor:
        padding = ~mask.reshape(*mask.shape, *[1] * (x.dim() - 2))
        return x.masked_fill(padding, torch.nan) if x.shape[:2] == mask.shape else x

    dirty = {name: poison(x) if name in case.sequences else x for name, x in inputs.items()}
    clean = run_case(case, inputs, form, mask, segments)
    poisoned = run_case(case, dirty, form, mask, segments.masked_fill(~mask, 77))
    for kind in clean:
        for x, y in zip(clean[kind], poisoned[kind], strict=True):
            assert torch.equal(x, y), kind
    if case.sequences:
        assert (clean["outputs"][0][~mask] == 0).all()
    names = [name for name, x in dirty.items() for leaf in flatten(x) if differentiable(leaf)]
    for name, gradient in zip(names, poisoned["gradients"], strict=True):
        if name in case.sequences and gradient.shape[:2] == mask.shape:
            assert (gradient[~mask] == 0).all(), name


@each("reference", "chunked", slow=("triton",))
def test_every_output_is_written(op, case, form):
    """Memory that a kernel is given is full of NaN; nothing of that is left in outputs, state and gradients."""
    t = 17 if form == "triton" else 70
    inputs, packing = to_dtype(case.draw(Draw(t), t), torch.float32), draw_packing(t)["both"]
    expected = run_case(case, inputs, form, **packing)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory
    try:
        assert torch.empty(3).isnan().all()
        actual = run_case(case, inputs, form, **packing)
    finally:
        torch.use_deterministic_algorithms(False)
    for kind in expected:
        for x, y in zip(actual[kind], expected[kind], strict=True):
            assert torch.equal(x, y), kind


@pytest.mark.parametrize("form", ["reference", "native"])
@pytest.mark.parametrize("op", ["cell_scan", "selective_scan", "short_conv"])
def test_documents_do_not_spoil_others(op, form):
    """Where a document starts, the state is put to 0 and not multiplied by it, for 0 times NaN is NaN."""
    case = importlib.import_module(f"zoo.ops.{op}.cases").CASES[0]
    inputs = to_dtype(case.draw(Draw(3), 40), torch.float64)
    segments = (torch.arange(40) >= 17).expand(ROWS, -1).int()
    expected = run_case(case, inputs, form, segments=segments)
    for spoilt, kept in ((slice(0, 17), slice(17, 40)), (slice(17, 40), slice(0, 17))):
        for name in case.sequences:
            x = inputs[name].clone()
            x[:, spoilt] = torch.nan
            actual = run_case(case, inputs | {name: x}, form, segments=segments)
            for kind in expected:
                for found, wanted in zip(actual[kind], expected[kind], strict=True):
                    if found.shape[:2] == (ROWS, 40):
                        assert torch.equal(found[:, kept], wanted[:, kept]), (name, kind)


@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{op}-{case.name}") for op, case in CASES])
def test_reference_gradients(op, case):
    """The gradients that all forms are compared with are those of finite differences."""
    inputs = case.draw(Draw(5, small=True), 5)
    inputs = {name: map_tensors(lambda x: x.requires_grad_(differentiable(x)), x) for name, x in inputs.items()}
    segments = torch.tensor([[0, 0, 1, 1, 1]]).expand(ROWS, -1)
    if case.gauge and inputs["state"] is not None:  # which has no gradient
        inputs["state"] = (*inputs["state"][:-1], inputs["state"][-1].detach())
    leaves = [x for x in flatten(inputs) if x.requires_grad]

    def run(*_):
        results = flatten(case.call(inputs, "reference", segments=segments))
        return [x for x in results[: 1 if case.gauge else None] if x.requires_grad]

    assert gradcheck(run, leaves, fast_mode=True)


@each("reference", "triton")
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(op, case, form, seed):
    assert_exact(case, form, random_example(case, seed))


@each("reference", "chunked", "native")
@pytest.mark.parametrize("seed", range(2))
def test_triton_takes_random_shapes(op, case, form, seed):
    assert_exact(case, form, random_example(case, seed, small=True))


@each("reference", "chunked", "triton")
def test_threads_do_not_change_the_result(op, case, form):
    inputs = to_dtype(case.draw(Draw(3), 70), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run_case(case, inputs, form))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for kind in other:
            assert all(torch.equal(x, y) for x, y in zip(other[kind], results[0][kind], strict=True)), kind


@each("reference", "chunked")
def test_operator_is_well_behaved(op, case, form):
    """PyTorch's own checks of a custom operator: schema, fake tensors, autograd, tracing."""
    inputs = to_dtype(case.draw(Draw(3, small=True), 6), torch.float32)
    inputs = {name: map_tensors(lambda x: x.requires_grad_(differentiable(x)), x) for name, x in inputs.items()}
    packing = draw_packing(6)["both"]
    for arguments in recorded_operator_calls(op, lambda: case.call(inputs, form, **packing)):
        arguments = [
            x.detach().requires_grad_(differentiable(x)) if isinstance(x, torch.Tensor) else x for x in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.zoo, op).default, arguments)


def test_cross_entropy_is_a_well_behaved_operator():
    """It stands outside of `Op`: its PyTorch form is a custom operator too."""
    x, weight, bias = torch.randn(7, 5), torch.randn(11, 5), torch.randn(11)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    labels = torch.tensor([1, 2, -100, 3, 10, 0, 4])
    torch.library.opcheck(
        torch.ops.zoo.linear_cross_entropy.default, (*inputs, labels, -100, 0.1, 2.0, [True] * 3, "chunked")
    )


@pytest.mark.parametrize("form", ["chunked", "native"])
def test_cross_entropy_of_many_words(form):
    """Sums over a large vocabulary keep their digits; numbers that are none are not hidden."""
    weight, labels = torch.randn(50_000, 1), torch.arange(6)
    hidden = torch.tensor([[0.0], [1.0], [-80.0], [1e4], [torch.inf], [torch.nan]])
    found, exact = (
        torch.stack([linear_cross_entropy(x[None], w, y[None], kernels=form) for x, y in zip(h, labels, strict=True)])
        for h, w, form in ((hidden, weight, form), (hidden.double(), weight.double(), "reference"))
    )
    assert torch.equal(found.isfinite(), torch.tensor([True] * 4 + [False] * 2))
    torch.testing.assert_close(found[:4], exact[:4].float(), rtol=1e-6, atol=1e-6)


def recorded_operator_calls(op: str, run) -> list[tuple]:
    """The arguments that `torch.ops.zoo.<op>` is called with."""

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        calls: list[tuple] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is getattr(torch.ops.zoo, op).default:
                self.calls.append(args)
            return function(*args, **(kwargs or {}))

    with Record() as record:
        run()
    assert record.calls, f"torch.ops.zoo.{op} was not called"
    return record.calls


_SLOW_TO_COMPILE = (("cell_scan", "chunked"), ("delta_rule", "chunked"))  # graphs of thousands of nodes


@pytest.mark.parametrize(
    ("op", "form"),
    [
        pytest.param(op, form, marks=[pytest.mark.slow] * ((op, form) in _SLOW_TO_COMPILE))
        for op in op_names()
        for form in ("chunked", "native")
        if form in forms_of(op)
    ],
)
def test_compiles_into_one_graph(op, form):
    """A case of each op, packed documents and all.

    Triton's kernels stand behind the operator that C++ stands behind.
    """
    case = importlib.import_module(f"zoo.ops.{op}.cases").CASES[0]
    inputs = to_dtype(case.draw(Draw(3), 33), torch.float32)
    packing = draw_packing(33)["both"]
    expected = run_case(case, inputs, form, **packing)
    compiled = torch.compile(case.run, fullgraph=True, dynamic=False)
    actual = run_case(case.with_run(compiled), inputs, form, **packing)
    for kind in expected:
        for x, y in zip(actual[kind], expected[kind], strict=True):
            assert_close(x, y, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("op", "case"), [pytest.param(op, case, id=f"{op}-{case.name}") for op, case in CASES])
def test_wrong_inputs_are_refused(op, case):
    """A size that does not agree, or a tensor elsewhere, is an error that names it, in every form."""
    inputs = to_dtype(case.draw(Draw(3), 6), torch.float32)
    for form in forms_of(op):
        for name, x in inputs.items():
            first = flatten(x)[0] if x is not None else None
            if first is None or not differentiable(first):
                continue

            def spoil(change, name=name, x=x):
                spoilt = (change(x[0]), *x[1:]) if isinstance(x, tuple) else change(x)
                return inputs | {name: spoilt}

            with pytest.raises(ValueError, match=op.split("_")[0]):
                case.call(spoil(lambda x: torch.cat([x, x], dim=-1)), form)
            with pytest.raises(ValueError, match=op.split("_")[0]):
                case.call(spoil(lambda x: x[None]), form)
            with pytest.raises(ValueError, match="device"):
                case.call(spoil(lambda x: x.to("meta")), form)
            if name in case.sequences[:1]:
                with pytest.raises(ValueError, match=r"torch\.int64"):
                    case.call(spoil(lambda x: x.abs().long()), form)
        if op == "linear_cross_entropy":  # whose padding is a matter of labels
            continue
        mask = torch.ones(ROWS, 6, dtype=torch.bool)
        for packing in ({"mask": mask[:, 1:]}, {"mask": mask.int()}, {"segments": mask.long()[1:]}):
            with pytest.raises(ValueError, match=next(iter(packing))):
                case.call(inputs, form, **packing)


# -- what no one should do ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["linear_scan", "selective_scan", "decay_attention", "delta_rule", "cell_scan", "short_conv"])
def native_case(request):
    return importlib.import_module(f"zoo.ops.{request.param}.cases").CASES[0]


def test_flags_are_no_numbers(native_case):
    """A mask in place of a number, whose bytes are fewer than C++ would read and write."""
    inputs = to_dtype(native_case.draw(Draw(3), 6), torch.float32)
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor):
            with pytest.raises(ValueError, match=r"torch\.bool"):
                native_case.call(inputs | {name: x > 0}, "native")


def test_nothing_to_compute(native_case):
    """No rows are as good as any, no tokens are refused."""
    inputs = to_dtype(native_case.draw(Draw(3), 6), torch.float32)
    empty = {
        name: map_tensors(lambda x: x[:0], x) if name in native_case.sequences or name == "state" else x
        for name, x in inputs.items()
    }
    for form in ("chunked", "native"):
        for gradient in run_case(native_case, empty, form)["gradients"]:
            assert (gradient == 0).all()
        with pytest.raises(ValueError, match="a sequence of no tokens"):
            split_case(native_case, 0).call(inputs, form)


def test_a_missing_input_is_named():
    with pytest.raises(ValueError, match="b is missing"):
        torch.ops.zoo.linear_scan(torch.ones(1, 2, 3), None, torch.ones(1, 3), "native")


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 88), (torch.float64, 709)])
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("form", ["chunked", "native"])
def test_states_that_grow_end_in_infinity(form, t, dtype, largest):
    """A selective scan with A > 0, which the equation allows, as far as the dtype reaches."""
    function = importlib.import_module("zoo.ops.selective_scan").selective_scan
    exponents = torch.arange(-3 * largest, 3 * largest, dtype=dtype)
    step = torch.cat(
        [torch.zeros(1, t - 1, len(exponents), dtype=dtype), torch.ones(1, 1, len(exponents), dtype=dtype)], 1
    )
    ones = torch.ones(1, t, 1, dtype=dtype)
    y, _ = function(0 * step, step, exponents[:, None], ones, ones, torch.ones(1, len(exponents), 1), kernels=form)
    finite = exponents <= largest
    torch.testing.assert_close(y[0, -1, finite], exponents[finite].exp(), rtol=TOLERANCE[dtype], atol=1e-30)
    assert (y[0, -1, ~finite] == torch.inf).all()


def test_conjugates_that_are_still_to_be_taken():
    a, b = (torch.randn(1, 4, 2, dtype=torch.complex64, requires_grad=True) for _ in range(2))
    function = importlib.import_module("zoo.ops.linear_scan").linear_scan

    def gradients(form):
        h, end = function(a.conj(), b.conj().imag.neg() + 0j, b[:, 0], kernels=form)
        return torch.autograd.grad(h.abs().sum() + end.conj().abs().sum(), (a, b))

    for found, expected in zip(gradients("native"), gradients("reference"), strict=True):
        assert_close(found, expected.to(torch.complex128), TOLERANCE[torch.float32])


def test_forward_mode_is_refused_by_kernels():
    function = importlib.import_module("zoo.ops.linear_scan").linear_scan
    x, state = torch.rand(1, 4, 2), torch.rand(1, 2)

    def jvp(form):
        return torch.func.jvp(lambda b: function(x, b, state, kernels=form)[0].sum(), (x,), (x,))[1]

    assert jvp("chunked") > 0
    with pytest.raises(ValueError, match="no forward-mode derivative; kernels='chunked'"):
        jvp("native")

"""The memory that a dry run expects: what is counted, what a GPU would do otherwise, and what is said of it."""

import pytest
import torch
from torch.nn import functional as F

import zoo
from zoo.ops.dispatch import FORMS, choose
from zoo.train.config import load_config
from zoo.train.memory import _MemoryInUse, _OperationsOfGPU, measure_micro_batch, without_numbers
from zoo.train.plan import plan_run

ROWS, LENGTH = 2, 96


def measure(preset: str, *, packed: bool = True, bf16: bool = False, checkpointing: bool = False, gpu=None):
    with without_numbers():
        model = zoo.create_model(preset, vocab_size=300)
    return measure_micro_batch(model, ROWS, LENGTH, packed=packed, bf16=bf16, checkpointing=checkpointing, gpu=gpu)


def test_memory_is_counted_while_it_is_held():
    with _MemoryInUse() as memory:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        assert (memory.now, memory.peak) == (4000, 4000)
        c = (a.double() + 1).sum()  # two of 8000 bytes at a time
        assert (memory.now, memory.peak) == (4008, 20000)
        del a
        assert memory.now == 4008
        del b, c
        assert memory.now == 0


@pytest.mark.parametrize(
    ("preset", "bf16", "checkpointing"),
    [("mamba2-tiny", False, False), ("hybrid-tiny", True, False), ("retnet-tiny", True, True)],
)
def test_the_peak_is_that_of_a_run_with_numbers(preset, bf16, checkpointing):
    found = measure(preset, bf16=bf16, checkpointing=checkpointing)
    assert found.is_packed
    model = zoo.create_model(preset, vocab_size=300).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(300, (ROWS, LENGTH))
    positions = torch.arange(LENGTH).remainder(40).repeat(ROWS, 1)
    with _MemoryInUse() as memory:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(ids, position_ids=positions, shift_labels=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
    assert found.memory == pytest.approx(memory.peak, rel=0.01)


def test_what_saves_memory():
    in_float32 = measure("mamba2-tiny", gpu="sm_90")
    in_bf16 = measure("mamba2-tiny", bf16=True, gpu="sm_90")
    again = measure("mamba2-tiny", bf16=True, checkpointing=True, gpu="sm_90")
    one_document = measure("mamba2-tiny", bf16=True, packed=False, gpu="sm_90")
    assert again.memory < 0.5 * in_bf16.memory < 0.5 * in_float32.memory
    assert one_document.memory < in_bf16.memory


def test_a_gpu_runs_its_kernels_and_takes_in_float32_what_cuda_does(monkeypatch):
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.ones(8, requires_grad=True)
    chosen = set()

    def spy(op, *args):
        choice = choose(op, *args)
        chosen.add((op, choice.backend))
        return choice

    monkeypatch.setattr("zoo.ops.op.choose", spy)
    measure("mamba2-tiny", bf16=True, gpu="sm_90")
    without_triton = {("short_conv", "chunked"), ("linear_cross_entropy", "chunked")}
    assert chosen == {("decay_attention", "triton"), *without_triton}
    saved = []
    with _OperationsOfGPU():
        assert F.softplus(x).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert F.softplus(x).dtype == x.exp().dtype == (x**2).dtype == F.rms_norm(x, (8,), weight).dtype
            assert (x**2).dtype == torch.float32
            assert F.silu(x).dtype == F.linear(x, torch.ones(8, 8)).dtype == torch.bfloat16
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            F.rms_norm(x.float(), (8,), weight)
    assert [tuple(x.shape) for x in saved] == [(4, 8), (8,), (4,)]
    assert choose("decay_attention", FORMS, "cpu").backend == "native"  # outside of a measurement nothing is pretended


def test_a_run_that_depends_on_numbers():
    """Titans cut rows where documents begin, which one document a row decides; on other numbers there is no answer."""
    assert not measure("titans-tiny").is_packed
    with without_numbers():
        model = zoo.create_model("retnet-tiny", vocab_size=300)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: args[0].sum().item() > 0)
    options = {"packed": True, "bf16": False, "checkpointing": False, "gpu": None}
    assert measure_micro_batch(model, ROWS, LENGTH, **options) is None


def test_what_does_not_fit_is_said_with_what_to_change():
    def dry_run(recipe: str, devices: int, *words: str) -> list[str]:
        return plan_run(load_config(recipe, words), "RTX 4090", devices)

    fits = dry_run("130m/transformer.yaml", 1)
    assert fits[-1].split(":")[0].strip() == "assumed"
    assert "bf16" in fits[-1]
    assert "Triton kernels" in fits[-1]
    more_rows = dry_run("130m/transformer.yaml", 1, "data.micro_batch_size=null")
    assert more_rows[-1].startswith("DOES NOT FIT    more than 22.6 GB")
    assert "data.micro_batch_size from 256" in more_rows[-1]
    assert "train.gradient_checkpointing=true" in more_rows[-1]
    assert "fsdp2.yaml" in more_rows[-1]
    whole = dry_run("1b3/transformer.yaml", 8)
    assert whole[-1].startswith("NEEDS FSDP2     more than 22.6 GB")


def test_checkpointing_takes_a_third_longer():
    """The forward pass, 2 of 6 operations, runs twice."""
    hours = [
        float(plan_run(load_config("130m/transformer.yaml", words), "L40S")[3].split()[1])
        for words in ([], ["train.gradient_checkpointing=true"])
    ]
    assert hours[1] / hours[0] == pytest.approx(4 / 3, rel=0.03)

"""What tests share: no network, one seed, a small tokenizer, a record of the C++ that runs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _interpreter_knows_bfloat16():
    """Triton 3.9's interpreter keeps bfloat16 as its 16 bits, the upper half of a float32.

    Its `tl.dot` multiplies them as integers, and it makes them of a float32 by cutting it off. GPUs do neither.
    """
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def round_to_nearest(x, given, wanted, rounding_mode):
        if (given, wanted) != (tl.float32, tl.bfloat16):
            return convert(x, given, wanted, rounding_mode)
        bits = x.view(numpy.uint32).astype(numpy.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", round_to_nearest)
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *rest: multiply(self, widen(a), widen(b), *rest),
        )
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer trained on this file; the end-of-text token pads, as in many published models."""
    from pathlib import Path

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([Path(__file__).read_text()], vocab_size=300, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture
def native_calls(monkeypatch) -> list[str]:
    """Functions of C++ that were called."""
    from zoo.ops import native

    found = []
    original = native.call
    monkeypatch.setattr(native, "call", lambda op, name, *rest: found.append(name) or original(op, name, *rest))
    return found

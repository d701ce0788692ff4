"""What the comparisons with other implementations share."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import zoo
from zoo.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def renamer() -> Callable[[Mapping[str, str]], Callable[[str], str]]:
    """Makes a function that rewrites a parameter's name part by part: `a.b.weight` by {"b": "c"} is `a.c.weight`."""
    return lambda names: lambda name: ".".join(names.get(part, part) for part in name.split("."))


@pytest.fixture
def assert_imports(tmp_path):
    """Checks that a checkpoint is read, bit for bit, and written back so that its own library loads it."""

    def check(
        source: Path,
        logits_of: Callable[[Tensor], Tensor],
        reload: Callable[[Path], nn.Module] | None,
        to: str = "transformers",
    ) -> Any:
        """Import `source` and compare with its library.

        Args:
            source: the checkpoint.
            logits_of: what the source's library makes of tokens (b t) with the weights in float32, logits
                (b t vocabulary).
            reload: how that library loads an exported folder; None: there is no export.
            to: that library, for the export.

        Returns:
            The imported model.
        """
        model, _ = zoo.import_checkpoint(source)
        tokens = torch.randint(1, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = logits_of(tokens)
            wide, _ = zoo.import_checkpoint(source, dtype=torch.float32)
            assert (wide(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        model.save_pretrained(tmp_path / "ours")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items())
        if reload is None:
            with pytest.raises(ValueError, match=r"to export|has no architecture"):
                zoo.export_checkpoint(model, tmp_path / "theirs", to=to)
            return model
        zoo.export_checkpoint(model, tmp_path / "theirs", to=to)
        original, written = Checkpoint(source), Checkpoint(tmp_path / "theirs")
        assert original.shapes == written.shapes
        for name in original.shapes:
            assert original.read(name).dtype == written.read(name).dtype, name
            assert torch.equal(original.read(name), written.read(name)), name
        with torch.no_grad():
            logits = reload(tmp_path / "theirs").float().eval()(tokens).logits
            assert (logits - expected).abs().max() <= 1e-6 * expected.abs().max()
        return model

    return check


_RWKV = """
import sys, torch
from rwkv.model import RWKV

model = RWKV(model=sys.argv[1], strategy="cpu fp32")
tokens, ways = torch.load(sys.argv[2])
found = []
for lengths in ways:
    rows = []
    for row in tokens:
        state, pieces = None, []
        for piece in row.split(lengths):
            logits, state = model.forward(piece.tolist(), state, full_output=True)
            pieces.append(logits.reshape(len(piece), -1))
        rows.append(torch.cat(pieces))
    found.append(torch.stack(rows))
torch.save(found, sys.argv[2])
"""


@pytest.fixture
def rwkv_package(tmp_path):
    """Runs the authors' package `rwkv`, in a process of its own, as its environment says which versions it computes."""

    def run(file: Path, version: int, tokens: Tensor, *ways: list[int]) -> list[Tensor]:
        """Logits (b t vocabulary) of tokens (b t) by the weights of a `.pth`, for each way to read t in pieces."""
        exchange = tmp_path / "exchange"
        torch.save((tokens, ways), exchange)
        settings = {"RWKV_V7_ON": str(int(version == 7)), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
        command = [sys.executable, "-c", _RWKV, str(file.with_suffix("")), str(exchange)]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(exchange)

    return run

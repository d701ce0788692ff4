"""The Triton kernels, compiled for GPUs that are not there: what dispatch is told of them is true of these sources.

Each test runs a process of its own, since here Triton interprets.
"""

import csv
import json
import os
import subprocess
import sys

import pytest

from zoo.layout import shelf

TABLE = shelf("evals") / "results" / "kernels_aot.csv"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
IDENTITY = ("op", "kernel", "size", "target", "constants", "absent", "warps", "stages", "source")
LARGE_PRODUCTS = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def run(code: str) -> list:
    process = subprocess.run(
        [sys.executable, "-c", f"import json\nfrom zoo.ops.ahead_of_time import *\nprint(json.dumps({code}))"],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def table() -> list[dict]:
    with TABLE.open(newline="") as lines:
        return list(csv.DictReader(lines))


def assert_as_wanted(row: dict) -> None:
    """What a row calls `triton` neither spills nor multiplies without tensor cores."""
    if row["verdict"] == "chunked":
        assert row["why"]
        return
    assert (int(row["stack"]), int(row["spills"])) == (0, 0), row
    assert int(row["shared"]) <= (64 if row["target"] == "gfx942" else 100) * 1024, row
    if str(row["products"]) == "True":
        assert int(row["tensor_core"]) > 0, row
        if row["op"] in ("decay_attention", "delta_rule") and "bfloat16" in row["size"]:
            assert row["instruction"] == LARGE_PRODUCTS.get(row["target"], row["instruction"]), row


def test_the_table_is_of_these_kernels():
    """Every kernel, size and GPU has its row, of the source as it is."""
    listed = run("[row for op in ops_with_triton() for t in TARGETS for row in list_kernels(op, t)]")
    here = {tuple(str(value) for value in row[: len(IDENTITY)]) for row in listed}
    assert {tuple(row[name] for name in IDENTITY) for row in table()} == here
    assert {row["target"] for row in table()} == set(TARGETS)


def test_the_table_is_sound():
    rows = table()
    for row in rows:
        assert_as_wanted(row)
    assert len({tuple(row[name] for name in IDENTITY) for row in rows}) == len(rows), "a kernel has two rows"


def test_compiling_finds_what_the_table_says():
    """One op for each GPU; the slow test below does them all."""
    for target in TARGETS:
        rows = run(f"[row._asdict() for row in compile_op('linear_scan', {target!r})]")
        assert rows
        for row in rows:
            assert row["verdict"] == "triton"
            assert_as_wanted(row)


def test_spills_and_slow_products_are_found(tmp_path):
    """A kernel that holds too much spills, one of small tiles in float32 has no tensor cores."""
    code = """
import torch, triton, triton.language as tl
from zoo.ops import ahead_of_time
from zoo.ops.gpu import Launch

@triton.jit
def product(x, y, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile, input_precision=PRECISION) + tile)

x = torch.empty(128, 128, device="meta")
for size, precision, warps in ((128, "tf32", 1), (32, "ieee", 4), (64, "tf32", 4)):
    row = ahead_of_time.Row("op", "product", "main", "sm_90", "", "", warps, 1, "source")
    launch = Launch(product, (x, x), {"SIZE": size, "PRECISION": precision}, warps, 1)
    print(ahead_of_time._compile(row, launch).why)
"""
    file = tmp_path / "program.py"  # Triton reads the source of a kernel from a file
    file.write_text(code)
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled, slow, fine = done.stdout.splitlines()
    assert "spills" in spilled or "stack" in spilled
    assert slow == "products without tensor cores"
    assert fine == ""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target):
    """And as the table says, but for registers and the like, which another release of Triton may do otherwise."""
    rows = run(f"[row._asdict() for op in ops_with_triton() for row in compile_op(op, {target!r})]")
    found = {tuple(str(row[name]) for name in IDENTITY): row["verdict"] for row in rows}
    listed = {tuple(row[name] for name in IDENTITY): row["verdict"] for row in table() if row["target"] == target}
    assert found == listed
    for row in rows:
        assert_as_wanted(row)

"""What the Triton kernels compile to, for GPUs that are not there: `zoo bench aot`."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from zoo.bench.results import align
from zoo.bench.runner import choose
from zoo.ops import ahead_of_time
from zoo.ops.ahead_of_time import Row
from zoo.tables import read_table, update_table


def bench_aot(names: Sequence[str] = (), output: Path | None = None) -> None:
    """Compile the Triton kernels of ops, and print a summary an op and a GPU.

    Args:
        names: of ops.
        output: as of every bench (`zoo.bench.runner`); a row is a kernel.

    Raises:
        ValueError: on an op without Triton kernels.
        RuntimeError: under TRITON_INTERPRET=1, where Triton has no compiler.
    """
    ops = choose(names, ahead_of_time.ops_with_triton(), "op")
    if output:
        read_table(output, Row._fields)  # a file of another kind is found now, not when there are rows
    rows: list[Row] = []
    try:
        for op in ops:
            rows += ahead_of_time.compile_all([op])
            if output:
                update_table(output, Row._fields, ("op",), (row._asdict() for row in rows))
    finally:
        if rows:
            print(_summary(rows))


def _summary(rows: list[Row]) -> str:
    lines = [["op", "target", "kernels", "registers", "shared", "tensor_cores", "verdict", "why"]]
    rows = sorted(rows, key=lambda row: (row.op, row.target))
    for (op, target), group in itertools.groupby(rows, key=lambda row: (row.op, row.target)):
        kernels = list(group)
        most = (max(getattr(row, name) for row in kernels) for name in ("registers", "shared"))
        instructions = "+".join(sorted({row.instruction for row in kernels if row.instruction}))
        faults = "; ".join(f"{row.kernel} {row.size}: {row.why}" for row in kernels if row.why)
        verdict = "chunked" if faults else "triton"
        lines.append([op, target, str(len(kernels)), *map(str, most), instructions, verdict, faults])
    return align(lines)

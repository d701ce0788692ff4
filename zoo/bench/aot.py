"""What the Triton kernels compile to, for GPUs that are not there: `zoo bench aot`."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from zoo.bench.results import align, check_names, read_csv
from zoo.ops import ahead_of_time
from zoo.ops.ahead_of_time import Row


def bench_aot(ops: Sequence[str] = (), output: Path | None = None) -> None:
    """Compile the Triton kernels of ops, and print a summary an op and a GPU.

    Args:
        ops: their names; all, where there is none.
        output: a CSV file for the rows, a kernel each. They go there an op at a time; those of other ops stay in it.

    Raises:
        ValueError: on an op without Triton kernels.
        RuntimeError: under TRITON_INTERPRET=1, where Triton has no compiler.
    """
    known = ahead_of_time.ops_with_triton()
    check_names(ops, known)
    before = [Row(**row) for row in read_csv(output, Row._fields)] if output else []
    rows: list[Row] = []
    try:
        for op in sorted(set(ops)) or known:
            rows += ahead_of_time.compile_all([op])
            if output:
                compiled = {row.op for row in rows}
                ahead_of_time.write_csv([*(row for row in before if row.op not in compiled), *rows], output)
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

"""`zoo selftest` and `zoo bench`."""

import argparse
import math
from pathlib import Path

from zoo.cli.arguments import extra, find_device
from zoo.errors import unknown_name


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("selftest", help="compare every kernel with its reference on a device")
    command.add_argument("ops", nargs="*", metavar="OP", help="ops to test; default: all")
    command.add_argument("--device", default="cpu", help="as cpu or cuda")
    command.set_defaults(run=selftest)

    command = commands.add_parser("bench", help="how fast kernels, models and training are")
    kinds = command.add_subparsers(metavar="WHAT", required=True, parser_class=type(command))
    kind = _add_bench(kinds, "ops", "op", "time kernels beside other code that computes the same", repeats=20)
    kind.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    kind.set_defaults(run=bench_ops)
    kind = _add_bench(kinds, "models", "model", "time training and decoding beside transformers' own classes, on a CPU")
    kind.set_defaults(run=bench_models)
    kind = _add_bench(kinds, "length", "model", "time reading and decoding at several lengths, on a CPU")
    kind.set_defaults(run=bench_length)
    kind = _add_bench(kinds, "train", "recipe", "time steps of the tiny recipes on a CPU")
    kind.set_defaults(run=bench_train)
    kind = _add_bench(kinds, "eval", "model", "time lm-eval's scores of long contexts beside its own class, on a CPU")
    kind.set_defaults(run=bench_eval)
    kind = _add_bench(kinds, "aot", "op", "compile the Triton kernels for GPUs that are not there", repeats=None)
    kind.set_defaults(run=bench_aot)


def _add_bench(
    kinds: argparse._SubParsersAction, name: str, subject: str, help: str, repeats: int | None = 9
) -> argparse.ArgumentParser:
    """The parser of a bench, which takes names of its subjects and has a table of theirs.

    Args:
        kinds: the benches.
        name: of this one.
        subject: what it times, one of them.
        help: what it does.
        repeats: rounds by default; None: it times nothing.
    """
    kind = kinds.add_parser(name, help=help)
    kind.add_argument("names", nargs="*", metavar=subject.upper(), help=f"which {subject}s; default: all")
    kind.add_argument("--output", type=Path, help=f"a CSV file for the rows; those of other {subject}s stay in it")
    if repeats is not None:
        help = "rounds at most, of which the median counts"
        kind.add_argument("--repeats", type=int, default=repeats, help=help)
    return kind


def selftest(arguments: argparse.Namespace) -> None:
    from zoo.selftest import describe_environment, op_names, selftest  # noqa: PLC0415 (imports every op)

    for op in arguments.ops:
        if op not in op_names():
            raise unknown_name("op", op, op_names())
    device = find_device(arguments.device)
    print(describe_environment(device))
    row = "{:<22}{:<23}{:<11}{:<10}{:>9}{:>9}  {}"
    print(row.format("op", "case", "backend", "inputs", "error", "allowed", "verdict"))
    failures = 0
    for found in selftest(device, arguments.ops):
        error = "" if math.isnan(found.error) else f"{found.error:.1e}"
        columns = (found.op, found.case, found.backend, found.dtype, error, f"{found.tolerance:.0e}", found.verdict)
        print(row.format(*columns), flush=True)
        failures += not found.passed
    if failures:
        raise ValueError(f"{failures} of the kernels differ from their reference")
    print("every kernel that runs here agrees with its reference")


def bench_ops(arguments: argparse.Namespace) -> None:
    from zoo.bench import bench_ops  # noqa: PLC0415 (it imports other libraries' models)

    bench_ops(arguments.names, arguments.device, arguments.repeats, arguments.output)


def bench_models(arguments: argparse.Namespace) -> None:
    from zoo.bench.models import bench_models  # noqa: PLC0415 (as above)

    bench_models(arguments.names, arguments.repeats, arguments.output)


def bench_length(arguments: argparse.Namespace) -> None:
    from zoo.bench.length import bench_length  # noqa: PLC0415 (as above)

    bench_length(arguments.names, arguments.repeats, arguments.output)


def bench_train(arguments: argparse.Namespace) -> None:
    from zoo.bench.train import bench_train  # noqa: PLC0415 (as above)

    bench_train(arguments.names, arguments.repeats, arguments.output)


def bench_eval(arguments: argparse.Namespace) -> None:
    with extra("eval", "evaluation"):
        from zoo.bench.scoring import bench_eval  # noqa: PLC0415 (as above)
    bench_eval(arguments.names, arguments.repeats, arguments.output)


def bench_aot(arguments: argparse.Namespace) -> None:
    try:
        from zoo.bench.aot import bench_aot  # noqa: PLC0415 (it needs Triton)
    except ModuleNotFoundError as error:
        raise ValueError(f"compiling GPU kernels needs {error.name}: pip install {error.name}") from error
    bench_aot(arguments.names, arguments.output)

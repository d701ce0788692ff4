"""Training as `zoo train` does it, on one thread of a CPU: `zoo bench train`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from zoo.bench import cpu
from zoo.bench.results import (
    PROVENANCE,
    Row,
    RowFile,
    check_request,
    describe_targets,
    format_columns,
    provenance,
    short,
    verdict,
)
from zoo.train.config import list_recipes, load_config
from zoo.train.distributed import make_accelerator
from zoo.train.loop import Run
from zoo.train.stop import StopRequest

COLUMNS = (
    *("recipe", "parameters", "tokens_a_step", "milliseconds", "tokens_per_second"),
    "of_matmul_peak",  # 6 operations a parameter and token, of what one core multiplies at most
    "loader",  # the part of a step that goes into its batch
    *("target", "met", "repeats", *PROVENANCE),
)
_BUDGET = 15.0  # seconds that a recipe gets for its rounds


def bench_train(names: Sequence[str] = (), repeats: int = 9, output: Path | None = None) -> None:
    """Time steps of the tiny recipes, and print a table.

    Args:
        names: recipes, as `mamba` for `tiny/mamba.yaml`; all tiny ones, where there is none.
        repeats: rounds at most.
        output: a CSV file. Rows go there as they are finished; those of other recipes stay in it.

    Raises:
        ValueError: on an unknown name.
    """
    known = [Path(recipe).stem for recipe in list_recipes() if recipe.startswith("tiny/")]
    check_request(names, known, "tiny recipe", repeats)
    source = provenance(cpu.device_name(), threads=1, allocator=cpu.allocator())
    file = RowFile(output, COLUMNS)
    for name in (bar := tqdm(names or known, unit="recipe", leave=False)):
        bar.set_description(name)
        file.add([_measure(name, repeats) | source])
    print(format_columns(file.rows, COLUMNS))


def _measure(name: str, repeats: int) -> Row:
    peak = cpu.peaks().flops_per_second
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(f"tiny/{name}", [f"train.output={folder}", "train.trackers=[]"])
        output = Path(folder)
        run = Run(config, output, make_accelerator(output, config.train), say=lambda line: None)
        stop = StopRequest()
        seconds, rounds = cpu.median_time(lambda: run._step(stop), repeats, _BUDGET)
        loader, _ = cpu.median_time(lambda: run.data.batches.batch(run.progress.step), repeats, _BUDGET)
        run.data.close()
    plan = run.plan
    figures = {
        "of_matmul_peak": plan.flops_per_token * plan.tokens_per_step / seconds / peak,
        "loader": loader / seconds,
    }
    targets = {"of_matmul_peak": 0.5 if name == "transformer" else 0.4, "loader": 0.03}
    return {
        "recipe": name,
        "parameters": plan.parameters,
        "tokens_a_step": plan.tokens_per_step,
        "milliseconds": short(1e3 * seconds),
        "tokens_per_second": short(plan.tokens_per_step / seconds),
        **{column: short(figure) for column, figure in figures.items()},
        "target": describe_targets(targets),
        "met": verdict(targets, figures),
        "repeats": rounds,
    }

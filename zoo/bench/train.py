"""Training as `zoo train` does it, on one thread of a CPU: `zoo bench train`."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from zoo.bench import cpu
from zoo.bench.results import PROVENANCE, judge
from zoo.bench.runner import choose, run_cases
from zoo.tables import Row
from zoo.train.config import list_recipes, load_config
from zoo.train.distributed import make_accelerator
from zoo.train.loop import Run

COLUMNS = (
    *("recipe", "parameters", "tokens_a_step", "milliseconds", "tokens_per_second"),
    "of_matmul_peak",  # 6 operations a parameter and token, of what one core multiplies at most
    "loader",  # the part of a step that goes into its batch
    *("target", "met", "repeats", *PROVENANCE),
)
_BUDGET = 15.0  # seconds that a recipe gets for its rounds


def bench_train(names: Sequence[str] = (), repeats: int = 9, output: Path | None = None) -> None:
    """Time steps of the tiny recipes.

    Args:
        names: of recipes, as `mamba` for `tiny/mamba.yaml`.
        repeats, output: as of every bench (`zoo.bench.runner`).

    Raises:
        ValueError: on an unknown name.
    """
    tiny = [Path(recipe).stem for recipe in list_recipes() if recipe.startswith("tiny/")]
    cases = [(name, partial(_measure, name)) for name in choose(names, tiny, "tiny recipe")]
    run_cases(cases, COLUMNS, repeats, output)


def _measure(name: str, repeats: int) -> list[Row]:
    peak = cpu.peaks().flops_per_second
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(f"tiny/{name}", [f"train.output={folder}", "train.trackers=[]"])
        output = Path(folder)
        run = Run(config, output, make_accelerator(output, config.train), say=lambda line: None)
        seconds, rounds = cpu.median_time(run._step, repeats, _BUDGET)
        loader, _ = cpu.median_time(lambda: run.data.batches.batch(run.progress.step), repeats, _BUDGET)
        run.data.close()
    plan = run.plan
    figures = {
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": plan.tokens_per_step / seconds,
        "of_matmul_peak": plan.flops_per_token * plan.tokens_per_step / seconds / peak,
        "loader": loader / seconds,
    }
    targets = {"of_matmul_peak": 0.5 if name == "transformer" else 0.4, "loader": 0.03}
    return [
        {
            "recipe": name,
            "parameters": plan.parameters,
            "tokens_a_step": plan.tokens_per_step,
            **judge(figures, targets),
            "repeats": rounds,
        }
    ]

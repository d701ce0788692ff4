"""`zoo eval` and `zoo plots`."""

import argparse
import json
from pathlib import Path

from transformers.utils import logging

from zoo.cli.arguments import check_checkpoint, extra, find_device
from zoo.layout import shelf


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("eval", help="score a checkpoint on tasks of lm-eval, the zoo's own among them")
    command.add_argument("checkpoint", help="a folder or a name on the Hub")
    command.add_argument("--tasks", default="", help="names, with commas between them, or YAML files, as parity,s5")
    command.add_argument("--suite", help="tasks that papers report together: commonsense")
    command.add_argument("--limit", type=int, help="documents of each task; default: all")
    command.add_argument("--batch-size", default="auto", help="rows of a call at most; default: what memory allows")
    command.add_argument("--device", help="as cpu or cuda; default: the accelerator if there is one")
    command.add_argument("--no-truncate", action="store_true", help="stop where the model cannot read a request whole")
    command.add_argument("--metadata", type=json.loads, help="JSON that tasks are made with, as '{\"examples\": 20}'")
    command.add_argument("--output", type=Path, metavar="FILE.json", help="where the results go, in lm-eval's layout")
    command.add_argument("--results", type=Path, metavar="FILE.csv", help="where a row for each metric is added")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("plots", help="draw what was measured, and fill in the READMEs' tables of it")
    command.add_argument(
        "folder", nargs="?", type=Path, help="of CSV files; default: evals/results, and the READMEs of the checkout"
    )
    command.add_argument(
        "--runs", nargs="+", type=Path, default=[], metavar="RUN", help="training runs to add to <folder>/losses.csv"
    )
    command.add_argument("--check", action="store_true", help="change nothing, fail where a picture or table is stale")
    command.set_defaults(run=plot)


def evaluate(arguments: argparse.Namespace) -> None:
    with extra("eval", "evaluation"):
        from zoo.evaluate import harness, record  # noqa: PLC0415 (an extra)
    check_checkpoint(arguments.checkpoint)
    if arguments.device is not None:
        find_device(arguments.device)
    if arguments.output and not arguments.output.absolute().parent.is_dir():
        raise ValueError(f"there is no folder for --output {arguments.output}")
    if arguments.results:
        record.read_rows(arguments.results)  # a file of another kind is refused before the work
    logging.disable_progress_bar()  # of loading weights; lm-eval has its own
    results = harness.evaluate(
        arguments.checkpoint,
        harness.named_tasks(arguments.tasks, arguments.suite),
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        allow_truncation=not arguments.no_truncate,
        metadata=arguments.metadata,
    )
    if results is None:  # the first process of a launcher speaks for all
        return
    print(harness.result_table(results))
    if arguments.output:
        harness.write_results(results, arguments.output)
    if arguments.results:
        record.add_rows(results, arguments.checkpoint, arguments.results)


def plot(arguments: argparse.Namespace) -> None:
    with extra("train", "drawing"):
        from zoo import plots  # noqa: PLC0415 (an extra)
    folder = arguments.folder or shelf("evals") / "results"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    pages = [] if arguments.folder else plots.pages()
    if arguments.check:
        if stale := plots.find_stale(folder, pages):
            raise ValueError(f"{', '.join(stale)}: not what the CSV files in {folder} say; `zoo plots` mends it")
        return
    if arguments.runs:
        plots.add_runs(arguments.runs, folder / "losses.csv")
    print("\n".join(plots.make(folder, pages)))

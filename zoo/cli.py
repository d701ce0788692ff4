"""The command `zoo`: show, train, run, convert, test and time models. Errors are one line; `--debug` shows more."""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

import zoo
from zoo.errors import unknown_name
from zoo.hub import publication, upload
from zoo.layout import shelf


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest command where the command is unknown."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command is a function of this module that takes the parsed arguments."""
    parser = _Parser(prog="zoo", description="Sequence architectures as first-class Hugging Face models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"sequence-zoo {zoo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    command = commands.add_parser("list", help="the models there are")
    command.add_argument("pattern", nargs="?", default="*", help="a shell pattern, as 'retnet*'")
    command.add_argument("--markdown", action="store_true", help="the README's table of architectures")
    command.set_defaults(run=list_presets)

    command = commands.add_parser("show", help="parameters, state and paper of a model")
    command.add_argument("name", help="a name of `zoo list`")
    command.add_argument("--length", type=int, default=2048, help="tokens at which a growing state is measured")
    command.set_defaults(run=show)

    command = commands.add_parser("train", help="pretrain a model as a recipe says")
    command.add_argument("recipe", help="a YAML file, or one that comes with the zoo, as tiny/retnet.yaml")
    command.add_argument("assignments", nargs="*", metavar="key=value", help="what to change, as train.seed=1")
    command.add_argument("--print-config", action="store_true", help="print the resolved recipe, and do nothing else")
    command.add_argument("--dry-run", action="store_true", help="print what the run will take, and do nothing else")
    command.add_argument("--device", help="with --dry-run: hours on another device than this machine's, as H100")
    command.add_argument("--devices", type=int, default=1, help="with --dry-run: how many of them")
    command.set_defaults(run=train)

    command = commands.add_parser("generate", help="continue a prompt, streaming")
    command.add_argument("checkpoint", help="a folder or a name on the Hub")
    command.add_argument("--prompt", required=True)
    command.add_argument("--max-new-tokens", type=int, default=100)
    command.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=generate)

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

    command = commands.add_parser("import", help="turn a published checkpoint into one of the zoo")
    command.add_argument("source", help="a folder, a file (.pth, .bin, .safetensors) or a name on the Hub")
    command.add_argument("destination", help="a folder that is not there yet")
    command.set_defaults(run=import_)

    command = commands.add_parser("export", help="write a checkpoint of the zoo for another library")
    command.add_argument("source", help="a folder or a name on the Hub")
    command.add_argument("destination", help="a folder that is not there yet")
    command.add_argument("--to", default="transformers", help="the library, as transformers, which then needs no zoo")
    command.set_defaults(run=export)

    command = commands.add_parser("publish", help="put a checkpoint on the Hugging Face Hub, with a model card")
    command.add_argument("checkpoint", help="a folder, as <run>/latest")
    command.add_argument("repository", metavar="user/name")
    command.add_argument("--dry-run", action="store_true", help="show the card and the files, and send nothing")
    command.add_argument("--private", action="store_true", help="only its owners see the repository")
    command.add_argument("--force", action="store_true", help="replace all that the repository holds, whatever it is")
    command.add_argument("--format", default="zoo", help="transformers: files that load without the zoo")
    command.add_argument("--license", default="apache-2.0", help="of the weights, by its identifier on the Hub")
    command.add_argument("--results", metavar="FILE.json", help="what `zoo eval` or lm-eval wrote, for the card")
    command.set_defaults(run=publish)

    command = commands.add_parser("plots", help="draw what was measured, and fill in the READMEs' tables of it")
    command.add_argument(
        "folder", nargs="?", type=Path, help="of CSV files; default: evals/results, and the READMEs of the checkout"
    )
    command.add_argument(
        "--runs", nargs="+", type=Path, default=[], metavar="RUN", help="training runs to add to <folder>/losses.csv"
    )
    command.add_argument("--check", action="store_true", help="change nothing, fail where a picture or table is stale")
    command.set_defaults(run=plot)

    command = commands.add_parser("selftest", help="compare every kernel with its reference on a device")
    command.add_argument("ops", nargs="*", metavar="OP", help="ops to test; default: all")
    command.add_argument("--device", default="cpu", help="as cpu or cuda")
    command.set_defaults(run=selftest)

    command = commands.add_parser("bench", help="how fast the kernels are, and what they compile to")
    kinds = command.add_subparsers(metavar="WHAT", required=True, parser_class=_Parser)
    kind = kinds.add_parser("ops", help="time them beside other code that computes the same")
    kind.add_argument("ops", nargs="*", metavar="OP", help="ops to time; default: all")
    kind.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    kind.add_argument("--repeats", type=int, default=20, help="rounds at most, of which the median counts")
    kind.add_argument("--output", type=Path, help="a CSV file for the rows; those of other ops stay in it")
    kind.set_defaults(run=bench_ops)
    kind = kinds.add_parser("models", help="time training and decoding beside transformers' own classes, on a CPU")
    kind.add_argument("models", nargs="*", metavar="MODEL", help="models to time; default: all")
    kind.add_argument("--repeats", type=int, default=9, help="rounds at most, of which the median counts")
    kind.add_argument("--output", type=Path, help="a CSV file for the rows; those of other models stay in it")
    kind.set_defaults(run=bench_models)
    kind = kinds.add_parser("length", help="time reading and decoding at several lengths, on a CPU")
    kind.add_argument("models", nargs="*", metavar="MODEL", help="models to time; default: all")
    kind.add_argument("--repeats", type=int, default=9, help="rounds at most, of which the median counts")
    kind.add_argument("--output", type=Path, help="a CSV file for the rows; those of other models stay in it")
    kind.set_defaults(run=bench_length)
    kind = kinds.add_parser("train", help="time steps of the tiny recipes on a CPU")
    kind.add_argument("recipes", nargs="*", metavar="RECIPE", help="recipes to time, as mamba; default: all")
    kind.add_argument("--repeats", type=int, default=9, help="rounds at most, of which the median counts")
    kind.add_argument("--output", type=Path, help="a CSV file for the rows; those of other recipes stay in it")
    kind.set_defaults(run=bench_train)
    kind = kinds.add_parser("aot", help="compile the Triton kernels for GPUs that are not there")
    kind.add_argument("ops", nargs="*", metavar="OP", help="ops to compile; default: all")
    kind.add_argument("--output", type=Path, help="a CSV file for the rows")
    kind.set_defaults(run=bench_aot)

    parser.set_defaults(known_commands=tuple(commands.choices))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 after an error, or 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # wherever it stands
    words = [word for word in words if word != "--debug"]
    try:
        parser = build_parser()
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in parser.get_default("known_commands"):
            raise unknown_name("command", command, parser.get_default("known_commands"))
        parsed, left = parser.parse_known_args(words)
        if any(word.startswith("-") or "=" not in word or "assignments" not in parsed for word in left):
            raise ValueError(f"unrecognized arguments: {' '.join(left)} (see zoo --help)")
        if left:  # argparse takes words of one kind up to the first option, and no more of them behind it
            parsed.assignments += left
        parsed.run(parsed)
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"zoo: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


# -- commands ----------------------------------------------------------------------------------------------------------


def list_presets(arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        if arguments.pattern != "*":
            raise ValueError("--markdown is the whole table: leave the pattern out")
        print("\n".join(zoo.inspection.architecture_table()))
        return
    names = zoo.list_models(arguments.pattern)
    if not names:
        raise unknown_name("model", arguments.pattern, zoo.list_models())
    for name in names:
        print(name)


def show(arguments: argparse.Namespace) -> None:
    summary = zoo.summarize(arguments.name)
    config = zoo.create_config(arguments.name)
    state = zoo.state_bytes(config, arguments.length)
    grows = state != zoo.state_bytes(config, arguments.length + 1)
    print(f"{'name':<12}{summary.name}")
    print(f"{'type':<12}{summary.model_type}")
    print(f"{'mixers':<12}{', '.join(dict.fromkeys(summary.mixers))}, {len(summary.mixers)} layers")
    print(f"{'parameters':<12}{summary.parameters:,}")
    print(f"{'':<12}{summary.embedding_parameters:,} embedding")
    print(f"{'':<12}{summary.parameters - summary.embedding_parameters:,} other")
    print(
        f"{'state':<12}{state:,} bytes a sequence" + (f" of {arguments.length:,} tokens" if grows else ", any length")
    )
    print(f"{'paper':<12}{summary.paper}")


def train(arguments: argparse.Namespace) -> None:
    try:
        from zoo.train import config, loop, plan  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise ValueError(f"training needs {error.name}: pip install 'sequence-zoo[train]'") from error
    logging.disable_progress_bar()  # of saving and loading weights; the run has its own
    settings = config.load_config(arguments.recipe, arguments.assignments)
    if arguments.print_config:
        print(config.to_yaml(settings), end="")
    elif arguments.dry_run:
        for line in plan.plan_run(settings, arguments.device, arguments.devices):
            print(line)
    else:
        loop.run(settings)


def generate(arguments: argparse.Namespace) -> None:
    _check_checkpoint(arguments.checkpoint)
    if not arguments.prompt:
        raise ValueError("--prompt is empty: there is nothing to continue")
    logging.disable_progress_bar()  # of loading weights
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    torch.manual_seed(arguments.seed)
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature must be 0 or positive, got {arguments.temperature}")
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    model.generate(
        **tokenizer(arguments.prompt, return_tensors="pt"),
        **sampling,
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


def evaluate(arguments: argparse.Namespace) -> None:
    try:
        from zoo.evaluate import harness, record  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise ValueError(f"evaluation needs {error.name}: pip install 'sequence-zoo[eval]'") from error
    _check_checkpoint(arguments.checkpoint)
    if arguments.device is not None:
        _find_device(arguments.device)
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


def _check_checkpoint(name: str) -> None:
    """Raise ValueError unless `name` may be a checkpoint of the zoo, or one on the Hub."""
    folder = Path(name).expanduser()
    is_on_hub = not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    if not is_on_hub and not (folder / "config.json").is_file():
        hint = f"; did you mean {folder / 'latest'}?" if (folder / "latest").is_dir() else ""
        raise ValueError(f"{name} is no checkpoint: it has no config.json{hint}")


def _find_device(name: str) -> torch.device:
    """The device of that name; ValueError if this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def import_(arguments: argparse.Namespace) -> None:
    model = zoo.convert.save_imported(arguments.source, arguments.destination)
    print(f"{arguments.destination}: {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")


def export(arguments: argparse.Namespace) -> None:
    _check_checkpoint(arguments.source)
    logging.disable_progress_bar()  # of loading weights
    zoo.convert.save_exported(arguments.source, arguments.destination, to=arguments.to)
    print(f"{arguments.destination}: {arguments.to} loads it")


def publish(arguments: argparse.Namespace) -> None:
    _check_checkpoint(arguments.checkpoint)
    logging.disable_progress_bar()  # of loading weights; sending them has its own
    with publication.prepare(
        arguments.checkpoint,
        arguments.repository,
        format=arguments.format,
        license=arguments.license,
        results=arguments.results,
    ) as prepared:
        if arguments.dry_run:
            print(prepared.card, prepared.list_files(), sep="\n")
            return
        commit = upload.publish(prepared, private=arguments.private, force=arguments.force)
        print(prepared.list_files())
        print(commit.commit_url)


def plot(arguments: argparse.Namespace) -> None:
    try:
        from zoo import plots  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise ValueError(f"plots need {error.name}: pip install 'sequence-zoo[train]'") from error
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


def selftest(arguments: argparse.Namespace) -> None:
    from zoo.selftest import describe_environment, op_names, selftest  # noqa: PLC0415 (imports every op)

    for op in arguments.ops:
        if op not in op_names():
            raise unknown_name("op", op, op_names())
    device = _find_device(arguments.device)
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

    bench_ops(arguments.ops, arguments.device, arguments.repeats, arguments.output)


def bench_models(arguments: argparse.Namespace) -> None:
    from zoo.bench.models import bench_models  # noqa: PLC0415 (as above)

    bench_models(arguments.models, arguments.repeats, arguments.output)


def bench_train(arguments: argparse.Namespace) -> None:
    from zoo.bench.train import bench_train  # noqa: PLC0415 (as above)

    bench_train(arguments.recipes, arguments.repeats, arguments.output)


def bench_length(arguments: argparse.Namespace) -> None:
    from zoo.bench.length import bench_length  # noqa: PLC0415 (as above)

    bench_length(arguments.models, arguments.repeats, arguments.output)


def bench_aot(arguments: argparse.Namespace) -> None:
    try:
        from zoo.bench.aot import bench_aot  # noqa: PLC0415 (it needs Triton)
    except ModuleNotFoundError as error:
        raise ValueError(f"compiling GPU kernels needs {error.name}: pip install {error.name}") from error
    bench_aot(arguments.ops, arguments.output)


if __name__ == "__main__":
    sys.exit(main())

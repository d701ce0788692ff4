"""`zoo train` and `zoo launch`."""

import argparse
import sys

from transformers.utils import logging

from zoo.cli.arguments import extra


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("train", help="pretrain a model as a recipe says")
    command.add_argument("recipe", help="a YAML file, or one that comes with the zoo, as tiny/retnet.yaml")
    command.add_argument("assignments", nargs="*", metavar="key=value", help="what to change, as train.seed=1")
    instead = command.add_mutually_exclusive_group()
    instead.add_argument("--print-config", action="store_true", help="print the resolved recipe, and do nothing else")
    instead.add_argument("--dry-run", action="store_true", help="print what the run will take, and do nothing else")
    about = "with --dry-run: hours and memory on another device than this machine's, as H100"
    command.add_argument("--device", default=argparse.SUPPRESS, help=about)
    command.add_argument("--devices", type=int, default=argparse.SUPPRESS, help="with --dry-run: how many of them")
    command.set_defaults(run=train)

    about = "accelerate launch, with its arguments; asked to stop, it ends as the run does, with 0"
    # No prefix is an option's: all words are for `accelerate launch`.
    command = commands.add_parser("launch", help=about, prefix_chars="\0", add_help=False)
    command.add_argument("arguments", nargs=argparse.REMAINDER)
    command.set_defaults(run=launch)


def train(arguments: argparse.Namespace) -> None:
    on = {name: value for name, value in vars(arguments).items() if name in ("device", "devices")}
    if on and not arguments.dry_run:
        raise ValueError(f"--{next(iter(on))} goes with --dry-run; a run takes the devices that its launcher gives it")
    with extra("train", "training"):
        from zoo.train import config, loop, plan  # noqa: PLC0415 (an extra)
    logging.disable_progress_bar()  # of saving and loading weights; the run has its own
    settings = config.load_config(arguments.recipe, arguments.assignments)
    if arguments.print_config:
        print(config.to_yaml(settings), end="")
    elif arguments.dry_run:
        for line in plan.plan_run(settings, **on):
            print(line)
    else:
        loop.run(settings)


def launch(arguments: argparse.Namespace) -> None:
    with extra("train", "training"):
        from zoo.train.launch import launch  # noqa: PLC0415 (an extra)
    if status := launch(arguments.arguments):
        sys.exit(status)

"""`zoo import`, `zoo export` and `zoo publish`."""

import argparse

from transformers.utils import logging

import zoo
from zoo.cli.arguments import check_checkpoint
from zoo.hub import publication, upload


def add(commands: argparse._SubParsersAction) -> None:
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


def import_(arguments: argparse.Namespace) -> None:
    model = zoo.convert.save_imported(arguments.source, arguments.destination)
    print(f"{arguments.destination}: {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")


def export(arguments: argparse.Namespace) -> None:
    check_checkpoint(arguments.source)
    logging.disable_progress_bar()  # of loading weights
    zoo.convert.save_exported(arguments.source, arguments.destination, to=arguments.to)
    print(f"{arguments.destination}: {arguments.to} loads it")


def publish(arguments: argparse.Namespace) -> None:
    check_checkpoint(arguments.checkpoint)
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

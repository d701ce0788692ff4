"""`zoo list`, `zoo show` and `zoo generate`."""

import argparse
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

import zoo
from zoo.cli.arguments import check_checkpoint
from zoo.errors import unknown_name


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("list", help="the models there are")
    command.add_argument("pattern", nargs="?", default="*", help="a shell pattern, as 'retnet*'")
    command.add_argument("--markdown", action="store_true", help="the README's table of architectures")
    command.set_defaults(run=list_presets)

    command = commands.add_parser("show", help="parameters, state and paper of a model")
    command.add_argument("name", help="a name of `zoo list`")
    command.add_argument("--length", type=int, default=2048, help="tokens at which a growing state is measured")
    command.set_defaults(run=show)

    command = commands.add_parser("generate", help="continue a prompt, streaming")
    command.add_argument("checkpoint", help="a folder or a name on the Hub")
    command.add_argument("--prompt", required=True)
    command.add_argument("--max-new-tokens", type=int, default=100)
    command.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=generate)


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


def generate(arguments: argparse.Namespace) -> None:
    check_checkpoint(arguments.checkpoint)
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

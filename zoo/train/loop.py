"""The pretraining loop: one process, a log line a step, whole checkpoints, and a report at the end."""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from textwrap import indent
from typing import TextIO

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zoo.evaluate import TextScore, score_text
from zoo.files import whole_folder
from zoo.registry import create_config, create_model
from zoo.train.config import TrainConfig, to_yaml
from zoo.train.data import Corpus, batches, encode, into_rows, read_corpus, train_tokenizer

_SMOOTHING = 0.95  # of the loss in the progress bar and of the line in the plot


def run(config: TrainConfig, say: Callable[[str], None] = print) -> dict[str, TextScore]:
    """Train a tokenizer and a model as the recipe says, and leave log, plot, checkpoints and figures in its output.

    Ctrl-C saves a checkpoint of the steps done so far before it takes effect.

    Returns:
        The scores of the held-out texts, by name.

    Raises:
        ValueError: if the output holds a run already, or the recipe does not fit the data.
        FloatingPointError: if the loss stops being finite; the last checkpoint is named.
    """
    output = Path(config.train.output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"train.output {output} is a file")
    if (output / "log.jsonl").exists():
        raise ValueError(f"{output} holds a run already: remove it, or choose another train.output")
    create_config(config.model.preset, **config.model.overrides)  # an error in it shall not wait for the data
    torch.manual_seed(config.train.seed)
    corpus = read_corpus(config.data.corpus)
    started = time.perf_counter()
    tokenizer = train_tokenizer(corpus.documents, config.data.vocab_size)
    tokens = encode(tokenizer, corpus.documents)
    rows = into_rows(tokens, config.data.sequence_length, config.data.batch_size)
    say(
        f"corpus {config.data.corpus}: {len(corpus.documents)} documents, {len(tokens):,} tokens of a vocabulary of "
        f"{len(tokenizer):,} ({time.perf_counter() - started:.0f} s)"
    )
    model = create_model(
        config.model.preset,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config.model.overrides,
    )
    say(f"{config.model.preset}: {model.num_parameters():,} parameters")

    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(to_yaml(config))
    _optimise(config, model, tokenizer, rows, output)
    return _report(config, model, tokenizer, corpus, output, say)


def _report(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    output: Path,
    say: Callable[[str], None],
) -> dict[str, TextScore]:
    """Score the held-out texts, plot the losses, sample a text; say it and keep it in the output."""
    scores = {
        name: score_text(model, tokenizer, text, window=config.data.sequence_length)
        for name, text in corpus.held_out.items()
    }
    figures = {
        "held_out": {name: score._asdict() for name, score in scores.items()},
        "parameters": model.num_parameters(),
        "corpus_sha256": corpus.sha256,
        "seed": config.train.seed,
        "device": str(model.device),
        "torch": torch.__version__,
        "zoo": version("sequence-zoo"),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    (output / "held_out.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot_loss(output / "log.jsonl", output / "loss.png", scores)
    say(f"{'held-out text, never trained on':<42}nats a token   bits per byte")
    for name, score in scores.items():
        say(f"  {name + ' loss':<40}{score.loss:12.3f}{score.bits_per_byte:16.3f}")
        say(f"  {'its unigram entropy':<40}{score.unigram_entropy:12.3f}{score.unigram_bits_per_byte:16.3f}")
    say(f"sample\n{indent(generate_sample(model, tokenizer, config.train.sample_prompt), '  | ')}")
    say(f"checkpoint {output / 'latest'}, loss curve {output / 'loss.png'}")
    return scores


def _optimise(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Tensor,
    output: Path,
) -> None:
    batch_size, settings = config.data.batch_size, config.train
    tokens_a_step = batch_size * rows.shape[1]
    steps = max(1, round(settings.tokens / tokens_a_step))
    groups = model.parameter_groups(settings.learning_rate, settings.weight_decay)
    optimiser = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)
    factor = _warmup_cosine(steps, settings.warmup_fraction)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    smooth, done = math.nan, 0
    model.train()
    with (
        (output / "log.jsonl").open("w") as log,
        tqdm(
            total=steps * tokens_a_step,
            desc=config.model.preset,
            unit="tok",
            unit_scale=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
        ) as bar,
    ):
        try:
            for step, batch in zip(range(1, steps + 1), batches(rows, batch_size, settings.seed), strict=False):
                started = time.perf_counter()
                outputs = model(batch, labels=batch)
                loss, auxiliary = outputs.loss, outputs.aux_losses or {}
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                if not (loss.isfinite() and norm.isfinite()):
                    latest = output / "latest"
                    kept = f"the last checkpoint is {latest.resolve()}" if latest.exists() else "none was saved yet"
                    raise FloatingPointError(
                        f"loss {loss.item()} and gradient norm {norm.item()} at step {step}; {kept}"
                    )
                rate = settings.learning_rate * factor(step - 1)
                optimiser.step()
                done = step
                schedule.step()
                optimiser.zero_grad()
                speed = batch.numel() / (time.perf_counter() - started)
                row = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), "lr": rate}
                row |= {name: value.item() for name, value in auxiliary.items()}
                _log(log, **row, tokens_per_second=speed)
                smooth = _smooth(smooth, loss.item())
                bar.set_postfix_str(f"loss {smooth:.3f}", refresh=False)
                bar.update(batch.numel())
                if step % settings.save_every == 0 and step < steps:
                    save_checkpoint(model, tokenizer, output, step)
        except KeyboardInterrupt:
            save_checkpoint(model, tokenizer, output, done)
            raise
    save_checkpoint(model, tokenizer, output, done)


def _warmup_cosine(steps: int, warmup_fraction: float) -> Callable[[int], float]:
    """The factor of the learning rate at each step: linear up to 1 in the warm-up, then cosine to 0.1."""
    warmup = max(1, round(steps * warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def _smooth(average: float, loss: float) -> float:
    """The running average of the loss after another step; the first loss starts it."""
    return loss if math.isnan(average) else _SMOOTHING * average + (1 - _SMOOTHING) * loss


def _log(file: TextIO, **values: float) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, step: int) -> Path:
    """Write a Hugging Face folder and point `latest` at it; until it is whole, `latest` stays at the one before."""
    folder = output / f"step-{step:08d}"
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    link = output / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(output / "latest")
    for old in output.iterdir():
        if re.fullmatch(r"step-\d{8}", old.name) and old != folder:
            shutil.rmtree(old)
    return folder


def generate_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """A continuation of `prompt`, sampled."""
    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = model.generate(
        **inputs, max_new_tokens=48, do_sample=True, temperature=0.8, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def plot_loss(log: Path, picture: Path, scores: dict[str, TextScore]) -> None:
    """The loss of each step, smoothed, with the held-out losses and the unigram entropies as lines."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, list(accumulate(losses, _smooth)), color="tab:blue", label="training loss")
    for (name, score), color in zip(scores.items(), ("tab:orange", "tab:green", "tab:red", "tab:purple"), strict=False):
        axes.axhline(score.loss, color=color, linestyle="--", linewidth=1, label=f"held-out {name}")
        axes.axhline(score.unigram_entropy, color=color, linestyle=":", linewidth=1, label=f"unigram entropy of {name}")
    axes.set(xlabel="step", ylabel="nats a token")
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=150)

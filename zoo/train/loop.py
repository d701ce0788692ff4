"""The pretraining loop: the same for one process and for many, from the start or from the newest checkpoint."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from zoo.cache import detach_state
from zoo.inspection import state_bytes
from zoo.registry import create_config, create_model
from zoo.train.batches import IGNORED
from zoo.train.checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    point_latest,
    save_checkpoint,
)
from zoo.train.config import TrainConfig, to_yaml
from zoo.train.data import TrainingData, prepare_data
from zoo.train.distributed import make_accelerator
from zoo.train.optimizer import learning_rate_schedule, make_optimizers, set_learning_rate
from zoo.train.output import check_recipe, claimed, flat
from zoo.train.plan import memory_in_use, multiplied_parameters, peak_of
from zoo.train.provenance import commit, device_name
from zoo.train.report import ProgressBar, RunLog, describe_scores, plot_run
from zoo.train.stop import StopRequest, stop_requests
from zoo.train.validation import Score, unigram_baseline, validate


def run(config: TrainConfig, say: Callable[[str], None] = print) -> dict[str, Score]:
    """Train as a recipe says, from the newest whole checkpoint in its output if there is one.

    SIGTERM and SIGINT (Ctrl-C) end it after the step they come in, with a checkpoint.

    Args:
        config: the recipe.
        say: takes the lines that the main process has for the user.

    Returns:
        The scores of the held-out texts, by name; none if the run was ended before its last step.

    Raises:
        ValueError: if the recipe does not fit the data, the output, or the checkpoint in it.
        FloatingPointError: if too many steps in a row have no finite gradients; the last checkpoint is named.
    """
    output = Path(config.train.output).expanduser()
    if output.exists() and not output.is_dir():
        raise ValueError(f"train.output {output} is a file")
    create_config(config.model.preset, **config.model.overrides)  # an error in it shall not wait for the data
    accelerator = make_accelerator(str(output), config.train.trackers)
    try:
        with claimed(output, accelerator):
            return Run(config, output, accelerator, say).train()
    finally:
        accelerator.end_training()


class Run:
    """One run of a recipe: everything is checked and loaded when it is made, and `train` goes through the steps."""

    def __init__(self, config: TrainConfig, output: Path, accelerator: Accelerator, say: Callable[[str], None]):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.is_main = accelerator.is_main_process
        self.say = say if self.is_main else lambda line: None
        found = find_checkpoint(output, self.say)
        folder, self.progress = found or (None, Progress())
        if folder is not None:
            check_recipe(config, folder)
        torch.manual_seed(config.train.seed)
        tokenizer = AutoTokenizer.from_pretrained(folder) if folder else None
        self.data: TrainingData = prepare_data(config, tokenizer, self.say, show_progress=self.is_main)
        self.tokenizer: PreTrainedTokenizerBase = self.data.tokenizer
        if folder is not None and self.progress.data_sha256 != self.data.sha256:
            raise ValueError(f"the data changed since {folder.name} was written: choose another train.output")
        self.progress.data_sha256 = self.data.sha256
        model = self._make_model(folder)
        self.parameters = model.num_parameters()
        self.flops_per_token = 6 * multiplied_parameters(model)
        tokens_a_step = config.data.batch_size * config.data.sequence_length
        self.steps = max(1, round(config.train.tokens / tokens_a_step))
        self.factor = learning_rate_schedule(config.train, self.steps)
        optimizers = make_optimizers(model, config.train)
        self.model, *self.optimizers = accelerator.prepare(model, *optimizers)
        torch.manual_seed(config.train.seed + accelerator.process_index)  # each process drops out other activations
        self.carried: list[Cache] = []
        if folder is not None:
            self._resume(folder)
        if config.train.compile:
            accelerator.unwrap_model(self.model).compile()
        precision = config.train.precision
        uses_bf16 = precision == "bf16" or (precision == "auto" and accelerator.device.type == "cuda")
        self.autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=uses_bf16)
        self.baselines = {name: unigram_baseline(store) for name, store in self.data.validation.items()}

    @property
    def raw_model(self) -> PreTrainedModel:
        """The model without what Accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model)

    def _make_model(self, folder: Path | None) -> PreTrainedModel:
        """A model with fresh weights, or with those of a checkpoint."""
        settings, tokenizer = self.config.model, self.tokenizer
        vocab_size = settings.overrides.get("vocab_size", len(tokenizer))
        if vocab_size < len(tokenizer):
            raise ValueError(f"model.overrides.vocab_size is {vocab_size}, the tokenizer has {len(tokenizer)} entries")
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fields = {**settings.overrides, **special, "vocab_size": vocab_size}
        config = create_config(settings.preset, **fields)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and longest < self.config.data.sequence_length:
            raise ValueError(
                f"data.sequence_length is {self.config.data.sequence_length}, the model reads {longest} tokens: set "
                "model.overrides.max_position_embeddings"
            )
        if self.config.train.carry_state and state_bytes(config, 1) != state_bytes(config, 2):
            raise ValueError(f"train.carry_state: a layer of {settings.preset} keeps more with every token it reads")
        if folder is None:
            model = create_model(settings.preset, **fields)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        if self.config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.say(f"{settings.preset}: {model.num_parameters():,} parameters")
        return model.train()

    def _resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        carried = load_checkpoint(folder, self.accelerator, self.model, self._bare_optimizers())
        self.carried = carried or []
        self.say(f"going on from {folder.name}, {self.progress.tokens:,} tokens")
        if self.progress.world_size != self.accelerator.num_processes:
            self.say(
                f"it was written by {self.progress.world_size} processes and these are "
                f"{self.accelerator.num_processes}: sums are rounded in another order, dropout draws other numbers"
                + (" and carried states start anew" if self.config.train.carry_state else "")
                + ", so losses agree, but not to the last bit"
            )
        if self.is_main:
            point_latest(self.output, folder)

    def _bare_optimizers(self) -> list[Optimizer]:
        return [optimizer.optimizer for optimizer in self.optimizers]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Score]:
        """Go through the steps that are left, then score all of the held-out texts."""
        settings, progress = self.config.train, self.progress
        self.output.mkdir(parents=True, exist_ok=True)
        if settings.trackers:
            self.accelerator.init_trackers("zoo", flat(OmegaConf.to_container(OmegaConf.structured(self.config))))
        log = RunLog(self.output / "log.jsonl", progress.step) if self.is_main else None
        tokens_a_step = self.config.data.batch_size * self.config.data.sequence_length
        bar = ProgressBar(self.config.model.preset, self.steps * tokens_a_step, progress.tokens, self.is_main)
        _, peak = peak_of(self.accelerator.device)
        evaluate_every = settings.evaluate_every or settings.save_every
        with stop_requests(bar.say if self.is_main else self.say) as stop:
            try:
                while progress.step < self.steps:
                    started = time.perf_counter()
                    figures, stopped = self._step(stop)
                    seconds = time.perf_counter() - started
                    speed = tokens_a_step / seconds
                    mfu = speed * self.flops_per_token / (peak * self.accelerator.num_processes)
                    progress.hours += seconds / 3600
                    is_last = progress.step == self.steps
                    is_saved = is_last or stopped or progress.step % settings.save_every == 0
                    row = {"step": progress.step, **figures, "tokens_per_second": speed, "mfu": mfu}
                    if self.data.validation and (is_last or progress.step % evaluate_every == 0):
                        row["validation"] = self._validate(None if is_last else settings.evaluate_rows, bar)
                        is_saved |= progress.best_step == progress.step
                    if log is not None:
                        log.write(**row)
                        self._track(row)
                    memory = memory_in_use(self.accelerator.device)
                    shown = {"tok/s": f"{speed:,.0f}", "mfu": f"{mfu:.0%}", "memory": f"{memory / 1e9:.1f}G"}
                    if progress.skipped:
                        shown["skipped"] = str(progress.skipped)
                    bar.update(tokens_a_step, figures["loss"], **shown)
                    if is_saved:
                        self._save()
                    if stopped:
                        break
            finally:
                bar.close()
                if log is not None:
                    log.close()
                self.data.close()
        if progress.step < self.steps:
            self.say(f"stopped after step {progress.step}; the same command goes on from {self.output / 'latest'}")
            return {}
        return self._report()

    def _step(self, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """One update of the weights; gives the figures of the log, and whether some process was asked to stop."""
        settings, progress, accelerator = self.config.train, self.progress, self.accelerator
        factor = self.factor(progress.step)
        set_learning_rate(self.optimizers, factor)
        batch = self.data.batches.batch(progress.step, accelerator.process_index, accelerator.num_processes)
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        count = (batch["shift_labels"] != IGNORED).sum().float()
        count, stopped = accelerator.reduce(torch.stack([count, count.new_tensor(float(stop.requested))])).unbind()
        rows = self.config.data.micro_batch_size or len(batch["input_ids"])
        parts = list(zip(*(x.split(rows) for x in batch.values()), strict=True))
        total, auxiliary, carried = 0.0, {}, []
        for index, (part, cache) in enumerate(zip_longest(parts, self.carried)):
            is_last = index == len(parts) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                with self.autocast:
                    outputs = self._forward(dict(zip(batch, part, strict=True)), cache, count)
                # Gradients are averaged over the processes, and each has the sum of its part of the mean.
                accelerator.backward(outputs.loss * accelerator.num_processes)
            total = total + outputs.loss.detach().float()
            for name, value in (outputs.aux_losses or {}).items():
                auxiliary[name] = auxiliary.get(name, 0.0) + value.detach().float() / len(parts)
            if settings.carry_state:
                detach_state(outputs.past_key_values)
                carried.append(outputs.past_key_values)
        self.carried = carried
        loss = accelerator.reduce(total).item()
        norm = _full(accelerator.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)).item()
        self._update(loss, norm)
        progress.step += 1
        progress.tokens += batch["input_ids"].numel() * accelerator.num_processes
        progress.world_size = accelerator.num_processes
        figures = {"loss": loss, "grad_norm": norm, "lr": settings.learning_rate * factor}
        for name, value in auxiliary.items():
            figures[name] = accelerator.reduce(value, "mean").item()
        if progress.skipped:
            figures["skipped"] = progress.skipped
        return figures, bool(stopped)

    def _forward(self, part: dict[str, Tensor], cache: Cache | None, count: Tensor) -> Any:
        settings = self.config.train
        return self.model(
            **part,
            past_key_values=cache,
            use_cache=settings.carry_state,
            num_items_in_batch=count,
            z_loss=settings.z_loss,
            skip_logits=True,
        )

    def _update(self, loss: float, norm: float) -> None:
        """Take the step, or skip it where gradients are not finite."""
        progress = self.progress
        is_finite = abs(norm) < float("inf") and abs(loss) < float("inf")
        if is_finite:
            for optimizer in self.optimizers:
                optimizer.step()
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            self.carried = []  # what led there shall not go on
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if progress.skipped_in_a_row >= self.config.train.max_skipped:
            latest = self.output / "latest"
            kept = f"the last checkpoint is {latest.resolve()}" if latest.exists() else "none was saved yet"
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} at step {progress.step + 1}, the "
                f"{progress.skipped_in_a_row}th in a row that is not finite; {kept}"
            )

    # -- between steps -------------------------------------------------------------------------------------------------

    def _validate(self, rows: int | None, bar: ProgressBar) -> dict[str, dict[str, float]]:
        """Score the held-out texts, or some rows of each, and show a sample."""
        data = self.config.data
        rows_at_a_time = data.micro_batch_size or max(1, data.batch_size // self.accelerator.num_processes)
        scores = {}
        for name, store in self.data.validation.items():
            with self.autocast:
                score = validate(
                    self.model,
                    store,
                    self.accelerator,
                    data.sequence_length,
                    rows_at_a_time,
                    self.tokenizer.eos_token_id,
                    data.isolate_documents,
                    rows,
                )
            scores[name] = score._asdict()
        progress = self.progress
        progress.scores = scores
        mean = sum(score["loss"] for score in scores.values()) / len(scores)
        if rows is not None:
            losses = ", ".join(f"{name} {score['loss']:.3f}" for name, score in scores.items())
            bar.say(f"step {progress.step}: held-out {losses} nats a token{indent(self._sample(), ' | ')}")
            if progress.best_loss is None or mean < progress.best_loss:
                progress.best_loss, progress.best_step = mean, progress.step
        return scores

    def _sample(self) -> str:
        """A continuation of the prompt behind a line break; empty without a prompt. All processes draw the same."""
        prompt = self.config.train.sample_prompt
        if not prompt:
            return ""
        model = self.raw_model.eval()
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.accelerator.device)
        with torch.random.fork_rng(), self.autocast:
            torch.manual_seed(0)
            ids = model.generate(
                **inputs, max_new_tokens=48, do_sample=True, temperature=0.8, pad_token_id=self.tokenizer.pad_token_id
            )
        model.train()
        return "\n" + self.tokenizer.decode(ids[0], skip_special_tokens=True)

    def _track(self, row: dict[str, Any]) -> None:
        """Hand a line of the log to the trackers."""
        self.accelerator.log(flat({name: value for name, value in row.items() if name != "step"}), step=row["step"])

    def _save(self) -> None:
        save_checkpoint(
            self.output,
            self.progress,
            self.accelerator,
            self.model,
            self._bare_optimizers(),
            self.tokenizer,
            {"recipe.yaml": to_yaml(self.config), "training.json": json.dumps(self._facts(), indent=2) + "\n"},
            self.carried,
            self.config.train.keep,
        )

    def _facts(self) -> dict[str, Any]:
        """Where the weights come from."""
        progress = self.progress
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "skipped_steps": progress.skipped,
            "hours": round(progress.hours, 4),
            "validation": progress.scores,
            "data": {
                "sources": {
                    name: {key: value for key, value in asdict(source).items() if value}
                    for name, source in self.config.data.sources.items()
                },
                "sha256": progress.data_sha256,
            },
            "parameters": self.parameters,
            "seed": self.config.train.seed,
            "world_size": progress.world_size,
            "device": device_name(self.accelerator.device),
            "torch": torch.__version__,
            "zoo": version("sequence-zoo"),
            "commit": commit(),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }

    def _report(self) -> dict[str, Score]:
        """Show the scores of the held-out texts, draw the pictures, sample a text."""
        scores = {name: Score(**score) for name, score in self.progress.scores.items()}
        sample = self._sample()
        if self.is_main:
            plot_run(self.output / "log.jsonl", self.output, self.baselines)
            for line in describe_scores(scores, self.baselines):
                self.say(line)
            if sample:
                self.say(f"sample{indent(sample, '  | ')}")
            self.say(f"checkpoint {self.output / 'latest'}, pictures {self.output / 'loss.png'} and beside it")
        return scores


def _full(norm: Tensor) -> Tensor:
    """A gradient norm as one number, also where the gradients are sharded."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

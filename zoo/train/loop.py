"""The pretraining loop: the same for one process and for many, from the start or from the newest checkpoint."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoTokenizer, Cache, PreTrainedModel, PreTrainedTokenizerBase

from zoo.cache import detach_state
from zoo.provenance import commit, device_name
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
from zoo.train.engine import make_engine
from zoo.train.model import check_model, check_sharing, make_model
from zoo.train.optimizer import learning_rate_schedule, set_learning_rate
from zoo.train.output import check_recipe, claimed, flat
from zoo.train.plan import make_plan, memory_in_use, peak_of
from zoo.train.report import ProgressBar, RunLog, describe_scores, plot_run
from zoo.train.stop import StopRequest, stop_requests
from zoo.train.store import IGNORED
from zoo.train.validation import Score, check_prompt, generate_sample, unigram_baseline, validate


def run(config: TrainConfig, say: Callable[[str], None] = print) -> dict[str, Score]:
    """Train as a recipe says, from the newest whole checkpoint in its output if there is one.

    SIGTERM, SIGINT (Ctrl-C) and SIGHUP end it after the step they come in, with a checkpoint.

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
    check_model(config)  # an error in it shall not wait for the data
    accelerator = make_accelerator(output, config.train)
    if config.data.batch_size % accelerator.num_processes:
        raise ValueError(
            f"data.batch_size is {config.data.batch_size}, which does not divide among {accelerator.num_processes} "
            "processes"
        )
    with claimed(output, accelerator):
        scores = Run(config, output, accelerator, say).train()
    accelerator.end_training()  # not after an error: other processes may still be waiting for this one
    return scores


class Run:
    """One run of a recipe: everything is checked and loaded when it is made, and `train` goes through the steps."""

    def __init__(self, config: TrainConfig, output: Path, accelerator: Accelerator, say: Callable[[str], None]):
        self.config, self.output, self.accelerator = config, output, accelerator
        self.is_main = accelerator.is_main_process
        self.say = say if self.is_main else lambda line: None
        found = [find_checkpoint(output, self.say) if self.is_main else None]
        folder, self.progress = broadcast_object_list(found)[0] or (None, Progress())
        if folder is not None:
            check_recipe(config, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder) if folder else None
        self.data: TrainingData = prepare_data(config, tokenizer, self.say, show_progress=self.is_main)
        self.tokenizer: PreTrainedTokenizerBase = self.data.tokenizer
        self._check_data(folder)
        check_prompt(config.train.sample_prompt, self.tokenizer)
        torch.manual_seed(config.train.seed)
        model = make_model(config, self.tokenizer, folder)
        check_sharing(config, model, accelerator)
        self.say(f"{config.model.preset}: {model.num_parameters():,} parameters")
        self.plan = make_plan(config, model, accelerator.num_processes)
        self.factor = learning_rate_schedule(config.train, self.plan.steps)
        self.engine = make_engine(accelerator, model, config.train)
        self.raw_model: PreTrainedModel = accelerator.unwrap_model(self.engine.model)
        # Each process drops out other activations, and with another number of processes not those of the start again.
        torch.manual_seed(config.train.seed + accelerator.process_index + 1_000_003 * self.progress.step)
        self.carried: list[Cache] = []
        if folder is not None:
            self._resume(folder)
        if config.train.compile:
            self.raw_model.compile()
        precision = config.train.precision
        uses_bf16 = precision == "bf16" or (precision == "auto" and accelerator.device.type == "cuda")
        self.autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=uses_bf16)

    def _check_data(self, folder: Path | None) -> None:
        """Raise unless the data are those of the checkpoint, and the same in all processes."""
        if folder is not None and self.progress.data_sha256 != self.data.sha256:
            raise ValueError(f"the data changed since {folder.name} was written: choose another train.output")
        self.progress.data_sha256 = self.data.sha256
        if len(set(gather_object([self.data.sha256]))) > 1:
            raise ValueError("processes read different data: put data.cache on a disk that all of them see")

    def _resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        carried = load_checkpoint(folder, self.accelerator, self.engine)
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

    # -- steps ---------------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Score]:
        """Go through the steps that are left, then score all of the held-out texts."""
        settings, progress, plan = self.config.train, self.progress, self.plan
        if settings.trackers:
            recipe = flat(OmegaConf.to_container(OmegaConf.structured(self.config)))
            name, folder = self.output.absolute().name, str(self.output / "trackers")
            options = {"wandb": {"name": name, "dir": folder}, "trackio": {"name": name}}
            self.accelerator.init_trackers("zoo", recipe, init_kwargs=options)
        log = RunLog(self.output / "log.jsonl", progress.step) if self.is_main else None
        bar = ProgressBar(self.config.model.preset, plan.tokens, progress.tokens, self.is_main)
        _, peak = peak_of(self.accelerator.device)
        evaluate_every = settings.evaluate_every or settings.save_every
        try:
            with stop_requests() as stop:
                while progress.step < plan.steps:
                    started = time.perf_counter()
                    figures = self._step()
                    seconds = time.perf_counter() - started
                    progress.hours += seconds / 3600
                    speed = plan.tokens_per_step / seconds
                    mfu = speed * plan.flops_per_token / (peak * self.accelerator.num_processes)
                    row = {"step": progress.step, **figures, "tokens_per_second": speed, "mfu": mfu}
                    is_last = progress.step == plan.steps
                    is_validated = self.data.validation and (is_last or progress.step % evaluate_every == 0)
                    if is_validated:
                        row["validation"] = self._validate(None if is_last else settings.evaluate_rows)
                    if log is not None:
                        log.write(**row)
                        self._track(row)
                    bar.update(plan.tokens_per_step, figures["loss"], **self._shown(speed, mfu))
                    is_best = progress.best_step == progress.step
                    is_saved = is_last or is_best or progress.step % settings.save_every == 0
                    if is_saved:
                        self._save()
                    if is_validated and not is_last:
                        bar.say(self._describe_validation())
                    if self._is_asked_to_stop(stop):  # last: validation, saving and sampling take their time
                        if not is_saved:
                            self._save()
                        bar.say("asked to stop: saved")
                        break
        finally:
            bar.close()
            if log is not None:
                log.close()
            self.data.close()
        if progress.step < plan.steps:
            self.say(f"stopped after step {progress.step}; the same command goes on from {self.output / 'latest'}")
            return {}
        return self._report()

    def _shown(self, speed: float, mfu: float) -> dict[str, str]:
        """What the progress bar says beside the loss."""
        memory = memory_in_use(self.accelerator.device)
        shown = {"tok/s": f"{speed:,.0f}", "mfu": f"{mfu:.0%}", "memory": f"{memory / 1e9:.1f}G"}
        return shown | {"skipped": str(self.progress.skipped)} if self.progress.skipped else shown

    def _step(self) -> dict[str, float]:
        """One update of the weights; gives the figures of the log."""
        settings, progress, accelerator = self.config.train, self.progress, self.accelerator
        factor = self.factor(progress.step)
        set_learning_rate(self.engine.optimizers, factor)
        batch = self.data.batches.batch(progress.step, accelerator.process_index, accelerator.num_processes)
        batch = {name: x.to(accelerator.device) for name, x in batch.items()}
        count = accelerator.reduce((batch["shift_labels"] != IGNORED).sum().float())
        rows = self.config.data.micro_batch_size or len(batch["input_ids"])
        parts = list(zip(*(x.split(rows) for x in batch.values()), strict=True))
        total, auxiliary, carried = 0.0, {}, []
        caches = self.carried or [None] * len(parts)
        for index, (part, cache) in enumerate(zip(parts, caches, strict=True)):
            part = dict(zip(batch, part, strict=True))
            with self.engine.micro_batch(is_last=index == len(parts) - 1):
                with self.autocast:
                    outputs = self._forward(part, cache, count)
                # Gradients are averaged over the processes, and each has the sum of its part of the mean.
                self.engine.backward(outputs.loss * accelerator.num_processes)
            total = total + outputs.loss.detach().float()
            share = (part["shift_labels"] != IGNORED).sum() / count
            for name, value in (outputs.aux_losses or {}).items():
                auxiliary[name] = auxiliary.get(name, 0.0) + share * value.float()
            if settings.carry_state:
                detach_state(outputs.past_key_values)
                carried.append(outputs.past_key_values)
        self.carried = carried
        loss = accelerator.reduce(total).item()
        norm = self._update(loss)
        progress.step += 1
        progress.tokens += batch["input_ids"].numel() * accelerator.num_processes
        progress.world_size = accelerator.num_processes
        figures = {"loss": loss, "grad_norm": norm, "lr": settings.learning_rate * factor}
        for name, value in auxiliary.items():
            figures[name] = accelerator.reduce(value).item()
        if progress.skipped:
            figures["skipped"] = progress.skipped
        return figures

    def _forward(self, part: dict[str, Tensor], cache: Cache | None, count: Tensor) -> Any:
        settings = self.config.train
        return self.engine.model(
            **part,
            past_key_values=cache,
            use_cache=settings.carry_state,
            num_items_in_batch=count,
            z_loss=settings.z_loss,
            skip_logits=True,
        )

    def _update(self, loss: float) -> float:
        """Take the step, or skip it where gradients are not finite; gives their norm."""
        progress = self.progress
        norm, is_taken = self.engine.step(loss)
        if is_taken:
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            self.carried = []  # what led there shall not go on
        if progress.skipped_in_a_row >= self.config.train.max_skipped:
            latest = self.output / "latest"
            kept = f"the last checkpoint is {latest.resolve()}" if latest.exists() else "none was saved yet"
            raise FloatingPointError(
                f"loss {loss} and gradient norm {norm} at step {progress.step + 1}, the "
                f"{progress.skipped_in_a_row}th in a row that is not finite; {kept}"
            )
        return norm

    # -- between steps -------------------------------------------------------------------------------------------------

    def _is_asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether some process was; all of them get the same answer."""
        requests = torch.tensor(float(stop.requested), device=self.accelerator.device)
        return self.accelerator.reduce(requests).item() > 0

    def _validate(self, rows: int | None) -> dict[str, dict[str, float]]:
        """Score the held-out texts, or some rows of each."""
        data, progress = self.config.data, self.progress
        with self.autocast:
            scores = {
                name: validate(
                    self.engine.model,
                    store,
                    self.accelerator,
                    data.sequence_length,
                    data.micro_batch_size or max(1, data.batch_size // self.accelerator.num_processes),
                    self.tokenizer.eos_token_id,
                    data.isolate_documents,
                    rows,
                )
                for name, store in self.data.validation.items()
            }
        progress.scores = {name: score._asdict() for name, score in scores.items()}
        mean = sum(score.loss for score in scores.values()) / len(scores)
        if rows is not None and (progress.best_loss is None or mean < progress.best_loss):
            progress.best_loss, progress.best_step = mean, progress.step
        return progress.scores

    def _describe_validation(self) -> str:
        losses = ", ".join(f"{name} {score['loss']:.3f}" for name, score in self.progress.scores.items())
        return f"step {self.progress.step}: held-out {losses} nats a token{indent(self._sample(), ' | ')}"

    def _sample(self) -> str:
        """A continuation of the prompt behind a line break; empty without a prompt."""
        prompt = self.config.train.sample_prompt
        if not prompt:
            return ""
        with self.autocast:
            return "\n" + generate_sample(self.raw_model, self.tokenizer, prompt)

    def _track(self, row: dict[str, Any]) -> None:
        """Hand a line of the log to the trackers."""
        self.accelerator.log(flat({name: value for name, value in row.items() if name != "step"}), step=row["step"])

    def _save(self) -> None:
        save_checkpoint(
            self.output,
            self.progress,
            self.accelerator,
            self.engine,
            self.tokenizer,
            self._facts() if self.is_main else {},
            self.carried,
            self.config.train.keep,
        )

    def _facts(self) -> dict[str, str]:
        """Where the weights come from, as files."""
        progress = self.progress
        facts = {
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
            "parameters": self.plan.parameters,
            "seed": self.config.train.seed,
            "world_size": progress.world_size,
            "device": device_name(self.accelerator.device),
            "torch": torch.__version__,
            "zoo": version("sequence-zoo"),
            "commit": commit(),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
        return {"recipe.yaml": to_yaml(self.config), "training.json": json.dumps(facts, indent=2) + "\n"}

    def _report(self) -> dict[str, Score]:
        """Show the scores of the held-out texts, draw the pictures, sample a text."""
        scores = {name: Score(**score) for name, score in self.progress.scores.items()}
        sample = self._sample()
        if self.is_main:
            baselines = {name: unigram_baseline(store) for name, store in self.data.validation.items()}
            plot_run(self.output / "log.jsonl", self.output, baselines)
            for line in describe_scores(scores, baselines):
                self.say(line)
            if sample:
                self.say(f"sample{indent(sample, '  | ')}")
            self.say(f"checkpoint {self.output / 'latest'}, pictures {self.output / 'loss.png'} and beside it")
        return scores

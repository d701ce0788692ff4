"""Whole models beside other code, in training and decoding: `zoo bench models`."""

import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo.bench import cpu
from zoo.bench.pairs import DECODING, PAIRS, TRAINING, Models, Pair
from zoo.bench.results import PROVENANCE, Measurement, judge
from zoo.bench.runner import choose, run_cases
from zoo.heads import ZooForCausalLM
from zoo.tables import Row

COLUMNS = (
    *("model", "parameters", "pass", "contender", "milliseconds", "tokens_per_second"),
    "ratio",  # how many times as fast as the other contender the zoo's model is
    "of_matmul_peak",  # 6 operations a parameter and token, of what one core multiplies at most
    "of_read_bandwidth",  # the weights once a token, of what one core reads at most
    *("speedup_2_threads", "peak_megabytes"),
    "difference",  # of loss and gradient, or of the tokens
    *("target", "met", "repeats", *PROVENANCE),
)

_ROWS, _LENGTH = 1, 512  # of a training step
_PROMPT, _NEW = 16, 64  # tokens of one sequence
_BUDGET = 15.0  # seconds that a model gets for its rounds


class TrainingStep:
    """A step of training as a user runs it: loss, gradients, AdamW."""

    def __init__(self, name: str, model: PreTrainedModel, tokens: Tensor, is_compared: bool):
        self.name, self._model, self._tokens, self._is_compared = name, model.train(), tokens, is_compared
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        self._options = {"skip_logits": True} if isinstance(model, ZooForCausalLM) else {}  # as `zoo train` does

    def __call__(self) -> Tensor:
        """The loss, and the norm of the gradient of the embedding."""
        loss = self._model(self._tokens, labels=self._tokens, use_cache=False, **self._options).loss
        loss.backward()
        norm = self._model.get_input_embeddings().weight.grad.norm()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.stack([loss.detach(), norm])

    def as_op(self, result: Tensor) -> list[Tensor]:
        return list(result) if self._is_compared else []


class Decoding:
    """`generate` as a user calls it: greedy, one sequence."""

    def __init__(self, name: str, model: PreTrainedModel, tokens: Tensor, is_compared: bool):
        self.name, self._model, self._is_compared = name, model.eval(), is_compared
        self._tokens = tokens[:1, :_PROMPT]

    def __call__(self) -> Tensor:
        """The continued sequence."""
        options = {"max_new_tokens": _NEW, "min_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}
        return self._model.generate(self._tokens, attention_mask=torch.ones_like(self._tokens), **options)

    def as_op(self, result: Tensor) -> list[Tensor]:
        return [result.double()] if self._is_compared else []


def bench_models(names: Sequence[str] = (), repeats: int = 9, output: Path | None = None) -> None:
    """Time a training step and greedy decoding of the zoo's models and of others.

    Args:
        names: of `PAIRS`.
        repeats, output: as of every bench (`zoo.bench.runner`).

    Raises:
        ValueError: on an unknown name, or if the two models of a pair compute something else.
    """
    chosen = choose(names, [pair.name for pair in PAIRS], "model")
    pairs = [pair for pair in PAIRS if pair.name in chosen and _can_run(pair)]
    cases = [(f"{pair.name} {which}", partial(_measure, pair, which)) for pair in pairs for which in pair.passes]
    run_cases(cases, COLUMNS, repeats, output)


def _can_run(pair: Pair) -> bool:
    if pair.package is None or importlib.util.find_spec(pair.package) is not None:
        return True
    print(f"zoo: {pair.name} is left out: {pair.other} is not installed", file=sys.stderr)
    return False


def _measure(pair: Pair, which: str, repeats: int) -> list[Row]:
    torch.manual_seed(0)
    ours, others = pair.make(pair.config())
    tokens = torch.randint(1, ours.config.vocab_size, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    trial = {TRAINING: TrainingStep, DECODING: Decoding}[which]
    pieces = tokens.unflatten(1, (-1, pair.piece)).flatten(0, 1) if pair.piece and which == TRAINING else tokens
    trials = [
        trial("zoo", ours, tokens, pair.computes_the_same),
        trial(pair.other, others, pieces, pair.computes_the_same),
    ]
    measurements = cpu.measure(trials, repeats, peak_memory=which == TRAINING, budget=_BUDGET)
    return _make_rows(pair, which, (ours, others), measurements)


def _make_rows(pair: Pair, which: str, models: Models, measurements: list[Measurement]) -> list[Row]:
    seconds = [x.seconds for x in measurements]
    target = {TRAINING: pair.training, DECODING: pair.decoding}[which]
    rows = []
    for x, model in zip(measurements, models, strict=True):
        own = {"ratio": target} if x is measurements[0] and target is not None else {}
        figures = {"speedup_2_threads": x.speedup_2_threads, "peak_megabytes": x.peak_megabytes}
        parameters = model.num_parameters()
        if x.seconds is not None:
            figures |= _figures(which, x.seconds, parameters, model.dtype.itemsize)
            if x is measurements[0] and None not in seconds:
                figures["ratio"] = seconds[1] / seconds[0]
        rows.append(
            {
                "model": pair.name,
                "parameters": parameters,
                "pass": which,
                "contender": x.contender,
                **judge(figures, own),
                "difference": f"{x.difference:.0e}" if pair.computes_the_same else "",
                "repeats": x.repeats,
            }
        )
    return rows


def _figures(which: str, seconds: float, parameters: int, itemsize: int) -> dict[str, float]:
    """The time of a step or a token, and how near it is to what the processor can do."""
    peaks = cpu.peaks()
    if which == TRAINING:
        tokens = _ROWS * _LENGTH
        matmul_peak = 6 * parameters * tokens / seconds / peaks.flops_per_second
        return {"milliseconds": 1e3 * seconds, "tokens_per_second": tokens / seconds, "of_matmul_peak": matmul_peak}
    seconds /= _NEW
    bandwidth = parameters * itemsize / seconds / peaks.bytes_per_second
    return {"milliseconds": 1e3 * seconds, "tokens_per_second": 1 / seconds, "of_read_bandwidth": bandwidth}

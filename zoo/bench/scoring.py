"""Long contexts with several choices each, scored by `ZooLM` and by lm-eval's own `HFLM`: `zoo bench eval`."""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import zoo
from zoo.bench import cpu
from zoo.bench.results import PROVENANCE, judge
from zoo.bench.runner import choose, run_cases
from zoo.evaluate.lm import ZooLM
from zoo.tables import Row
from zoo.train.tokenizer import train_words

COLUMNS = (
    *("model", "parameters", "batch_size", "contender"),
    "milliseconds",  # of a document: a context with all its choices
    "ratio",  # how many times as fast as HFLM
    "peak_megabytes",
    "difference",  # of the log-likelihoods, relative to the largest
    *("target", "met", "repeats", *PROVENANCE),
)
MODELS = ("transformer", "retnet", "mamba2", "rwkv7")

_SIZES = {"hidden_size": 512, "num_hidden_layers": 6}
_CONTEXT, _CHOICES, _DOCUMENTS = 1700, 6, 2
_BATCH_SIZES = (1, 8)
_BUDGET = 10.0  # seconds that a contender gets for its rounds
_TARGET = {"ratio": 3.0}


class Scoring:
    """A call gives the log-likelihoods of all choices."""

    def __init__(self, name: str, lm: HFLM, requests: list[Instance]):
        self.name, self._lm, self._requests = name, lm, requests

    def __call__(self) -> Tensor:
        return torch.tensor([nats for nats, _ in self._lm.loglikelihood(self._requests, disable_tqdm=True)])

    def as_op(self, result: Tensor) -> list[Tensor]:
        return [result]


def bench_eval(names: Sequence[str] = (), repeats: int = 9, output: Path | None = None) -> None:
    """Time models with random weights on one thread of a CPU.

    Args:
        names: of `MODELS`.
        repeats, output: as of every bench (`zoo.bench.runner`).

    Raises:
        ValueError: on an unknown name, or if the two do not agree.
    """
    chosen = choose(names, MODELS, "model")
    cases = [(f"{name}, batch {size}", partial(_measure, name, size)) for name in chosen for size in _BATCH_SIZES]
    run_cases(cases, COLUMNS, repeats, output)


def _measure(name: str, batch_size: int, repeats: int) -> list[Row]:
    words = [f"word{i}" for i in range(1000)]
    tokenizer = train_words(words, vocab_size=2 + len(words))
    torch.manual_seed(0)
    model = zoo.create_model(f"{name}-tiny", vocab_size=len(tokenizer), **_SIZES).eval()
    requests = _requests(words)
    trials = [
        Scoring(contender.__name__, contender(model, tokenizer=tokenizer, batch_size=batch_size), requests)
        for contender in (ZooLM, HFLM)
    ]
    ours, theirs = cpu.measure(trials, repeats, peak_memory=True, budget=_BUDGET)
    rows = []
    for measured in (ours, theirs):
        figures = {"peak_megabytes": measured.peak_megabytes}
        if measured.seconds is not None:
            figures["milliseconds"] = 1e3 * measured.seconds / _DOCUMENTS
        if measured is ours and theirs.seconds is not None:
            figures["ratio"] = theirs.seconds / ours.seconds
        rows.append(
            {
                "model": name,
                "parameters": model.num_parameters(),
                "batch_size": batch_size,
                "contender": measured.contender,
                **judge(figures, _TARGET if measured is ours else {}),
                "difference": f"{measured.difference:.0e}",
                "repeats": measured.repeats,
            }
        )
    return rows


def _requests(words: Sequence[str]) -> list[Instance]:
    """Each choice of each document; choices are of one to three words."""
    chance = random.Random(0)
    requests = []
    for _ in range(_DOCUMENTS):
        context = " ".join(chance.choices(words, k=_CONTEXT))
        for choice in range(_CHOICES):
            text = " ".join(["", *chance.choices(words, k=1 + choice % 3)])
            requests.append(Instance("loglikelihood", {}, (context, text), choice))
    return requests

"""Long contexts with several choices each, scored by `ZooLM` and by lm-eval's own `HFLM`: `zoo bench eval`."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

import zoo
from zoo.bench import cpu
from zoo.bench.results import (
    PROVENANCE,
    Row,
    RowFile,
    check_request,
    describe_targets,
    format_columns,
    provenance,
    short,
    verdict,
)
from zoo.evaluate.lm import ZooLM
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
    """Time models with random weights on one thread of a CPU, and print a table.

    Args:
        names: of `MODELS`; all, where there is none.
        repeats: rounds at most.
        output: a CSV file. Rows go there as they are finished; those of other models stay in it.

    Raises:
        ValueError: on an unknown name, or if the two do not agree.
    """
    check_request(names, MODELS, "model", repeats)
    source = provenance(cpu.device_name(), threads=1, allocator=cpu.allocator())
    file = RowFile(output, COLUMNS)
    for name in (bar := tqdm(names or MODELS, unit="model", leave=False)):
        bar.set_description(name)
        file.add([row | source for size in _BATCH_SIZES for row in _measure(name, size, repeats)])
    print(format_columns(file.rows, COLUMNS))


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
    if theirs.seconds is None:
        raise ValueError(f"{name}: scores differ by {theirs.difference:.0e} from those of HFLM")
    ratio = theirs.seconds / ours.seconds
    compared = {"ratio": short(ratio), "target": describe_targets(_TARGET), "met": verdict(_TARGET, {"ratio": ratio})}
    return [
        {
            "model": name,
            "parameters": model.num_parameters(),
            "batch_size": batch_size,
            "contender": measured.contender,
            "milliseconds": short(1e3 * measured.seconds / _DOCUMENTS),
            "peak_megabytes": "" if measured.peak_megabytes is None else short(measured.peak_megabytes),
            "difference": f"{measured.difference:.0e}",
            "repeats": measured.repeats,
            **(compared if measured is ours else dict.fromkeys(compared, "")),
        }
        for measured in (ours, theirs)
    ]


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

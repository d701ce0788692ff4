"""How speed depends on the length: reading a prompt of it, and decoding behind one: `zoo bench length`."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

import zoo
from zoo.bench import cpu
from zoo.bench.results import PROVENANCE, short
from zoo.bench.runner import choose, run_cases
from zoo.tables import Row

COLUMNS = (
    *("model", "parameters", "pass", "length"),
    "milliseconds",  # of the whole prompt, or of one token behind it
    "tokens_per_second",
    "state_bytes",  # of the sequence, once it is read
    *("repeats", *PROVENANCE),
)
MODELS = ("transformer", "retnet", "mamba2", "rwkv7")

_SIZES = {"hidden_size": 512, "num_hidden_layers": 6, "vocab_size": 4096}
_LENGTHS = (256, 1024, 4096, 16384)
_NEW = 16  # tokens that are decoded in a round
_BUDGET = 2.0  # seconds that a length gets for its rounds


def bench_length(names: Sequence[str] = (), repeats: int = 9, output: Path | None = None) -> None:
    """Time models with random weights on one sequence of several lengths, on one thread of a CPU.

    Args:
        names: of `MODELS`.
        repeats, output: as of every bench (`zoo.bench.runner`).

    Raises:
        ValueError: on an unknown name.
    """
    cases = [(name, partial(_measure, name)) for name in choose(names, MODELS, "model")]
    run_cases(cases, COLUMNS, repeats, output)


def _measure(name: str, repeats: int) -> list[Row]:
    model = zoo.create_model(f"{name}-tiny", **_SIZES).eval()
    return [row for length in _LENGTHS for row in _measure_at(name, model, length, repeats)]


@torch.no_grad()
def _measure_at(name: str, model: PreTrainedModel, length: int, repeats: int) -> list[Row]:
    tokens = torch.randint(0, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

    def read():
        return model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    state = read()

    def decode():
        for _ in range(_NEW):
            model(tokens[:, :1], past_key_values=state)

    calls: dict[str, tuple[Callable, int]] = {"reading": (read, length), "decoding": (decode, _NEW)}
    rows = []
    for which, (call, count) in calls.items():
        seconds, rounds = cpu.median_time(call, repeats, _BUDGET)
        rows.append(
            {
                "model": name,
                "parameters": model.num_parameters(),
                "pass": which,
                "length": length,
                "milliseconds": short(1e3 * seconds / (1 if which == "reading" else count)),
                "tokens_per_second": short(count / seconds),
                "state_bytes": zoo.state_bytes(model.config, length),
                "repeats": rounds,
            }
        )
    return rows

"""Whole models beside other code: `zoo bench models`.

Most are measured beside transformers' class of the same architecture with the same weights, which has to compute the
same. A model with a memory that goes around a backbone is measured beside the plain backbone.
"""

import copy
import importlib.util
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
    xLSTMConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

import zoo
from zoo.bench import cpu
from zoo.bench.results import (
    PROVENANCE,
    Measurement,
    Row,
    align,
    check_names,
    describe_targets,
    provenance,
    read_csv,
    short,
    verdict,
    write_csv,
)
from zoo.bench.workloads.decay_attention import transformers_xlstm
from zoo.convert import import_checkpoint

COLUMNS = (
    *("model", "parameters", "pass", "contender", "milliseconds", "tokens_per_second"),
    "ratio",  # how many times as fast as the other contender the zoo's model is
    "of_matmul_peak",  # 6 operations a parameter and token, of what one core multiplies at most
    "of_read_bandwidth",  # the weights once a token, of what one core reads at most
    *("speedup_2_threads", "peak_megabytes"),
    "difference",  # of loss and gradient, or of the tokens
    *("target", "met", "repeats", *PROVENANCE),
)

TRAINING, DECODING = "training step", "decoding"

Models = tuple[PreTrainedModel, nn.Module]
"""The zoo's and the other one."""

_ROWS, _LENGTH = 2, 512  # of a training batch
_PROMPT, _NEW = 16, 64  # tokens of one sequence
_VOCABULARY = 8192
_BUDGET = 15.0  # seconds that a model gets for its rounds


def make_models(config: PreTrainedConfig) -> Models:
    """Transformers' model of a configuration, with random weights, and the zoo's with the same."""
    return import_weights(AutoModelForCausalLM.from_config(config))


def import_weights(theirs: PreTrainedModel) -> Models:
    """The zoo's model of transformers' one, whose weights are disturbed, so that none of them is 0 or 1."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours, _ = import_checkpoint(folder)
            ours = copy.deepcopy(ours)  # out of the files
    finally:
        if progress:
            logging.enable_progress_bar()
    return ours, theirs


@dataclass(frozen=True)
class Pair:
    """An architecture, at about 25 million parameters where the other allows it, and what it is measured beside.

    Args:
        name: of the architecture.
        config: the configuration that both models are made from.
        training, decoding: how many times as fast as the other the zoo's has to be; None: no target.
        other: the name of the other.
        make: from the configuration, the zoo's model and the other.
        computes_the_same: whether losses, gradients and tokens have to agree.
        passes: which are measured.
        piece: tokens of a sequence that the other trains on, where a batch is cut into shorter ones for it.
        package: what has to be installed for the other.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    training: float | None = None
    decoding: float | None = None
    other: str = "transformers"
    make: Callable[[PreTrainedConfig], Models] = make_models
    computes_the_same: bool = True
    passes: tuple[str, ...] = (TRAINING, DECODING)
    piece: int | None = None
    package: str | None = None


def _mamba2() -> Mamba2Config:
    return Mamba2Config(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        num_hidden_layers=12,
        num_heads=16,
        head_dim=64,
        state_size=128,
        n_groups=1,
        tie_word_embeddings=True,
    )


def _xlstm() -> xLSTMConfig:
    return xLSTMConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        embedding_dim=512,
        num_heads=4,
        num_hidden_layers=6,
        num_blocks=6,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        autocast_kernel_dtype="float32",
    )


def _jamba() -> JambaConfig:
    return JambaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=384,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_experts=8,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.0,  # transformers leaves it out unless asked
    )


def _griffin() -> RecurrentGemmaConfig:
    return RecurrentGemmaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        num_hidden_layers=6,
        intermediate_size=3072,
        num_attention_heads=8,
        num_key_value_heads=1,
    )


_BACKBONE = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "intermediate_size": 1376,
    "tie_word_embeddings": True,
}
_SEGMENT = 128  # tokens


def _armt() -> PreTrainedConfig:
    return zoo.create_config(
        "armt-tiny",
        **_BACKBONE,
        vocab_size=_VOCABULARY,
        backbone_options={"num_attention_heads": 8},
        segment_length=_SEGMENT,
        num_memory_tokens=16,
        d_mem=64,
    )


def _lm2() -> PreTrainedConfig:
    return zoo.create_config(
        "lm2-tiny",
        **_BACKBONE,
        vocab_size=_VOCABULARY,
        num_attention_heads=8,
        num_key_value_heads=8,
        segment_length=_SEGMENT,
        num_memory_slots=16,
    )


def make_with_backbone(config: PreTrainedConfig) -> Models:
    """The zoo's model of a configuration, and the Transformer of the same sizes without the memory."""
    backbone = zoo.create_model(
        "transformer-tiny", **_BACKBONE, vocab_size=_VOCABULARY, num_attention_heads=8, num_key_value_heads=8
    )
    return AutoModelForCausalLM.from_config(config), backbone


def _beside_backbone(name: str, config: Callable[[], PreTrainedConfig]) -> Pair:
    """Training of a model with a memory beside its backbone, which trains on rows of a segment each."""
    return Pair(
        *(name, config, 0.6),
        other="backbone",
        make=make_with_backbone,
        computes_the_same=False,
        passes=(TRAINING,),
        piece=_SEGMENT,
    )


def _titans() -> PreTrainedConfig:
    """Small: titans-pytorch takes minutes for a step of 25 million parameters."""
    return zoo.create_config(
        "titans-tiny",
        mixers=["titans_mac"],
        num_hidden_layers=2,
        vocab_size=256,
        intermediate_size=341,
        chunk_size=16,
        segment_length=64,
    )


class TitansPytorch(nn.Module):
    """titans-pytorch's memory as context at the sizes of a configuration, which writes its memory for every token."""

    dtype = torch.float32

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        from titans_pytorch import MemoryAsContextTransformer, MemoryMLP  # noqa: PLC0415 (need not be installed)

        width = config.hidden_size // config.num_attention_heads
        sizes = {"heads": config.num_attention_heads, "dim_head": width}
        self.inner = MemoryAsContextTransformer(
            num_tokens=config.vocab_size,
            dim=config.hidden_size,
            depth=config.num_hidden_layers,
            segment_len=config.segment_length,
            num_persist_mem_tokens=config.num_persistent_tokens,
            **sizes,
            num_residual_streams=1,
            neural_memory_segment_len=1,
            neural_memory_batch_size=config.chunk_size,
            neural_memory_model=MemoryMLP(dim=width, depth=2, expansion_factor=2.0),
            neural_memory_kwargs=sizes,
        )
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()  # some are views that repeat, which no optimiser can write

    def forward(self, tokens: Tensor, labels: Tensor, use_cache: bool) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(loss=self.inner(tokens, return_loss=True))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.inner.token_emb

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def make_with_titans_pytorch(config: PreTrainedConfig) -> Models:
    """The zoo's model of a configuration, and titans-pytorch's of the same sizes."""
    return AutoModelForCausalLM.from_config(config), TitansPytorch(config)


PAIRS = (
    Pair(
        "llama",
        lambda: LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=512,
            num_hidden_layers=6,
            intermediate_size=1376,
            num_attention_heads=8,
            tie_word_embeddings=True,
        ),
    ),
    Pair("mamba", lambda: MambaConfig(vocab_size=_VOCABULARY, hidden_size=512, num_hidden_layers=12), 6, 1.5),
    Pair("mamba2", _mamba2, 3, 1.5),
    Pair("rwkv4", lambda: RwkvConfig(vocab_size=_VOCABULARY, hidden_size=384, num_hidden_layers=12), 5, 1.5),
    Pair(
        *("xlstm", _xlstm, 3, 1.5),
        make=lambda config: import_weights(transformers_xlstm().xLSTMForCausalLM(config)),
    ),
    Pair("jamba", _jamba, 5, 5),
    Pair("griffin", _griffin, 5, 5),
    Pair(
        *("titans", _titans, 5),
        other="titans-pytorch",
        make=make_with_titans_pytorch,
        computes_the_same=False,
        passes=(TRAINING,),
        package="titans_pytorch",
    ),
    _beside_backbone("armt", _armt),
    _beside_backbone("lm2", _lm2),
)


class TrainingStep:
    """A step of training as a user runs it: loss, gradients, AdamW."""

    def __init__(self, name: str, model: PreTrainedModel, tokens: Tensor, is_compared: bool):
        self.name, self._model, self._tokens, self._is_compared = name, model.train(), tokens, is_compared
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def __call__(self) -> Tensor:
        """The loss, and the norm of the gradient of the embedding."""
        loss = self._model(self._tokens, labels=self._tokens, use_cache=False).loss
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
    """Time a training step and greedy decoding of the zoo's models and of others, and print a table.

    Args:
        names: of `PAIRS`; all, where there is none.
        repeats: rounds at most.
        output: a CSV file. Rows go there as they are finished; those of other models stay in it.

    Raises:
        ValueError: on an unknown name, or if the two models of a pair compute something else.
    """
    check_names(names, [pair.name for pair in PAIRS], kind="model")
    if repeats < 1:
        raise ValueError(f"--repeats must be 1 or more, got {repeats}")
    if "ZOO_KERNELS" in os.environ:
        raise ValueError("ZOO_KERNELS asks for one form of every op, the bench runs the fastest: unset it")
    source = provenance(cpu.device_name(), threads=1, allocator=cpu.allocator())
    before = read_csv(output, COLUMNS) if output else []
    rows: list[Row] = []
    pairs = [pair for pair in PAIRS if (not names or pair.name in names) and _can_run(pair)]
    try:
        for pair in (bar := tqdm(pairs, unit="model", leave=False)):
            bar.set_description(pair.name)
            for which in pair.passes:
                rows += _measure(pair, which, repeats, source)
                if output:
                    measured = {row["model"] for row in rows}
                    write_csv([*(row for row in before if row["model"] not in measured), *rows], output, COLUMNS)
    finally:
        if rows:
            print(_format(rows))
    if wrong := Counter(row["model"] for row in rows if "milliseconds" not in row):
        raise ValueError(f"{', '.join(wrong)}: no time where the two models differ too much")


def _can_run(pair: Pair) -> bool:
    if pair.package is None or importlib.util.find_spec(pair.package) is not None:
        return True
    print(f"zoo: {pair.name} is left out: {pair.other} is not installed", file=sys.stderr)
    return False


def _measure(pair: Pair, which: str, repeats: int, source: Row) -> list[Row]:
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
    return _make_rows(pair, which, (ours, others), measurements, source)


def _make_rows(pair: Pair, which: str, models: Models, measurements: list[Measurement], source: Row) -> list[Row]:
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
                **{column: short(figure) for column, figure in figures.items() if figure is not None},
                "difference": f"{x.difference:.0e}" if pair.computes_the_same else "",
                "target": describe_targets(own),
                "met": verdict(own, figures),
                "repeats": x.repeats,
                **source,
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


def _format(rows: list[Row]) -> str:
    shown = [c for c in COLUMNS[: COLUMNS.index("repeats")] if any(row.get(c) for row in rows)]
    return align([shown, *([str(row.get(column, "")) for column in shown] for row in rows)])

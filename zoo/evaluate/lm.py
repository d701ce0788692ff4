"""`ZooLM`: lm-eval's model class for the zoo, with the scores of its `HFLM` and less work.

    loglikelihood           a context is read once and its state forked for the choices, where that is less work
    loglikelihood_rolling   the state is carried through a document instead of cutting it into windows
    generate_until          as HFLM

Nothing is truncated silently, and the processes of a launcher share the work on a CPU too.
"""

import logging
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import clear_torch_cache
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from zoo.config import ZooConfig
from zoo.evaluate.likelihood import log_probabilities
from zoo.evaluate.passages import Passage, Score, plan, read
from zoo.inspection import state_grows
from zoo.processes import connect_processes
from zoo.segments import SegmentedStack

logger = logging.getLogger(__name__)

_UNLIMITED = 2**31 - 1
"""`max_length` of a model that takes any number of tokens."""

_AUTO_TOKENS = 2**14
"""Tokens of a call with batch size "auto", to begin with; memory that does not suffice for them halves it."""

_SHARED_FROM = 48
"""Tokens of a context from which on it is read once for its choices. Below, calls cost more than what they save: on a
CPU, with four choices, the two are even between 25 and 50 tokens."""

_COLUMNS = 1024
"""Tokens of a row that a call reads at most where the state can be carried on."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's request: its strings, the tokens of the context, the tokens of the continuation."""


@register_model("zoo")
class ZooLM(HFLM):
    """Scores models of the zoo on tasks of lm-eval; `--model zoo` where this module was imported.

    Args:
        pretrained: a checkpoint of the zoo, a folder or a name on the Hub, or a model.
        allow_truncation: whether a request that is longer than the model allows loses its beginning, with a warning.
        device: as "cpu" or "cuda:1"; default: the accelerator if there is one. A launcher of processes decides itself.
        options: those of `HFLM`. `batch_size` bounds the rows of a call; "auto" fits them to their length and, but for
            generation, to the memory. `softmax_dtype` is float32 or the logits' own by default. `logits_cache` changes
            nothing: what requests share is always read once.

    Raises:
        ValueError: if the model is not of the zoo. While scoring: if a request is too long and truncation not allowed.
        RuntimeError: if a launcher started several processes and they are not connected.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        allow_truncation: bool = True,
        device: str | None = None,
        **options,
    ):
        if isinstance(pretrained, str):
            processes = connect_processes()  # HFLM would not do so on a CPU
            device = device or processes.device.type
        super().__init__(pretrained, backend="causal", device=device, **options)
        if hasattr(self, "accelerator"):  # HFLM shares the work only where it sees several GPUs
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if isinstance(pretrained, str) and Path(pretrained).is_dir():
            self.pretrained = str(Path(pretrained).absolute())  # which is no name on the Hub that HFLM would look up
        self.allow_truncation = allow_truncation
        self._auto_tokens = _AUTO_TOKENS
        self._longest_generation = 1

    def _get_backend(self, config, *args, **kwargs) -> None:
        if not isinstance(config, ZooConfig):
            raise ValueError(
                f"{config.model_type} is no architecture of the zoo; `python -m zoo.evaluate --model hf` evaluates it"
            )
        super()._get_backend(config, *args, **kwargs)

    # -- what the model allows -----------------------------------------------------------------------------------------

    @cached_property
    def max_length(self) -> int:
        """Tokens that the model takes at once: no limit unless its state grows and its configuration names one."""
        if self._max_length:
            return self._max_length
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if limit and state_grows(self.config) else _UNLIMITED

    @cached_property
    def _reads_in_pieces(self) -> bool:
        """Whether several calls give what one gives: not where segments are laid from the end of the first call."""
        stacks = [module for module in self.model.modules() if isinstance(module, SegmentedStack)]
        return not any(stack.aligns_right or stack.freezes for stack in stacks)

    def _report_truncation(self, kind: str, excess: Sequence[int]) -> None:
        """Warn of requests that have more tokens than there is room for, or raise if none may be cut."""
        cut = [tokens for tokens in excess if tokens > 0]
        if not cut:
            return
        found = f"{len(cut)} of {len(excess)} {kind} requests are longer than max_length {self.max_length}"
        if not self.allow_truncation:
            raise ValueError(f"{found}, by up to {max(cut)} tokens: give a larger max_length, or allow truncation")
        logger.warning("%s: %d tokens in all are cut from their beginnings", found, sum(cut))

    # -- batches -------------------------------------------------------------------------------------------------------

    def _rows(self, length: int) -> int:
        """Rows of a call of so many tokens each."""
        if self.batch_size != "auto":
            return self.batch_size
        return max(1, min(self.max_batch_size, self._auto_tokens // length))

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """What HFLM asks for in order to generate with batch size "auto"."""
        return self._rows(self._longest_generation)

    def _within_memory(self, score: Callable[[list], list], items: list) -> list:
        """`score(items)`; with batch size "auto" in smaller parts once memory does not suffice."""
        try:
            return score(items)
        except RuntimeError as error:
            if self.batch_size != "auto" or self._auto_tokens == 1 or not should_reduce_batch_size(error):
                raise
        clear_torch_cache()
        self._auto_tokens //= 2
        middle = len(items) // 2
        parts = (items[:middle], items[middle:]) if middle else (items,)
        return [result for part in parts for result in self._within_memory(score, part)]

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """As HFLM runs a model."""
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    # -- loglikelihood -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Score]:
        room = self.max_length + 1  # the last token is predicted and not read
        for strings, context, continuation in requests:
            if not context or not 0 < len(continuation) < room:
                raise ValueError(
                    f"{reprlib.repr(strings)}: {len(context)} tokens of context and {len(continuation)} to predict; "
                    f"there must be one of each, and no more than max_length {self.max_length} to predict"
                )
        self._report_truncation("loglikelihood", [len(x) + len(y) - room for _, x, y in requests])
        shared_from = _SHARED_FROM if self._reads_in_pieces else None
        passages = plan([(x[-(room - len(y)) :], y) for _, x, y in requests], shared_from)
        passages.sort(key=lambda passage: -len(passage.tokens))  # as HFLM: memory fails early, or not at all
        scores: list[Score] = [(0.0, True)] * len(requests)
        with tqdm(
            total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm or self.rank != 0
        ) as bar:
            while passages:
                rows = self._rows(len(passages[0].tokens))
                batch, passages = passages[:rows], passages[rows:]
                for i, (nats, is_greedy) in self._within_memory(self._read, batch):
                    scores[i] = scores[i][0] + nats, scores[i][1] and is_greedy
                finished = [i for passage in batch for i in passage.ends]
                for i in finished:
                    if (strings := requests[i][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", strings, scores[i])
                bar.update(len(finished))
        return scores

    def _read(self, passages: list[Passage]) -> list[tuple[int, Score]]:
        with self._precision():
            columns = _COLUMNS if self._reads_in_pieces else None
            return read(self.model, passages, self._rows, columns, self.softmax_dtype)

    # -- whole documents -----------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        documents = [self.tok_encode(request.args[0]) for request in requests]
        totals = [0.0] * len(documents)
        windows = [
            (i, (None, *make_disjoint_window(window)))
            for i, document in enumerate(documents)
            if not self._carries(document)
            for window in get_rolling_token_windows(document, self.prefix_token_id, self.max_length, context_len=1)
        ]
        if windows:
            scores = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm)
            for (i, _), (nats, _) in zip(windows, scores, strict=True):
                totals[i] += nats
        carried = sorted(
            ((i, document) for i, document in enumerate(documents) if document and self._carries(document)),
            key=lambda item: -len(item[1]),
        )
        with tqdm(
            total=len(carried), desc="Running loglikelihood_rolling requests", disable=disable_tqdm or self.rank != 0
        ) as bar:
            while carried:
                length = len(carried[0][1])
                rows = self._rows(length if state_grows(self.config) else min(length, _COLUMNS))
                batch, carried = carried[:rows], carried[rows:]
                for i, nats in self._within_memory(self._read_documents, batch):
                    totals[i] = nats
                bar.update(len(batch))
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _carries(self, document: list[int]) -> bool:
        """Whether the state can be carried through it: then every token is predicted from all before it."""
        return self._reads_in_pieces and len(document) <= self.max_length

    def _read_documents(self, batch: list[tuple[int, list[int]]]) -> list[tuple[int, float]]:
        """The log-likelihoods of documents, the longest first, by request."""
        totals = [0.0] * len(batch)
        with self._precision():
            rows = [document for _, document in batch]
            for piece in log_probabilities(self.model, rows, self.prefix_token_id, _COLUMNS):
                for row, nats in enumerate(piece.double().sum(dim=1).tolist()):
                    totals[row] += nats
        return [(i, total) for (i, _), total in zip(batch, totals, strict=True)]

    # -- generation ----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts = [len(self.tok_encode(request.args[0])) for request in requests]
        added = [normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests]
        lengths = [prompt + new for prompt, new in zip(prompts, added, strict=True)]
        self._report_truncation("generate_until", [length - self.max_length for length in lengths])
        self._longest_generation = min(max(lengths), self.max_length)
        return super().generate_until(requests, disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As of HFLM, which would warn of truncation in every batch again."""
        ids, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        return (ids, mask) if not left_truncate_len else (ids[:, -left_truncate_len:], mask[:, -left_truncate_len:])

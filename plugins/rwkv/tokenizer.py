"""The World tokenizer of RWKV: greedy longest match over bytes (Peng et al., 2024, arXiv:2404.05892, section 5).

A token is a string of bytes, written here as a `str` with one character a byte (Latin-1). Its vocabulary file,
`rwkv_vocab_v20230424.txt`, comes with a checkpoint or with the `rwkv` package; a line is an id, a Python literal of
str or bytes, and the number of bytes.
"""

import ast
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

END_OF_DOCUMENT = "<|rwkv_tokenizer_end_of_text|>"
"""How id 0 is written, which stands between documents and has no bytes."""

_LINE = re.compile(r"""([0-9]+) (b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")) ([0-9]+)""")
_NO_TOKEN = "\ufffd".encode().decode("latin-1")
"""What is read at an id without a token: models have more rows than there are tokens."""

Trie = dict[str, Any]
"""By byte, the nodes below; under "" the token that ends here."""


class RwkvTokenizer(PreTrainedTokenizer):
    """The World tokenizer. `decode(encode(text)) == text` for every text; pieces that are no UTF-8 decode to U+FFFD.

    Args:
        vocab_file: the vocabulary.
        bos_token, eos_token, pad_token: the authors have one for all three, id 0.
        kwargs: as for any `PreTrainedTokenizer`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if none is given, a line of it is not as it should be, an id is missing, or a byte has no token.
    """

    vocab_files_names = {"vocab_file": "rwkv_vocab_v20230424.txt"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | os.PathLike | None,
        bos_token: str | AddedToken = END_OF_DOCUMENT,
        eos_token: str | AddedToken = END_OF_DOCUMENT,
        pad_token: str | AddedToken = END_OF_DOCUMENT,
        **kwargs,
    ):
        if vocab_file is None:  # as AutoTokenizer has it for a folder without one
            raise ValueError(f"there is no vocabulary, {self.vocab_files_names['vocab_file']}")
        self.vocab_file = str(vocab_file)
        self._ids = read_vocabulary(vocab_file)
        self._tokens = {index: token for token, index in self._ids.items()}
        self._longest = max(map(len, self._ids))
        self._trie = _build_trie(self._ids)
        self._added_tokens_decoder = {0: AddedToken(END_OF_DOCUMENT, normalized=False, special=True)}
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, id 0 included, without those that were added."""
        return len(self._ids) + 1

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self._added_tokens_encoder

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        data = text.encode().decode("latin-1")
        tokens, start, longest, trie = [], 0, self._longest, self._trie
        while start < len(data):
            node = trie
            for byte in data[start : start + longest]:
                node = node.get(byte)
                if node is None:
                    break
                if "" in node:
                    token = node[""]
            tokens.append(token)
            start += len(token)
        return tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens.get(index, _NO_TOKEN)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        added = self._added_tokens_encoder
        data = "".join(token.encode().decode("latin-1") if token in added else token for token in tokens)
        return data.encode("latin-1").decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if not target.exists() or not target.samefile(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def read_vocabulary(path: str | os.PathLike) -> dict[str, int]:
    """The ids of the tokens in a vocabulary file, by their bytes as Latin-1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the line, if one is not of the form `id literal length`, or an id or a token comes twice;
            if ids are left out, or a byte has no token of its own.
    """
    ids: dict[str, int] = {}
    lines: dict[int, int] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            index, token = _parse(line)
            if index in lines:
                raise ValueError(f"id {index} is on line {lines[index]} already")
            if token in ids:
                raise ValueError(f"the token is on line {lines[ids[token]]} already")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        ids[token], lines[index] = index, number
    missing = next((index for index in range(1, len(ids) + 1) if index not in lines), None)
    if missing is not None:
        raise ValueError(f"{path}: of {len(ids)} tokens none has id {missing}")
    for byte in range(256):
        if chr(byte) not in ids:
            raise ValueError(f"{path}: there is no token for byte {byte:#04x}, so not every text could be encoded")
    return ids


def _read_lines(path: str | os.PathLike) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no vocabulary: {error}") from error


def _parse(line: str) -> tuple[int, str]:
    """The id and the token of a line; only a single literal is evaluated, never an expression."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"wanted `id literal length`, the literal of str or bytes, got {line[:60]!r}")
    index, literal, length = match.groups()
    try:
        value = ast.literal_eval(literal)
        token = value.encode() if isinstance(value, str) else value
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{literal[:60]} is no literal of str or bytes") from error
    if len(token) != int(length):
        raise ValueError(f"{literal[:60]} has {len(token)} bytes, not {length}")
    if not token or index == "0":
        raise ValueError("an id is at least 1 and a token at least one byte long")
    return int(index), token.decode("latin-1")


def _build_trie(tokens: dict[str, int]) -> Trie:
    root: Trie = {}
    for token in tokens:
        node = root
        for byte in token:
            node = node.setdefault(byte, {})
        node[""] = token
    return root

"""What a run reads: sources, tokenizers, stores of tokens on disk, rows and batches."""

import gzip
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from zoo.train import batches as batching
from zoo.train import data, store, tokenizer
from zoo.train.batches import Batches, Stream
from zoo.train.config import SourceSection, TrainConfig, load_config
from zoo.train.corpora import read_corpus
from zoo.train.sources import open_source
from zoo.train.store import IGNORED, BackgroundFiller, Encoded, EncodedPiece, TokenStore


def documents_of(lengths, start=1):
    """Documents whose ids count up through all of them, so that every token has an id of its own."""
    found = []
    for length in lengths:
        found.append(Encoded(np.arange(start, start + length), None, length))
        start += length
    return found


def filled(folder, documents, **options) -> TokenStore:
    built = TokenStore(folder, np.dtype(np.uint32), **options)
    for _ in built.append(lambda resume: iter([EncodedPiece(documents, None)])):
        pass
    return built


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "_SMALLEST_SHARD", 16)
    monkeypatch.setattr(store, "_LARGEST_SHARD", 64)


def in_pieces(documents, size, resume):
    for start in range(resume or 0, len(documents), size):
        yield EncodedPiece(documents[start : start + size], start + len(documents[start : start + size]))


# -- stores ------------------------------------------------------------------------------------------------------------


def test_a_store_reads_across_its_shards(tmp_path, small_shards):
    lengths = [3, 20, 1, 7, 50, 2, 9, 30]
    documents = documents_of(lengths)
    built = TokenStore(tmp_path / "s", np.dtype(np.uint16))
    for _ in built.append(partial(in_pieces, documents, 1)):
        pass
    assert built.is_complete
    assert len(list((tmp_path / "s").glob("0*"))) >= 3
    total = sum(lengths)
    starts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    again = TokenStore(tmp_path / "s", np.dtype(np.uint16))
    for first, last in [(0, total), (2, 5), (22, 90), (total - 1, total), (23, 24)]:
        ids, targets, begins = again.read(first, last)
        assert ids.tolist() == list(range(first + 1, last + 1))
        assert targets.tolist() == [i if i <= total else IGNORED for i in range(first + 2, last + 2)]
        assert {first + i for i in np.flatnonzero(begins)} == {s for s in starts if first <= s < last}
    for token in range(total):
        assert again.document_start(token) == max(s for s in starts if s <= token)


def test_a_store_goes_on_where_a_killed_process_stopped(tmp_path, small_shards):
    documents = documents_of([10] * 20)
    whole = filled(tmp_path / "whole", documents)

    def killed_after(pieces, resume):
        for index, piece in enumerate(in_pieces(documents, 2, resume)):
            if index == pieces:
                raise KeyboardInterrupt
            yield piece

    for pieces in (5, 2, 3):
        part = TokenStore(tmp_path / "part", np.dtype(np.uint32))
        with pytest.raises(KeyboardInterrupt):
            for _ in part.append(partial(killed_after, pieces)):
                pass
        assert not part.is_complete
    part = TokenStore(tmp_path / "part", np.dtype(np.uint32))
    seen = part.tokens
    for _ in part.append(partial(in_pieces, documents, 2)):
        pass
    assert 0 < seen < part.tokens
    assert (part.tokens, part.documents, part.text_bytes) == (whole.tokens, whole.documents, whole.text_bytes)
    for mine, theirs in zip(part.read(0, 200), whole.read(0, 200), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_store_of_examples_cuts_none_of_them(tmp_path):
    examples = [Encoded(np.arange(1, n + 1), np.full(n, 7), n) for n in (5, 4, 8, 2, 3)]
    built = filled(tmp_path / "s", examples, row_length=8, filler=99)
    ids, targets, begins = built.read(0, built.tokens)
    rows = [ids[i : i + 8].tolist() for i in range(0, len(ids), 8)]
    assert rows == [[1, 2, 3, 4, 5, 99, 99, 99], [1, 2, 3, 4, 99, 99, 99, 99], [*range(1, 9)], [1, 2, 1, 2, 3]]
    assert set(targets[ids == 99]) == {IGNORED}
    assert set(targets[ids != 99]) == {7}
    assert begins[5]
    assert begins[8]
    with pytest.raises(ValueError, match="an example has 9 tokens, a row 8"):
        filled(tmp_path / "long", [Encoded(np.arange(9), np.arange(9), 9)], row_length=8)


def test_a_store_is_filled_in_the_background_by_one_of_many(tmp_path, small_shards):
    documents = documents_of([10] * 30)
    open_store = partial(TokenStore, tmp_path / "s", np.dtype(np.uint32))
    fillers = [BackgroundFiller(open_store(), partial(in_pieces, documents, 1), ahead=20) for _ in range(3)]
    for filler in fillers:
        filler.wait_for(200)
        assert filler.store.tokens >= 200
    for filler in fillers:
        filler.wait_for(10**6)
        assert filler.store.tokens == 300
        filler.close()
    ids, _, _ = fillers[0].store.read(0, 300)
    assert ids.tolist() == list(range(1, 301))


def test_an_error_in_the_background_reaches_the_reader(tmp_path, small_shards):
    def broken(resume):
        yield EncodedPiece(documents_of([100]), 1)
        raise ValueError("no such file")

    filler = BackgroundFiller(TokenStore(tmp_path / "s", np.dtype(np.uint32)), broken, ahead=1000)
    filler.wait_for(50)
    with pytest.raises(ValueError, match="no such file"):
        filler.wait_for(500)
    filler.close()


# -- batches -----------------------------------------------------------------------------------------------------------


def test_no_token_is_dropped_or_used_twice_in_a_pass(tmp_path):
    tokens = 8 * 13 + 5
    built = filled(tmp_path / "s", documents_of([9] * 12 + [1]))
    batches = Batches([Stream(built)], sequence_length=8, batch_size=2, seed=0)
    for steps in (range(7), range(7, 14)):  # 14 rows a pass, the last with 5 tokens
        seen, predicted = Counter(), Counter()
        for step in steps:
            batch = batches.batch(step)
            seen.update(batch["input_ids"].flatten().tolist())
            predicted.update(batch["shift_labels"].flatten().tolist())
        assert {seen[i] for i in range(1, tokens + 1)} == {1}
        assert {predicted[i] for i in range(2, tokens + 1)} == {1}
        assert predicted[1] == 0
    first, second = ([batches.batch(s)["input_ids"].tolist() for s in steps] for steps in (range(7), range(7, 14)))
    assert first != second


def test_a_batch_is_a_function_of_seed_step_and_rank(tmp_path):
    built = filled(tmp_path / "s", documents_of([50] * 20))
    make = partial(Batches, [Stream(built)], sequence_length=8, batch_size=4)
    alone = make(seed=1)
    for step in (11, 0, 70):
        whole = alone.batch(step)
        parts = [make(seed=1).batch(step, rank, 2) for rank in range(2)]
        for name, x in whole.items():
            assert torch.equal(x, torch.cat([part[name] for part in parts]))
    assert not torch.equal(make(seed=2).batch(0)["input_ids"], alone.batch(0)["input_ids"])


def test_positions_tell_documents_apart(tmp_path):
    built = filled(tmp_path / "s", documents_of([3, 2, 20]))
    batches = Batches([Stream(built)], sequence_length=8, batch_size=4, seed=0)
    rows = {tuple(ids): positions for ids, positions in zip(*_columns(batches.batch(0)), strict=True)}
    assert rows[tuple(range(1, 9))] == [0, 1, 2, 0, 1, 0, 1, 2]
    assert rows[tuple(range(9, 17))] == list(range(8))
    assert rows[(25, *[0] * 7)] == [0, *range(7)]  # what fills the last row is a document of its own
    assert "position_ids" not in Batches([Stream(built)], 8, 4, seed=0, isolate=False).batch(0)


def _columns(batch):
    return batch["input_ids"].tolist(), batch["position_ids"].tolist()


def test_carried_rows_go_on_where_the_step_before_ended(tmp_path):
    built = filled(tmp_path / "s", documents_of([30, 11, 60, 3]))  # 13 rows of 8
    batches = Batches([Stream(built)], sequence_length=8, batch_size=3, seed=0, carry=True)
    lanes = [batches.batch(step) for step in range(13)]
    starts = [0, 30, 41, 101]
    for lane in range(3):
        ids = torch.cat([batch["input_ids"][lane] for batch in lanes]).tolist()
        begin = ids.index(1)
        assert ids[begin:] + ids[:begin] == list(range(1, 105))
        for batch in lanes:
            for token, position in zip(batch["input_ids"][lane].tolist(), batch["position_ids"][lane], strict=True):
                assert position == token - 1 - max(s for s in starts if s < token)


def test_sources_alternate_by_weight(tmp_path):
    streams = [
        Stream(filled(tmp_path / name, documents_of([80], start=start)), weight)
        for name, start, weight in (("a", 1000, 3.0), ("b", 2000, 1.0))
    ]
    batches = Batches(streams, sequence_length=8, batch_size=4, seed=0)
    for step in range(20):
        thousands = batches.batch(step)["input_ids"][:, 0] // 1000
        assert sorted(thousands.tolist()) == [1, 1, 1, 2]


def test_the_order_of_a_stream_is_the_same_once_it_is_all_there(tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(batching, "WINDOW", 5)
    documents = documents_of([10] * 20)  # 25 rows of 8
    growing = TokenStore(tmp_path / "s", np.dtype(np.uint32))
    filler = BackgroundFiller(growing, partial(in_pieces, documents, 1), ahead=1)
    make = partial(Batches, sequence_length=8, batch_size=5, seed=0)
    first = make([Stream(growing, is_streamed=True, filler=filler)])
    rows = [first.batch(step)["input_ids"] for step in range(12)]
    filler.close()
    second = make([Stream(TokenStore(tmp_path / "s", np.dtype(np.uint32)), is_streamed=True)])
    assert all(torch.equal(row, second.batch(step)["input_ids"]) for step, row in enumerate(rows))
    for passed in (rows[:5], rows[5:10]):
        assert sorted(torch.cat(passed).flatten().tolist()) == list(range(1, 201))
    assert sorted(rows[0].flatten().tolist()) == list(range(1, 41))  # a window's rows come before those of the next


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def json_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = [f"document {i} says {'la ' * (i % 7)}" for i in range(900)]
    path.write_text("".join(json.dumps({"text": text, "ids": [1, 2, i % 5]}) + "\n" for i, text in enumerate(texts)))
    return path, texts


def test_a_dataset_goes_on_where_it_stopped_twice(json_lines):
    path, texts = json_lines
    section = SourceSection(dataset="json", files=[str(path)], held_out=7, limit=800)
    source = open_source("web", section, seed=0)
    assert source.held_out() == {"web": texts[:7]}
    pieces = list(source.read(None))
    assert [text for piece in pieces for text in piece.documents] == texts[7:807]
    resume = None
    for index in range(len(pieces)):
        found = next(source.read(json.loads(json.dumps(resume))))
        assert found.documents == pieces[index].documents
        resume = found.resume
    assert list(source.read(resume)) == []


def test_a_changed_source_has_another_fingerprint(json_lines):
    path, _ = json_lines
    section = SourceSection(dataset="json", files=[str(path)])
    before = open_source("web", section, seed=0).fingerprint
    assert open_source("web", section, seed=0).fingerprint == before
    assert open_source("web", SourceSection(dataset="json", files=[str(path)], held_out=1), 0).fingerprint != before
    os.utime(path, (1, 1))
    assert open_source("web", section, seed=0).fingerprint == before
    path.write_text(path.read_text().replace("says", "sang"))
    assert open_source("web", section, seed=0).fingerprint != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": ["missing.jsonl"]}, "Unable to find"),
        ({"column": "txt"}, "did you mean text"),
        ({"split": "test"}, "Bad split"),
        ({"dataset": "nobody/nothing", "files": []}, "cannot read 'nobody/nothing'"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(json_lines, changes, message):
    section = SourceSection(**{"dataset": "json", "files": [str(json_lines[0])], **changes})
    with pytest.raises(ValueError, match=message) as error:
        open_source("web", section, seed=0)
    assert "\n" not in str(error.value)


def cut(path: Path) -> Path:
    """A copy that is compressed and not whole."""
    copy = path.with_name("bad.jsonl.gz")
    copy.write_bytes(gzip.compress(path.read_bytes())[:-200])
    return copy


def spoilt(path: Path) -> Path:
    """A copy whose last line is no JSON."""
    copy = path.with_name("bad.jsonl")
    copy.write_text(path.read_text() + "garbage\n")
    return copy


@pytest.fixture
def tokenizer_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(("copy", "reason"), [(cut, "Compressed file ended"), (spoilt, "JSON parse error")])
def test_a_file_that_cannot_be_read_to_its_end_is_named(json_lines, tmp_path, tokenizer_folder, copy, reason):
    """By the process that trains the tokenizer, and by the one that fills the store."""
    files = f"data.sources.a.files=[{json_lines[0]}, {copy(json_lines[0])}]"
    for named in ("bpe", tokenizer_folder):
        with pytest.raises(ValueError, match=rf"^data\.sources\.a: cannot read '.*bad\.jsonl.*': {reason}") as error:
            prepare(tmp_path, files, tokenizer=named)
        assert "\n" not in str(error.value)


def test_a_streamed_file_that_cannot_be_read_to_its_end_is_named(json_lines, tmp_path, tokenizer_folder, small_shards):
    files = f"data.sources.a.files=[{json_lines[0]}, {cut(json_lines[0])}]"
    settings = recipe(tmp_path, files, "data.sources.a.streaming=true", tokenizer=tokenizer_folder)
    found = data.prepare_data(settings, say=lambda line: None)
    with pytest.raises(ValueError, match=r"^data\.sources\.a: cannot read '.*bad\.jsonl\.gz': Compressed file ended"):
        found.batches.batch(0)
    found.close()


def test_a_document_that_is_none_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": [1, "b"]}\n')
    with pytest.raises(ValueError, match=r"data\.sources\.a: a document is \[1, 'b'\], wanted text or token ids"):
        prepare(tmp_path, f"data.sources.a.files=[{tmp_path / 'bad.jsonl'}]")


def test_token_ids_are_read_as_they_are(json_lines, tmp_path, tokenizer_folder):
    words = [f"data.sources.a.files=[{json_lines[0]}]", "data.sources.a.column=ids"]
    found = prepare(tmp_path, *words, tokenizer=tokenizer_folder)
    ids, _, begins = found.batches.streams[0].store.read(0, 12)
    assert ids.tolist() == [0, 1, 2, 0, 0, 1, 2, 1, 0, 1, 2, 2]
    assert np.flatnonzero(begins).tolist() == [0, 4, 8]
    with pytest.raises(ValueError, match="holds token ids: name their tokenizer"):
        prepare(tmp_path, *words)


def recipe(tmp_path, *words, **data_keys) -> TrainConfig:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {preset: retnet-tiny}\n"
        "data: {sources: {a: {dataset: json}}, vocab_size: 300, sequence_length: 8, batch_size: 2}\n"
        "train: {output: unused, tokens: 100}\n"
    )
    words = [*words, f"data.cache={tmp_path / 'cache'}", *(f"data.{key}={value}" for key, value in data_keys.items())]
    return load_config(str(file), words)


def prepare(tmp_path, *words, **data_keys) -> data.TrainingData:
    found = data.prepare_data(recipe(tmp_path, *words, **data_keys), say=lambda line: None, show_progress=False)
    found.close()
    return found


def test_tokens_are_kept_until_source_or_tokenizer_change(json_lines, tmp_path, monkeypatch):
    files = f"data.sources.a.files=[{json_lines[0]}]"
    first = prepare(tmp_path, files)
    encode = data._encode
    monkeypatch.setattr(data, "_encode", lambda *args: pytest.fail("tokenised again"))
    assert prepare(tmp_path, files).fingerprints == first.fingerprints
    monkeypatch.setattr(data, "_encode", encode)
    assert prepare(tmp_path, files, vocab_size=310).fingerprints != first.fingerprints
    json_lines[0].write_text(json_lines[0].read_text()[:-20].rsplit("\n", 1)[0] + "\n")
    assert prepare(tmp_path, files).fingerprints != first.fingerprints


def test_text_comes_back_from_its_tokens(json_lines, tmp_path):
    """Every document behind the end-of-text token, a special token that a text spells included."""
    path, texts = json_lines
    path.write_text(json.dumps({"text": "a<|endoftext|>b naïve ✓"}) + "\n" + path.read_text())
    found = prepare(tmp_path, f"data.sources.a.files=[{path}]")
    built, end = found.batches.streams[0].store, found.tokenizer.eos_token_id
    ids, _, begins = built.read(0, built.tokens)
    assert set(ids[begins]) == {end}
    assert (ids == end).sum() == begins.sum() == 901
    pieces = np.split(ids, np.flatnonzero(begins)[1:])
    decoded = [found.tokenizer.decode(piece[1:]) for piece in pieces]
    assert decoded == ["a<|endoftext|>b naïve ✓", *texts]
    assert built.text_bytes == sum(len(text.encode()) for text in decoded)


def test_an_empty_dataset_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data\.sources\.a: split 'train' of 'json' is empty"):
        prepare(tmp_path, f"data.sources.a.files=[{tmp_path / 'empty.jsonl'}]")


def test_one_process_trains_the_tokenizer(tmp_path):
    """Another waits for it, and finds it."""
    with FileLock(tmp_path / "lock"):
        first = tokenizer.trained_tokenizer("bpe", 300, iter(["some text " * 50]), tmp_path, "f")
    second = tokenizer.trained_tokenizer("bpe", 300, iter(()), tmp_path, "f")
    assert tokenizer.fingerprint_of(first) == tokenizer.fingerprint_of(second)
    other = tokenizer.trained_tokenizer("bpe", 300, iter(["another text " * 50]), tmp_path, "g")
    assert tokenizer.fingerprint_of(other) != tokenizer.fingerprint_of(first)
    words = tokenizer.trained_tokenizer("words", 300, iter(["b a b"]), tmp_path, "f")
    assert words.convert_ids_to_tokens(words("a b c")["input_ids"]) == ["a", "b", tokenizer.UNKNOWN_WORD]


def test_the_standard_library_is_a_corpus():
    corpus = read_corpus("stdlib")
    assert len(corpus.documents) > 400
    assert sum(map(len, corpus.documents)) > 5e6
    trained_on = "".join(corpus.documents)
    for text in corpus.held_out.values():
        assert len(text) > 2e5
        assert text[1000:1500] not in trained_on
    with pytest.raises(ValueError, match="did you mean stdlib"):
        read_corpus("stdlb")

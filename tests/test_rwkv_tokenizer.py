"""RWKV's World tokenizer against that of the authors' package `rwkv` 0.8.32, which also brings the vocabulary."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, TextStreamer, pipeline
from zoo.plugins.rwkv.tokenizer import END_OF_DOCUMENT, RwkvTokenizer

import zoo

NAME = "rwkv_vocab_v20230424.txt"
TEXTS = [
    "Hello, world! The quick brown fox  jumps over\tthe lazy dog.\r\n\n\n   Next.",
    "敏捷的棕色狐狸跳过了懒狗。人工智能正在改变世界!",
    "いろはにほへと ちりぬるを。カタカナ、ｶﾀｶﾅ。 다람쥐 헌 쳇바퀴에 타고파",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "نص حكيم له سر قاطع وذو شأن عظيم. דג סקרן שט בים מאוכזב. ऋषियों को सताने वाले",
    "🎉👩‍👩‍👧‍👦🏳️‍🌈 é vs e\u0301, \u200b\ufeff\u2028\x00\x07\x85\xa0 ½ \U0001d518 \U0010ffff",
    "<|endoftext|> </s> '\"\\ \\n b'\\xff'",
    "",
]


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    return Path(find_spec("rwkv").submodule_search_locations[0]) / NAME


@pytest.fixture(scope="module")
def world(vocabulary) -> RwkvTokenizer:
    return RwkvTokenizer(vocabulary)


@pytest.fixture(scope="module")
def oracle(vocabulary):
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(vocabulary)


def random_text(seed: int) -> str:
    """Characters from all of Unicode, those of one to four bytes equally often, and runs of them."""
    draw = random.Random(seed)
    ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    return "".join(chr(draw.randint(*draw.choice(ranges))) * draw.choice((1, 1, 1, 2, 9)) for _ in range(500))


def test_equals_the_authors_and_gives_every_text_back(world, oracle):
    code = [path.read_text() for path in sorted(Path(zoo.__file__).parent.glob("*.py"))]
    for text in [*TEXTS, *code, *map(random_text, range(20))]:
        ids = world.encode(text)
        assert ids == oracle.encode(text)
        assert world.decode(ids) == text
        assert world(text)["input_ids"] == ids  # nothing is put in front or behind


def test_every_token(world, oracle):
    assert len(world) == world.vocab_size == 65530
    for index, data in oracle.idx2token.items():
        token = world.convert_ids_to_tokens(index)
        assert world.convert_tokens_to_ids(token) == index
        assert token.encode("latin-1") == data
        assert world.decode([index]) == data.decode(errors="replace")
    assert world.decode([65531]) == "\ufffd"  # a row of the model's embedding that no token has


def test_special_tokens(world):
    assert world.bos_token_id == world.eos_token_id == world.pad_token_id == 0
    ids = world.encode(f"a{END_OF_DOCUMENT}b")
    assert ids == [*world.encode("a"), 0, *world.encode("b")]
    assert world.decode(ids) == f"a{END_OF_DOCUMENT}b"
    assert world.decode(ids, skip_special_tokens=True) == "ab"
    batch = world(["a", "Hello, world!"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, :-1].tolist() == [0] * (batch["input_ids"].shape[1] - 1)
    assert batch["attention_mask"].sum(1).tolist() == [len(world.encode(text)) for text in ("a", "Hello, world!")]


def test_pieces_of_a_character(world):
    """Half a character is U+FFFD until it is whole; a stream shows what the whole text is in the end."""
    ids = world.encode("a 🦤")
    assert len(ids) > 3
    assert world.decode(ids[:-1]) == "a \ufffd"
    shown = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            shown.append(text)

    for text in TEXTS[:-1]:
        shown.clear()
        streamer = Streamer(world)
        for index in world.encode(text):
            streamer.put(torch.tensor([index]))
        streamer.end()
        assert "".join(shown) == text


def test_files(vocabulary, tmp_path):
    world = RwkvTokenizer(vocabulary)
    world.add_tokens(["<tool>"])
    world.save_pretrained(tmp_path)
    world.save_pretrained(tmp_path)  # over itself
    assert (tmp_path / NAME).read_bytes() == vocabulary.read_bytes()
    for loaded in (RwkvTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        loaded.save_pretrained(tmp_path)
        assert type(loaded) is RwkvTokenizer
        assert loaded.padding_side == "left"
        assert loaded.encode("a<tool>") == world.encode("a<tool>") == [*world.encode("a"), 65530]
        assert [loaded.encode(text) for text in TEXTS] == [world.encode(text) for text in TEXTS]


def test_a_checkpoint_folder(tmp_path, vocabulary):
    """A model and the bare vocabulary: AutoTokenizer finds the class by the model. Padded rows generate as alone."""
    zoo.create_model("rwkv4-tiny", vocab_size=65536, num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / NAME).write_bytes(vocabulary.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is RwkvTokenizer
    generate = pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    prompts = ["Hello, world! 世界", "a"]
    together = [outputs[0]["generated_text"] for outputs in generate(prompts, batch_size=2, **options)]
    assert together == [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]


LITERALS = [repr(bytes([byte])) if byte > 127 else repr(chr(byte)) for byte in range(256)]
BYTES = [f"{index} {literal} 1" for index, literal in enumerate(LITERALS, start=1)]


def test_a_small_vocabulary(tmp_path):
    path = tmp_path / NAME
    path.write_text("\n".join([*BYTES, "257 'ab' 2", "258 'é' 2", "259 b'b\\xc3' 2"]), encoding="utf-8")
    tokenizer = RwkvTokenizer(path)
    assert tokenizer.encode("abé") == [257, 258]
    assert tokenizer.encode("cbé") == [ord("c") + 1, 259, 0xA9 + 1]  # the longest, even if it cuts a character
    assert tokenizer.decode([259, 0xA9 + 1]) == "bé"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*BYTES, "257 'ab' 3"], r"line 257: 'ab' has 2 bytes, not 3"),
        ([*BYTES, "257 'é' 1"], r"line 257: 'é' has 2 bytes, not 1"),
        ([*BYTES, "7 'ab' 2"], r"line 257: id 7 is on line 7 already"),
        ([*BYTES, "257 'a' 1"], r"line 257: the token is on line 98 already"),
        ([*BYTES, "258 'ab' 2"], r"of 257 tokens none has id 257"),
        ([*BYTES, "257 '' 0"], r"line 257: an id is at least 1 and a token at least one byte long"),
        (["0 'ab' 2", *BYTES], r"line 1: an id is at least 1"),
        ([*BYTES, "257 'ab"], r"line 257: wanted `id literal length`"),
        ([*BYTES, "", "257 'ab' 2"], r"line 257: wanted `id literal length`"),
        ([*BYTES, "-1 'ab' 2"], r"line 257: wanted `id literal length`"),
        ([*BYTES, f"{'9' * 5000} 'ab' 2"], r"line 257: Exceeds the limit"),
        ([*BYTES, r"257 b'\xg' 1"], r"line 257: b'\\xg' is no literal of str or bytes"),
        ([*BYTES, r"257 '\ud800' 3"], r"line 257: '\\ud800' is no literal of str or bytes"),
        (BYTES[:-1], r"no token for byte 0xff"),
        ([], r"line 1: wanted `id literal length`"),
    ],
)
def test_a_broken_vocabulary_is_refused(lines, message, tmp_path):
    path = tmp_path / NAME
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        RwkvTokenizer(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_vocabulary_is_refused(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ValueError, match="is no vocabulary"):
        RwkvTokenizer(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RwkvTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('pathlib').Path('{trace}').touch()",
        "'' or __import__('pathlib').Path('{trace}').touch() or ''",
        'f\'{{__import__("pathlib").Path("{trace}").touch()}}\'',
        "'a' + 'b'",
        "'" + "-" * 100_000 + "' - '1'",
        "[" * 100_000,
    ],
)
def test_nothing_in_a_vocabulary_is_executed(expression, tmp_path):
    path, trace = tmp_path / NAME, tmp_path / "trace"
    literal = expression.format(trace=trace) if "trace" in expression else expression
    path.write_text("\n".join([*BYTES, f"257 {literal} 2"]), encoding="utf-8")
    with pytest.raises(ValueError, match="line 257: wanted `id literal length`"):
        RwkvTokenizer(path)
    assert not trace.exists()

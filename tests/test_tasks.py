"""Every synthetic task is answered by a solver that only reads, and by nobody who does not; lm-eval can run it."""

import math
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import zoo
from zoo.layout import shelf
from zoo.tasks import Example, Task, list_tasks, load_task
from zoo.train.tokenizer import train_words

# -- solvers: the words up to a question -> the word that answers it ---------------------------------------------------


def solve_mqar(words):
    return words[words.index(words[-1]) + 1]


def solve_in_context_recall(words):
    pairs = re.findall(r"((?:k\d+ )+)((?:v\d+ )*)", " ".join(word for word in words if word[0] != "n") + " ")
    key, told = pairs.pop()
    return dict(reversed(pairs))[key].split()[len(told.split())]


def solve_induction(words):
    return words[words.index("here") + 1]


def solve_selective_copying(words):
    end = words.index("copy")
    return [word for word in words[:end] if word != "."][len(words) - end - 1]


def solve_phonebook(words):
    *name, number = " ".join(words[words.index("Now") + 3 :]).partition(" :")
    book = " ".join(words[: words.index("Now")])
    return (book + " ").split(f"{name[0]} : ", 1)[1].split()[len(number.split())]


def solve_passkey_retrieval(words):
    told = words.index("key") + 2
    return words[told : words.index(".")][_digits_at_the_end(words)]


def solve_needle(words):
    text = " ".join(words)
    (key,) = re.findall(r"What is the special magic number for (\w+) mentioned", text)
    (number,) = re.findall(rf"magic numbers for {key} is: ([\d ]+) \.", text)
    return number.split()[_digits_at_the_end(words)]


def _digits_at_the_end(words):
    return len(words) - max(i for i, word in enumerate(words) if not word.isdigit()) - 1


def solve_babi_in_prose(words):
    """By the places where people and things are said to be, each sentence that is not about them left out."""
    *sentences, question = re.split(r"(?<=\.) ", " ".join(words))
    rooms, holders, trail = {}, {}, {}
    for who, did, what in re.findall(r"(?:^| )(Mary|John|Sandra|Daniel) ([^.]*) (\w+)\.", " ".join(sentences)):
        if did.split()[0] in ("moved", "went", "travelled"):
            rooms[who] = what
            for thing in [thing for thing, holder in holders.items() if holder == who]:
                trail[thing].append(what)
        elif did.split()[0] in ("took", "grabbed", "picked"):
            holders[what] = who
            trail.setdefault(what, [rooms[who]])
        else:
            del holders[what]
    if found := re.match(r"Where is the (\w+)\?", question):
        return trail[found[1]][-1]
    if found := re.match(r"Where was the (\w+) before the (\w+)\?", question):
        seen = trail[found[1]]
        return seen[max(i for i, room in enumerate(seen) if room == found[2]) - 1]
    return rooms[re.match(r"Where is (\w+)\?", question)[1]]


def solve_parity(words):
    return ("even", "odd")[words.count("1") % 2]


def solve_s5(words):
    """By moving things about, one permutation after another; elements of a cyclic group are numbers to add."""
    if min(map(len, words)) < 3:
        return str(sum(map(int, words)) % 60)
    things = sorted(words[0])
    for word in words:
        things = [things[int(place) - 1] for place in word]
    return "".join(things)


def solve_associative_retrieval(words):
    *pairs, _, key = words
    return dict(zip(pairs[::2], pairs[1::2], strict=True))[key]


SOLVERS = {name.removeprefix("solve_"): solver for name, solver in globals().items() if name.startswith("solve_")}

VARIANTS = [
    ("associative_retrieval", {"mode": "rewrite", "pairs": 200, "keys": 16}),
    ("in_context_recall", {"noise": 0.5}),
    ("in_context_recall", {"motif": 3, "noise": 0.2}),
    ("babi_in_prose", {"qa": 2, "facts": 30, "length": 1000}),
    ("babi_in_prose", {"qa": 3, "facts": 30, "length": 1000}),
    ("needle", {"haystack": "noise"}),
    ("needle", {"needles": 8, "length": 2000}),
    ("s5", {"group": "a5"}),
    ("s5", {"group": "z60"}),
    *((task, {}) for task in list_tasks()),
]
"""A task that is new is tested as it is; it needs a solver above."""

TINY = {
    "associative_retrieval": {"pairs": 2, "keys": 2, "values": 2},
    "induction": {"length": 3, "tokens": 8},
    "mqar": {"length": 4, "pairs": 1, "vocabulary_size": 4},
    "parity": {"min_length": 1, "length": 4},
    "s5": {"group": "s3", "length": 3},
    "selective_copying": {"length": 4, "items": 1, "tokens": 8},
}
"""Options with few possible examples, of which splits drawn at random would share some."""


def _examples(task: str, count: int, split: str = "test", **options) -> list[Example]:
    return list(islice(load_task(task).generate(split, 0, **options), count))


@pytest.mark.parametrize(("task", "options"), VARIANTS, ids=str)
def test_a_solver_that_reads_to_the_question_answers_it(task, options):
    """So no target depends on later words, and all that an answer needs is in the text. Words are in the vocabulary."""
    vocabulary = load_task(task).vocabulary(**options)
    assert len(set(vocabulary)) == len(vocabulary)
    for example in _examples(task, 30, **options):
        assert len(example.targets) == len(example.words)
        asked = {i: target for i, target in enumerate(example.targets) if target is not None}
        assert asked == {i: SOLVERS[task](example.words[: i + 1]) for i in asked}
        assert {*example.words, *asked.values(), *example.choices} <= set(vocabulary)
        assert not example.choices or set(asked.values()) <= set(example.choices)


@pytest.mark.parametrize("task", list_tasks())
def test_a_constant_guess_is_right_as_often_as_the_readme_says(task):
    readme = (shelf("evals") / task / "README.md").read_text()
    chance = float(re.search(r"\| chance level \| ([\d.e-]+)", readme)[1])
    count = 1000
    answers = Counter(example.answer for example in _examples(task, count))
    assert abs(answers.most_common(1)[0][1] / count - chance) < 0.03


@pytest.mark.parametrize("task", list_tasks())
def test_an_example_is_a_function_of_split_seed_and_number(task):
    loaded = load_task(task)
    first = _examples(task, 4)
    assert first == _examples(task, 4)
    assert next(loaded.generate("test", 0, start=3)) == first[3]
    others = [next(loaded.generate("train", 0)), next(loaded.generate("test", 1)), first[1]]
    assert all(other.words != first[0].words for other in others)


@pytest.mark.parametrize(("task", "options"), TINY.items(), ids=TINY)
def test_splits_share_no_text(task, options):
    train, test = ({" ".join(e.words) for e in _examples(task, 100, split, **options)} for split in ("train", "test"))
    assert not train & test
    assert len(train) < 100 > len(test)


@pytest.mark.parametrize("task", list_tasks())
def test_length_up_to_128k(task):
    longest = {"pairs": 65535, "keys": 65535} if task == "associative_retrieval" else {"length": 131072}
    longest |= {"min_length": 131072} if task == "parity" else {}
    (example,) = _examples(task, 1, **longest)
    assert 131072 - 20 <= len(example.words) <= 131072


def test_a_question_ends_where_the_answer_begins():
    free = Example.with_answer(["a", "b", "b"], ["b", "c"])
    assert (free.words, free.targets) == (["a", "b", "b", "b"], [None, None, "b", "c"])
    assert (free.question, free.answer) == ("a b b", "b c")
    dense = Example(["x", "y", "z"], ["y", "z", "x"], ["x", "y", "z"])
    assert (dense.question, dense.answer) == ("x y z", "x")
    with_tail = Example(["k1", "v1", "k1", "x"], [None, None, "v1", None])
    assert (with_tail.question, with_tail.answer) == ("k1 v1 k1", "v1")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_task("parrity"), "unknown task 'parrity'; did you mean parity"),
        (lambda: load_task("mqar").generate("dev", 0), "unknown split 'dev'; there are: train, test"),
        (lambda: load_task("mqar").generate("test", 0, pears=3), "unknown option of task 'mqar' 'pears'; did you mean"),
        (lambda: load_task("mqar").options(pairs="3"), "task 'mqar': pairs is like 4, not '3'"),
        (lambda: load_task("mqar").options(pairs=0), "task 'mqar': pairs=0 is not from 1 to 32768"),
        (lambda: load_task("mqar").options(pairs=17), "take 68 words, length=64"),
        (lambda: load_task("s5").options(group="S5"), "task 's5': unknown group 'S5'; there are: s3"),
        (lambda: load_task("parity").options(min_length=41), "min_length=41 is above length=40"),
        (lambda: load_task("needle").options(needles=30, length=400), "without any haystack, it is 400"),
        (lambda: load_task("phonebook").options(digits=1, length=131072), "entries, not 1 to 16384"),
        (
            lambda: _examples("induction", 1, length=3, tokens=2),
            "task 'induction' has too few examples for both splits",
        ),
    ],
)
def test_errors_name_the_culprit(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_every_folder_is_a_task_of_its_name():
    """One folder with generator, YAML and README makes a task; nothing else names it."""
    assert set(SOLVERS) == set(list_tasks())
    for name in list_tasks():
        folder = shelf("evals") / name
        assert isinstance(load_task(name), Task)
        assert {f"{name}.py", f"{name}.yaml", "README.md"} <= {path.name for path in folder.iterdir()}


# -- lm-eval -----------------------------------------------------------------------------------------------------------


class Solver(LM):
    """Answers by a task's solver, or, of as much use as a model that has learned nothing, always the same."""

    def __init__(self, solve):
        super().__init__()
        self.solve = solve

    def loglikelihood(self, requests, disable_tqdm=False):
        return [self._score(*request.args) for request in requests]

    def _score(self, context, continuation):
        assert continuation.startswith(" ")
        words, right = context.split(" "), True
        for word in continuation.split():
            right &= self.solve(words) == word
            words.append(word)
        return -float(not right), right

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    generate_until = loglikelihood_rolling


def _load(name: str, **metadata) -> dict:
    return TaskManager(include_path=str(shelf("evals")), include_defaults=False, metadata=metadata).load([name])


def _results(model, name: str, **metadata) -> dict[str, dict]:
    return evaluate(model, _load(name, **metadata), bootstrap_iters=0)["results"]


def _accuracies(model, name: str, **metadata) -> dict[str, float]:
    """By task of the group."""
    results = _results(model, name, **metadata).items()
    return {each: metrics["acc,none"] for each, metrics in results if "acc,none" in metrics}


_YAML = [path for task in list_tasks() for path in sorted((shelf("evals") / task).glob("*.yaml"))]


@pytest.mark.parametrize("path", _YAML, ids=lambda path: path.stem)
def test_lm_eval_gives_full_marks_to_the_solver_and_none_to_a_constant(path):
    """In every setting of the YAML, whose task has its file's name."""
    scores = _accuracies(Solver(SOLVERS[path.parent.name]), path.stem, examples=2)
    settings = yaml.safe_load(path.read_text())["metadata"]["settings"]
    assert len(scores) == len(settings)
    assert set(scores.values()) == {1.0}
    of_nobody = _accuracies(Solver(lambda words: "nothing"), path.stem, examples=20, settings=[{}])
    assert list(of_nobody) == [f"{path.stem}_defaults"]
    assert max(of_nobody.values()) < 0.9


def test_settings_are_tasks_of_a_group_and_have_what_stands_beside_them():
    settings = [{"length": 200}, {"length": 300, "haystack": "noise"}]
    loaded = _load("needle", settings=settings, digits=2, examples=3)
    names = ["needle_length200", "needle_length300_noise"]
    assert loaded["group_map"] == {"needle": names}
    for name, setting in zip(names, settings, strict=True):
        documents = loaded["tasks"][name].eval_docs
        assert documents["text"] == [each.question for each in _examples("needle", 3, digits=2, **setting)]
        assert all(len(answer.split()) == 2 for answer in documents["target"])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"settings": {"length": 512}}, "`settings` is a list of options, as [{length: 1024}], not {'length': 512}"),
        ({"settings": [{"length": 512}] * 2}, "`settings` of task 'needle' has {'length': 512} twice"),
        ({"length": 512}, "length of task 'needle' stands both in `settings` and beside it"),
        ({"settings": [{"lenght": 512}]}, "unknown option of task 'needle' 'lenght'; did you mean length"),
    ],
    ids=str,
)
def test_bad_metadata_are_refused(metadata, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _load("needle", **metadata)


def test_lm_eval_has_no_tasks_of_the_same_names():
    """Whose place ours would take, or theirs ours."""
    pattern = re.compile(r"^(?:task|group|tag): *[\"']?([\w.-]+)", re.MULTILINE)
    ours, theirs = (
        {name for path in folder.rglob("*.yaml") for name in pattern.findall(path.read_text(encoding="utf-8"))}
        for folder in (shelf("evals"), Path(lm_eval.tasks.__file__).parent)
    )
    assert "parity" in ours
    assert "hellaswag" in theirs
    assert not ours & theirs


class OneOfTwo(Solver):
    """A process of two, with what the other one sent if it was there first."""

    def __init__(self, solve, rank, received=()):
        super().__init__(solve)
        self._rank, self._world_size, self._device, self.received = rank, 2, "cpu", received

    def all_gather(self, count):
        return count.repeat(2)

    def gather_object(self, sent, dst=0):
        self.sent = sent
        return [sent, *self.received]

    def barrier(self):
        pass


@pytest.mark.parametrize("limit", [2, 5])
def test_two_processes_share_the_documents_of_every_setting(limit):
    second = OneOfTwo(SOLVERS["parity"], 1)
    assert evaluate(second, _load("parity"), limit=limit, bootstrap_iters=0, log_samples=False) is None
    first = OneOfTwo(SOLVERS["parity"], 0, [second.sent])
    results = evaluate(first, _load("parity"), limit=limit, bootstrap_iters=0, log_samples=False)
    for name in _load("parity")["tasks"]:
        assert results["results"][name]["acc,none"] == 1.0
        assert results["n-samples"][name]["effective"] == limit


def test_lm_eval_scores_a_model_as_its_logits_do():
    """One task of each kind: the most likely of a few choices, and an answer of several words, greedily."""
    for name, options in (("parity", {"length": 12}), ("phonebook", {"length": 16, "digits": 1})):
        words = load_task(name).vocabulary(**options)
        tokenizer = train_words(words, len(words) + 2)
        model = zoo.create_model("retnet-tiny", vocab_size=len(tokenizer)).eval()
        right = []
        for example in _examples(name, 60, **options):
            ids = tokenizer(example.question, return_tensors="pt").input_ids
            logits = model(ids).logits[0, -1]
            among = tokenizer.convert_tokens_to_ids(example.choices) if example.choices else range(len(logits))
            right.append(max(among, key=lambda i: logits[i]) == tokenizer.convert_tokens_to_ids(example.answer))
        lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=64, batch_size=8)
        assert list(_accuracies(lm, name, settings=[options], examples=60).values()) == [sum(right) / 60]


class Uniform(LM):
    """Gives every byte 2 bits."""

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-2 * math.log(2) * len(request.args[0].encode()) for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        self.pairs = [request.args for request in requests]
        return [(-2 * math.log(2) * len(text.encode()), False) for _, text in self.pairs]

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def test_bits_per_byte(tmp_path):
    for name in ("bits_per_byte", "bits_per_byte_code"):
        results = _results(Uniform(), name)[name]
        assert results["bits_per_byte,none"] == pytest.approx(2)
        assert results["sample_len"] >= 5  # modules: how many is up to who built this Python
    (tmp_path / "book.txt").write_text("Größe" * 100, encoding="utf-8")
    results = _results(Uniform(), "bits_per_byte", text=str(tmp_path / "book.txt"), characters=90)["bits_per_byte"]
    assert results["bits_per_byte,none"] == pytest.approx(2)
    assert results["sample_len"] == 6
    with pytest.raises(ValueError, match="unknown held-out text or file 'proze'; did you mean prose"):
        _results(Uniform(), "bits_per_byte", text="proze")


def test_bits_per_byte_by_position(tmp_path):
    text = "".join(f"Größe {i} " for i in range(100))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    lm, options = Uniform(), {"text": str(tmp_path / "book.txt")}
    results = _results(lm, "bits_per_byte_by_position", **options, ranges=[[0, 50], [50, 75], [200, 300]])
    scores = [results[f"bits_per_byte_by_position_{i}"]["bits_per_byte,none"] for i in (0, 50, 200)]
    assert scores == pytest.approx([2] * 3)
    assert len(lm.pairs) == 6  # what is left over of the text is no document
    for document in (text[:300], text[300:600]):
        ranges = sorted(pair for pair in lm.pairs if "".join(pair) in document and document.startswith(pair[0]))
        (nothing, first), (before, second), (long_before, last) = ranges
        assert (nothing, before) == ("", first)
        assert long_before.startswith(first + second)
        assert long_before + last == document
        assert [len(first) // 10, len(before + second) // 10, len(long_before) // 10] == [4, 7, 19]
        assert second[0] == last[0] == " "
    for ranges, message in (
        ([[50, 50]], "must ascend from 0"),
        ([[0, 5], [4, 9]], "not overlap"),
        ([[0, 10_000]], "10,000"),
    ):
        with pytest.raises(ValueError, match=message):
            _results(lm, "bits_per_byte_by_position", **options, ranges=ranges)

"""lm-eval on models of the zoo: HFLM's scores with less work, nothing cut silently."""

import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import zoo
from zoo.cli import main
from zoo.evaluate import harness
from zoo.evaluate import lm as lm_module
from zoo.evaluate.lm import ZooLM
from zoo.layout import shelf

TEXT = Path(__file__).read_text()
WORDS = TEXT.split()
TOLERANCE = 1e-5  # nats a request, in float64
BATCH_SIZES = (1, 8, "auto")

TASK = """
task: colours
custom_dataset: !function colours.load
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" red", " green", " deep dark blue"]
doc_to_target: target
metadata:
  documents: 7
"""
TASK_CODE = """
from datasets import Dataset


def load(documents, **others):
    texts = ["word " * (9 * i + 1) + "colour" for i in range(documents)]
    return {"test": Dataset.from_dict({"text": texts, "target": [i % 3 for i in range(documents)]})}
"""


def make_model(name: str, tokenizer, **overrides):
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return zoo.create_model(name, vocab_size=len(tokenizer), **ids, **overrides).double().eval()


@pytest.fixture(scope="module")
def models(tokenizer):
    """By name, in float64."""
    torch.manual_seed(0)
    made = {name: make_model(f"{name}-tiny", tokenizer, num_hidden_layers=2) for name in ("retnet", "transformer")}
    made["armt, aligned right"] = make_model("armt-tiny", tokenizer, num_hidden_layers=2, alignment="right")
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    make_model("retnet-tiny", tokenizer, num_hidden_layers=2).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("task")
    (folder / "colours.py").write_text(TASK_CODE)
    (folder / "colours.yaml").write_text(TASK)
    return str(folder / "colours.yaml")


def some(rng: random.Random, count: int) -> str:
    start = rng.randrange(len(WORDS) - count)
    return " ".join(WORDS[start : start + count])


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def choices(model, tokenizer) -> list[Instance]:
    """Contexts short and long, with choices of one token and more; one choice alone, no context, a repeated request,
    and a choice that greedy search takes."""
    rng, pairs = random.Random(0), []
    for count in (2, 25, 60, 40):
        context = some(rng, count)
        pairs += [(context, " " + some(rng, length)) for length in (1, 2, 4)] + [(context, "a"), (context, "b")]
    pairs += [(some(rng, 30), " " + some(rng, 3)), ("", " " + some(rng, 3)), pairs[-1]]
    ids = tokenizer(pairs[0][0], return_tensors="pt")
    greedy = model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1:]
    return instances("loglikelihood", *pairs, (pairs[0][0], tokenizer.decode(greedy)))


def counted_tokens(model, monkeypatch) -> list[int]:
    """How many tokens each call reads from now on, padding included."""
    counts, embed = [], model.get_input_embeddings()
    forward = embed.forward
    monkeypatch.setattr(embed, "forward", lambda ids: counts.append(ids.numel()) or forward(ids))
    return counts


# -- the scores of HFLM ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retnet", "transformer", "armt, aligned right"])
def test_loglikelihood_is_that_of_hflm(models, tokenizer, monkeypatch, name):
    model = models[name]
    requests = choices(model, tokenizer)
    wanted = HFLM(model, tokenizer=tokenizer, max_length=10_000).loglikelihood(requests, disable_tqdm=True)
    assert {is_greedy for _, is_greedy in wanted} == {True, False}
    monkeypatch.setattr(lm_module, "_COLUMNS", 16)
    for batch_size in BATCH_SIZES:
        scorer = ZooLM(model, tokenizer=tokenizer, batch_size=batch_size)
        found = scorer.loglikelihood(requests, disable_tqdm=True)
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=TOLERANCE)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]


@pytest.mark.parametrize("name", ["retnet", "transformer", "armt, aligned right"])
def test_rolling_is_that_of_hflm(models, tokenizer, monkeypatch, name):
    """With documents longer than what attention may read, for which both cut the same windows."""
    model, rng = models[name], random.Random(1)
    requests = instances("loglikelihood_rolling", *[(some(rng, count),) for count in (1, 40, 120, 30)], ("",))
    limit = 60 if name == "transformer" else 10_000
    wanted = HFLM(model, tokenizer=tokenizer, max_length=limit).loglikelihood_rolling(requests, disable_tqdm=True)
    monkeypatch.setattr(lm_module, "_COLUMNS", 16)
    for batch_size in BATCH_SIZES:
        scorer = ZooLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=limit)
        assert scorer.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(wanted, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["retnet", "transformer"])
def test_generation_is_that_of_hflm(models, tokenizer, name):
    rng = random.Random(2)
    settings = {"until": ["e"], "max_gen_toks": 9}
    requests = instances("generate_until", *[(some(rng, count), settings) for count in (3, 20, 9)])
    wanted = HFLM(models[name], tokenizer=tokenizer).generate_until(requests, disable_tqdm=True)
    for batch_size in BATCH_SIZES:
        scorer = ZooLM(models[name], tokenizer=tokenizer, batch_size=batch_size)
        assert scorer.generate_until(requests, disable_tqdm=True) == wanted


# -- less work ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retnet", "transformer"])
def test_a_context_is_read_once_for_its_choices(models, tokenizer, monkeypatch, name):
    context, answers = list(range(100, 300)), [[i, i + 1, i + 2] for i in range(6)]
    counts = counted_tokens(models[name], monkeypatch)
    scorer = ZooLM(models[name], tokenizer=tokenizer, batch_size=8)
    scorer._loglikelihood_tokens([(None, context, answer) for answer in answers], disable_tqdm=True)
    assert counts == [200, 6 * 2]
    counts.clear()
    scorer._loglikelihood_tokens([(None, context, answer[:1]) for answer in answers], disable_tqdm=True)
    assert counts == [200]
    counts.clear()
    scorer._loglikelihood_tokens([(None, context[:5], answer) for answer in answers], disable_tqdm=True)
    assert counts == [6 * 7], "short contexts are read with each choice, in one call"


def test_memory_that_does_not_suffice_makes_the_batches_smaller(models, tokenizer, monkeypatch):
    model, forward = models["retnet"], models["retnet"].forward
    requests = choices(model, tokenizer)
    wanted = ZooLM(model, tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)

    def of_little_memory(ids, **options):
        if ids.numel() > 500:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(ids, **options)

    monkeypatch.setattr(model, "forward", of_little_memory)
    found = ZooLM(model, tokenizer=tokenizer, batch_size="auto").loglikelihood(requests, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=TOLERANCE)
    with pytest.raises(torch.OutOfMemoryError):
        ZooLM(model, tokenizer=tokenizer, batch_size=64).loglikelihood(requests, disable_tqdm=True)


# -- lengths -----------------------------------------------------------------------------------------------------------


def test_only_a_state_that_grows_limits_the_length(tokenizer):
    griffin = make_model("griffin-tiny", tokenizer, num_hidden_layers=3)
    assert griffin.config.max_position_embeddings == 8192
    for model in (griffin, make_model("retnet-tiny", tokenizer), make_model("jamba-tiny", tokenizer)):
        assert ZooLM(model, tokenizer=tokenizer).max_length > 10**9
    assert ZooLM(make_model("transformer-tiny", tokenizer), tokenizer=tokenizer).max_length == 2048


def test_truncation_is_counted_once_or_refused(models, tokenizer, caplog):
    model, rng = models["transformer"], random.Random(3)
    requests = choices(model, tokenizer)
    short = {"max_length": 70, "tokenizer": tokenizer}
    wanted = HFLM(model, **short).loglikelihood(requests, disable_tqdm=True)
    with caplog.at_level(logging.WARNING):
        scorer = ZooLM(model, batch_size=8, **short)
        caplog.clear()
        found = scorer.loglikelihood(requests, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], abs=TOLERANCE)
    lengths = [len(tokenizer.encode(context + answer)) for context, answer in (request.args for request in requests)]
    excess = [length - 71 for length in lengths if length > 71]
    (warning,) = caplog.messages
    assert warning.startswith(f"{len(excess)} of {len(requests)} loglikelihood requests are longer than max_length 70")
    assert f" {sum(excess)} tokens" in warning

    strict = ZooLM(model, allow_truncation=False, **short)
    with pytest.raises(ValueError, match=rf"{len(excess)} of {len(requests)} .* by up to {max(excess)} tokens"):
        strict.loglikelihood(requests, disable_tqdm=True)
    prompts = instances("generate_until", *[(some(rng, 40), {"until": [], "max_gen_toks": 9}) for _ in range(3)])
    with pytest.raises(ValueError, match="3 of 3 generate_until requests"):
        strict.generate_until(prompts, disable_tqdm=True)
    caplog.clear()
    assert scorer.generate_until(prompts, disable_tqdm=True) == HFLM(model, **short).generate_until(
        prompts, disable_tqdm=True
    )
    assert sum("generate_until requests are longer" in message for message in caplog.messages) == 1
    strict.loglikelihood_rolling(instances("loglikelihood_rolling", (some(rng, 60),)), disable_tqdm=True)


def test_what_cannot_be_scored_is_refused(models, tokenizer):
    scorer = ZooLM(models["transformer"], tokenizer=tokenizer, max_length=5)
    with pytest.raises(ValueError, match="3 tokens of context and 0 to predict"):
        scorer._loglikelihood_tokens([(None, [1, 2, 3], [])])
    with pytest.raises(ValueError, match="max_length 5") as raised:
        scorer._loglikelihood_tokens([(("a long text " * 100, " b"), [1], [2] * 6)])
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("how", ["rolling", "loglikelihood"])
def test_the_memory_of_a_recurrent_model_does_not_grow_with_the_text(models, tokenizer, monkeypatch, how):
    """Neither what it keeps between calls nor the tokens of a call."""
    model, forward = models["retnet"], models["retnet"].forward
    kept, read = set(), []

    def watched(ids, past_key_values=None, **options):
        read.append(ids.shape[1])
        if past_key_values is not None:
            kept.add(sum(state.nbytes for layer in past_key_values.layers for state in layer.states))
        return forward(ids, past_key_values=past_key_values, **options)

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(lm_module, "_COLUMNS", 512)
    text, scorer = (WORDS[0] + " ") * 2000, ZooLM(model, tokenizer=tokenizer)
    if how == "rolling":
        scorer.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    else:
        scorer.loglikelihood(instances("loglikelihood", (text, "a"), (text, "bcdefg")), disable_tqdm=True)
    assert sum(read) > 4000
    assert max(read) == 512
    assert len(kept) == 1


# -- the command -------------------------------------------------------------------------------------------------------


def test_eval_is_the_same_at_any_batch_size_and_with_hflm(checkpoint, task, tmp_path, capsys):
    results = []
    for batch_size in BATCH_SIZES:
        path = tmp_path / f"{batch_size}.json"
        words = ["eval", checkpoint, "--tasks", f"{task},parity", "--limit", "6", "--output", str(path)]
        assert main([*words, "--batch-size", str(batch_size), "--device", "cpu"]) == 0, capsys.readouterr().err
        results.append(json.loads(path.read_text()))
        assert "colours" in capsys.readouterr().out
    assert results[0]["results"] == results[1]["results"] == results[2]["results"]
    settings = {"parity_min_length3_length40", "parity_min_length40_length256"}
    assert set(results[0]["results"]) == {"colours", "parity", *settings}
    assert results[0]["n-samples"]["colours"] == {"original": 7, "effective": 6}
    assert results[0]["model_name"] == checkpoint
    assert results[0]["config"]["model_args"]["pretrained"] == checkpoint

    manager = TaskManager(include_path=[Path(task).parent, shelf("evals")], include_defaults=False)
    for batch_size in BATCH_SIZES:
        hflm = simple_evaluate(
            model="hf",
            model_args={"pretrained": checkpoint, "device": "cpu"},
            tasks=["colours", "parity"],
            task_manager=manager,
            batch_size=batch_size,
            max_batch_size=8,
            limit=6,
        )
        assert hflm["results"] == results[0]["results"]
    written = {
        "results",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
        "git_hash",
        "date",
    }
    assert written <= set(hflm) & set(results[0])


def test_metadata_reaches_the_task(checkpoint, task, tmp_path):
    path = tmp_path / "results.json"
    assert main(["eval", checkpoint, "--tasks", task, "--metadata", '{"documents": 2}', "--output", str(path)]) == 0
    assert json.loads(path.read_text())["n-samples"]["colours"] == {"original": 2, "effective": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no tasks are named"),
        (["--suite", "commonsens"], "did you mean commonsense?"),
        (["--tasks", "parity", "--limit", "0"], "limit must be positive, got 0"),
        (["--tasks", "parity", "--batch-size", "many"], "batch_size must be positive or auto, got many"),
        (["--tasks", "parity", "--device", "gpu"], "no device 'gpu'"),
        (["--tasks", "parity", "--metadata", "{"], "argument --metadata"),
        (["--tasks", "parity", "--output", "nowhere/results.json"], "no folder for --output nowhere/results.json"),
        (["--tasks", "party"], "unknown task 'party'; did you mean parity"),
        (["--tasks", "wikitext"], "the data of task wikitext could not be had"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(checkpoint, monkeypatch, capsys, words, message):
    import lm_eval.tasks

    few = [shelf("evals"), Path(lm_eval.tasks.__file__).parent / "wikitext"]  # lm-eval's own take long to find
    monkeypatch.setattr(harness, "TaskManager", lambda **_: TaskManager(include_path=few, include_defaults=False))
    assert main(["eval", checkpoint, *words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("zoo: ")
    assert message in error


def test_the_extra_is_named_where_it_is_missing(checkpoint, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "zoo.evaluate.harness")
    monkeypatch.delattr(zoo.evaluate, "harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", checkpoint, "--tasks", "parity"]) == 1
    assert capsys.readouterr().err == "zoo: evaluation needs lm_eval: pip install 'sequence-zoo[eval]'\n"


def test_models_of_other_libraries_are_refused(tmp_path, tokenizer, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), "--tasks", "parity", "--limit", "1"]) == 1
    assert (
        "zoo: llama is no architecture of the zoo; `python -m zoo.evaluate --model hf` evaluates it"
        in capsys.readouterr().err
    )


def test_the_tasks_of_the_suites_exist():
    import lm_eval.tasks

    shelves = ("wikitext", "lambada", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "sciq", "siqa")
    folder = Path(lm_eval.tasks.__file__).parent
    paths = [folder / name for name in shelves] + [folder / "super_glue" / "boolq"]
    known = TaskManager(include_path=paths, include_defaults=False).all_tasks
    assert {name for suite in harness.SUITES.values() for name in suite} <= set(known)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["hf", "zoo"])
def test_the_command_of_lm_eval_knows_the_zoo(checkpoint, task, tmp_path, model):
    output = tmp_path / "results"
    words = [f"--model={model}", "--model_args", f"pretrained={checkpoint}", "--tasks", "colours", "--device", "cpu"]
    words += ["--include_path", str(Path(task).parent), "--output_path", str(output)]
    subprocess.run([sys.executable, "-m", "zoo.evaluate", *words], check=True)
    (written,) = output.rglob("*.json")
    assert main(["eval", checkpoint, "--tasks", task, "--output", str(tmp_path / "zoo.json")]) == 0
    assert json.loads(written.read_text())["results"] == json.loads((tmp_path / "zoo.json").read_text())["results"]


def test_a_process_without_documents_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(harness, "connect_processes", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(ValueError, match="2 documents of parity_min_length3_length40 are too few for 3 processes"):
        harness.evaluate(checkpoint, ["parity"], limit=2)


@pytest.mark.slow
def test_two_processes_share_the_work(checkpoint, task, tmp_path):
    """7 documents on 2 CPU processes, as `accelerate launch` starts them; one of them speaks."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    words = [
        "eval",
        checkpoint,
        "--tasks",
        f"{task},bits_per_byte,parity",
        "--limit",
        "7",
        "--device",
        "cpu",
        "--output",
    ]
    assert main([*words, str(one)]) == 0
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "zoo.cli", *words, str(two)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("colours") == 1
    one, two = json.loads(one.read_text()), json.loads(two.read_text())
    for name, metrics in one["results"].items():
        for metric, value in metrics.items():
            assert two["results"][name][metric] == (pytest.approx(value) if isinstance(value, float) else value)
    assert one["n-samples"] == two["n-samples"]

"""Publishing: what goes to a Hub, what its card says, what is refused, and that it loads again, all on the loopback."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_hub import TOKEN, FakeHub, Repository
from transformers import AutoModelForCausalLM

import zoo
from zoo.hub.card import Facts, make_card
from zoo.hub.publication import prepare
from zoo.train.config import load_config, to_yaml

MODELS = ("retnet-tiny", "mamba-tiny", "transformer-tiny")
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 300}
IDS = torch.arange(24).view(2, 12)

# A process that does what the lines of its input ask for, and answers each with a line: Hub and cache are set when
# huggingface_hub is imported, so the tests' own process cannot.
CLIENT = """
import contextlib, io, json, os, sys, types
import torch
from huggingface_hub.utils import _http
from transformers import AutoModelForCausalLM, AutoTokenizer
import zoo

_http.time = types.SimpleNamespace(sleep=lambda seconds: None)  # between the attempts of a request

def zoo_command(*words):
    from zoo.cli import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("zoo: ")]
    return status, out.getvalue(), lines

def logits(name, revision, ids):
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision)
    with torch.no_grad():
        return type(model).__module__, model(torch.tensor(ids)).logits.tolist()

def encode(name, text):
    return AutoTokenizer.from_pretrained(name).encode(text)

def set_token(token):
    os.environ["HF_TOKEN"] = token

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    name, *arguments = json.loads(line)
    try:
        answer = {"result": globals()[name](*arguments)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Client:
    """A process of its own with a Hub and a cache."""

    def __init__(self, endpoint: str, home: Path, token: str = "", offline: bool = False):
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env={
                **os.environ,
                "HF_ENDPOINT": endpoint,
                "HF_HOME": str(home),
                "HF_TOKEN": token,
                "HF_HUB_OFFLINE": str(int(offline)),
                "HF_HUB_DISABLE_XET": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, *arguments):
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def zoo(self, *words) -> tuple[int, str, list[str]]:
        """A command line: status, output, and the lines of its errors."""
        return tuple(self.ask("zoo_command", *map(str, words)))

    def logits(self, name: str, revision: str = "main") -> tuple[str, torch.Tensor]:
        """The module that the model's class is of, and its logits for `IDS`."""
        module, values = self.ask("logits", name, revision, IDS.tolist())
        return module, torch.tensor(values)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def hub():
    with FakeHub().serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def publisher(hub, tmp_path_factory):
    """A process that has a token."""
    with Client(hub.endpoint, tmp_path_factory.mktemp("publisher"), token=TOKEN) as client:
        yield client


@pytest.fixture(scope="module")
def readers_home(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def reader(hub, readers_home):
    """A process that has none, nor anything in its cache."""
    with Client(hub.endpoint, readers_home) as client:
        yield client


def save(preset: str, folder: Path, seed: int = 0, **options) -> Path:
    torch.manual_seed(seed)
    zoo.create_model(preset, **SMALL).save_pretrained(folder, **options)
    return folder


def save_run(run: Path, tokenizer) -> Path:
    """A folder as training leaves it; its `latest`."""
    folder = save("retnet-tiny", run / "step-00001234")
    tokenizer.save_pretrained(folder)
    (run / "latest").symlink_to(folder.name)
    (run / "log.jsonl").write_text("{}\n")
    (run / "loss.png").write_bytes(b"a picture")
    (folder / "trainer").mkdir()
    (folder / "trainer" / "optimizer.pt").write_bytes(b"moments")
    (folder / "recipe.yaml").write_text("model:\n  preset: retnet-tiny\n")
    (folder / "notes.txt").write_text("of nobody's business")
    training = {
        "step": 1234,
        "tokens": 1_300_000,
        "seed": 1234,
        "commit": "0123abc",
        "hours": 0.25,
        "data": {
            "sources": {"stdlib": {"weight": 0.5, "tokens": 3_000_000}, "other": {"options": {"pairs": 4}}},
            "sha256": "c0ffee",
        },
        "validation": {"code": {"loss": 4.4, "bits_per_byte": 1.9, "accuracy": 0.25, "tokens": 50_000}},
    }
    (folder / "training.json").write_text(json.dumps(training))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return run / "latest"


RESULTS = {  # in lm-eval's layout
    "results": {
        "mqar": {"alias": "mqar", "acc,none": 0.5, "acc_stderr,none": 0.0123, "sample_len": 100},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"},
    },
    "configs": {
        "mqar": {"task": "mqar"},
        "gsm8k": {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"},
    },
    "n-shot": {"mqar": 0, "gsm8k": 5},
    "n-samples": {"mqar": {"original": 1000, "effective": 100}, "gsm8k": {"original": 1319, "effective": 1319}},
}


# -- through the Hub ---------------------------------------------------------------------------------------------------


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_published_models_load_by_name(hub, publisher, reader, readers_home, tokenizer, tmp_path):
    """In a fresh process, and in another from its cache, without a Hub."""
    for preset in MODELS:
        folder = save(preset, tmp_path / preset)
        tokenizer.save_pretrained(folder)
        assert publisher.zoo("publish", folder, f"user/{preset}")[0] == 0
        module, logits = reader.logits(f"user/{preset}")
        assert module.startswith("zoo.plugins.")
        assert torch.equal(logits, logits_of(folder))
        assert reader.ask("encode", f"user/{preset}", "def zoo") == tokenizer.encode("def zoo")
    calls = len(hub.calls)
    with Client(hub.endpoint, readers_home, offline=True) as offline:
        for preset in MODELS:
            assert torch.equal(offline.logits(f"user/{preset}")[1], logits_of(tmp_path / preset))
    assert len(hub.calls) == calls


def test_revisions(hub, publisher, reader, tmp_path):
    for seed in (0, 1):
        folder = save("retnet-tiny", tmp_path / str(seed), seed)
        assert publisher.zoo("publish", folder, "user/twice")[0] == 0
    _, first, second = hub.repositories["user/twice"].commits
    for revision, seed in ((first, 0), (second, 1), ("main", 1)):
        assert torch.equal(reader.logits("user/twice", revision)[1], logits_of(tmp_path / str(seed)))


def test_private(hub, publisher, reader, tmp_path):
    folder = save("retnet-tiny", tmp_path / "model")
    assert publisher.zoo("publish", folder, "user/private", "--private")[0] == 0
    assert hub.repositories["user/private"].private
    with pytest.raises(
        RuntimeError, match=r"user/private is not a [\s\S]* private repository, make sure to pass a token"
    ):
        reader.logits("user/private")
    reader.ask("set_token", TOKEN)
    assert torch.equal(reader.logits("user/private")[1], logits_of(folder))
    reader.ask("set_token", "")
    assert publisher.zoo("publish", folder, "user/public")[0] == 0
    status, _, errors = publisher.zoo("publish", folder, "user/public", "--private")
    assert status == 1
    assert "user/public is there already, and public" in errors[0]


def test_format_of_transformers(hub, publisher, reader, tmp_path):
    folder = save("mamba-tiny", tmp_path / "mamba")
    assert publisher.zoo("publish", folder, "user/stock", "--format", "transformers")[0] == 0
    module, logits = reader.logits("user/stock")
    assert module.startswith("transformers.")
    torch.testing.assert_close(logits, logits_of(folder), atol=2e-5, rtol=0)
    assert "import zoo" not in hub.repositories["user/stock"].files["README.md"].decode()
    status, _, errors = publisher.zoo("publish", folder, "user/stock")
    assert status == 1
    assert "user/stock holds something else than a zoo_mamba: a mamba" in errors[0]


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_a_single_failure_is_tried_again(hub, publisher, tmp_path):
    hub.fail("PUT", "/blobs/")
    assert publisher.zoo("publish", save("retnet-tiny", tmp_path / "model", seed=10), "user/retried")[0] == 0


def test_an_interrupted_upload_goes_on(hub, publisher, tmp_path):
    folder = save("retnet-tiny", tmp_path / "model", seed=11, max_shard_size="100kB")
    shards = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
    last = max(shards)
    hub.fail("PUT", last, times=6)  # as often as huggingface_hub tries
    status, _, errors = publisher.zoo("publish", folder, "user/interrupted")
    assert status == 1
    assert "500" in errors[0]
    assert "the same command goes on from what has arrived" in errors[0]
    assert list(hub.repositories["user/interrupted"].files) == [".gitattributes"]

    hub.fail("POST", "/commit/")  # now all blobs arrive, and then it breaks off
    assert publisher.zoo("publish", folder, "user/interrupted")[0] == 1
    assert publisher.zoo("publish", folder, "user/interrupted")[0] == 0
    assert len(shards) > 2
    for shard in shards:
        assert len(hub.sent("PUT", shard)) == (7 if shard == last else 1)
    assert shards < {hashlib.sha256(x).hexdigest() for x in hub.repositories["user/interrupted"].files.values()}


# -- what is there already ---------------------------------------------------------------------------------------------


def test_something_else_is_not_overwritten(hub, publisher, tmp_path):
    folder = save("retnet-tiny", tmp_path / "retnet")
    theirs = {
        ".gitattributes": b"",
        "README.md": b"---\ntags: [mine]\n---\n",
        "config.json": b'{"model_type": "llama"}',
    }
    hub.repositories["user/llama"] = Repository(private=False, commits={"1" * 40: {**theirs, "merges.txt": b"a b"}})
    status, _, errors = publisher.zoo("publish", folder, "user/llama")
    assert (status, len(errors)) == (1, 1)
    assert (
        "user/llama holds something else than a zoo_retnet: a llama that `zoo publish` did not put there" in errors[0]
    )
    assert "--force" in errors[0]
    assert hub.repositories["user/llama"].head == "1" * 40
    assert publisher.zoo("publish", folder, "user/llama", "--force")[0] == 0
    assert set(hub.repositories["user/llama"].files) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors")
    }


def test_a_publication_is_replaced(hub, publisher, tmp_path):
    """Shards of the one before go, or transformers might read them; what others put there stays."""
    shards = save("retnet-tiny", tmp_path / "shards", max_shard_size="100kB")
    assert publisher.zoo("publish", shards, "user/again")[0] == 0
    repository = hub.repositories["user/again"]
    repository.files["figure.png"] = b"of theirs"
    assert publisher.zoo("publish", save("retnet-tiny", tmp_path / "whole"), "user/again")[0] == 0
    assert [name for name in repository.files if "safetensors" in name] == ["model.safetensors"]
    assert "figure.png" in repository.files
    commits = len(repository.commits)
    assert publisher.zoo("publish", tmp_path / "whole", "user/again")[0] == 0
    assert len(repository.commits) == commits  # nothing has changed


def test_a_token_is_needed(hub, publisher, tmp_path):
    folder = save("retnet-tiny", tmp_path / "model")
    publisher.ask("set_token", "")
    try:
        calls = len(hub.calls)
        status, _, errors = publisher.zoo("publish", folder, "user/denied")
        assert (status, len(hub.calls)) == (1, calls)
        assert "needs a token that may write: run `hf auth login`, or set HF_TOKEN" in errors[0]
        publisher.ask("set_token", "hf_other")
        status, _, errors = publisher.zoo("publish", folder, "user/denied")
        assert status == 1
        assert "user/denied was not published" in errors[0]
        assert "401" in errors[0]
        assert "the token may not write there" in errors[0]
    finally:
        publisher.ask("set_token", TOKEN)


# -- the publication ---------------------------------------------------------------------------------------------------


def test_dry_run_tells_what_publishing_does(hub, publisher, tokenizer, tmp_path):
    latest = save_run(tmp_path / "run", tokenizer)
    calls = len(hub.calls)
    status, out, _ = publisher.zoo("publish", latest, "user/run", "--dry-run")
    assert (status, len(hub.calls)) == (0, calls)
    assert publisher.zoo("publish", latest, "user/run")[0] == 0
    repository = hub.repositories["user/run"]
    assert repository.messages == ["Publish retnet at step 1,234"]
    published = {name: content for name, content in repository.files.items() if name != ".gitattributes"}
    assert set(published) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "recipe.yaml", "training.json", "loss.png"),
    }
    assert out.startswith(published["README.md"].decode())
    for name, content in published.items():
        assert re.search(rf"^{re.escape(name)} +{len(content):,}$", out, flags=re.MULTILINE)
    assert out.endswith("left out: notes.txt, results.json, trainer/\n")


def test_places_of_the_disk_are_not_published(tokenizer, tmp_path):
    latest = save_run(tmp_path / "run", tokenizer)

    def words(home: str) -> list[str]:
        return [
            *(f"train.output={home}runs/first", f"data.tokenizer={home}words", "train.sample_prompt=/usr/bin"),
            *(f"data.sources.mine.files=[{home}texts/mine.jsonl,https://example.org/a.jsonl,near/b.jsonl]",),
            *("data.sources.mine.dataset=json", f"data.sources.books.dataset={home}texts/books"),
        ]

    config = load_config("tiny/retnet", [*words(f"{tmp_path}/"), f"data.cache={tmp_path}/tokens"])
    (latest / "recipe.yaml").write_text(to_yaml(config))
    sources = json.loads(json.dumps({name: asdict(source) for name, source in config.data.sources.items()}))
    change_json(latest / "training.json", data={"sources": sources})
    configs = {"gsm8k": {"dataset_path": f"{tmp_path}/gsm8k"}}
    change_json(latest / "results.json", configs=configs)
    kept = {path: path.read_bytes() for path in latest.iterdir() if path.is_file()}
    with prepare(latest, "user/run") as publication:
        published = [str(publication.card).encode(), *(path.read_bytes() for path in publication.files.values())]
        recipe = load_config(str(publication.files["recipe.yaml"]))
    assert not any(str(tmp_path).encode() in content for content in published)
    assert any(b"./mine.jsonl" in content for content in published[:1])
    expected = [word.replace("./runs/", "./").replace("./texts/", "./") for word in words("./")]
    assert recipe == load_config("tiny/retnet", expected)
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_card_has_the_facts(tokenizer, tmp_path):
    with prepare(save_run(tmp_path / "run", tokenizer), "user/run", license="mit") as publication:
        card = publication.card
    parameters = 300 * 64 + sum(
        x.numel() for name, x in zoo.create_model("retnet-tiny", **SMALL).named_parameters() if "embed" not in name
    )
    for fact in (
        'Sun et al., 2023, "Retentive Network',
        "S_n = gamma S_{n-1} + K_n^T V_n",
        'AutoModelForCausalLM.from_pretrained("user/run")',
        'AutoTokenizer.from_pretrained("user/run")',
        "pip install sequence-zoo",
        f"| parameters | {parameters:,}: 19,200 embedding, {parameters - 19200:,} other |",
        f"| state of a sequence | {zoo.state_bytes(zoo.create_config('retnet-tiny', **SMALL)):,} bytes, whatever its",
        "[2307.08621](https://arxiv.org/abs/2307.08621)",
        "| tokens | 1,300,000 |",
        "| seed | 1234 |",
        "| commit | 0123abc |",
        "| SHA-256 of the data | c0ffee |",
        "| source | weight | tokens | options |",
        "| stdlib | 0.5 | 3,000,000 |  |",
        "| other |  |  | pairs 4 |",
        "| held-out text | nats a token | bits a byte | accuracy | tokens |",
        "| code | 4.4 | 1.9 | 0.25 | 50,000 |",
        "| mqar | acc | 0.5000 ± 0.0123 | 0 | 100 of 1,000 |",
        "| gsm8k | exact_match,strict-match | 0.2500 | 5 | 1,319 |",
        "![loss](loss.png)",
        "zoo train recipe.yaml",
    ):
        assert fact in card.text
    assert card.data.license == "mit"
    assert {(result.dataset_type, result.metric_type, result.metric_value) for result in card.data.eval_results} == {
        ("mqar", "acc", 0.5),
        ("openai/gsm8k", "exact_match", 0.25),
        ("code", "loss", 4.4),
        ("code", "bits_per_byte", 1.9),
        ("code", "accuracy", 0.25),
    }


def test_card_invents_nothing(tmp_path):
    with prepare(save("transformer-tiny", tmp_path / "model"), "user/bare") as publication:
        card = publication.card
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert headings == ["# bare", "## Load it", "## Model", "## Licence"]
    assert "None" not in card.text
    assert "AutoTokenizer" not in card.text
    config = zoo.create_config("transformer-tiny", **SMALL)
    state, longer = zoo.state_bytes(config, 2048), zoo.state_bytes(config, 2049)
    assert f"{state:,} bytes at 2,048 tokens, {longer - state:,} more with each token" in card.text
    assert card.data.eval_results is None
    assert card.data.license == "apache-2.0"


def test_every_architecture_has_a_card(tmp_path):
    """Its README begins in a way that the card can quote."""
    for preset in zoo.list_models("*-tiny"):
        with torch.device("meta"):
            model = zoo.create_model(preset)
        text = make_card(Facts("user/name", model, "zoo", "mit", [], {}, [])).text
        about = text.split("\n\n")[1]
        assert zoo.registry.find_preset(preset).paper.removeprefix("arXiv:") in about
        assert "](.." not in text


def test_card_names_the_distributions_of_plugins(monkeypatch):
    """A hybrid may have mixers of a plugin that is installed beside the zoo."""
    from zoo.hub import card

    with torch.device("meta"):
        facts = Facts("user/name", zoo.create_model("hybrid-tiny"), "zoo", "mit", [], {}, [])
    theirs = type("TheirModel", (), {"__module__": "zoo_echo.modeling"})
    monkeypatch.setattr(
        card,
        "registry",
        SimpleNamespace(plugins=zoo.registry.plugins, find_owner=lambda _: SimpleNamespace(models=[theirs])),
    )
    monkeypatch.setattr(card, "packages_distributions", lambda: {"zoo_echo": ["sequence-zoo-echo"]})
    assert "pip install sequence-zoo sequence-zoo-echo\n" in make_card(facts).text


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"repo_id": "name"}, "'name' names no owner: write it as user/name"),
        (None, {"repo_id": "user/na me"}, "Repo id must use alphanumeric chars"),
        (None, {"format": "transformer"}, "did you mean transformers?"),
        (None, {"format": "transformers"}, "library to export RetNetForCausalLM .*--format zoo publishes"),
        (lambda folder: (folder / "config.json").unlink(), {}, "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "holds no weights"),
        (
            lambda folder: change_json(folder / "config.json", model_type="llama"),
            {},
            "a llama, which is not of the zoo",
        ),
        (
            lambda folder: change_json(folder / "config.json", vocab_size=299),
            {},
            "1 tensors .* model.embed_tokens.weight",
        ),
        (lambda folder: (folder / "training.json").write_text("{"), {}, "training.json is no JSON"),
        (lambda folder: (folder / "results.json").write_text("{}"), {}, "results.json is not in lm-eval's layout"),
    ],
)
def test_errors(tmp_path, change, options, message):
    folder = save("retnet-tiny", tmp_path / "model")
    if change is not None:
        change(folder)
    with (
        pytest.raises((ValueError, FileNotFoundError), match=message),
        prepare(folder, **{"repo_id": "user/name", **options}),
    ):
        pass


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

"""The command line: what it prints, and that every error is one line that names the culprit and a way out."""

import re

import pytest

from zoo.cli import main


def run(capsys, *words) -> tuple[int, str, str]:
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list(capsys):
    status, out, _ = run(capsys, "list", "transformer*")
    assert (status, out.split()) == (0, ["transformer-sliding-tiny", "transformer-tiny"])


def test_show(capsys):
    status, out, _ = run(capsys, "show", "retnet-tiny")
    assert status == 0
    for wanted in (
        "1,442,944",
        "524,288 embedding",
        "918,656 other",
        "131,104 bytes a sequence, any length",
        "2307.08621",
    ):
        assert wanted in out
    _, out, _ = run(capsys, "show", "transformer-tiny", "--length", "100")
    assert "204,800 bytes a sequence of 100 tokens" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shw"], "unknown command 'shw'; did you mean show?"),
        ([], "COMMAND"),
        (["list", "mambo*"], "unknown model 'mambo*'"),
        (["show", "retnet-tny"], "did you mean retnet-tiny"),
        (["show", "retnet-tiny", "--lenght", "3"], "unrecognized arguments: --lenght"),
        (["generate", "./nowhere", "--prompt", "x"], "./nowhere is no checkpoint"),
        (["generate", "./nowhere"], "--prompt"),
        (["train", "tiny/retnt"], "did you mean tiny/retnet.yaml?"),
        (["train", "tiny/retnet", "train.sed=1"], "did you mean train.seed"),
        (["train", "tiny/retnet", "seed"], "'seed' is no assignment"),
        (["train", "tiny/retnet", "train.tokens=many"], "train.tokens: Value 'many'"),
        (["train", "tiny/retnet", "train.tokens=-1"], "train.tokens must be from 1 to 1e+18, got -1"),
        (["train", "tiny/retnet", "model.preset=retnt-tiny"], "did you mean retnet-tiny"),
        (["train", "tiny/retnet", "model.overrides.num_head=2"], "did you mean num_heads"),
        (
            ["train", "tiny/retnet", "model.overrides.pad_token_id=9"],
            "model.overrides.pad_token_id: it follows from the tokenizer",
        ),
        (["train", "tiny/retnet", "train.tokens=nan"], "train.tokens must be from 1 to 1e+18, got nan"),
        (["train", "tiny/retnet", "train.beta1=1"], "train.beta1 must be from 0 to 1"),
        (["train", "tiny/retnet", "train.seed=["], "no valid YAML"),
        (["train", "tiny/retnet", "data.sequence_length=1"], "data.sequence_length must be from 2"),
        (["show", "transformer-tiny", "--length", "-5"], "a sequence has no -5 tokens"),
        (["train", "tiny/retnet", "data.sources.stdlib.corpus=stdlb"], "did you mean stdlib?"),
        (["train", "tiny/retnet", "--device", "H100"], "--device goes with --dry-run"),
        (["train", "tiny/retnet", "--print-config", "--devices", "8"], "--devices goes with --dry-run"),
        (["train", "tiny/retnet", "--print-config", "--dry-run"], "not allowed with argument --print-config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("zoo: ")
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback():
    for words in (["--debug", "show", "nothing"], ["show", "nothing", "--debug"]):
        with pytest.raises(ValueError, match="unknown model"):
            main(words)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert set(re.findall(r"^    (\w+)", out, flags=re.MULTILINE)) == {
        *("list", "show", "generate", "train", "launch", "eval", "plots"),
        *("import", "export", "publish", "selftest", "bench"),
    }

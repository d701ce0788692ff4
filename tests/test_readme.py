"""What the README says is so: its Python and its commands run, its table is what the registry says."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import zoo
from zoo.cli import main
from zoo.inspection import architecture_table
from zoo.ops.testing import op_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks("python"):
        exec(block, namespace)
    out = capsys.readouterr().out
    assert re.search(r"print\(zoo.state_bytes\(model.config\)\)  # (\d+),", README).group(1) in out.split()
    assert namespace["logits"].shape == (8, 1, 4096)


def test_commands_run(tmp_path, monkeypatch, capsys):
    """Every command of the README; the tokens to train on are cut down, and make is asked what it would do."""
    monkeypatch.chdir(tmp_path)
    assert ["make", "demo"] in commands()
    assert ["make", "test"] in commands()
    for words in commands():
        if words[0] == "make":
            plan = subprocess.run(
                ["make", "--dry-run", "--directory", ROOT, *words[1:]], capture_output=True, text=True
            )
            assert plan.returncode == 0, plan.stderr
            continue
        assert words[0] == "zoo"
        words = ["train.tokens=8192" if word.startswith("train.tokens=") else word for word in words]
        assert main(words[1:]) == 0, capsys.readouterr().err


def test_the_table_of_ops_is_of_these_ops():
    rows = re.findall(r"^\| \[(\w+)\]\(zoo/ops/(\w+)\) \|.*\| ([^|]*) \|$", README, flags=re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == op_names()
    names = {"chunked": "PyTorch", "native": "C++", "triton": "Triton"}
    for name, folder, forms in rows:
        assert folder == name
        assert forms == ", ".join(names[form] for form in importlib.import_module(f"zoo.ops.{name}").OP.forms[1:])


def test_ci_runs_the_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_table_is_what_the_registry_says():
    begin, end = "<!-- zoo list --markdown -->\n", "<!-- end of table -->"
    table = README[README.index(begin) + len(begin) : README.index(end)]
    assert table.splitlines() == architecture_table(), "paste what `zoo list --markdown` prints"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("plugins/*/README.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_documented_lora_targets_are_the_registered_ones():
    for name, plugin in zoo.registry.plugins().items():
        listed = ", ".join(f'"{target}"' for target in plugin.lora_targets)
        assert f"target_modules=[{listed}]" in (ROOT / "plugins" / name / "README.md").read_text()


@pytest.mark.slow
def test_demo(tmp_path):
    """The main job of `make demo`, with the interpreter at hand: what it prints, keeps, and whether it learned."""
    plan = subprocess.run(
        ["make", "--dry-run", "--directory", ROOT, "demo"], capture_output=True, text=True, check=True
    )
    run = tmp_path / "demo"
    out = ""
    for line in plan.stdout.splitlines():
        if not line.startswith(".venv/bin/zoo"):
            continue
        words = shlex.split(line.replace("runs/demo", str(run)))[1:]
        done = subprocess.run([sys.executable, "-m", "zoo.cli", *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        out += done.stdout
    *_, last = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    table = re.findall(r"^  (\w+) loss +(\S+).*\n  its unigram entropy +(\S+)", out, flags=re.MULTILINE)
    assert {name: loss for name, loss, _ in table} == {
        name: f"{score['loss']:.3f}" for name, score in last["validation"].items()
    }
    bounds = {"code": 0.75, "prose": 0.95}
    assert bounds.keys() == last["validation"].keys()
    assert all(float(loss) <= bounds[name] * float(entropy) for name, loss, entropy in table)
    assert "def read_text(path):" in out

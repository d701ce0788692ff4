"""A wheel, a source distribution and an editable install all find plugins, recipes and evals, under one name."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_PLUGINS = {path.parent.name for path in ROOT.glob("plugins/*/__init__.py")}

_LOOK = f"""
import zoo
from zoo.layout import shelf
assert set(zoo.registry.plugins()) == {_PLUGINS!r}, zoo.list_models()
for name, wanted in (("plugins", "retnet/modeling.py"), ("recipes", "tiny/retnet.yaml"), ("evals", "README.md")):
    assert (shelf(name) / wanted).is_file(), shelf(name)
import zoo.plugins.retnet.modeling
print(zoo.__file__)
"""


def pip(*arguments) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


def test_wheel(wheel, tmp_path):
    """Installed where the checkout cannot be seen, it finds everything; site-packages gets one name."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"zoo"}
    assert not [name for name in names if "tests/" in name or name.endswith((".pyc", ".so"))]
    kernels = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("zoo/ops/**/native*.*")}
    assert kernels
    assert kernels <= set(names)
    pip("install", "--quiet", "--no-deps", "--target", tmp_path, wheel)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + _LOOK
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "zoo" / "__init__.py"


def test_wheel_has_the_command_and_the_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "zoo = zoo.cli:main" in archive.read(info).decode()
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_editable_install(tmp_path):
    """In a venv of its own that borrows this one's libraries."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    pip("--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT)
    done = subprocess.run([python, "-P", "-c", _LOOK], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "zoo" / "__init__.py"
    assert "zoo" in (tmp_path / "venv" / "bin" / "zoo").read_text()


def test_source_distribution(tmp_path):
    code = f"import hatchling.build; print(hatchling.build.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    for wanted in (
        "zoo/__init__.py",
        "plugins/retnet/modeling.py",
        "recipes/tiny/retnet.yaml",
        "tests/test_contract.py",
    ):
        assert any(name.endswith(wanted) for name in names), wanted
    assert not [name for name in names if "/runs/" in name or "/.venv/" in name]

"""Which form runs and why; how the C++ kernels are built, and what happens where they cannot be."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import zoo
from zoo.ops import dispatch, native
from zoo.ops.dispatch import choose, use_backend
from zoo.ops.linear_scan import linear_scan

ALL = dispatch.FORMS


@pytest.fixture(autouse=True)
def _no_choice_is_remembered():
    dispatch._choose_once.cache_clear()
    yield
    dispatch._choose_once.cache_clear()


def test_the_device_decides():
    assert choose("linear_scan", ALL, "cpu") == ("native", "the kernel of linear_scan for cpu")
    for kernels in ("auto", "require"):  # what an op does not have cannot be missing
        choice = choose("other", ("reference", "chunked", "triton"), "cpu", kernels=kernels)
        assert choice == ("chunked", "the form of other for cpu: it has no native one")
    assert choose("linear_scan", ALL, "mps") == ("chunked", "there are no kernels for mps")


def test_a_form_asked_for_by_name_runs_or_says_why_not():
    with use_backend("reference"):
        assert choose("linear_scan", ALL, "cpu") == ("reference", "asked for by name")
        with pytest.raises(ValueError, match="other has no 'reference' backend; it has chunked"):
            choose("other", ("chunked",), "cpu")
    with use_backend("native"), pytest.raises(ValueError, match="C\\+\\+ runs on a CPU, not on cuda"):
        choose("linear_scan", ALL, "cuda")
    assert choose("linear_scan", ALL, "cpu", kernels="chunked").backend == "chunked"
    with pytest.raises(ValueError, match="did you mean chunked"), use_backend("chunkd"):
        pass
    with pytest.raises(ValueError, match="did you mean native"):
        choose("linear_scan", ALL, "cpu", kernels="nativ")


def test_what_the_environment_or_a_block_asks_for_goes_before_the_argument():
    with use_backend("reference"):
        assert choose("linear_scan", ALL, "cpu", kernels="native").backend == "reference"
    assert choose("linear_scan", ALL, "cpu", kernels="native").backend == "native"


def test_triton_without_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(ValueError, match="Triton runs on a GPU"):
        choose("linear_scan", ALL, "cpu")


def test_required_kernels(monkeypatch):
    assert choose("linear_scan", ALL, "cpu", kernels="require").backend == "native"
    monkeypatch.setattr(native, "obstacle", lambda op: "no C++ compiler")
    dispatch._choose_once.cache_clear()
    assert choose("linear_scan", ALL, "cpu") == ("chunked", "no C++ compiler")
    with pytest.raises(ValueError, match="kernels='require', but no C\\+\\+ compiler"):
        choose("linear_scan", ALL, "cpu", kernels="require")
    with pytest.raises(ValueError, match="there are no kernels for mps"):
        choose("linear_scan", ALL, "mps", kernels="require")
    model = zoo.create_model("retnet-tiny", kernels="require")
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_a_gpu_whose_kernels_did_not_compile_well(monkeypatch, tmp_path):
    """Dispatch obeys the table of kernels that were compiled ahead of time."""
    (tmp_path / "results").mkdir()
    table = tmp_path / "results" / "kernels_aot.csv"
    table.write_text("op,target,verdict\nlinear_scan,sm_80,chunked\nlinear_scan,sm_90,triton\n")
    monkeypatch.setattr(dispatch, "shelf", lambda name: tmp_path)
    dispatch.targets_listed_as_chunked.cache_clear()
    try:
        monkeypatch.setattr(dispatch, "gpu_target", lambda: "sm_80")
        choice = choose("linear_scan", ALL, "cuda")
        assert choice.backend == "chunked"
        assert "kernels_aot.csv lists linear_scan on sm_80" in choice.reason
        dispatch._choose_once.cache_clear()
        monkeypatch.setattr(dispatch, "gpu_target", lambda: "sm_90")
        assert choose("linear_scan", ALL, "cuda").backend == "triton"
        assert choose("linear_scan", ALL, "cuda", torch.float64).backend == "chunked"
    finally:
        dispatch.targets_listed_as_chunked.cache_clear()


def test_a_gpu_that_is_not_here(monkeypatch):
    """A dry run has the forms of the GPU that it is about, whatever is installed."""
    monkeypatch.setattr(dispatch, "targets_listed_as_chunked", lambda: frozenset({("linear_scan", "sm_80")}))
    with dispatch.planned_for("sm_90"):
        assert choose("linear_scan", ALL, "cpu").backend == "triton"
        assert choose("other", ("reference", "chunked"), "cpu").backend == "chunked"
    with dispatch.planned_for("sm_80"):
        assert "kernels_aot.csv lists linear_scan on sm_80" in choose("linear_scan", ALL, "cpu").reason
    assert choose("linear_scan", ALL, "cpu").backend == "native"


def test_the_choice_is_not_saved_with_a_model(tmp_path):
    zoo.create_model("retnet-tiny", kernels="require").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).kernels == "auto"
    assert "kernels" not in (tmp_path / "config.json").read_text()


# -- building ----------------------------------------------------------------------------------------------------------

PROGRAM = textwrap.dedent("""
    import warnings
    import torch
    from zoo.ops.dispatch import choose
    from zoo.ops.linear_scan import OP, linear_scan

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            x = torch.ones(1, 3, 2)
            h, _ = linear_scan(x, x, torch.zeros(1, 2))
            assert h[0, :, 0].tolist() == [1, 2, 3]
    print(choose("linear_scan", OP.forms, "cpu"))
    print(len([w for w in caught if "zoo" in str(w.message)]))
""")


def start(**environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_two_processes_that_build_at_once(tmp_path):
    processes = [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for process in processes:
        assert "backend='native'" in finish(process)
    left = [path.suffix for path in (tmp_path / "sequence-zoo" / "native").iterdir()]
    assert sorted(left) == [".sha256", ".so"]


def test_a_compiler_with_arguments(tmp_path):
    out = finish(start(XDG_CACHE_HOME=str(tmp_path), CXX="g++ -fno-plt", CXXFLAGS="-DNOTHING='a b'"))
    assert "backend='native'" in out


def test_a_damaged_library_is_built_anew(tmp_path):
    finish(start(XDG_CACHE_HOME=str(tmp_path)))
    (library,) = (tmp_path / "sequence-zoo" / "native").glob("*.so")
    library.write_bytes(library.read_bytes()[:1000])
    assert "backend='native'" in finish(start(XDG_CACHE_HOME=str(tmp_path)))


def test_a_library_is_of_its_headers_too(tmp_path):
    source, header = tmp_path / "native.cpp", tmp_path / "native_walk.h"
    source.write_text('#include "native_walk.h"')
    keys = set()
    for text in ("one", "another"):
        header.write_text(text)
        keys.add(native._key(source, native._compiler()))
    assert len(keys) == 2


@pytest.mark.parametrize(
    "trouble", ["no compiler", "a broken compiler", "a compiler that hangs up", "a read-only home"]
)
def test_without_a_library_there_is_one_warning_and_chunked(tmp_path, trouble):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    if trouble == "no compiler":
        environment["CXX"] = str(tmp_path / "missing")
    elif trouble == "a read-only home":
        environment["XDG_CACHE_HOME"] = "/dev/null/home"
    else:
        compiler = tmp_path / "compiler"
        ending = "exit 1" if trouble == "a broken compiler" else "kill -9 $$"
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no such header" >&2\n{ending}\n')
        compiler.chmod(0o755)
        environment["CXX"] = str(compiler)
    choice, warnings = finish(start(**environment)).splitlines()
    assert "backend='chunked'" in choice
    assert warnings == "1"
    if trouble != "a read-only home":
        assert not list(Path(environment["XDG_CACHE_HOME"]).rglob("*.so"))


def test_only_what_cpp_can_read_reaches_it():
    x = torch.ones(1, 3, 2)
    for bad in (x.to("meta"), x.mT, x.long()):
        with pytest.raises(ValueError, match="argument 1 of linear_scan_forward"):
            native.call("linear_scan", "linear_scan_forward", torch.float32, 1, bad)
    with pytest.raises(ValueError, match=r"no C\+\+ kernel for torch\.float16"):
        native.call("linear_scan", "linear_scan_forward", torch.float16, x)


def test_strided_inputs():
    """Views of any strides are read as what they are."""
    x = torch.randn(5, 7, 4)
    a, b, state = x.transpose(0, 1)[..., ::2], x.transpose(0, 1)[..., 1::2], torch.zeros(7, 4).t()[:2].t()
    expected = linear_scan(a.contiguous(), b.contiguous(), state.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(linear_scan(a, b, state), expected, strict=True))


def test_who_watches_sees_one_node():
    """Where no gradient is asked for a call goes straight to the kernel, but a tracer and a fake tensor stop it."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def scan(x):
        return linear_scan(x, x, x[:, 0], kernels="native")[0]

    x = torch.rand(1, 3, 2)
    assert "torch.ops.zoo.linear_scan.default" in make_fx(scan)(x).code
    assert scan(x).grad_fn is None
    assert "zoo_linear_scan" in type(scan(x.clone().requires_grad_()).grad_fn).__name__.lower()
    assert torch.func.vmap(scan)(x[None]).shape == (1, 1, 3, 2)
    with FakeTensorMode() as mode:
        assert scan(mode.from_tensor(x)).shape == x.shape

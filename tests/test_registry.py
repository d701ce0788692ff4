"""Finding plugins, names and presets; what importing the zoo costs and leaves alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import zoo
from zoo import registry


def test_names_are_in_natural_order(monkeypatch):
    plugin = zoo.Plugin(models=(), presets={name: {} for name in ("x-10b", "x-2b", "x-1b3", "x-tiny")})
    monkeypatch.setattr(registry, "_plugins", {"x": plugin})
    assert zoo.list_models() == ["x-1b3", "x-2b", "x-10b", "x-tiny"]
    assert zoo.list_models("x-?b*") == ["x-1b3", "x-2b"]


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="'retnet-tinny'; did you mean retnet-tiny"):
        zoo.create_model("retnet-tinny")
    with pytest.raises(ValueError, match="'hiden_size'; did you mean hidden_size"):
        zoo.create_config("retnet-tiny", hiden_size=3)
    with pytest.raises(ValueError, match="'atention'; did you mean"):
        zoo.create_config("transformer-tiny", mixers=["atention"])
    with pytest.raises(ValueError, match=r"there are: .*retnet-tiny"):
        zoo.create_model("qqqq")


def test_configurations_are_checked():
    with pytest.raises(ValueError, match="mixers names 5 layers, num_hidden_layers is 4"):
        zoo.create_config("transformer-tiny", mixers=["attention"] * 5)
    with pytest.raises(ValueError, match="hidden_size must be positive, got 0"):
        zoo.create_config("retnet-tiny", hidden_size=0)
    with pytest.raises(ValueError, match=r"'gelo'; did you mean .*gelu"):
        zoo.create_config("retnet-tiny", hidden_act="gelo")
    with pytest.raises(ValueError, match=r"unknown field .*'layer_types'"):
        zoo.create_config("retnet-tiny", layer_types=["x"])
    with pytest.raises(ValueError, match="num_heads 3"):
        zoo.create_config("retnet-tiny", num_heads=3)
    with pytest.raises(ValueError, match=r"retnet-tiny.*num_heads"):
        zoo.create_config("retnet-tiny", num_heads="many")
    with pytest.raises(ValueError, match=r"num_attention_heads \(4\).*\(3\)"):
        zoo.create_config("transformer-tiny", num_key_value_heads=3)


def test_a_pattern_of_mixers_repeats_and_survives_a_file(tmp_path):
    config = zoo.create_config("transformer-tiny", mixers=["sliding_attention", "attention"], num_hidden_layers=5)
    assert config.mixers == ["sliding_attention", "attention"] * 2 + ["sliding_attention"]
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).mixers == config.mixers


def test_any_mixer_goes_into_any_model_that_has_its_fields():
    """Each registered mixer in each model: it builds and runs, or names the fields that are missing."""
    mixers = [mixer for plugin in registry.plugins().values() for mixer in plugin.mixers]
    for name in zoo.list_models("*-tiny"):
        config = zoo.create_config(name)
        for mixer in mixers:
            if name == "lm2-tiny" and mixer != "attention":  # its memory stands beside attention
                with pytest.raises(ValueError, match=f"beside the memory; mixers are .*{mixer!r}|{mixer!r} needs"):
                    zoo.create_model(name, mixers=[mixer])
                continue
            found, needed = config.for_mixer(mixer), registry.find_mixer(mixer).config_fields
            if missing := [field for field in needed if not hasattr(found, field)]:
                with pytest.raises(ValueError, match=f"mixer {mixer!r} needs {', '.join(missing)}, which"):
                    zoo.create_model(name, mixers=[mixer])
            else:
                model = zoo.create_model(name, mixers=[mixer])
                assert model(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()
    with pytest.raises(ValueError, match="mixer 'attention' needs num_attention_heads"):
        zoo.create_model("retnet-tiny", mixers=["retention", "attention"])


def test_dtype_is_honoured():
    model = zoo.create_model("retnet-tiny", dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_auto_classes_know_every_architecture():
    for name in zoo.list_models("*-tiny"):
        config = zoo.create_config(name)
        with torch.device("meta"):
            assert type(AutoModelForCausalLM.from_config(config)) is type(zoo.create_model(name))
            assert isinstance(AutoModel.from_config(config), zoo.ZooModel)


def test_a_clash_is_refused():
    plugin = registry.find_preset("retnet-tiny")
    with pytest.raises(ValueError, match=r"presets that 'retnet' has already: .*retnet-tiny"):
        registry.register("other", plugin)
    with pytest.raises(ValueError, match="model type 'zoo_retnet', which is registered already"):
        registry.register("other", zoo.Plugin(models=plugin.models, presets={}))


def test_a_plugin_that_is_not_one_is_refused_whole(monkeypatch):
    class OddName(zoo.ZooModel):
        class config_class(zoo.ZooConfig):  # noqa: N801 (the attribute transformers looks for)
            model_type = "zoo_odd"

    with pytest.raises(ValueError, match=r"is a int, not a zoo\.Plugin"):
        registry.register("odd", 3)
    with pytest.raises(ValueError, match="the name of OddName ends in none of"):
        registry.register("odd", zoo.Plugin(models=(OddName,), presets={}))
    assert "zoo_odd" not in CONFIG_MAPPING


def test_foreign_models_are_refused():
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(ValueError, match="not LlamaConfig"):
        zoo.state_bytes(config)
    with pytest.raises(ValueError, match="not LlamaForCausalLM"):
        zoo.kernel_report(LlamaForCausalLM(config))


def _without_linear_layers(rows):
    """What is left of a report; a processor may be one on which oneDNN is faster, or not."""
    linear = [row for row in rows if row.op == "linear"]
    assert "lm_head" in {row.module for row in linear}
    assert len({(row.backend, row.why) for row in linear}) == 1
    assert linear[0].backend in ("onednn", "torch")
    return [row for row in rows if row.op != "linear"]


def test_kernel_report():
    model = zoo.create_model("transformer-sliding-tiny")
    rows = _without_linear_layers(zoo.kernel_report(model))
    assert [row.module for row in rows if row.op == "attention"] == [f"model.layers.{i}.mixer" for i in range(4)]
    assert {(row.op, row.backend) for row in rows} == {
        ("attention", "sdpa"),
        ("rms_norm", "native"),
        ("swiglu", "native"),
    }
    rows = _without_linear_layers(zoo.kernel_report(zoo.create_model("retnet-tiny")))
    assert {(row.op, row.backend) for row in rows} == {("decay_attention", "native"), ("rms_norm", "native")}
    assert all("cpu" in row.why for row in rows)
    rows = zoo.kernel_report(zoo.create_model("retnet-tiny", kernels="reference"))
    assert {row.backend for row in rows if row.op == "decay_attention"} == {"reference"}


def test_tokens_move_between_devices():
    """As accelerate moves the inputs of a block whose weights are on another device."""
    from accelerate.utils import send_to_device

    for mask in (None, torch.tensor([[True, False]])):
        tokens = zoo.Tokens(torch.tensor([[0, 1]]), mask=mask, rotary=(torch.ones(1, 2, 4), torch.ones(1, 2, 4)))
        tokens.attention_masks = {"full_attention": torch.ones(1, 1, 2, 2), "other": None}
        tokens.left_aligned = tokens.align_left()
        moved = send_to_device(tokens, "meta")
        assert (moved.left_aligned is moved) is (mask is None)
        for part in (moved.positions, moved.left_aligned.rotary[1], moved.attention_masks["full_attention"]):
            assert part.device.type == "meta"


def test_summary_counts_exactly():
    for name in zoo.list_models("*-tiny"):
        model, summary = zoo.create_model(name), zoo.summarize(name)
        assert summary.parameters == sum(p.numel() for p in model.parameters())
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        assert summary.embedding_parameters == sum(weight.numel() for weight in tables)


_IMPORT = """
import json, sys, time
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, cache_utils, masking_utils
tables = lambda: [dict(t) for t in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING,
                  masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING)]
before, names = tables(), set(CONFIG_MAPPING.keys())
loaded = set(sys.modules)
start = time.process_time()
import zoo
seconds = time.process_time() - start
unchanged = all(after[key] is value for b, after in zip(before, tables()) for key, value in b.items())
unchanged = unchanged and all(CONFIG_MAPPING[key].__module__.startswith("transformers.") for key in ("llama", "mamba"))
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
print(json.dumps([seconds, sorted(new), unchanged, sorted(set(CONFIG_MAPPING.keys()) - names)]))
"""


def test_importing_is_light_and_overrides_nothing():
    """Of what is not imported anyway with transformers' own classes, importing the zoo brings in nothing but itself."""
    results = [
        json.loads(subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, check=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds for seconds, *_ in results) <= 0.5
    architectures = {plugin.config_class.model_type for plugin in registry.plugins().values()}
    for _, new, unchanged, model_types in results:
        assert set(new) - sys.stdlib_module_names <= {"zoo", "transformers", "torch"}
        assert unchanged
        assert set(model_types) == architectures


# -- a plugin of another distribution ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def with_external_plugin(tmp_path_factory):
    """Runs Python with the distribution of `tests/external_plugin` installed, in a folder of its own."""
    target = tmp_path_factory.mktemp("site")
    source = Path(__file__).parent / "external_plugin"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", target, source], check=True, capture_output=True)

    def run(*arguments):
        import os

        path = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )

    return run


def test_an_external_plugin_keeps_the_whole_contract_and_goes_into_hybrids(with_external_plugin):
    tests = [str(Path(__file__).parent / name) for name in ("test_contract.py", "test_hybrid.py")]
    done = with_external_plugin("-m", "pytest", *tests, "-q", "-k", "echo", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_a_plugin_that_fails_to_import_is_reported_and_stays_out_of_the_way(with_external_plugin):
    code = "import zoo; print(zoo.list_models('*-tiny')); zoo.create_model('broken-7b')"
    done = with_external_plugin("-c", code)
    assert "echo-tiny" in done.stdout
    assert "retnet-tiny" in done.stdout
    assert "zoo plugin 'broken' (zoo_echo.broken) is left out" in done.stderr
    assert "zoo plugin 'a_thief' (zoo_echo.thief) is left out" in done.stderr
    assert re.search("brings presets that 'retnet' has already: .*retnet-tiny", done.stderr)
    assert done.stderr.rstrip().endswith("ImportError: this plugin needs a library that is not there")


def test_an_external_plugin_has_a_parameter_group(with_external_plugin):
    code = (
        "import zoo; m = zoo.create_model('echo-tiny');"
        "print(sorted({(g['lr'], g['weight_decay']) for g in m.parameter_groups(1.0, 0.1)}))"
    )
    assert with_external_plugin("-c", code).stdout.strip() == "[(1.0, 0.0), (1.0, 0.1), (2.0, 0.0)]"

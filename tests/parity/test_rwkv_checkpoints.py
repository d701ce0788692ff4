"""Checkpoints of RWKV: the authors' files against their package `rwkv` 0.8.32, folders of transformers 5.23's RWKV-4.

The files are made here, in the names and shapes of the published ones. There is no oracle on a CPU for folders of
flash-linear-attention: its names and shapes are those of its model class (0.6.0), and the logits must be those of the
same weights in the authors' file.
"""

import json
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, RwkvConfig, RwkvForCausalLM

import zoo
from zoo.cli import main

VERSIONS = (4, 5, 6, 7)
VOCABULARY, D, INNER, HEADS = 97, 64, 96, 4
HEAD = D // HEADS
RANKS = {"shift_rank": 3, "decay_rank": 5, "iclr_rank": 6, "value_rank": 7, "gate_rank": 8}
ROW = (1, 1, D)


def shapes_of_layer(version: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer in the authors' files, in their order."""
    heads = (HEADS, HEAD)
    time_mixing = {
        4: {"time_decay": (D,), "time_first": (D,), **{f"time_mix_{c}": ROW for c in "kvr"}},
        5: {**{f"time_mix_{c}": ROW for c in "kvrg"}, "time_decay": heads, "time_faaaa": heads},
        6: {
            **{f"time_maa_{c}": ROW for c in "xwkvrg"},
            "time_maa_w1": (D, 5 * RANKS["shift_rank"]),
            "time_maa_w2": (5, RANKS["shift_rank"], D),
            "time_decay": ROW,
            "time_decay_w1": (D, RANKS["decay_rank"]),
            "time_decay_w2": (RANKS["decay_rank"], D),
            "time_faaaa": heads,
        },
        7: {
            **{f"x_{c}": ROW for c in "rwkvag"},
            **{f"{c}0": ROW for c in "wav"},
            **{f"{c}1": (D, RANKS[rank]) for c, rank in zip("wavg", list(RANKS)[1:], strict=True)},
            **{f"{c}2": (RANKS[rank], D) for c, rank in zip("wavg", list(RANKS)[1:], strict=True)},
            "k_k": ROW,
            "k_a": ROW,
            "r_k": heads,
        },
    }[version]
    channel_mixing = {
        7: {"x_k": ROW},
        6: {"time_maa_k": ROW, "time_maa_r": ROW, "receptance.weight": (D, D)},
    }.get(version, {"time_mix_k": ROW, "time_mix_r": ROW, "receptance.weight": (D, D)})
    projections = ("receptance", "key", "value", "output", "gate")[: 5 if version in (5, 6) else 4]
    norm = {"ln_x.weight": (D,), "ln_x.bias": (D,)} if version > 4 else {}
    time_mixing |= {f"{name}.weight": (D, D) for name in projections} | norm
    channel_mixing |= {"key.weight": (INNER, D), "value.weight": (D, INNER)}
    return {
        **{f"ln{i}.{kind}": (D,) for i in (1, 2) for kind in ("weight", "bias")},
        **{f"att.{name}": shape for name, shape in time_mixing.items()},
        **{f"ffn.{name}": shape for name, shape in channel_mixing.items()},
    }


def authors_tensors(version: int, layers: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under the names of the authors' files; those of version 7 that nothing reads are left out."""
    shapes = {"emb.weight": (VOCABULARY, D), "blocks.0.ln0.weight": (D,), "blocks.0.ln0.bias": (D,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in shapes_of_layer(version).items()}
    shapes |= {"ln_out.weight": (D,), "ln_out.bias": (D,), "head.weight": (VOCABULARY, D)}
    generator = torch.Generator().manual_seed(version)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        part = name.split(".")[-1]
        if ".ln" in name or name.startswith("ln_"):
            x = 0.2 * x + (part == "weight")
        elif part.startswith(("time_mix_", "time_maa_", "x_")) and shape == ROW:
            x = x.sigmoid()
        elif part in ("time_decay", "w0"):
            x = x - 1.5
        elif len(shape) == 2 and shape != (HEADS, HEAD):
            x = x / D**0.5
        tensors[name] = x.to(dtype)
    unread = {f"blocks.0.att.v{i}" for i in range(3)} if version == 7 else set()
    return {name: x for name, x in tensors.items() if name not in unread}


def save(tensors: dict[str, Tensor], folder: Path, name: str = "tiny.pth") -> Path:
    torch.save(tensors, folder / name)
    return folder / name


@pytest.fixture
def package(rwkv_package):
    """A module around a file, from tokens to the package's logits.

    The package gets the weights in float32: it norms the embedding in the precision of the file.
    """
    assert version_of("rwkv") == "0.8.32"

    class Package(nn.Module):
        def __init__(self, file: Path, version: int):
            super().__init__()
            wide = {name: x.float() for name, x in torch.load(file).items()}
            self.file, self.version = save(wide, file.parent, "wide.pth"), version

        def forward(self, tokens: Tensor) -> SimpleNamespace:
            (logits,) = rwkv_package(self.file, self.version, tokens, [tokens.shape[1]])
            return SimpleNamespace(logits=logits)

    return Package


# -- the authors' files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_authors_files(version, dtype, tmp_path, assert_imports, package):
    file = save(authors_tensors(version, dtype=dtype), tmp_path)
    oracle = package(file, version)

    def reload(folder):
        return package(folder / "model.pth", version)

    model = assert_imports(file, lambda tokens: oracle(tokens).logits, reload, to="rwkv")
    config = model.config
    assert model.dtype == dtype
    assert set(config.mixers) == {f"rwkv{version}"}
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (VOCABULARY, D, INNER)
    assert config.num_hidden_layers == 3
    assert version == 4 or config.num_heads == HEADS
    for name in {6: ("shift_rank", "decay_rank"), 7: list(RANKS)[1:]}.get(version, ()):
        assert getattr(config, name) == RANKS[name]


@pytest.mark.parametrize("version", [5, 6, 7])
def test_one_layer(version, tmp_path, package):
    """The package looks at tensors one by one, and of versions 5 and 6 the order in the file decides what it takes."""
    model, _ = zoo.import_checkpoint(save(authors_tensors(version, layers=1), tmp_path))
    zoo.export_checkpoint(model, tmp_path / "theirs", to="rwkv")
    tokens = torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = package(tmp_path / "theirs" / "model.pth", version)(tokens).logits
    with torch.no_grad():
        assert (model(tokens).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_order_in_a_file_says_nothing(version, tmp_path):
    tensors = authors_tensors(version)
    expected = zoo.import_checkpoint(save(tensors, tmp_path))[0].state_dict()
    model, _ = zoo.import_checkpoint(save(dict(reversed(tensors.items())), tmp_path, "reversed.pth"))
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_what_the_first_layer_does_not_read(tmp_path):
    """Version 7 mixes values of the first layer into those above: in the first itself the tensors for it are idle."""
    tensors = authors_tensors(7)
    expected = zoo.import_checkpoint(save(tensors, tmp_path))[0].state_dict()
    idle = {f"blocks.0.att.v{i}": torch.randn_like(tensors[f"blocks.1.att.v{i}"]) for i in range(3)}
    model, _ = zoo.import_checkpoint(save(tensors | idle, tmp_path, "idle.pth"))
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
    zoo.export_checkpoint(model, tmp_path / "theirs", to="rwkv")
    assert torch.load(tmp_path / "theirs" / "model.pth").keys() == tensors.keys()


def test_the_vocabulary_beside_a_file(tmp_path):
    vocabulary = Path(find_spec("rwkv").origin).parent / "rwkv_vocab_v20230424.txt"
    file = save(authors_tensors(7), tmp_path)
    assert zoo.import_checkpoint(file)[1] is None
    (tmp_path / vocabulary.name).write_bytes(vocabulary.read_bytes())
    model, tokenizer = zoo.import_checkpoint(file)
    assert tokenizer.decode(tokenizer("Hello, 世界").input_ids) == "Hello, 世界"
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    zoo.export_checkpoint(model, tmp_path / "theirs", to="rwkv", tokenizer=tokenizer)
    assert (tmp_path / "theirs" / vocabulary.name).read_bytes() == vocabulary.read_bytes()
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("Hello").input_ids == tokenizer("Hello").input_ids


def test_commands(tmp_path, capsys):
    """A folder without a tokenizer is one that `zoo export` takes."""
    tensors = authors_tensors(6, dtype=torch.bfloat16)
    assert main(["import", str(save(tensors, tmp_path)), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "rwkv"]) == 0
    assert capsys.readouterr().out.endswith("rwkv loads it\n")
    written = torch.load(tmp_path / "theirs" / "model.pth")
    assert written.keys() == tensors.keys()
    assert all(x.dtype == tensors[name].dtype and torch.equal(x, tensors[name]) for name, x in written.items())


# -- what is refused ---------------------------------------------------------------------------------------------------


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if part not in name}


def in_every_layer(tensors: dict[str, Tensor], part: str, x: Tensor) -> dict[str, Tensor]:
    return tensors | {f"blocks.{i}.{part}": x.clone() for i in range(3)}


STATE = torch.randn(HEADS, HEAD, HEAD)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(authors_tensors(5), "gate"), r"version 5.0 \(no att.gate.weight\)"),
        (in_every_layer(authors_tensors(5), "att.time_decay", torch.ones(HEADS)), "version 5.1 .*one number a head"),
        (in_every_layer(authors_tensors(5), "att.time_decay", torch.ones(HEADS, 1, 1)), "version 5.1"),
        (in_every_layer(authors_tensors(7), "ffn.s_emb.weight", torch.ones(97, 1024)), "version 7a or 7b"),
        (in_every_layer(authors_tensors(6), "att.time_state", STATE), "tuned initial states"),
        (in_every_layer({}, "att.time_state", STATE), "tuned initial states"),
        (without(authors_tensors(4), "time_first"), "no version of RWKV that it knows"),
    ],
)
def test_variants_are_named(tensors, message, tmp_path):
    with pytest.raises(ValueError, match=f"tiny.pth: this variant is not in the zoo: {message}"):
        zoo.import_checkpoint(save(tensors, tmp_path))


@pytest.mark.parametrize("version", VERSIONS)
def test_missing_and_unexpected_tensors(version, tmp_path):
    tensors = authors_tensors(version)
    tensors["blocks.1.att.keys.weight"] = tensors.pop("blocks.1.att.key.weight")
    del tensors["emb.weight"]
    message = r"missing blocks.1.att.key.weight, emb.weight; unexpected blocks.1.att.keys.weight"
    with pytest.raises(ValueError, match=f"is not a whole checkpoint of BlinkDL's rwkv: {message}"):
        zoo.import_checkpoint(save(tensors, tmp_path))


@pytest.mark.parametrize("version", VERSIONS)
def test_wrong_shapes(version, tmp_path):
    """A tensor at a time, with one entry less, or a matrix with an axis more; the message names it, in one line."""
    tensors = authors_tensors(version, layers=2)
    decides = ("emb.weight", "r_k", "time_faaaa", "att.v1")  # sizes are read from these
    for name in [name for name in tensors if not name.startswith("blocks.0.") and not name.endswith(decides)]:
        x = tensors[name]
        for wrong in (x[..., :-1], *([x[:, None]] if x.dim() == 2 else [])):
            with pytest.raises(ValueError, match=name) as refusal:
                zoo.import_checkpoint(save(tensors | {name: wrong.clone()}, tmp_path))
            assert "\n" not in str(refusal.value)
    for name in ("emb.weight", "blocks.0.ffn.key.weight", f"blocks.0.att.{'r_k' if version == 7 else 'key.weight'}"):
        for shape in ((), (1,), (0, 0), (3, 2, 2)):
            with pytest.raises(ValueError, match=r"tiny\.pth"):
                zoo.import_checkpoint(save(tensors | {name: torch.ones(shape)}, tmp_path))


def test_what_the_package_has_no_room_for(tmp_path):
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "head_dim": HEAD}
    for changes, message in (
        ({"tie_word_embeddings": True}, "its head is not tied"),
        ({"norm_eps": 1e-3}, "it knows one norm_eps, 1e-05, not 0.001"),
        ({"mixers": ["rwkv6", "rwkv7"]}, "all its layers are of one version"),
    ):
        model = zoo.create_model("rwkv7-tiny", **sizes, **changes)
        with pytest.raises(ValueError, match=f"rwkv has no architecture for this model .*{message}"):
            zoo.export_checkpoint(model, tmp_path / "out", to="rwkv")
    with pytest.raises(ValueError, match=r"transformers has no architecture for this model .*all its layers"):
        zoo.export_checkpoint(model, tmp_path / "out")


# -- transformers ------------------------------------------------------------------------------------------------------


def transformers_folder(folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": D, "num_hidden_layers": 3, "intermediate_size": INNER}
    torch.manual_seed(0)
    oracle = RwkvForCausalLM(RwkvConfig(**sizes, **options))
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    oracle.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_folders_of_transformers(tied, dtype, tmp_path, assert_imports):
    options = {"tie_word_embeddings": tied, "layer_norm_epsilon": 1e-4, "eos_token_id": 3, "attention_hidden_size": D}
    folder = transformers_folder(tmp_path / "rwkv", dtype, **options)
    oracle = RwkvForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = assert_imports(folder, lambda tokens: oracle(tokens).logits, RwkvForCausalLM.from_pretrained)
    config = model.config
    assert (config.tie_word_embeddings, config.norm_eps, config.eos_token_id) == (tied, 1e-4, 3)


def test_rescaling_is_not_written(tmp_path):
    """It is exact but for the epsilon of the norms; what is written leaves its weights alone, also when it runs."""
    folder = transformers_folder(tmp_path / "rwkv", rescale_every=1)
    oracle = RwkvForCausalLM.from_pretrained(folder).eval()
    model, _ = zoo.import_checkpoint(folder)
    zoo.export_checkpoint(model, tmp_path / "theirs")
    written = RwkvForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    tokens = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, rescaled, unscaled = (m(tokens).logits for m in (model, oracle, written))
    assert (logits - unscaled).abs().max() <= 1e-5 * unscaled.abs().max()
    assert (logits - rescaled).abs().max() <= 1e-4 * rescaled.abs().max()
    stored = load_file(folder / "model.safetensors")
    name = "rwkv.blocks.2.attention.output.weight"
    assert torch.equal(written.state_dict()[name], stored[name])
    assert torch.equal(oracle.state_dict()[name], stored[name] / 4)


def test_a_wider_attention_is_not_in_the_zoo(tmp_path):
    folder = transformers_folder(tmp_path / "rwkv", attention_hidden_size=2 * D)
    with pytest.raises(ValueError, match="this variant is not in the zoo: attention_hidden_size is 128, it knows 64"):
        zoo.import_checkpoint(folder)


# -- flash-linear-attention --------------------------------------------------------------------------------------------

FLA_OUTSIDE = {
    "emb.weight": "model.embeddings.weight",
    "blocks.0.ln0.weight": "model.layers.0.pre_norm.weight",
    "blocks.0.ln0.bias": "model.layers.0.pre_norm.bias",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
FLA_PARTS = {
    "blocks": "model.layers",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "ln_x": "g_norm",
    "receptance": "r_proj",
    "output": "o_proj",
    "0": "2.bias",
    "1": "0.weight",
    "2": "2.weight",
}


def fla_tensor(name: str, x: Tensor) -> tuple[str, Tensor]:
    """A tensor of the authors' file of version 7 as flash-linear-attention keeps it."""
    if name in FLA_OUTSIDE:
        return FLA_OUTSIDE[name], x
    _, i, *parts = name.split(".")
    if parts[0] == "att":
        parts[0] = "attn"
        parts[1] = {"key": "k_proj", "value": "v_proj"}.get(parts[1], parts[1])
        if parts[1][0] in "wavg" and parts[1][1:] in ("0", "1", "2"):
            x = x.flatten() if parts[1][1] == "0" else x.T
            parts[1] = f"{parts[1][0]}_lora.lora.{FLA_PARTS[parts[1][1]]}"
    if parts[-1] in ("k_k", "k_a") or parts == ["ffn", "x_k"]:
        x = x.flatten()
    return ".".join(["model.layers", i, *(FLA_PARTS.get(part, part) for part in parts)]), x.contiguous()


FLA_CONFIG = {"model_type": "rwkv7", "norm_eps": 64e-5 / HEAD, "hidden_act": "sqrelu", "eos_token_id": 2}


def fla_folder(folder: Path, **changes) -> Path:
    folder.mkdir()
    tensors = dict(fla_tensor(name, x) for name, x in authors_tensors(7).items())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(FLA_CONFIG | changes))
    return folder


def test_folders_of_flash_linear_attention(tmp_path, assert_imports):
    """There, what is added in the norm of heads follows the other norms; so theirs is not 1e-5 in heads this small."""
    same, _ = zoo.import_checkpoint(save(authors_tensors(7), tmp_path))
    config = same.config.to_dict() | {"norm_eps": FLA_CONFIG["norm_eps"]}
    oracle = type(same)(type(same.config)(**config)).eval()
    oracle.load_state_dict(same.state_dict())
    model = assert_imports(fla_folder(tmp_path / "fla"), lambda tokens: oracle(tokens).logits, reload=None)
    assert model.config.eos_token_id == 2
    assert all(torch.equal(x, same.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 1e-5}, r"norm of heads adds head_dim \* norm_eps = 0.00016, it knows 0.00064"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', it knows 'sqrelu'"),
        ({"attn": {"layers": [1]}}, "attn is .*, it knows None"),
    ],
)
def test_options_of_flash_linear_attention(changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"this variant is not in the zoo: .*{message}"):
        zoo.import_checkpoint(fla_folder(tmp_path / "fla", **changes))

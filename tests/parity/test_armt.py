"""RMT and ARMT against their papers' algebra, written here, around the layers of transformers' Llama.

The authors' code is not on PyPI, so the algebra of this file is the oracle: one memory token at a time, in float64, on
`LlamaForCausalLM`, which knows nothing of segments.
"""

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from zoo.plugins.armt import ARMTForCausalLM
from zoo.plugins.armt.memory import AssociativeMemory, dpfp

import zoo

TOLERANCE = 1e-9  # float64, relative to the largest entry
EPSILON = 1e-5
LENGTH, MEMORY = 12, 3  # tokens of a segment, tokens of memory
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}

NAMES = {
    "mixer": "self_attn",
    "channel_mixer": "mlp",
    "mixer_norm": "input_layernorm",
    "channel_norm": "post_attention_layernorm",
}


def make(backbone: str = "transformer", options: dict | None = None, **overrides) -> ARMTForCausalLM:
    """A model in float64 whose weights are away from their initial values: the values' projection is zero there."""
    fields = {"segment_length": LENGTH, "num_memory_tokens": MEMORY, "d_mem": 4, "tie_word_embeddings": False}
    options = HEADS if options is None else options
    torch.manual_seed(0)
    model = zoo.create_model(
        "armt-tiny", **{**SIZES, **fields, "backbone": backbone, "backbone_options": options, **overrides}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.fixture(scope="module")
def llama_of(renamer):
    """Makes the Llama whose weights a model's backbone has, and gives the names of the parameters in it."""
    renamed = renamer(NAMES)

    def make_llama(model: ARMTForCausalLM) -> tuple[LlamaForCausalLM, dict[str, str]]:
        config = LlamaConfig(**SIZES, **HEADS, rms_norm_eps=model.config.norm_eps, tie_word_embeddings=False)
        llama = LlamaForCausalLM(config)
        for module in list(llama.modules()):  # their norms compute in float32 whatever they are given
            for name, norm in module.named_children():
                if isinstance(norm, LlamaRMSNorm):
                    setattr(module, name, nn.RMSNorm(config.hidden_size, norm.variance_epsilon))
        llama = llama.double().eval()
        names = {
            name: renamed(name.replace("backbone.", "").replace(".block.", "."))
            for name, _ in model.named_parameters()
            if ".memory." not in name and ".stack." not in name
        }
        weights = dict(model.named_parameters())
        llama.load_state_dict({theirs: weights[ours].detach() for ours, theirs in names.items()})
        return llama, names

    return make_llama


def tokens(t: int, b: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (b, t), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# -- the papers, in their words ----------------------------------------------------------------------------------------


def phi(x: Tensor, nu: int, normalize: bool) -> Tensor:
    """DPFP, entry by entry."""
    u = [*x.clamp(min=0).unbind(-1), *(-x).clamp(min=0).unbind(-1)]
    y = torch.stack([u[i] * u[i - j] for j in range(1, nu + 1) for i in range(len(u))], dim=-1)
    return y / y.norm(dim=-1, keepdim=True) if normalize else y


def armt(llama, model, ids: Tensor, lengths: list[int]) -> tuple[Tensor, list[dict[int, tuple[Tensor, Tensor]]]]:
    """Logits of segments of these lengths, and after each the memories (A, z) by layer, written behind every one."""
    config, b = model.config, ids.shape[0]
    memories = {i: module.memory for i, module in enumerate(model.model.backbone.layers) if hasattr(module, "memory")}
    k, d = 2 * config.dpfp_nu * config.d_mem, config.hidden_size
    state = {i: (torch.zeros(b, k, d).double(), torch.zeros(b, k).double()) for i in memories}
    logits, states = [], []

    def features(x: Tensor, projection) -> Tensor:
        return phi(x @ projection.weight.T, config.dpfp_nu, config.normalize_phi)

    def recall(x: Tensor, A: Tensor, z: Tensor) -> Tensor:  # noqa: N803
        weight = (x * z).sum(-1, keepdim=True) + EPSILON if config.use_denominator else 1
        return (x[:, None] @ A)[:, 0] / weight

    for number, segment in enumerate(ids.split(lengths, dim=1)):
        x = llama.model.embed_tokens(segment)
        x = torch.cat([x, model.model.stack.memory_tokens.expand(b, -1, -1)], dim=1)
        n = x.shape[1]
        rotary = llama.model.rotary_emb(x, torch.arange(n)[None])
        mask = torch.full((n, n), -torch.inf).double().triu(1)[None, None]
        for i, layer in enumerate(llama.model.layers):
            if number > 0 and i in memories:
                queries = features(x, memories[i].q_proj)
                x = x + torch.stack([recall(q, *state[i]) for q in queries.unbind(1)], dim=1)
            x = layer(x, attention_mask=mask, position_embeddings=rotary)
            if i not in memories:
                continue
            A, z = new_A, new_z = state[i]  # noqa: N806
            for m in x[:, -MEMORY:].unbind(1):
                key, value = features(m, memories[i].k_proj), m @ memories[i].v_proj.weight.T
                beta = torch.sigmoid(m @ memories[i].beta_proj.weight.T + memories[i].beta_proj.bias)
                old = recall(key, A, z) if number > 0 else 0
                gamma = 1 - (key * z).sum(-1, keepdim=True) / (key.pow(2).sum(-1, keepdim=True) + EPSILON)
                gamma = gamma.clamp(0, 1).detach() if number > 0 else 1
                new_A = new_A + (beta * key)[:, :, None] * (value - old)[:, None]  # noqa: N806
                new_z = new_z + gamma * key
            state[i] = new_A, new_z
        logits.append(llama.lm_head(llama.model.norm(x[:, :-MEMORY])))
        states.append(dict(state))
    return torch.cat(logits, dim=1), states


def rmt(llama, model, ids: Tensor, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and after each segment the memory that is passed on: Llama on [memory, segment, memory]."""
    memory = model.model.stack.memory_tokens.expand(ids.shape[0], -1, -1)
    logits, memories = [], []
    for segment in ids.split(lengths, dim=1):
        x = torch.cat([memory, llama.model.embed_tokens(segment), memory], dim=1)
        y = llama.model(inputs_embeds=x, use_cache=False).last_hidden_state
        memory = y[:, -MEMORY:]
        logits.append(llama.lm_head(y[:, MEMORY:-MEMORY]))
        memories.append(memory)
    return torch.cat(logits, dim=1), memories


VARIANTS = {
    "paper": {"normalize_phi": False},
    "normalized": {},
    "no_denominator": {"use_denominator": False},
    "some_layers": {"memory_layers": [2, 0], "dpfp_nu": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_armt(variant, llama_of):
    """Logits of three segments, and A and z of every layer after each of them."""
    model = make(**VARIANTS[variant])
    llama, _ = llama_of(model)
    ids = tokens(3 * LENGTH)
    expected, states = armt(llama, model, ids, [LENGTH] * 3)
    assert relative_error(model(ids).logits, expected) <= TOLERANCE
    names = list(model.model.stack.memory_shapes(model.config))
    for n, state in enumerate(states, start=1):
        found = model(ids[:, : n * LENGTH], use_cache=True).past_key_values.layers[0].states
        assert (found[0] == 0).all()
        found = dict(zip(names, found[1:], strict=False))
        for layer, (A, z) in state.items():  # noqa: N806
            assert relative_error(found[f"memory.{layer}.A"], A) <= TOLERANCE
            if model.config.use_denominator:
                assert relative_error(found[f"memory.{layer}.z"], z) <= TOLERANCE
    assert relative_error(expected[:, LENGTH:], llama(ids).logits[:, LENGTH:]) > 0.1  # the test is about something


@torch.no_grad()
def test_rmt(llama_of):
    model = make(memory="tokens")
    llama, _ = llama_of(model)
    ids = tokens(3 * LENGTH)
    expected, memories = rmt(llama, model, ids, [LENGTH] * 3)
    assert relative_error(model(ids).logits, expected) <= TOLERANCE
    for n, memory in enumerate(memories, start=1):
        found = model(ids[:, : n * LENGTH], use_cache=True).past_key_values.layers[0].states
        assert relative_error(found[1], memory) <= TOLERANCE


@pytest.mark.parametrize("memory", ["associative", "tokens"])
def test_gradients(memory, llama_of):
    """Of all weights, through three segments; gamma is a constant."""
    model = make(memory=memory, normalize_phi=False)
    llama, names = llama_of(model)
    ids = tokens(3 * LENGTH - 4)
    weight = torch.randn(2, 3 * LENGTH - 4, SIZES["vocab_size"], generator=torch.Generator().manual_seed(1)).double()
    lengths = [LENGTH, LENGTH, LENGTH - 4]
    (model(ids).logits * weight).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    oracle = armt if memory == "associative" else rmt
    (oracle(llama, model, ids, lengths)[0] * weight).sum().backward()
    theirs = dict(llama.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[names[name]].grad if name in names else parameter.grad
        assert relative_error(ours[name], expected) <= TOLERANCE, name


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_dpfp_by_hand():
    """x = (1, -2): u = (1, 0, 0, 2), which rolled by 1, 2, 3 is (2, 1, 0, 0), (0, 2, 1, 0), (0, 0, 2, 1)."""
    x = torch.tensor([1.0, -2.0])
    assert dpfp(x, 1).tolist() == [2, 0, 0, 0]
    assert dpfp(x, 3).tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def bare_memory(d_mem: int, **overrides) -> AssociativeMemory:
    """A memory whose inputs are a key (d_mem) and a value (d_mem) behind each other, and which writes them whole."""
    config = zoo.create_config("armt-tiny", hidden_size=2 * d_mem, d_mem=d_mem, **overrides)
    memory = AssociativeMemory(config, 0).double()
    one, zero = torch.eye(d_mem), torch.zeros(d_mem, d_mem)
    with torch.no_grad():
        memory.q_proj.weight.copy_(torch.cat([one, zero], dim=1))
        memory.k_proj.weight.copy_(torch.cat([one, zero], dim=1))
        memory.v_proj.weight.copy_(torch.cat([torch.cat([zero, zero], dim=1), torch.cat([zero, one], dim=1)]))
        memory.beta_proj.weight.zero_()
        memory.beta_proj.bias.fill_(50.0)
    return memory


def empty(memory: AssociativeMemory) -> tuple[Tensor, Tensor]:
    config = memory.config
    k = 2 * config.dpfp_nu * config.d_mem
    return torch.zeros(1, k, config.hidden_size).double(), torch.zeros(1, k).double()


@torch.no_grad()
def test_gamma():
    """1 for a key that is new, 0 for one that is known, and not below where its weight is more than its own already."""
    memory = bare_memory(4, normalize_phi=False)
    first = torch.tensor([[[1.0, 2.0, 0.0, 0.0, 3.0, 1.0, 4.0, 1.0]]]).double()
    second = torch.tensor([[[0.0, 0.0, -1.0, -3.0, 2.0, 7.0, 1.0, 8.0]]]).double()
    A, z = memory.write(first, empty(memory))  # noqa: N806
    key = dpfp(first[0, 0, :4], 3)
    assert torch.equal(z[0], key)
    assert torch.allclose(memory.write(first, (A, z))[1], z, rtol=1e-5)
    assert torch.equal(memory.write(first, (A, 2 * z))[1], 2 * z)
    both = memory.write(second, (A, z))
    assert torch.allclose(both[1][0], key + dpfp(second[0, 0, :4], 3), atol=1e-12)
    for x in (first, second):  # orthogonal keys find their values
        assert torch.allclose(memory.read(x, both)[0, 0, 4:], x[0, 0, 4:], rtol=1e-5)
    again = first.clone()
    again[..., 4:] = 5.0
    assert torch.allclose(memory.read(first, memory.write(again, both))[0, 0, 4:], again[0, 0, 4:], rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("normalize_phi", [False, True])
def test_gamma_keeps_the_memory_over_many_rewrites(normalize_phi):
    """16 keys whose values are written anew again and again: the newest are found as long as gamma is there.

    The mechanism of the paper's figure 4a, without training. Without gamma z grows with every write, and what is read
    or taken out fades.
    """
    d, steps, generator = 32, (8, 50, 200, 500), torch.Generator().manual_seed(0)
    memory = bare_memory(d, normalize_phi=normalize_phi)
    found = {True: dict.fromkeys(steps, 0.0), False: dict.fromkeys(steps, 0.0)}
    trials = 4
    for _ in range(trials):
        keys, values = (torch.randn(16, d, generator=generator).double() for _ in range(2))
        order, drawn = (torch.randint(0, 16, (max(steps),), generator=generator).tolist() for _ in range(2))
        for gamma in (True, False):
            A, z, newest = *empty(memory), {}  # noqa: N806
            for step, (key, value) in enumerate(zip(order, drawn, strict=True), start=1):
                x = torch.cat([keys[key], values[value]])[None, None]
                A, new_z = memory.write(x, (A, z))  # noqa: N806
                z = new_z if gamma else z + memory._phi(memory.k_proj(x), (A,))[:, 0]
                newest[key] = value
                if step in steps:
                    asked = torch.cat([keys[list(newest)], torch.zeros(len(newest), d)], dim=1)[None]
                    nearest = torch.cdist(memory.read(asked, (A, z))[0, :, d:], values).argmin(dim=1)
                    right = nearest == torch.tensor(list(newest.values()))
                    found[gamma][step] += right.double().mean().item() / trials
    assert min(found[True].values()) >= 0.85
    assert found[False][8] >= 0.85
    assert max(found[False][200], found[False][500]) <= 0.3


# -- options -----------------------------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("memory", ["associative", "tokens"])


def oracle(model, llama, ids: Tensor, lengths: list[int]) -> Tensor:
    return (armt if model.config.memory == "associative" else rmt)(llama, model, ids, lengths)[0]


def step_by_step(model, ids: Tensor, prompt: int) -> Tensor:
    """Logits of a prompt that is read at once and of what follows token by token."""
    cache = DynamicCache(config=model.config)
    pieces = ids.split([prompt, *[1] * (ids.shape[1] - prompt)], dim=1)
    return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)


@KINDS
@torch.no_grad()
def test_the_first_segment_may_be_the_shorter_one(memory, llama_of):
    model = make(memory=memory, alignment="right")
    llama, _ = llama_of(model)
    t = 2 * LENGTH + 5
    ids = tokens(t + LENGTH + 2)
    expected = oracle(model, llama, ids, [5, LENGTH, LENGTH, LENGTH, 2])
    assert relative_error(model(ids[:, :t]).logits, expected[:, :t]) <= TOLERANCE
    assert relative_error(step_by_step(model, ids, t), expected) <= TOLERANCE
    mask = torch.ones(2, t, dtype=torch.long)
    mask[0, :7] = 0  # of rows that are shorter too
    padded = model(ids[:, :t], attention_mask=mask).logits
    assert relative_error(padded[1], expected[1, :t]) <= TOLERANCE
    assert relative_error(padded[0, 7:], model(ids[:1, 7:t]).logits[0]) <= TOLERANCE
    with pytest.raises(ValueError, match="one document a row"):
        model(ids[:, :6], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


@KINDS
@pytest.mark.parametrize("prompt", [LENGTH + 5, 2 * LENGTH])
@torch.no_grad()
def test_memory_may_be_frozen_in_generation(memory, prompt, llama_of):
    """As the authors' `generate`: the last segment of a prompt is not written, and what is generated goes on in it."""
    options = {**HEADS, "max_position_embeddings": 3 * LENGTH}
    model = make(memory=memory, freeze_memory_in_generate=True, options=options)
    llama, _ = llama_of(model)
    ids = tokens(prompt + LENGTH)
    written = (prompt - 1) // LENGTH
    lengths = [*[LENGTH] * written, prompt + LENGTH - written * LENGTH]
    assert relative_error(step_by_step(model, ids, prompt), oracle(model, llama, ids, lengths)) <= TOLERANCE
    whole = [*[LENGTH] * ((prompt + LENGTH) // LENGTH), *[5] * (prompt % LENGTH > 0)]
    assert relative_error(model(ids).logits, oracle(model, llama, ids, whole)) <= TOLERANCE
    mask = torch.ones(2, prompt + LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
    padded = model(ids[:, prompt:], attention_mask=mask, past_key_values=cache).logits
    assert relative_error(padded[0], step_by_step(model, ids[:1, 3:], prompt - 3)[0, prompt - 3 :]) <= TOLERANCE
    with pytest.raises(ValueError, match=f"room for {3 * LENGTH}"):
        model(tokens(3 * LENGTH), past_key_values=cache)


@torch.no_grad()
def test_before_anything_was_learned_it_is_the_backbone():
    """With values of zero, as at the start of training, every segment is read as the backbone reads it alone."""
    torch.manual_seed(0)
    base = zoo.create_model("transformer-tiny", vocab_size=97).double().eval()
    model = ARMTForCausalLM.around(base, segment_length=LENGTH, num_memory_tokens=MEMORY).eval()
    assert model.dtype == torch.float64
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokens(3 * LENGTH)
    expected = torch.cat([base(segment).logits for segment in ids.split(LENGTH, dim=1)], dim=1)
    assert relative_error(model(ids).logits, expected) <= 1e-14


@torch.no_grad()
def test_memory_carries_over():
    """The last token of the first segment changes all that follows, and nothing before."""
    model, ids = make(), tokens(3 * LENGTH)
    changed = ids.clone()
    changed[:, LENGTH - 1] = changed[:, LENGTH - 1] % 90 + 1
    difference = (model(ids).logits - model(changed).logits).abs().amax(dim=(0, 2))
    assert (difference[: LENGTH - 1] == 0).all()
    assert (difference[LENGTH - 1 :] > 1e-6).all()


def test_initialisation():
    """As `nn.Linear`, but nothing is written at first; memory tokens look like tokens."""
    torch.manual_seed(0)
    model = zoo.create_model("armt-tiny", hidden_size=256, d_mem=64)
    memory = model.model.backbone.layers[0].memory
    for linear in (memory.q_proj, memory.k_proj, memory.beta_proj):
        assert abs(linear.weight.abs().max() - 256**-0.5) <= 0.05 * 256**-0.5
        assert abs(linear.weight.std() - (3 * 256) ** -0.5) <= 0.1 * 256**-0.5
    assert (memory.v_proj.weight == 0).all()
    assert abs(model.model.stack.memory_tokens.std() - 0.02) <= 0.002


# -- backbones ---------------------------------------------------------------------------------------------------------

BACKBONES = {
    "sliding": ("transformer", {**HEADS, "sliding_window": 5}, {"mixers": ["sliding_attention", "attention"]}),
    "moe": ("transformer", HEADS, {"channel_mixers": ["moe"]}),
    "mamba": ("mamba", {}, {}),
    "retnet": ("retnet", {"num_heads": 2}, {}),
    "rwkv": ("rwkv", {"head_dim": 16}, {}),
    "xlstm": ("xlstm", {"num_heads": 2}, {}),
}


@KINDS
@pytest.mark.parametrize("name", BACKBONES)
def test_around_any_backbone(name, memory):
    """Read whole, token by token, padded and packed: the same; checkpointing gives the same gradients."""
    backbone, options, overrides = BACKBONES[name]
    overrides = {"num_hidden_layers": 2, "intermediate_size": 32, **overrides}
    model = make(backbone, options, memory=memory, segment_length=8, **overrides)
    ids = tokens(30)
    with torch.no_grad():
        expected = model(ids).logits
        assert relative_error(step_by_step(model, ids, 3), expected) <= TOLERANCE
        mask = torch.ones(2, 34, dtype=torch.long)
        mask[0, :4] = mask[1, 20:24] = 0
        padded = torch.zeros(2, 34, dtype=torch.long).masked_scatter(mask.bool(), ids)
        logits = model(padded, attention_mask=mask).logits[mask.bool()].unflatten(0, (2, 30))
        assert relative_error(logits, expected) <= TOLERANCE
        documents = [3, 1, 19, 7]
        positions = torch.cat([torch.arange(n) for n in documents])[None].expand(2, -1)
        alone = torch.cat([model(document).logits for document in ids.split(documents, dim=1)], dim=1)
        assert relative_error(model(ids, position_ids=positions).logits, alone) <= TOLERANCE
    model.train()
    model(ids, labels=ids, attention_mask=mask[:, 4:]).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, labels=ids, attention_mask=mask[:, 4:]).loss.backward()
    for key, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[key]) <= TOLERANCE, key


def test_what_cannot_be():
    for fields, reason in (
        ({"backbone": "transfomer"}, "did you mean.*transformer"),
        ({"backbone_options": {"num_head": 4}}, "num_attention_heads"),
        ({"backbone_options": {"num_attention_heads": 4, "num_key_value_heads": 3}}, r"\(4\).*\(3\)"),
        ({"memory": "associativ"}, "associative"),
        ({"alignment": "center"}, "center"),
        ({"segment_length": 1}, "segment_length is 1"),
        ({"memory_layers": [7]}, "layer 7"),
        ({"memory_layers": []}, "each once"),
        ({"backbone": "armt", "backbone_options": {}}, "a memory of its own, and is no backbone"),
    ):
        with pytest.raises(ValueError, match=reason):
            zoo.create_config("armt-tiny", **fields)


def test_a_backbone_whose_logits_are_not_those_of_its_head_is_refused(monkeypatch):
    backbone = type(zoo.create_model("retnet-tiny"))
    monkeypatch.setattr(backbone, "compute_logits", lambda self, hidden_states: -self.lm_head(hidden_states))
    with pytest.raises(ValueError, match="RetNetForCausalLM computes logits in a way of its own"):
        zoo.create_config("armt-tiny", backbone="retnet", backbone_options={})


# -- RMT keeps what every model keeps ----------------------------------------------------------------------------------


@torch.no_grad()
def test_rmt_reads_a_stream_of_documents_in_windows():
    """Documents that start and end anywhere in the windows and in the segments."""
    model, lengths = make(memory="tokens"), [LENGTH + 3, 1, 3 * LENGTH, LENGTH, 2]
    row, positions = tokens(sum(lengths)), torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    cache = DynamicCache(config=model.config)
    windows = [LENGTH + 4, LENGTH, 1, sum(lengths) - 2 * LENGTH - 5]
    pieces = zip(row.split(windows, dim=1), positions.split(windows, dim=1), strict=True)
    logits = [model(x, position_ids=places, past_key_values=cache).logits for x, places in pieces]
    alone = [model(x, use_cache=True) for x in row.split(lengths, dim=1)]
    assert relative_error(torch.cat(logits, dim=1), torch.cat([out.logits for out in alone], dim=1)) <= TOLERANCE
    last = alone[-1].past_key_values.layers[0].states
    for state, expected in zip(cache.layers[0].states, last, strict=True):
        assert relative_error(state.double(), expected.double()) <= TOLERANCE


def test_rmt_generates_with_its_state(tmp_path):
    """Beams, rollback and files, across the borders of segments. ARMT is held to the whole contract by its preset."""
    model, prompt = make(memory="tokens", pad_token_id=0), tokens(LENGTH + 4)
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"cache_implementation": "static"}):
        ids = prompt[:1] if "prompt_lookup_num_tokens" in options else prompt
        settings = {"do_sample": False, "max_new_tokens": 2 * LENGTH}
        expected = model.generate(ids, use_cache=False, **settings, num_beams=options.get("num_beams", 1))
        assert torch.equal(model.generate(ids, **settings, **options), expected), options
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        size = sum(state.numel() * state.element_size() for state in cache.layers[0].states) / 2
        assert size == zoo.state_bytes(model.config, dtype=torch.float64)
        zoo.save_state(cache, tmp_path / "state.safetensors")
        rest = tokens(20, seed=1)
        loaded = model(rest, past_key_values=zoo.load_state(tmp_path / "state.safetensors", model)).logits
        assert torch.equal(loaded, model(rest, past_key_values=cache).logits)
        half = model.bfloat16()
        assert half(prompt, use_cache=True).past_key_values.layers[0].states[1].dtype == torch.bfloat16


@torch.no_grad()
def test_recorded_outputs():
    """Hidden states have the shape of the tokens; attention weights come segment by segment."""
    model, ids = make(attn_implementation="eager"), tokens(2 * LENGTH + 3)
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in out.hidden_states] == [(2, 2 * LENGTH + 3, 32)] * 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert [[tuple(x.shape) for x in layer] for layer in out.attentions] == [
        [(2, 4, LENGTH + MEMORY, LENGTH + MEMORY), (2, 4, LENGTH + MEMORY, LENGTH + MEMORY), (2, 4, 3, 3)]
    ] * 3
    padded = model(
        ids, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0), output_hidden_states=True
    )
    alone = model(ids[:, 1:], output_hidden_states=True)
    for actual, expected in zip(padded.hidden_states, alone.hidden_states, strict=True):
        assert relative_error(actual[:, 1:], expected) <= TOLERANCE

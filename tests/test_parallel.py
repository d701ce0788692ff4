"""Layers that two real processes share out: tensor parallelism gives the logits of one, FSDP2 the gradients."""

import os
import subprocess
import sys
from pathlib import Path

import torch

import zoo

_WORKER = """
import sys, time, torch, torch.distributed as dist, zoo
from transformers import AutoModelForCausalLM

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
for path in sys.argv[1:]:
    alone = AutoModelForCausalLM.from_pretrained(path).eval()
    together = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto").eval()
    sharded = sum(type(parameter).__name__ == "DTensor" for parameter in together.parameters())
    with torch.no_grad():
        expected, logits = alone(tokens).logits, together(tokens).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    error = (logits - expected).norm() / expected.norm()
    print(f"{dist.get_rank()} {sharded} {error:.1e}\\n", end="", flush=True)
dist.destroy_process_group()
time.sleep(0.2)  # as `zoo.processes` has it: gloo's threads free what was exchanged last
"""


_SHARDED_WORKER = """
import sys, time, torch, torch.distributed as dist, zoo
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
tokens = torch.randint(0, 96, (4, 40), generator=torch.Generator().manual_seed(0))
documents = ([3] * 13 + [1], [40], [19, 2, 19], [12, 28])  # the processes fill other segments, in other runs
packed = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])

def accumulate(model, rows, positions):
    for row in rows:
        model(tokens[row], position_ids=positions[row], labels=tokens[row], num_items_in_batch=100).loss.backward()

for path in sys.argv[1:]:
    alone, sharded = (AutoModelForCausalLM.from_pretrained(path).train() for _ in range(2))
    sharded.gradient_checkpointing_enable()
    shares = alone.model.stack.documents_share_runs
    positions = packed if shares else torch.arange(40).expand(4, -1)
    units = [module for module in sharded.modules() if type(module).__name__ in sharded._no_split_modules]
    for module in [*reversed(units), sharded]:
        fully_shard(module)
    sharded.set_reduce_scatter_unused_params(True)
    accumulate(alone, torch.arange(4).split(1), positions)
    accumulate(sharded, (2 * dist.get_rank() + torch.arange(2)).split(1), positions)
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    for name, parameter in alone.named_parameters():
        summed = 2 * gradients[name].full_tensor()  # FSDP2 averages
        error = (summed - parameter.grad).norm() / parameter.grad.norm()
        print(f"{path} {name} {error:.1e}\\n", end="", flush=True)
dist.destroy_process_group()
time.sleep(0.2)  # as `zoo.processes` has it: gloo's threads free what was exchanged last
"""


def test_tensor_parallel_plans(tmp_path):
    names = [name for name in zoo.list_models("*-tiny") if zoo.create_config(name).base_model_tp_plan]
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    paths = [tmp_path / name for name in names]
    for name, path in zip(names, paths, strict=True):
        zoo.create_model(name, vocab_size=96).save_pretrained(path)
    rows = run_two(worker, paths)
    assert len(rows) == 2 * len(names)
    for _, sharded, error in rows:
        assert int(sharded) > 0
        assert float(error) <= 1e-4


def test_segments_of_sharded_layers(tmp_path):
    """Layers that run several times in a forward pass, with rows that need other runs in each process."""
    worker = tmp_path / "worker.py"
    worker.write_text(_SHARDED_WORKER)
    models = {"armt": ("armt-tiny", {}), "rmt": ("armt-tiny", {"memory": "tokens"}), "lm2": ("lm2-tiny", {})}
    for name, (preset, changes) in models.items():
        model = zoo.create_model(preset, vocab_size=96, num_hidden_layers=2, **changes)
        for parameter in model.parameters():  # values are zero at first, and what reads them has no gradient
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
    rows = run_two(worker, [tmp_path / name for name in models])
    assert {Path(path).name for path, _, _ in rows} == models.keys()
    for path, name, error in rows:
        assert float(error) <= 1e-4, (path, name)


def run_two(worker: Path, paths: list[Path]) -> list[list[str]]:
    """The words of each line that two processes print."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split() for line in done.stdout.splitlines()]

"""Tensor parallelism: the plans of every model, on two real processes, give the logits of one."""

import os
import subprocess
import sys

import zoo

_WORKER = """
import sys, torch, torch.distributed as dist, zoo
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
"""


def test_tensor_parallel_plans(tmp_path):
    names = [name for name in zoo.list_models("*-tiny") if zoo.create_config(name).base_model_tp_plan]
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    paths = [tmp_path / name for name in names]
    for name, path in zip(names, paths, strict=True):
        zoo.create_model(name, vocab_size=96).save_pretrained(path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 2 * len(names)
    for _, sharded, error in rows:
        assert int(sharded) > 0
        assert float(error) <= 1e-4

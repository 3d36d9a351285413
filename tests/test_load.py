"""
What a sharded load holds in memory: two processes together little more than the model once. A model of 0.54 GB on the
disk, for a moment.

    python -m pytest tests/test_load.py
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib.tensors import to_hf
from lib.weights import ModelArgs
from model import LLaMA

ROOT = Path(__file__).parent.parent
SIZE = dict(dim=1024, n_layers=10, n_heads=8, n_kv_heads=8, hidden_dim=2816, vocab_size=4000, head_dim=128)
LOAD = """
import sys, time, torch
import train
from lib.configurator import configure
from lib.program import join
from lib.weights import open_llm
from scripts.memory import held, watch

cfg = configure(train.__file__, [f"llm={sys.argv[1]}", "stage=sft"], stages=("align", "sft"))
device = torch.device("cpu")
join(device)
raw = open_llm(cfg.llm)
model = train.build(cfg, raw.args, 64, device, torch.float32)  # on the meta device: what is held now is the program
program, peak = held(), watch()
model.load(raw, device, 0)
assert not any(p.is_meta for p in model.parameters())
time.sleep(0.05)
frozen = [p for k, p in model.named_parameters() if k.startswith("llm.") and "lora_" not in k]
print("HELD", peak[0] - program, sum(p.to_local().double().sum().item() for p in frozen), flush=True)
"""


def write(folder, layout):
    """A model of 0.54 GB in fp32, its layers all alike to be quick -> (bytes, sum of all its numbers)."""
    with torch.device("meta"):
        shapes = {k: p.shape for k, p in LLaMA(ModelArgs(**SIZE)).named_parameters()}
    kinds = {s: torch.randn(s) for s in set(shapes.values())}
    if layout in ("safetensors", "bin"):
        c = dict(model_type="llama", hidden_size=1024, num_hidden_layers=10, num_attention_heads=8,
                 intermediate_size=2816, vocab_size=4000, rms_norm_eps=1e-5)
        (folder / "config.json").write_text(json.dumps(c))
        names = sorted(shapes)
        for i in range(3):
            part = {to_hf(n): kinds[shapes[n]].clone() for n in names[i::3]}
            (save_file if layout == "safetensors" else torch.save)(part, folder / f"{i}.{layout}")
        weight_map = {to_hf(n): f"{i % 3}.{layout}" for i, n in enumerate(names)}
        index = "model.safetensors.index.json" if layout == "safetensors" else "pytorch_model.bin.index.json"
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    else:
        params = dict(dim=1024, n_layers=10, n_heads=8, norm_eps=1e-5, vocab_size=-1)
        (folder / "params.json").write_text(json.dumps(params))
        axis = lambda n: 1 if n.split(".")[-2] in ("wo", "w2", "tok_embeddings") else 0
        for i in range(2):
            cut = lambda n, w: w if w.dim() == 1 else w.chunk(2, axis(n))[i]
            torch.save({n: cut(n, kinds[s]).clone() for n, s in shapes.items()}, folder / f"consolidated.{i:02d}.pth")
    total = sum(kinds[s].double().sum().item() for s in shapes.values())
    return 4 * sum(s.numel() for s in shapes.values()), total


@pytest.mark.parametrize("layout", ["safetensors", "bin", "meta"])
@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="what a process holds is read from Linux's /proc")
def test_two_processes_hold_little_more_than_the_model(tmp_path, layout):
    if shutil.disk_usage(tmp_path).free < 1.5e9:
        pytest.skip("needs 1.5 GB of disk")
    size, total = write(tmp_path, layout)
    (tmp_path / "load.py").write_text(LOAD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               tmp_path / "load.py", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    held = [line.split()[1:] for line in out.stdout.splitlines() if line.startswith("HELD")]
    together = sum(int(h[0]) for h in held)
    print(f"{layout}: {size / 1e9:.2f} GB, two processes together {together / 1e9:.2f} GB, {together / size:.2f} x")
    assert len(held) == 2 and 0.5e9 < size < 0.6e9
    assert size < together < 1.2 * size
    assert abs(sum(float(h[1]) for h in held) - total) < 1e-6 * abs(total)  # and every number has arrived, once
    assert "loading" in out.stderr and "GB/s" in out.stderr

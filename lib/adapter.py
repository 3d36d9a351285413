"""
LoRA on the disk, in PEFT's file format (adapter_model.safetensors + adapter_config.json), which the ecosystem reads.
What the numbers mean stands in lora.py.
"""
import json
import os
import re

from safetensors.torch import save_file

from lib.files import load_json
from lib.program import BadInput
from lib.tensors import from_hf, load_tensors, to_hf

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # the linear layers that can have one
OURS = re.compile(rf"layers\.\d+\.(?:attention|feed_forward)\.(?:{'|'.join(TARGETS)})\.(lora_[AB])")
# what PEFT may set without changing what is computed here; any other option that is set is refused by name
HARMLESS = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "base_model_name_or_path",
            "inference_mode", "revision", "auto_mapping", "peft_version", "runtime_config", "ensure_weight_tying",
            "megatron_core", "qalora_group_size"}
INITS = (True, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the frozen weights as they are
UNSET = (None, False, 0, "none", "default", [], {})


def targets_of(names):
    """Which of the seven layers these names are of."""
    return [t for t in TARGETS if any(f".{t}." in name for name in names)]


def write_adapter(folder, tensors, rank, alpha, dropout=0.0, base=""):
    """Write a LoRA as PEFT does. tensors: our names (layers.0.attention.wq.lora_A) -> whole tensors; base: the LLM."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "lora_dropout": dropout,
              "target_modules": [to_hf(t) for t in targets_of(tensors)], "bias": "none", "fan_in_fan_out": False,
              "inference_mode": True, "base_model_name_or_path": base}
    theirs = {f"base_model.model.{to_hf(name)}.weight": t.detach().cpu().contiguous() for name, t in tensors.items()}
    os.makedirs(folder, exist_ok=True)
    save_file(theirs, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})
    with open(f"{folder}/adapter_config.json", "w") as f:
        json.dump(config, f, indent=2)


def read_adapter(folder):
    """
    A folder in PEFT's format -> (rank, alpha, targets, dropout, {name in our LLaMA: tensor}).
    BadInput names an option that we lack.
    """
    where = f"{folder}/adapter_config.json"
    c = load_json(where)
    rank, alpha, dropout = c.get("r"), c.get("lora_alpha"), c.get("lora_dropout") or 0.0
    if type(rank) is not int or type(alpha) not in (int, float) or type(dropout) not in (int, float):
        raise BadInput(f"{where}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r} must be numbers")
    if c.get("peft_type") != "LORA":
        raise BadInput(f"{where}: peft_type={c.get('peft_type')!r} is not LORA")
    for key, value in c.items():
        if key not in HARMLESS and value not in UNSET and not (key == "init_lora_weights" and value in INITS):
            raise BadInput(f"{where}: {key}={repr(value)[:100]} is not implemented")
    files = [f"{folder}/adapter_model.safetensors", f"{folder}/adapter_model.bin"]  # .bin: as PEFT saved before 0.6
    path = next(filter(os.path.exists, files), files[0])
    state = {}
    for name, tensor in load_tensors(path).items():
        ours = from_hf(name.removeprefix("base_model.model.").removesuffix(".weight"))
        m = OURS.fullmatch(ours)
        if not m or not name.startswith("base_model.model.model."):
            raise BadInput(f"{path}: {name} is not a LoRA weight of one of LLaMA's seven linear layers")
        if tensor.dim() != 2 or tensor.shape[m[1] == "lora_B"] != rank:
            raise BadInput(f"{path}: {name} is {tuple(tensor.shape)}, r in adapter_config.json is {rank}")
        state[ours] = tensor
    return rank, alpha, targets_of(state), dropout, state

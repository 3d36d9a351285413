"""
Low-rank adaptation (Hu et al. 2022, https://arxiv.org/abs/2106.09685; the paper's eq. 4): W' = W + (alpha/rank) B A beside frozen weights,
kept on disk in PEFT's file format (adapter_model.safetensors + adapter_config.json), which the ecosystem reads.

    python lora.py merge ckpt=out/toy/sft to=merged        # the LLM with LoRA merged in, as a Hugging Face folder
"""
import json
import os
import re
import shutil
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

from config import BadInput, configure, launch, usage_error
from weights import check_names, load_json, load_tensors, to_hf

ckpt = "out/toy/sft"  # run or checkpoint folder of the sft stage
to = "merged"  # folder to write; it must not exist
llm = ""  # folder of the LLM's raw weights, if it has moved; "" = the run's

TARGETS = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
           "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}  # our names -> PEFT's
# what PEFT may set without changing what is computed here; any other option that is set is refused by name
HARMLESS = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "base_model_name_or_path", "inference_mode",
            "revision", "auto_mapping", "peft_version", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"}
INITS = (True, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave the frozen weights as they are; pissa and others change them
UNSET = (None, False, 0, "none", "default", [], {})


class LoRALinear(nn.Linear):
    """A linear layer with its low-rank update beside it. It is still called `wq` and its weight `wq.weight`: raw weights load as before."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        on = dict(device=base.weight.device, dtype=torch.float32)  # what learns is fp32, whatever the frozen weights are
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **on))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **on))  # zero: the layer starts as it was
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)  # as PEFT
        self.alpha, self.scaling, self.dropout = alpha, alpha / rank, nn.Dropout(dropout)
        self.train(base.training)  # a new module is in training mode, and would drop out inside a model that is not

    def forward(self, x):
        down = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * self.scaling  # (..., in) -> (..., rank)
        return F.linear(x, self.weight, self.bias).add_(F.linear(down, self.lora_B.to(x.dtype)))  # in place: nobody else needs the frozen part


def layers(llama, kind=LoRALinear):
    """(layer index, target, the module that holds it, the linear layer) for every layer of that kind among the seven targets."""
    return [(i, t, part, getattr(part, t)) for i, block in enumerate(llama.layers) for part in (block.attention, block.feed_forward)
            for t in TARGETS if isinstance(getattr(part, t, None), kind)]


def apply_lora(llama, rank, alpha, targets, dropout=0.0):
    """Put a LoRALinear in the place of every linear layer named in targets (a list of wq wk wv wo w1 w2 w3). Returns llama."""
    if unknown := [t for t in targets if t not in TARGETS]:
        raise BadInput(f"lora_targets: {unknown[0]!r} is none of {' '.join(TARGETS)}")
    if not targets or rank < 1:
        raise BadInput(f"lora_rank={rank}, lora_targets={','.join(targets)!r}: there is nothing to adapt")
    if layers(llama):
        raise BadInput("the LLM has LoRA layers already; merge them first")
    for _, t, part, linear in layers(llama, nn.Linear):
        if t in targets:
            setattr(part, t, LoRALinear(linear, rank, alpha, dropout))
    return llama


@torch.no_grad()
def merge_lora(llama):
    """W' = W + (alpha/rank) B A, in place: computed in fp32 and rounded once to the weight's own type. Returns llama."""
    for _, t, part, lora in layers(llama):
        w = lora.weight.float() + lora.scaling * (lora.lora_B @ lora.lora_A)
        linear = nn.Linear(lora.in_features, lora.out_features, lora.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(w.to(lora.weight.dtype), requires_grad=False), lora.bias
        setattr(part, t, linear)
    return llama


def peft_name(i, target, matrix):
    return f"base_model.model.model.layers.{i}.{TARGETS[target]}.{matrix}.weight"


def adapter(llama, base=""):
    """(tensors, configuration) as PEFT writes them. The tensors may be sharded: see model.full."""
    found = layers(llama)
    if not found:
        raise BadInput("the LLM has no LoRA layers")
    tensors = {peft_name(i, t, m): getattr(lora, m) for i, t, _, lora in found for m in ("lora_A", "lora_B")}
    lora = found[0][3]
    targets = [t for t in TARGETS if t in {f[1] for f in found}]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.lora_A.shape[0], "lora_alpha": lora.alpha, "lora_dropout": lora.dropout.p,
              "target_modules": [TARGETS[t].split(".")[1] for t in targets], "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "base_model_name_or_path": base}
    return tensors, config


def save_lora(llama, folder, base=""):
    """Write the LoRA of a LLaMA as PEFT does; PeftModel.from_pretrained loads it onto the Hugging Face model of the same weights."""
    tensors, config = adapter(llama, base)
    write_adapter({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, config, folder)


def write_adapter(tensors, config, folder):
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f, indent=2)


def read_adapter(folder):
    """A folder in PEFT's format -> (rank, alpha, targets, dropout, {name in our LLaMA: tensor}). BadInput names an option that we lack."""
    where = os.path.join(folder, "adapter_config.json")
    c = load_json(where)
    for key in ("peft_type", "r", "lora_alpha"):
        if key not in c:
            raise BadInput(f"{where}: has no {key}")
    if type(c["r"]) is not int or type(c["lora_alpha"]) not in (int, float) or type(c.get("lora_dropout") or 0.0) not in (int, float):
        raise BadInput(f"{where}: r, lora_alpha and lora_dropout must be numbers")
    if c["peft_type"] != "LORA":
        raise BadInput(f"{where}: peft_type={c['peft_type']!r} is not LORA")
    for key, value in c.items():
        if key not in HARMLESS and value not in UNSET and not (key == "init_lora_weights" and value in INITS):
            raise BadInput(f"{where}: {key}={repr(value)[:100]} is not implemented")
    path = os.path.join(folder, "adapter_model.safetensors")
    if not os.path.exists(path) and os.path.exists(os.path.join(folder, "adapter_model.bin")):
        path = os.path.join(folder, "adapter_model.bin")  # as PEFT saved before 0.6
    ours, state, per_layer = {v: k for k, v in TARGETS.items()}, {}, {}
    for name, tensor in load_tensors(path).items():
        m = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.(lora_[AB])\.weight", name)
        if not m or m[2] not in ours:
            raise BadInput(f"{path}: {name} is not a LoRA weight of one of LLaMA's seven linear layers")
        part = m[2].split(".")[0].replace("self_attn", "attention").replace("mlp", "feed_forward")
        state[f"layers.{m[1]}.{part}.{ours[m[2]]}.{m[3]}"] = tensor
        per_layer.setdefault(ours[m[2]], set()).add(int(m[1]))
        if tensor.dim() != 2 or tensor.shape[m[3] == "lora_B"] != c["r"]:
            raise BadInput(f"{path}: {name} is {tuple(tensor.shape)}, r in adapter_config.json is {c['r']}")
    return c["r"], c["lora_alpha"], [t for t in TARGETS if t in per_layer], c.get("lora_dropout") or 0.0, state


@torch.no_grad()
def load_lora(llama, folder):
    """Apply to a plain LLaMA the LoRA that a folder holds (ours or PEFT's); rank, alpha and targets come from its files. Returns llama."""
    rank, alpha, targets, dropout, state = read_adapter(folder)
    apply_lora(llama, rank, alpha, targets, dropout)
    own = {k: p for k, p in llama.named_parameters() if "lora_" in k}
    check_names(folder, {k: p.shape for k, p in own.items()}, {k: v.shape for k, v in state.items()})
    for name, p in own.items():
        p.copy_(state[name])
    return llama


def export_hf(llama, folder, source, shard_bytes=5 * 10**9):
    """Write a LLaMA as a Hugging Face folder: config.json, safetensors shards with their index, and the tokenizer files of `source`."""
    if layers(llama):
        raise BadInput("the LLM's LoRA is not merged: a Hugging Face folder has no place for it")
    if not os.path.isdir(source):
        raise BadInput(f"{source}: is no folder, there is no tokenizer to copy from it")
    a = llama.args
    dtype = str(llama.tok_embeddings.weight.dtype).removeprefix("torch.")
    if os.path.exists(os.path.join(source, "config.json")):
        c = {**load_json(os.path.join(source, "config.json")), "torch_dtype": dtype, "dtype": dtype}  # older and newer transformers' name
    else:
        from data import Tokenizer
        tokenizer = Tokenizer(source)
        kind = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[a.model_type]
        c = {"architectures": [kind + "ForCausalLM"], "model_type": a.model_type, "hidden_size": a.dim, "num_hidden_layers": a.n_layers,
             "num_attention_heads": a.n_heads, "num_key_value_heads": a.n_kv_heads, "head_dim": a.head_dim, "intermediate_size": a.hidden_dim,
             "vocab_size": a.vocab_size, "rms_norm_eps": a.norm_eps, "rope_theta": a.rope_theta, "hidden_act": "silu",
             "max_position_embeddings": 4096, "tie_word_embeddings": a.tied, "sliding_window": a.sliding_window,
             "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None, "eos_token_id": tokenizer.eos_id, "torch_dtype": dtype}
    part = folder.rstrip("/") + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    shards, size = [{}], 0
    for name, p in llama.named_parameters():
        if size + p.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        size += p.nbytes
        shards[-1][to_hf(name)] = p.detach().contiguous()
    files = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for f, shard in zip(files, shards):
        save_file(shard, os.path.join(part, f), metadata={"format": "pt"})
    total = sum(p.nbytes for p in llama.parameters())
    index = {"metadata": {"total_size": total}, "weight_map": {k: f for f, shard in zip(files, shards) for k in shard}}
    for f, value in [("config.json", c)] + [("model.safetensors.index.json", index)] * (len(shards) > 1):
        with open(os.path.join(part, f), "w") as out:
            json.dump(value, out, indent=2)
    for f in sorted(os.listdir(source)):
        if f.startswith(("tokenizer", "special_tokens", "generation_config", "vocab", "merges", "chat_template")):
            shutil.copy(os.path.join(source, f), part)
    os.rename(part, folder)  # a reader never sees half a model


def main():
    from eval import load_model
    words = [a for a in sys.argv[1:] if a != "merge"]
    cfg = configure(__file__, words)
    if len(words) == len(sys.argv) - 1:
        usage_error(__file__, "say what to do: python lora.py merge ckpt=RUN to=FOLDER")
    if os.path.exists(cfg.to):
        raise BadInput(f"to={cfg.to}: exists already")
    sllama, tokenizer, trained = load_model(cfg.ckpt, device="cpu", dtype="stored", llm=cfg.llm)
    if not layers(sllama.llm):
        raise BadInput(f"ckpt={cfg.ckpt}: has no LoRA (stage={trained.stage}), there is nothing to merge")
    export_hf(merge_lora(sllama.llm), cfg.to, trained.llm)
    print(f"{cfg.to}: {trained.llm} with the LoRA of {cfg.ckpt} merged in")


if __name__ == "__main__":
    from lora import main  # the same classes as everybody else's, not copies of them in __main__
    launch(main)

"""
Low-rank adaptation (Hu et al. 2022, https://arxiv.org/abs/2106.09685; the paper's eq. 4):
W' = W + (alpha/rank) B A beside frozen weights. On disk it lies in PEFT's file format, see lib/adapter.py.

    python lora.py merge ckpt=out/toy/sft to=merged        # the LLM with LoRA merged in, as a Hugging Face folder
"""
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.adapter import TARGETS, read_adapter, write_adapter
from lib.checkpoint import find_checkpoint, read_checkpoint
from lib.configurator import configure, usage_error
from lib.linear import Linear
from lib.program import BadInput, launch
from lib.tensors import check_names, shapes_of
from lib.weights import open_llm, write_hf

ckpt = "out/toy/sft"  # run or checkpoint folder of the sft stage
to = "merged"  # folder to write; it must not exist
llm = ""  # folder of the LLM's raw weights, if it has moved; "" = the run's


class LoRALinear(Linear):
    """
    A linear layer with its low-rank update beside it.
    It is still called `wq` and its weight `wq.weight`: raw weights load as before.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, base.bias is not None, base.bits)
        for name, p in base.named_parameters():
            setattr(self, name, p)
        on = dict(device=base.weight.device, dtype=torch.float32)  # what learns is fp32, whatever is frozen
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **on))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **on))  # zero: the layer starts as it was
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)  # as PEFT
        self.alpha, self.scaling, self.dropout = alpha, alpha / rank, nn.Dropout(dropout)
        self.train(base.training)  # a new module is in training mode, and would drop out inside a model that is not

    def forward(self, x):
        flat = x.flatten(0, -2)  # (..., in) -> (N, in)
        down = F.linear(self.dropout(flat), self.lora_A.to(x.dtype))  # (N, rank)
        y = super().forward(flat)  # (N, out); what follows adds to it in place, since nobody else needs it
        return y.addmm_(down, self.lora_B.to(x.dtype).T, alpha=self.scaling).unflatten(0, x.shape[:-1])


def layers(llama, kind=LoRALinear, targets=TARGETS):
    """name -> layer, for every layer of that kind among the targets."""
    return {name: layer for name, layer in llama.named_modules()
            if isinstance(layer, kind) and name.endswith(tuple(targets))}


def apply_lora(llama, rank, alpha, targets, dropout=0.0):
    """Put a LoRALinear in the place of every linear layer in targets (a list of wq wk wv wo w1 w2 w3). -> llama"""
    if unknown := [t for t in targets if t not in TARGETS]:
        raise BadInput(f"lora_targets: {unknown[0]!r} is none of {' '.join(TARGETS)}")
    if not targets or rank < 1:
        raise BadInput(f"lora_rank={rank}, lora_targets={','.join(targets)!r}: there is nothing to adapt")
    if layers(llama):
        raise BadInput("the LLM has LoRA layers already; merge them first")
    for name, linear in layers(llama, Linear, targets).items():
        llama.set_submodule(name, LoRALinear(linear, rank, alpha, dropout))
    return llama


def unfreeze(llama):
    """Instead of LoRA its linear layers learn themselves. Norms stay, in the dtype of the arithmetic. -> llama"""
    if llama.bits < 16:
        raise BadInput(f"lora_rank=0: an LLM in {llama.bits} bits cannot learn itself, LoRA beside it can")
    for linear in layers(llama, Linear, (*TARGETS, "output")).values():
        linear.weight.requires_grad_(True)
    return llama


def merged(weight, A, B, scaling):
    """W' = W + (alpha/rank) B A, computed in fp32 and rounded once to the weight's own type."""
    return (weight.float() + scaling * (B.float() @ A.float())).to(weight.dtype)


@torch.no_grad()
def merge_lora(llama):
    """Merge every LoRALinear into a plain linear layer, in place. -> llama"""
    for name, lora in layers(llama).items():
        if lora.bits < 16:
            raise BadInput(f"llm_bits={lora.bits}: LoRA is merged into 16 bits, by `python lora.py merge`")
        with torch.device("meta"):
            linear = Linear(lora.in_features, lora.out_features, lora.bias is not None)
        weight = merged(lora.weight, lora.lora_A, lora.lora_B, lora.scaling)
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), lora.bias
        llama.set_submodule(name, linear)
    return llama


def save_lora(llama, folder, base=""):
    """Write the LoRA of a LLaMA as PEFT does: PeftModel.from_pretrained loads it onto the Hugging Face model."""
    found = layers(llama)
    if not found:
        raise BadInput("the LLM has no LoRA layers")
    first = next(iter(found.values()))
    tensors = {name: p for name, p in llama.named_parameters() if "lora_" in name}
    write_adapter(folder, tensors, len(first.lora_A), first.alpha, first.dropout.p, base)


@torch.no_grad()
def load_lora(llama, folder):
    """Apply to a plain LLaMA the LoRA that a folder holds (ours or PEFT's), rank, alpha and targets too. -> llama"""
    rank, alpha, targets, dropout, state = read_adapter(folder)
    apply_lora(llama, rank, alpha, targets, dropout)
    own = {name: p for name, p in llama.named_parameters() if "lora_" in name}
    check_names(folder, shapes_of(own), shapes_of(state))
    for name, p in own.items():
        p.copy_(state[name])
    return llama


def main():
    cfg = configure(__file__, [a for a in sys.argv[1:] if a != "merge"])
    if "merge" not in sys.argv:
        usage_error(__file__, "say what to do: python lora.py merge ckpt=RUN to=FOLDER")
    checkpoint = read_checkpoint(find_checkpoint(cfg.ckpt))
    trained = checkpoint.config
    source = cfg.llm or trained["llm"]
    raw, (rank, alpha, targets, *_) = open_llm(source), checkpoint.lora or (0, 0, ())
    learnt = {name.removeprefix("llm."): t for name, t in checkpoint.tensors.items() if name.startswith("llm.")}
    if not learnt:
        raise BadInput(f"ckpt={cfg.ckpt}: nothing of its LLM has learnt, stage={trained['stage']}")
    dtype = raw.read("tok_embeddings.weight").dtype
    # what has learnt must find its place in these weights, or it would be lost without a word
    places = {name: shape for name, shape in raw.shapes.items() if name in learnt}
    for name, shape in raw.shapes.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(tuple(targets)):
            places |= {f"{layer}.lora_A": (rank, shape[1]), f"{layer}.lora_B": (shape[0], rank)}
    check_names(checkpoint.folder, places, shapes_of(learnt))

    def tensors():  # one by one, so that the LLM never lies in memory whole
        for name, weight in raw.tensors():
            weight = learnt.get(name, weight).to(weight.dtype)  # what has learnt without LoRA
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A" in learnt:
                weight = merged(weight, learnt[f"{layer}.lora_A"], learnt[f"{layer}.lora_B"], alpha / rank)
            yield name, weight

    write_hf(cfg.to, raw.args, tensors(), source, dtype, ids=(trained["bos_id"], trained["eos_id"]))
    print(f"{cfg.to}: {source}, as it lies there in 16 bits, with what {cfg.ckpt} has learnt merged in")


if __name__ == "__main__":
    launch(main)

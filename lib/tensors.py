"""
Tensors by name, Meta's and Hugging Face's: read from anybody's file, drawn from a seed, in and out of shards.
"""
import math
import zipfile
import zlib

import numpy as np
import torch
from safetensors import safe_open

from lib.files import kind_of
from lib.program import BadInput

# Hugging Face's word -> Meta's
HF_NAMES = {"embed_tokens": "tok_embeddings", "lm_head": "output",
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
            "self_attn": "attention", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
            "mlp": "feed_forward", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
META_NAMES = {meta: hf for hf, meta in HF_NAMES.items()}


def from_hf(name):
    """Hugging Face's name of a weight -> Meta's, model.layers.0.mlp.up_proj -> layers.0.feed_forward.w3"""
    return ".".join(HF_NAMES.get(word, word) for word in name.removeprefix("model.").split("."))


def to_hf(name):
    """Meta's name of a weight -> Hugging Face's, the inverse of from_hf."""
    words = ".".join(META_NAMES.get(word, word) for word in name.split("."))
    return "model." + words if name.startswith(("layers.", "tok_embeddings.", "norm.")) else words


def halves(w, head_dim):
    """Rows of wq or wk from Meta's interleaved pairs to the rotate-half layout of Hugging Face's files."""
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(w.shape)


def pairs(w, head_dim):
    """The inverse of halves."""
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(w.shape)


# how a file begins that is not what its name says -> what it is, and what to do
INSTEAD = {b"version https://git-lfs": "it is a git-lfs pointer, not the file: git lfs pull brings it",
           rb"[\w+/=]+ \d+\n": "it is tiktoken's, as Llama 3 has it: take the Hugging Face folder's tokenizer.json",
           b"<": "it is a web page, not the file: download it again"}


def load_tensors(path):
    """name -> tensor of a .safetensors, .pth or .bin file, memory-mapped. Nothing in the file is executed."""
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        # what torch < 1.6 wrote (torchvision's googlenet) is no zip, and cannot be mapped
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror or e}") from None
    except Exception as e:  # a damaged file can raise nearly anything; the end of its first line is enough
        said = str(e).partition("\n")[0][-200:].rpartition(":")[2].strip() or type(e).__name__
        if "eights_only" in str(e) or "eights only" in str(e):
            said = "it holds more than tensors, which might run code"
        said = kind_of(path, INSTEAD) or f"damaged or not plain tensors ({said})"
        raise BadInput(f"{path}: cannot be read as weights, {said}") from None
    if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise BadInput(f"{path}: is not a plain dict of tensors")
    return state


def check_names(path, want, have):
    """Two dicts name -> shape must be equal; BadInput names the first difference."""
    # with its name in a Hugging Face file, where it has another there
    both = lambda name: name if to_hf(name) == name else f"{name} ({to_hf(name)})"
    for kind, names in {"has no tensor": want.keys() - have.keys(),
                        "has a surplus tensor": have.keys() - want.keys()}.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise BadInput(f"{path}: {kind} {both(min(names))}{more}")
    for name in want:
        if tuple(want[name]) != tuple(have[name]):
            raise BadInput(f"{path}: {both(name)} is {tuple(have[name])}, its configuration says {tuple(want[name])}")


def check_fit(state, own, needed):
    """
    Whether a checkpoint's tensors (state) fit a model (own); BadInput names the first that does not.
    needed: what it must hold. The LoRA of a stage that only now begins is the one thing that may be new.
    """
    for name, value in state.items():
        if name in own and value.is_floating_point() != own[name].is_floating_point():
            raise BadInput(f"checkpoint does not fit: its LLM has learnt itself, {name} among others, and 8 or 4 bits "
                           "would undo that: llm_bits=16")
        if name not in own or own[name].shape != value.shape:
            want = f"the model's is {tuple(own[name].shape)}" if name in own else "the model has no such tensor"
            raise BadInput(f"checkpoint does not fit: {name} is {tuple(value.shape)}, {want}")
    begins = not any("lora_" in name for name in state)
    missing = sorted(name for name in needed if name not in state and not (begins and "lora_" in name))
    if state and missing:
        raise BadInput(f"checkpoint does not fit: it has no {missing[0]} ({len(missing)} missing)")


def shapes_of(tensors):
    """A dict of tensors -> name -> shape."""
    return {name: tuple(t.shape) for name, t in tensors.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Drawn from a seed

def stateless(*key):
    """A random generator that is a function of its key (numbers and texts): resuming anywhere draws the same."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


def init_weight(name, shape, seed, device="cpu"):
    """
    A parameter's first value, a function of (name, shape, seed) alone: the same for any number of processes.
    device: what draws it; each kind draws others, and a GPU is some hundred times as fast.
    """
    if name.endswith(("bias", "lora_B")):
        return torch.zeros(shape, device=device)  # LoRA starts as the identity
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    # NOTE the CPU's generator reads 32 bits of a seed and drops the rest
    g = torch.Generator(device).manual_seed(zlib.crc32(name.encode(), seed))
    fan_in = math.prod(shape[1:])
    if name.endswith("lora_A"):
        # as PEFT: kaiming_uniform(a=sqrt(5))
        return (torch.rand(shape, generator=g, device=device) * 2 - 1) / fan_in**0.5
    return torch.randn(shape, generator=g, device=device) / fan_in**0.5

# ---------------------------------------------------------------------------------------------------------------------
# In and out of shards

def fill(param, full):
    """Copy a whole tensor into a parameter; a sharded one takes its rows, FSDP2's blocks of ceil(rows/world)."""
    local = param.detach()
    if hasattr(param, "to_local"):  # a DTensor; its class would take half a second to import
        local = local.to_local()
        low = math.ceil(full.shape[0] / param.device_mesh.size()) * param.device_mesh.get_local_rank()
        full = full[low:low + local.shape[0]]
    local.copy_(full)


def full(param):
    """The whole tensor of a parameter, on the CPU. Collective where it is sharded: every process must call it."""
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().cpu()

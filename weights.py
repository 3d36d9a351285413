"""
Files of weights, read safely: tensors and JSON from anyone, and LLaMAs as they are downloaded, in Meta's layout (params.json + consolidated.*.pth) or
Hugging Face's (config.json + *.safetensors). Nothing in a file is executed, and what cannot be run exactly is refused by the name of its key or tensor.
"""
import glob
import json
import os
import re
import zipfile

import torch
from safetensors import SafetensorError, safe_open

from config import BadInput

# ---------------------------------------------------------------------------------------------------------------------
# Tensors, JSON, and the two names of a weight

HF_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm", "self_attn": "attention", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
            "mlp": "feed_forward", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def from_hf(name):
    """Hugging Face's name of a weight -> Meta's: model.layers.0.self_attn.q_proj.weight -> layers.0.attention.wq.weight"""
    name = re.sub(r"model\.embed_tokens|model\.norm|[a-z_]+", lambda m: HF_NAMES.get(m[0], m[0]), name)
    return name.removeprefix("model.")


def to_hf(name):
    """Meta's name of a weight -> Hugging Face's, the inverse of from_hf."""
    back = {v: k for k, v in HF_NAMES.items()}
    name = re.sub(r"[a-z_]+\d?", lambda m: back.get(m[0], m[0]), name)
    return "model." + name if name.startswith("layers.") else name


MAX_JSON = 100e6  # bytes of a JSON file; the largest real ones, indexes of shards, have some 100 kB. (safetensors itself allows its header as much)
LIMITS = {"width": 2**17, "layers": 1000, "heads": 2**12, "rows": 2**23}  # sizes of an LLM; the largest real ones have 16384, 126, 128 and 256000


def whole_number(where, key, value, most):
    """A size that stands in a file, as it is; BadInput where no model can have it, before anything of that size is made."""
    if type(value) is not int or not 1 <= value <= LIMITS[most]:
        raise BadInput(f"{where}: {key}={str(value)[:50]} is not a whole number from 1 to {LIMITS[most]} (LIMITS in weights.py)")
    return value


def positive(where, values, *keys):
    """These, where they stand there, must be numbers that one can divide by."""
    for key in keys:
        value = values.get(key, 1)
        if value is not None and (type(value) not in (int, float) or not 0 < value < 1e30):
            raise BadInput(f"{where}: {key}={str(value)[:50]} is not a positive number")


def load_tensors(path):
    """name -> tensor of a .safetensors or .pth file, memory-mapped. Nothing in the file is executed."""
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}
        mmap = zipfile.is_zipfile(path)  # what torch < 1.6 wrote (torchvision's googlenet) is no zip and cannot be mapped
        state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror or e}") from None
    except Exception as e:  # a damaged file can raise nearly anything; the first line of what it says is enough
        said = (str(e) or type(e).__name__).splitlines()[0][:200]
        if isinstance(e, SafetensorError):
            said = said.split(":")[-1]
        elif "eights_only" in said or "eights only" in said:
            said = "it holds more than tensors, which might run code"
        raise BadInput(f"{path}: cannot be read as weights, damaged or not plain tensors ({said.strip()})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise BadInput(f"{path}: is not a plain dict of tensors")
    return state


def load_json(path):
    try:
        if os.path.getsize(path) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON / 1e6:.0f} MB, MAX_JSON in weights.py")
        value = json.load(open(path, encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: is not a JSON object")
    return value


def check_names(path, want, have):
    """Two dicts name -> shape must be equal; BadInput names the first difference."""
    both = lambda name: name if to_hf(name) == name else f"{name} ({to_hf(name)})"  # a Hugging Face file knows it by the other name
    for kind, names in (("has no tensor", sorted(want.keys() - have.keys())), ("has a surplus tensor", sorted(have.keys() - want.keys()))):
        if names:
            raise BadInput(f"{path}: {kind} {both(names[0])}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else ""))
    for name in want:
        if tuple(want[name]) != tuple(have[name]):
            raise BadInput(f"{path}: {both(name)} is {tuple(have[name])}, its configuration says {tuple(want[name])}")

# ---------------------------------------------------------------------------------------------------------------------
# LLaMAs on the disk

def open_folder(path):
    """
    A folder of raw weights -> (sizes as model.ModelArgs takes them, name -> shape, read). Names are Meta's, wq and wk in the rotate-half layout of
    Hugging Face's files; read(name) is one whole tensor, read when it is asked for.
    """
    meta, hf = (os.path.exists(os.path.join(path, f)) for f in ("params.json", "config.json"))
    if meta and not (hf and not glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth"))):  # Mistral's folders hold another params.json
        return open_meta(path)
    if hf:
        return open_hf(path)
    raise BadInput(f"llm={path}: holds neither params.json (Meta's layout) nor config.json (Hugging Face's)")


def open_meta(path):
    params = load_json(os.path.join(path, "params.json"))
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"}
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if key not in params:
            raise BadInput(f"{path}/params.json: has no {key}")
    if surplus := sorted(k for k in params.keys() - known if params[k]):
        raise BadInput(f"{path}/params.json: {surplus[0]}={params[surplus[0]]} is not implemented")
    for key, most in {"dim": "width", "n_layers": "layers", "n_heads": "heads"}.items():
        whole_number(f"{path}/params.json", key, params[key], most)
    positive(f"{path}/params.json", params, "norm_eps", "rope_theta")
    files = sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))
    if not files:
        raise BadInput(f"{path}: has no consolidated.00.pth")
    shards = [load_tensors(f) for f in files]
    for f, shard in zip(files, shards):
        check_names(f, {k: v.shape for k, v in shards[0].items()}, {k: v.shape for k, v in shard.items()})
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    first = "layers.0."
    for name in ("tok_embeddings.weight", first + "attention.wk.weight", first + "attention.wo.weight", first + "feed_forward.w1.weight"):
        if name not in shards[0] or shards[0][name].dim() != 2:
            raise BadInput(f"{files[0]}: has no matrix {name}")
    width = shards[0][first + "attention.wo.weight"].shape[1]
    if width * len(files) < dim:
        raise BadInput(f"{path}: has {len(files)} of {dim // width} shards consolidated.*.pth")

    def axis(name, shard):  # how model-parallel shards are joined: column-parallel layers on 0, row-parallel ones on 1, norms are copies
        kind = name.split(".")[-2]
        if shard.dim() == 1 or len(shards) == 1:
            return None
        if kind == "tok_embeddings":
            return 0 if shard.shape[1] == dim else 1  # LLaMA 2 splits its width, LLaMA 3 its vocabulary
        return 1 if kind in ("wo", "w2") else 0

    def shape(name):
        s, a = list(shards[0][name].shape), axis(name, shards[0][name])
        if a is not None:
            s[a] *= len(shards)
        return tuple(s)

    def read(name):
        parts = [s[name] for s in shards]
        a = axis(name, parts[0])
        if a is None and not all(torch.equal(p, parts[0]) for p in parts):
            raise BadInput(f"{path}: {name} should be the same in every shard")
        w = parts[0] if a is None else torch.cat(parts, a)
        if name.endswith(("wq.weight", "wk.weight")):  # rows from interleaved pairs to halves; wk has its own number of heads
            w = w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(w.shape)
        return w

    shapes = {k: shape(k) for k in shards[0] if k != "rope.freqs"}
    n_kv_heads, vocab_size = shapes[first + "attention.wk.weight"][0] // head_dim, shapes["tok_embeddings.weight"][0]
    for key, found in (("n_kv_heads", n_kv_heads), ("vocab_size", vocab_size)):  # absent and -1 in what Meta ships: the weights know
        if params.get(key) not in (None, -1, found):
            raise BadInput(f"{path}/params.json: {key}={params[key]}, but its weights have {found}")
    sizes = dict(dim=dim, n_layers=params["n_layers"], n_heads=params["n_heads"], n_kv_heads=n_kv_heads, head_dim=head_dim, vocab_size=vocab_size,
                 hidden_dim=shapes[first + "feed_forward.w1.weight"][0], norm_eps=params["norm_eps"], rope_theta=params.get("rope_theta", 10000.0))
    return sizes, shapes, read


def open_hf(path):
    where = os.path.join(path, "config.json")
    c = load_json(where)
    need = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "rms_norm_eps")
    for key in need:
        if c.get(key) is None:
            raise BadInput(f"{where}: has no {key}")
    for key, most in {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads", "num_key_value_heads": "heads",
                      "intermediate_size": "width", "vocab_size": "rows", "head_dim": "width", "sliding_window": "rows"}.items():
        if key in need or c.get(key) is not None:
            whole_number(where, key, c[key], most)
    positive(where, c, "rms_norm_eps", "rope_theta")
    refuse = lambda key, why="is not implemented": BadInput(f"{where}: {key}={repr(c[key])[:100]} {why}")
    if str(c["model_type"]) not in ("llama", "mistral", "qwen2"):
        raise refuse("model_type", "is none of llama, mistral, qwen2")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if c.get(key):
            raise refuse(key)
    if c.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act")
    key = "rope_scaling" if c.get("rope_scaling") else "rope_parameters"  # newer folders keep rope_theta in the latter; where both stand,
    rope = c.get(key) or {}  # transformers obeys the former
    if not isinstance(rope, dict):
        raise refuse(key)
    positive(where, rope, "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    needed = {"default": set(), "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}}
    if kind not in needed or not needed[kind] <= rope.keys() or rope.get("partial_rotary_factor", 1) != 1:
        raise refuse(key)
    if c.get("partial_rotary_factor", 1) != 1:
        raise refuse("partial_rotary_factor")
    window = c.get("sliding_window", 4096 if c["model_type"] == "mistral" else None) if c.get("use_sliding_window", c["model_type"] != "qwen2") else None
    heads, dim = c["num_attention_heads"], c["hidden_size"]
    sizes = dict(dim=dim, n_layers=c["num_hidden_layers"], n_heads=heads, n_kv_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or dim // heads,
                 hidden_dim=c["intermediate_size"], vocab_size=c["vocab_size"], norm_eps=c["rms_norm_eps"], tied=bool(c.get("tie_word_embeddings")),
                 rope_theta=rope.get("rope_theta") or c.get("rope_theta") or 10000.0, rope_scaling=rope if kind == "llama3" else None,
                 qkv_bias=c["model_type"] == "qwen2", sliding_window=window, model_type=c["model_type"])

    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        names = load_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise BadInput(f"{index}: its weight_map does not say the files of weights")
        files = sorted({os.path.join(path, os.path.basename(f)) for f in names.values()})  # basename: files of this folder alone
    else:
        files = sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors")))
    if not files:
        raise BadInput(f"{path}: has no *.safetensors")
    tensors = {}
    for f in files:
        for k, v in load_tensors(f).items():
            if not k.endswith("rotary_emb.inv_freq"):
                tensors[from_hf(k)] = v
    if sizes["tied"] and "output.weight" in tensors:
        if not torch.equal(tensors["output.weight"], tensors.get("tok_embeddings.weight")):
            raise refuse("tie_word_embeddings", "but lm_head.weight differs from the embedding")
        del tensors["output.weight"]
    return sizes, {k: tuple(v.shape) for k, v in tensors.items()}, tensors.__getitem__

"""
LLMs on the disk, read as they were downloaded and written for others.
Meta's layout is params.json + consolidated.*.pth, Hugging Face's config.json + *.safetensors.
Nothing in a file is executed, and what cannot be run exactly is refused by the name of its key or tensor.
"""
import glob
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from lib.files import load_json, whole_folder
from lib.program import BadInput, Progress
from lib.tensors import check_names, from_hf, halves, init_weight, load_tensors, shapes_of, to_hf
from lib.tokenizer import Tokenizer, json_in, nothing_in, tokenizer_file


@dataclass
class ModelArgs:
    """Meta's names for the sizes of a LLaMA; what stands behind vocab_size is what the LLaMAs since have added."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # LLaMA 3.1's dict, or linear's, which has a factor alone
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each head's queries and keys
    tied: bool = False  # the output layer is the embedding
    # no sequence may be longer: Mistral 0.1, and rope_scaling dynamic, which changes nothing up to there
    sliding_window: int = None
    max_position_embeddings: int = None
    model_type: str = "llama"

    def fits(self, length):
        """BadInput where a sequence of this length would need what is not implemented."""
        for key in ("sliding_window", "max_position_embeddings"):
            most = getattr(self, key)
            if most and length > most:
                raise BadInput(f"{key}={most}: a sequence of {length} tokens is longer, which is not implemented")

    def shapes(self):
        """name -> shape of every weight, under Meta's names."""
        dim = self.dim
        hidden = self.hidden_dim
        query = self.n_heads * self.head_dim
        key = self.n_kv_heads * self.head_dim
        shapes = {"tok_embeddings.weight": (self.vocab_size, dim)}
        for i in range(self.n_layers):
            block = {"attention.wq.weight": (query, dim), "attention.wk.weight": (key, dim),
                     "attention.wv.weight": (key, dim), "attention.wo.weight": (dim, query),
                     "feed_forward.w1.weight": (hidden, dim), "feed_forward.w2.weight": (dim, hidden),
                     "feed_forward.w3.weight": (hidden, dim),
                     "attention_norm.weight": (dim,), "ffn_norm.weight": (dim,)}
            if self.qkv_bias:
                block |= {f"attention.w{n}.bias": (rows,) for n, rows in zip("qkv", (query, key, key))}
            if self.qk_norm:
                block |= {f"attention.{n}_norm.weight": (self.head_dim,) for n in "qk"}
            shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
        shapes["norm.weight"] = (dim,)
        return shapes if self.tied else shapes | {"output.weight": (self.vocab_size, dim)}

    def size(self):
        """How many parameters."""
        return sum(map(math.prod, self.shapes().values()))


SIZES = {  # llm=random:NAME -> dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size, head_dim
    "7B": ModelArgs(4096, 32, 32, 32, 11008, 32000, 128),
    "13B": ModelArgs(5120, 40, 40, 40, 13824, 32000, 128),
    "70B": ModelArgs(8192, 80, 64, 8, 28672, 32000, 128),
    "vicuna-7b-v1.5": ModelArgs(4096, 32, 32, 32, 11008, 32000, 128),
    "mistral-7b-instruct-v0.3": ModelArgs(4096, 32, 32, 8, 14336, 32768, 128, rope_theta=1e6, model_type="mistral"),
    "qwen2-7b-instruct": ModelArgs(3584, 28, 28, 4, 18944, 152064, 128, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True,
                                   model_type="qwen2"),
    "qwen3-8b": ModelArgs(4096, 36, 32, 8, 12288, 151936, 128, norm_eps=1e-6, rope_theta=1e6, qk_norm=True,
                          model_type="qwen3"),
    "deepseek-llm-7b-chat": ModelArgs(4096, 30, 32, 32, 11008, 102400, 128, norm_eps=1e-6),
    "chinese-llama-2-7b": ModelArgs(4096, 32, 32, 32, 11008, 55296, 128),
    "smollm2-135m": ModelArgs(576, 30, 9, 3, 1536, 49152, 64, rope_theta=1e5, tied=True),
}


@dataclass
class RawLLM:
    """An LLM before it is loaded."""
    path: str
    args: ModelArgs
    shapes: dict  # name -> shape of its weights
    read: Callable  # name -> one whole tensor, read when it is asked for

    def describe(self, dtype, bits=16):
        """One line: type, sizes, parameters and bytes; bits: of the blocks' matrices."""
        a = self.args
        n, name = a.size(), str(dtype).removeprefix("torch.")
        lies = (f"{n * dtype.itemsize / 1e9:.3f} GB in {name}" if bits == 16 else
                f"the blocks' matrices in {bits} bits, the rest in {name}")
        return (f"LLM: {self.path}: {a.model_type}, {a.n_layers} layers of width {a.dim}, {a.n_heads} heads "
                f"({a.n_kv_heads} of keys) of {a.head_dim}, SwiGLU {a.hidden_dim}, {a.vocab_size} tokens; "
                f"{n / 1e6:.2f}M parameters, {lies}")

    def tensors(self):
        """Yield (name, whole tensor), all that args name, so that one alone need be in memory; shows GB/s."""
        check_names(self.path, self.args.shapes(), self.shapes)
        done = 0
        show = None
        for name in self.shapes:
            weight = self.read(name)
            if show is None:
                scale = weight.itemsize / 1e9
                show = Progress(f"loading {self.path}, GB", self.args.size() * scale)
            yield name, weight
            done += weight.numel()
            show(done * scale, unit="GB")


def open_llm(path):
    """
    A folder of raw weights as it was downloaded, or random:NAME of SIZES -> RawLLM.
    Names are Meta's, wq and wk in the rotate-half layout of Hugging Face's files.
    """
    if path.startswith("random:"):
        return open_random(path)
    hf = os.path.exists(f"{path}/config.json")
    # beside a config.json, Mistral's folders hold another params.json
    meta = os.path.exists(f"{path}/params.json") and (not hf or glob.glob("consolidated.*.pth", root_dir=path))
    if not meta and not hf:
        raise nothing_in(path, "holds neither params.json (Meta's layout) nor config.json (Hugging Face's)")
    sizes, shapes, read = open_meta(path) if meta else open_hf(path)
    return RawLLM(path, ModelArgs(**sizes), shapes, read)


def open_random(path):
    """random:7B and its like: random weights of that size, for trials of speed and memory without real ones."""
    args = SIZES.get(path.removeprefix("random:"))
    if not args:
        raise BadInput(f"llm={path}: the sizes are {', '.join(SIZES)}")
    shapes = args.shapes()
    return RawLLM(path, args, shapes, lambda name: init_weight(name, shapes[name], 0))

# ---------------------------------------------------------------------------------------------------------------------
# Sizes that stand in a file

# no LLM has more; the largest real ones are 16384 wide and have 126 layers, 128 heads and 256000 tokens
LIMITS = {"dim": 2**17, "hidden_dim": 2**17, "head_dim": 2**17, "n_layers": 1000, "n_heads": 2**12, "n_kv_heads": 2**12,
          "vocab_size": 2**23, "sliding_window": 2**23, "max_position_embeddings": 2**23}
# a key -> our name; those without a limit are any positive number, the others are whole
META = {key: key for key in ("dim", "n_layers", "n_heads", "norm_eps", "rope_theta")}
HF = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
      "num_key_value_heads": "n_kv_heads", "intermediate_size": "hidden_dim", "vocab_size": "vocab_size",
      "head_dim": "head_dim", "sliding_window": "sliding_window", "rms_norm_eps": "norm_eps",
      "rope_theta": "rope_theta"}
OPTIONAL = ("n_kv_heads", "head_dim", "sliding_window", "rope_theta")


def sizes_in(where, says, table):
    """The sizes that a file says, under our names; one that a model can have, before anything of that size is made."""
    found = {}
    for key, name in table.items():
        value, most = says.get(key), LIMITS.get(name)
        if value is None and name in OPTIONAL:
            continue
        if key not in says:
            raise BadInput(f"{where}: has no {key}")
        if most and (type(value) is not int or not 1 <= value <= most):
            raise refusal(where, says, key, f"is not a whole number from 1 to {most} (weights.LIMITS)")
        if not most and (type(value) not in (int, float) or not 0 < value < 1e30):
            raise refusal(where, says, key, "is not a positive number")
        found[name] = value
    return found


def refusal(where, says, key, why="is not implemented"):
    """The error that names a key of a file and its value."""
    return BadInput(f"{where}: {key}={repr(says.get(key))[:100]} {why}")

# ---------------------------------------------------------------------------------------------------------------------
# Meta's layout: a folder -> (sizes as ModelArgs takes them, name -> shape, read)

def open_meta(path):
    """params.json + consolidated.*.pth, model-parallel shards: they know what params.json does not say."""
    where = f"{path}/params.json"
    params = load_json(where)
    sizes = sizes_in(where, params, META)
    known = META.keys() | {"n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
    for key in sorted(params.keys() - known):
        if params[key]:
            raise refusal(where, params, key)
    files = sorted(glob.glob(f"{glob.escape(path)}/consolidated.*.pth"))
    if not files:
        raise BadInput(f"{path}: has no consolidated.00.pth; of a Mistral take the folder with its config.json")
    shards = [load_tensors(f) for f in files]
    one = shards[0]  # the others hold the same names and shapes
    for f, shard in zip(files, shards):
        check_names(f, shapes_of(one), shapes_of(shard))
    embedding = "tok_embeddings.weight"
    wk = "layers.0.attention.wk.weight"
    wo = "layers.0.attention.wo.weight"
    w1 = "layers.0.feed_forward.w1.weight"
    for name in (embedding, wk, wo, w1):
        if name not in one or one[name].dim() != 2:
            raise BadInput(f"{files[0]}: has no matrix {name}")
    dim = sizes["dim"]
    head_dim = dim // sizes["n_heads"] or 1
    width = one[wo].shape[1]
    if width * len(files) < dim:
        raise BadInput(f"{path}: has {len(files)} of {dim // width} shards consolidated.*.pth")

    def axis(name):
        """How shards are joined: column-parallel layers on 0, row-parallel ones on 1; None where they are copies."""
        if one[name].dim() == 1 or len(shards) == 1:
            return None
        if name == embedding:
            return 0 if one[name].shape[1] == dim else 1  # LLaMA 2 splits its width, LLaMA 3 its vocabulary
        return 1 if name.endswith(("wo.weight", "w2.weight")) else 0

    def join(name, device):
        parts = [s[name].to(device) for s in shards]
        return parts[0] if axis(name) is None else torch.cat(parts, axis(name))

    def read(name):
        if axis(name) is None and not all(torch.equal(s[name], one[name]) for s in shards):
            raise BadInput(f"{path}: {name} should be the same in every shard")
        w = join(name, "cpu")
        return halves(w, head_dim) if name.endswith(("wq.weight", "wk.weight")) else w

    shapes = shapes_of({name: join(name, "meta") for name in one if name != "rope.freqs"})
    # absent and -1 in what Meta ships: the weights know
    found = {"n_kv_heads": shapes[wk][0] // head_dim, "vocab_size": shapes[embedding][0]}
    for key, value in found.items():
        if params.get(key) not in (None, -1, value):
            raise BadInput(f"{where}: {key}={params[key]}, but its weights have {value}")
    return sizes | found | {"head_dim": head_dim, "hidden_dim": shapes[w1][0]}, shapes, read

# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout, likewise

def open_hf(path):
    """config.json + *.safetensors or pytorch_model*.bin."""
    where = f"{path}/config.json"
    config = load_json(where)
    sizes = hf_sizes(where, config)
    tensors = {}
    for f in hf_files(path):
        tensors |= {from_hf(k): v for k, v in load_tensors(f).items() if not k.endswith("rotary_emb.inv_freq")}
    if sizes["tied"] and "output.weight" in tensors:  # the one matrix may stand there under either name, or both
        head = tensors.pop("output.weight")
        if not torch.equal(head, tensors.setdefault("tok_embeddings.weight", head)):
            raise refusal(where, config, "tie_word_embeddings", "but lm_head.weight differs from the embedding: "
                          "false keeps it, without it in the file the embedding takes its place")
    return sizes, shapes_of(tensors), tensors.__getitem__


# values of keys that change what is computed: the first is what an absent key means
ONLY = {"attention_bias": (False, None), "mlp_bias": (False, None), "quantization_config": (None, {}),
        "hidden_act": ("silu",), "partial_rotary_factor": (1,)}
# model_type -> what else it means, where config.json does not say otherwise
KINDS = {"llama": {}, "mistral": {"sliding_window": 4096}, "qwen2": {"qkv_bias": True},
         "qwen3": {"head_dim": 128, "qk_norm": True}}
# kind of rope_scaling -> what it must say
ROPE = {"default": (), "linear": ("factor",), "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def hf_sizes(where, config):
    """config.json -> sizes as ModelArgs takes them; what cannot be run exactly is refused."""
    kind = config.get("model_type")
    if str(kind) not in KINDS:
        raise refusal(where, config, "model_type", f"is none of {', '.join(KINDS)}")
    for key, values in ONLY.items():
        if config.get(key, values[0]) not in values:
            raise refusal(where, config, key)
    said = sizes_in(where, config, HF)
    sizes = dict(n_kv_heads=said["n_heads"], head_dim=said["dim"] // said["n_heads"]) | KINDS[kind] | said
    if config.get("sliding_window", 0) is None or not config.get("use_sliding_window", kind == "mistral"):
        sizes["sliding_window"] = None
    return sizes | hf_rope(where, config) | dict(tied=bool(config.get("tie_word_embeddings")), model_type=kind)


def hf_rope(where, config):
    """config.json's further word on positions -> what ModelArgs has of it."""
    # newer folders keep rope_theta in rope_parameters; where both stand, transformers obeys rope_scaling
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    kind = str(rope.get("rope_type", rope.get("type", "default"))) if isinstance(rope, dict) else ""
    if kind not in ROPE or not rope.keys() >= set(ROPE[kind]) or rope.get("partial_rotary_factor", 1) != 1:
        raise refusal(where, config, key)
    sizes_in(where, rope, {key: key for key in ROPE[kind]})  # positive numbers, which may be divided by
    found = sizes_in(where, rope, {"rope_theta": "rope_theta"})
    if kind == "dynamic":  # it changes nothing up to there
        return found | sizes_in(where, config, {"max_position_embeddings": "max_position_embeddings"})
    return found | {"rope_scaling": rope if ROPE[kind] else None}


def hf_files(path):
    """The files of weights, as transformers takes them: one for all, else those of an index; safetensors first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = f"{path}/{name}"
        if os.path.exists(file):
            return [file]
        index = file + ".index.json"
        if os.path.exists(index):
            said = load_json(index).get("weight_map")
            if not said or not isinstance(said, dict) or not all(isinstance(f, str) for f in said.values()):
                raise BadInput(f"{index}: its weight_map does not say the files of weights")
            return sorted({f"{path}/{os.path.basename(f)}" for f in said.values()})  # of this folder alone
    raise BadInput(f"{path}: has no model.safetensors, no pytorch_model.bin, and no *.index.json of their shards")

# ---------------------------------------------------------------------------------------------------------------------
# Written for others

TOKENIZER_FILES = ("tokenizer", "special_tokens", "generation_config", "vocab", "merges", "chat_template")


def write_hf(folder, args, tensors, source, dtype, shard_bytes=5 * 10**9, ids=()):
    """
    Write an LLM as a Hugging Face folder: config.json, safetensors shards with their index, the tokenizer of source.
    tensors: pairs (Meta's name, whole tensor), taken one by one, so that one shard is all that need be in memory.
    ids: those of BOS and EOS, where source does not say them as Hugging Face's folders do.
    """
    if not os.path.isdir(source):
        raise BadInput(f"{source}: is no folder, there is no tokenizer to copy from it")
    if os.path.exists(folder):
        raise BadInput(f"{folder}: exists already")
    with whole_folder(folder.rstrip("/")) as part:
        shards = []  # name -> bytes in each
        for shard in in_shards(tensors, shard_bytes):
            save_file(shard, f"{part}/{len(shards)}", metadata={"format": "pt"})
            shards.append({name: t.nbytes for name, t in shard.items()})
        # how many there are is known at the end: until then they are called 0, 1, 2, ...
        about = {"config.json": hf_config(args, source, dtype, ids)}
        files = ["model.safetensors"]
        if len(shards) > 1:
            files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
            about["model.safetensors.index.json"] = {
                "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
                "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
        for i, file in enumerate(files):
            os.rename(f"{part}/{i}", f"{part}/{file}")
        found = {f"{source}/{f}" for f in os.listdir(source) if f.startswith(TOKENIZER_FILES)}
        for file in filter(None, {*found, tokenizer_file(source)}):
            shutil.copy(file, part)
        if os.path.exists(f"{part}/tokenizer.model") and not os.path.exists(f"{part}/tokenizer_config.json"):
            about["tokenizer_config.json"] = Tokenizer(source, *ids).as_llama()
        for file, value in about.items():
            with open(f"{part}/{file}", "w") as f:
                json.dump(value, f, indent=2)


def in_shards(tensors, shard_bytes):
    """Pairs (Meta's name, tensor) -> dicts (Hugging Face's name -> tensor) of at most so many bytes, or one tensor."""
    shard = {}
    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[to_hf(name)] = tensor.contiguous()
    yield shard


def hf_config(a, source, dtype, ids=()):
    """config.json for these sizes: that of source where it has one, else made of them."""
    dtype = str(dtype).removeprefix("torch.")
    if config := json_in(source, "config.json"):
        return config | {"torch_dtype": dtype, "dtype": dtype}  # for older and newer transformers
    tokenizer = Tokenizer(source, *ids)
    return {key: getattr(a, name) for key, name in HF.items()} | {
        "architectures": [a.model_type.capitalize() + "ForCausalLM"], "model_type": a.model_type,
        "hidden_act": "silu", "max_position_embeddings": 4096, "tie_word_embeddings": a.tied,
        "bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None, "eos_token_id": tokenizer.eos_id,
        "torch_dtype": dtype}

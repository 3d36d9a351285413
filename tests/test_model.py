"""
model.py and the parts of lib/ below it, with tiny random weights: LLaMA against transformers in every layout, the band,
packing, decoding with a cache, the loss.

    python -m pytest tests/test_model.py
"""
import copy
import itertools
import json
import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import page
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from data import Sample, pack
from eval import prefixes as streams_of
from eval import translate
from lib.cnn import GoogLeNet, RandomCNN
from lib.program import BadInput
from lib.tensors import fill, from_hf, init_weight, to_hf
from lib.tokenizer import Tokenizer
from lib.weights import SIZES as LLM_SIZES
from lib.weights import ModelArgs, open_llm
from lora import apply_lora
from model import ADAPTORS, Adaptor, Cache, LLaMA, LocalTransformer, SLLaMA, generate, local_attention

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
# so short an original context that at heads of width 8 all three cases occur: kept, blended, stretched
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
TOKENS = torch.arange(100).view(2, 50) * 37 % 96

# ---------------------------------------------------------------------------------------------------------------------
# What the tests are made of

def tiny_hf(kind="llama", **changes):
    """A random Hugging Face model that is wide awake: weights so large that a mistake anywhere moves the logits."""
    transformers = pytest.importorskip("transformers")
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    config = getattr(transformers, name + "Config")(**{**SIZES, **changes})
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    torch.manual_seed(0)
    for key, p in model.named_parameters():
        p.data = torch.randn(p.shape) * 0.2 + ("norm" in key)
    return model


def hf_folder(folder, form="new", kind="llama", shard_size="1GB", dtype=torch.float32, **changes):
    """Save a tiny_hf. form: config.json says how positions turn in rope_parameters ("new"), or at the top ("old")."""
    model = tiny_hf(kind, **changes)
    for p in model.parameters():
        p.data = p.data.to(dtype).float()  # rounded weights, but transformers' own tables of angles stay exact
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    with edit(folder) as c:
        rope = c.pop("rope_parameters", None) or c.pop("rope_scaling", None) or {}
        rope = {"rope_type": "default", "rope_theta": c.pop("rope_theta", 10000.0), **rope}
        if form == "new":
            c["rope_parameters"] = rope
        else:
            c["rope_theta"] = rope.pop("rope_theta")
            c["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return model


class edit:
    """with edit(folder) as c: change the JSON object in folder/config.json (or another file)."""

    def __init__(self, folder, file="config.json"):
        self.path = Path(folder) / file

    def __enter__(self):
        self.value = json.loads(self.path.read_text())
        return self.value

    def __exit__(self, *error):
        self.path.write_text(json.dumps(self.value))


@torch.no_grad()
def distance(model, llama, tokens=TOKENS):
    """
    The largest difference between the logits of transformers and ours, computed at once and, from a third on, word by
    word with a cache.
    """
    theirs = model(tokens).logits
    assert theirs.std() > 0.5  # logits near zero would be equal whatever the model did
    return max((theirs - llama(tokens)).abs().max().item(), (theirs - cached(llama, tokens)).abs().max().item())


def cached(llama, tokens):
    """(B, T) -> (B, T, vocab) by one forward over the first third of every row, then one token at a time."""
    B, T = tokens.shape
    cache = Cache(T - T // 3)
    h = llama.tok_embeddings(tokens)
    first = llama(h=h[:, :T // 3].reshape(1, -1, h.shape[-1]), lens=[T // 3] * B, cache=cache)
    out = [first.view(B, T // 3, -1)]
    for i in range(T // 3, T):
        cache.step += 1
        out.append(llama(h=h[:, i:i + 1], pos=torch.full((B, 1), i), cache=cache))
    return torch.cat(out, 1)


META = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
        "gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
OTHERS = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
          "lm_head.weight": "output.weight"}


def meta_tensors(model):
    """The weights of a Hugging Face LLaMA as Meta lays them out, written apart from lib: rows of wq, wk interleaved."""
    out = {"rope.freqs": torch.ones(4)}  # LLaMA 2's files hold this table; it is no weight
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, w in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            kind = parts[-2]
            if kind in heads:
                d = len(w) // heads[kind]
                rows = [h * d + half * d // 2 + i for h in range(heads[kind]) for i in range(d // 2) for half in (0, 1)]
                w = w[rows]  # row i of the first half, row i of the second half, row i + 1 of the first half, ...
            name = f"layers.{parts[2]}.{META[kind]}.weight"
        else:
            name = OTHERS[name]
        out[name] = w.detach().clone()
    return out


def meta_folder(folder, model, shards=1, embedding_axis=1, **params):
    """
    Write Meta's layout as Meta ships LLaMA 2: vocab_size -1, no n_kv_heads; params: what params.json says beyond
    that.
    """
    folder.mkdir(exist_ok=True)
    c = model.config
    say = dict(dim=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=c.num_attention_heads, vocab_size=-1,
               multiple_of=16, norm_eps=c.rms_norm_eps)
    (folder / "params.json").write_text(json.dumps({**say, **params}))
    # row-parallel layers; all other matrices are column-parallel
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis}
    for i in range(shards):
        part = lambda name, w: w.chunk(shards, axes.get(name.split(".")[-2], 0))[i].clone() if w.dim() > 1 else w
        shard = {name: part(name, w) for name, w in meta_tensors(model).items()}
        torch.save(shard, folder / f"consolidated.{i:02d}.pth")


def awake(module):
    """Random weights for a module of ours, as tiny_hf's."""
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        p.data = torch.randn(p.shape) * 0.2 + ("norm" in name)
    return module


def tiny_llama(vocab_size=96, **changes):
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=vocab_size, head_dim=8)
    return awake(LLaMA(ModelArgs(**sizes | changes))).eval()

# ---------------------------------------------------------------------------------------------------------------------
# Raw weights: parity

@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("kind, changes", [
    ("llama", {}),
    ("llama", dict(num_key_value_heads=4)),
    ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    ("llama", dict(rope_parameters=LLAMA3)),
    ("llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-3)),
    ("mistral", dict(sliding_window=None, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    ("mistral", dict(sliding_window=50)),  # as long as the sequence: the window cuts nothing off
    ("qwen2", dict(tie_word_embeddings=False)),
    ("qwen2", dict(tie_word_embeddings=True)),
    ("qwen3", dict(tie_word_embeddings=False, head_dim=16, rms_norm_eps=1e-3)),
    ("qwen3", dict(tie_word_embeddings=True, head_dim=8)),
    ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=4.0))),
    ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=4.0),
                   max_position_embeddings=50)),  # as long as the sequence: plain up to there
], ids=lambda x: x if isinstance(x, str) else ",".join(x) or "gqa")
def test_equals_transformers(tmp_path, kind, changes, form):
    model = hf_folder(tmp_path, form, kind, **changes)
    assert ("rope_theta" in json.loads((tmp_path / "config.json").read_text())) == (form == "old")
    assert distance(model, LLaMA.from_pretrained(str(tmp_path))) < 1e-4


def test_parity_would_notice_a_wrong_angle(tmp_path):
    model = hf_folder(tmp_path, rope_parameters=LLAMA3)
    with edit(tmp_path) as c:
        c["rope_parameters"]["high_freq_factor"] = 2.0
    assert distance(model, LLaMA.from_pretrained(str(tmp_path))) > 1e-2


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_one_file_or_several_in_fp32_or_bf16(tmp_path, kind, dtype, shard_size):
    model = hf_folder(tmp_path, kind=kind, shard_size=shard_size, dtype=dtype)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard_size == "10KB")
    # the same rounded weights, computed in fp32 by both
    assert distance(model, LLaMA.from_pretrained(str(tmp_path))) < 1e-4
    as_stored = LLaMA.from_pretrained(str(tmp_path), dtype)
    assert as_stored.norm.weight.dtype == dtype
    assert torch.equal(as_stored.layers[0].attention.wq.weight.float(), model.model.layers[0].self_attn.q_proj.weight)
    if shard_size == "10KB":
        (tmp_path / "model.safetensors.index.json").unlink()  # as for transformers: it says which files are the model
        refused(tmp_path, "index.json")


@pytest.mark.parametrize("shards, embedding_axis", [(1, 1), (2, 1), (2, 0)],
                         ids=["one file", "two as LLaMA 2", "two as LLaMA 3"])
def test_meta_layout(tmp_path, shards, embedding_axis):
    model = tiny_hf()
    meta_folder(tmp_path, model, shards, embedding_axis)
    llama = LLaMA.from_pretrained(str(tmp_path))
    assert (llama.args.vocab_size, llama.args.n_kv_heads) == (96, 2)
    assert distance(model, llama) < 1e-4
    meta_folder(tmp_path / "whole", model)
    whole = LLaMA.from_pretrained(str(tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), whole.parameters()))


@pytest.mark.parametrize("key, value", [("n_kv_heads", 4), ("vocab_size", 97)])
def test_params_that_the_weights_contradict(tmp_path, key, value):
    meta_folder(tmp_path, tiny_hf(), **{key: value})
    refused(tmp_path, f"params.json: {key}={value}, but its weights have")


@pytest.mark.parametrize("name, billions", [
    ("7B", 6.738), ("13B", 13.016), ("70B", 68.977), ("vicuna-7b-v1.5", 6.738), ("mistral-7b-instruct-v0.3", 7.248),
    ("qwen2-7b-instruct", 7.616), ("qwen3-8b", 8.191), ("deepseek-llm-7b-chat", 6.910), ("chinese-llama-2-7b", 6.929),
    ("smollm2-135m", 0.1345)])
def test_sizes(name, billions):
    raw = open_llm(f"random:{name}")  # the published numbers of parameters
    assert sum(torch.Size(s).numel() for s in raw.shapes.values()) / 1e9 == pytest.approx(billions, abs=0.0006)
    assert f"{raw.args.n_layers} layers" in raw.describe(torch.bfloat16) and name in LLM_SIZES


def test_an_llm_in_one_line(tmp_path, capsys):
    hf_folder(tmp_path)
    raw = open_llm(str(tmp_path))
    sizes = "llama, 2 layers of width 32, 4 heads (2 of keys) of 8, SwiGLU 48, 96 tokens"
    assert raw.describe(torch.float32) == f"LLM: {tmp_path}: {sizes}; 0.02M parameters, 0.000 GB in float32"
    seven = open_llm("random:7B")
    assert seven.describe(torch.bfloat16).endswith("; 6738.42M parameters, 13.477 GB in bfloat16")
    said = "; 6738.42M parameters, the blocks' matrices in 4 bits, the rest in bfloat16"
    assert seven.describe(torch.bfloat16, 4).endswith(said)
    assert seven.describe(torch.float32).endswith("; 6738.42M parameters, 26.954 GB in float32")
    assert [name for name, _ in raw.tensors()] == list(raw.shapes)
    assert f"loading {tmp_path}, GB: 0.00/0.00, " in capsys.readouterr().err  # in GB, all of them


def test_random_weights(monkeypatch):
    monkeypatch.setitem(LLM_SIZES, "tiny", ModelArgs(2048, 1, 16, 8, 96, 4096, 128, qkv_bias=True))
    a, b = (LLaMA.from_pretrained("random:tiny") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    w = a.tok_embeddings.weight  # more numbers than are drawn
    assert len(w.unique(dim=0)) == len(w) and (w.mean().abs() < 1e-3) and (w.std() * 2048**0.5 - 1).abs() < 0.01
    # nor are matrices alike
    assert not torch.equal(a.layers[0].feed_forward.w1.weight, a.layers[0].feed_forward.w3.weight)
    assert 0.1 < a(TOKENS).std() < 10 and a.norm.weight.eq(1).all() and a.layers[0].attention.wq.bias.eq(0).all()
    tokenizer = Tokenizer("random:tiny")
    assert tokenizer.decode(tokenizer.encode("schön, 雪")) == "schön, 雪"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, [2])
    refused("random:8B", "7B, 13B")


def test_meta_layout_that_says_everything(tmp_path):
    model = tiny_hf(rope_parameters=dict(rope_type="default", rope_theta=500.0))
    meta_folder(tmp_path, model, vocab_size=96, n_kv_heads=2, rope_theta=500.0, ffn_dim_multiplier=1.3)
    assert distance(model, LLaMA.from_pretrained(str(tmp_path))) < 1e-4


def test_folder_with_a_stray_params_json(tmp_path):
    # Mistral's folders on the hub hold a params.json of another kind beside the Hugging Face files
    model = hf_folder(tmp_path, kind="mistral")
    params = dict(dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, norm_eps=1e-6)
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert distance(model, LLaMA.from_pretrained(str(tmp_path))) < 1e-4


def test_names_there_and_back():
    for name in tiny_hf("qwen2").state_dict():
        assert to_hf(from_hf(name)) == name


@pytest.mark.long
def test_stories260K_continues_as_llama2_c_does(real):
    folder = real / "stories260K"
    llama, tokenizer = LLaMA.from_pretrained(str(folder)), Tokenizer(str(folder))
    start = llama.tok_embeddings(torch.tensor([[tokenizer.bos_id]]))
    # these weights end a story with BOS
    (ids, ended), = generate(llama, [(start, [1])], [tokenizer.bos_id], max_new_tokens=200)
    assert not ended
    assert tokenizer.decode(ids).encode() == (real / "stories260K_golden.txt").read_bytes()

# ---------------------------------------------------------------------------------------------------------------------
# Raw weights: what cannot be run exactly is an error that says why

def refused(folder, *words, tokens=None):
    with pytest.raises(BadInput) as e:
        llama = LLaMA.from_pretrained(str(folder))
        if tokens is not None:
            llama(tokens)
    assert all(w in str(e.value) for w in words), f"{words} not in: {e.value}"


@pytest.mark.parametrize("change, words", [
    (dict(model_type="gpt2"), ["model_type", "gpt2"]),
    (dict(attention_bias=True), ["attention_bias"]),
    (dict(mlp_bias=True), ["mlp_bias"]),
    (dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    (dict(quantization_config={"bits": 4}), ["quantization_config"]),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), ["rope_parameters", "yarn"]),
    (dict(rope_parameters=None, rope_scaling={"type": "longrope", "factor": 2.0}), ["rope_scaling", "longrope"]),
    # beside rope_parameters: transformers obeys it
    (dict(rope_scaling={"type": "linear"}), ["rope_scaling", "linear"]),
    # half of what llama3 needs
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}), ["rope_parameters"]),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
     ["rope_parameters", "partial_rotary_factor"]),
    (dict(intermediate_size=64), ["w1"]),
    (dict(num_hidden_layers=3), ["layers.2."]),
    (dict(num_hidden_layers=1), ["layers.1."]),
    (dict(tie_word_embeddings=True), ["tie_word_embeddings"]),  # though the file's lm_head differs from its embedding
], ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_config_that_cannot_be_run(tmp_path, change, words):
    hf_folder(tmp_path)
    with edit(tmp_path) as c:
        c.update(change)
    refused(tmp_path, *words)


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size", "vocab_size", "rms_norm_eps"])
def test_config_without_a_key(tmp_path, key):
    hf_folder(tmp_path)
    with edit(tmp_path) as c:
        del c[key]
    refused(tmp_path, "config.json", key)


def test_sliding_window_shorter_than_the_sequence(tmp_path):
    hf_folder(tmp_path, kind="mistral", sliding_window=49)
    refused(tmp_path, "sliding_window=49", tokens=TOKENS)
    llama = LLaMA.from_pretrained(str(tmp_path))
    llama(TOKENS[:, :49])
    h = llama.tok_embeddings(TOKENS[:1])
    llama(h=h, lens=[25, 25])  # a stream may be longer, its documents are not
    with pytest.raises(BadInput, match="sliding_window"):  # decoding would outgrow it
        generate(llama, [(h[:, :40], [40])], [1], max_new_tokens=10)
    # so with dynamic positions: plain up to there
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    hf_folder(tmp_path, rope_parameters=rope, max_position_embeddings=49)
    refused(tmp_path, "max_position_embeddings=49", tokens=TOKENS)
    LLaMA.from_pretrained(str(tmp_path))(TOKENS[:, :49])
    # Qwen2 says how long its window is, and that it does not use it
    hf_folder(tmp_path, kind="qwen2")
    with edit(tmp_path) as c:
        c.update(sliding_window=10, use_sliding_window=False)
    LLaMA.from_pretrained(str(tmp_path))(TOKENS)


def test_tensors_missing_surplus_misshaped(tmp_path):
    hf_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    good, up = load_file(file), "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in good.items() if k != up}, file)
    refused(tmp_path, "layers.1.feed_forward.w3.weight", up)  # in our words and in the file's
    save_file({**good, "model.layers.1.self_attn.q_norm.weight": torch.ones(8)}, file)
    refused(tmp_path, "model.layers.1.self_attn.q_norm.weight")
    save_file({**good, up: good[up][:-1].clone()}, file)
    refused(tmp_path, up, "(47, 32)", "(48, 32)")
    save_file({**good, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    LLaMA.from_pretrained(str(tmp_path))  # a table that old files hold, no weight


def test_damaged_files(tmp_path):
    refused(tmp_path, str(tmp_path), "params.json", "config.json")  # an empty folder
    refused(tmp_path / "nowhere", "nowhere")
    hf_folder(tmp_path, shard_size="10KB")
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"", b"\xff" * 100):
        last.write_bytes(damaged)
        refused(tmp_path, last.name)
    last.unlink()
    refused(tmp_path, last.name)
    for f in tmp_path.glob("*.safetensors*"):
        f.unlink()
    refused(tmp_path, "safetensors")
    for text in ("{", "[]", "\udcff"):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        refused(tmp_path, "config.json")


def test_shards_of_a_meta_folder_are_missing(tmp_path):
    meta_folder(tmp_path, tiny_hf(), 4)
    for there, gone in ((3, "01"), (2, "03"), (1, "00")):
        (tmp_path / f"consolidated.{gone}.pth").unlink()
        refused(tmp_path, f"{there} of 4 shards")


def test_damaged_meta_files(tmp_path):
    meta_folder(tmp_path, tiny_hf())
    file, params = tmp_path / "consolidated.00.pth", (tmp_path / "params.json").read_text()
    whole, tensors = file.read_bytes(), torch.load(file)
    for damaged in (whole[:-100], whole[:len(whole) // 2], b"", b"weights"):
        file.write_bytes(damaged)
        refused(tmp_path, "consolidated.00.pth")
    for value in ([1, 2], {"a": 1}, torch.ones(3), {"model": tensors}):
        torch.save(value, file)
        refused(tmp_path, "consolidated.00.pth", "tensors")
    torch.save({k: v for k, v in tensors.items() if k != "layers.1.ffn_norm.weight"}, file)
    refused(tmp_path, "layers.1.ffn_norm.weight")
    torch.save({**tensors, "layers.1.attention.wq.bias": torch.ones(32)}, file)
    refused(tmp_path, "layers.1.attention.wq.bias")
    wk = [f"layers.{n}.attention.wk.weight" for n in (0, 1)]
    for name in ("tok_embeddings.weight", "output.weight", *wk):
        torch.save({**tensors, name: tensors[name][:-1].clone()}, file)
        refused(tmp_path, "its configuration says")
    file.unlink()
    refused(tmp_path, "consolidated.00.pth")
    file.write_bytes(whole)
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        (tmp_path / "params.json").write_text(params)
        with edit(tmp_path, "params.json") as p:
            del p[key]
        refused(tmp_path, "params.json", key)
    (tmp_path / "params.json").write_text(params)
    with edit(tmp_path, "params.json") as p:
        p["use_scaled_rope"] = True  # LLaMA 3.1, whose params.json does not say by how much
    refused(tmp_path, "use_scaled_rope")


class Bomb:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_never_execute_code(tmp_path):
    meta_folder(tmp_path, tiny_hf())
    proof, file = str(tmp_path / "executed"), tmp_path / "consolidated.00.pth"
    torch.save({"tok_embeddings.weight": Bomb(proof)}, file)
    refused(tmp_path, "consolidated.00.pth")
    torch.save({"tok_embeddings.weight": Bomb(proof)}, file, _use_new_zipfile_serialization=False)
    refused(tmp_path, "consolidated.00.pth")
    file.write_bytes(pickle.dumps({"tok_embeddings.weight": Bomb(proof)}))
    refused(tmp_path, "consolidated.00.pth")
    assert not os.path.exists(proof)

# ---------------------------------------------------------------------------------------------------------------------
# The band

def dense(q, k, v, window, doc=None):
    """local_attention as the paper writes it: every product, then a mask."""
    i = torch.arange(q.shape[2])
    see = ((i[:, None] - i).abs() <= window // 2)[None]
    if doc is not None:
        see = see & (doc[:, :, None] == doc[:, None])
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~see[:, None], float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("with_doc", [False, True], ids=["one clip", "clips"])
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 200])
def test_local_attention_equals_dense(T, with_doc):
    torch.manual_seed(T)
    doc = torch.randint(0, 4, (2, T)).sort(1)[0] if with_doc else None
    for window in (0, 1, 4, 8, 9, 16):
        q, k, v = (torch.randn(2, 3, T, 8, requires_grad=True) for _ in range(3))
        up = torch.randn(2, 3, T, 8)  # the gradient that comes from above
        ours, theirs = local_attention(q, k, v, window, doc), dense(q, k, v, window, doc)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), up), torch.autograd.grad(theirs, (q, k, v), up)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_band_by_hand():
    # equal scores: a row of the output shows whom it saw
    nothing, v = torch.zeros(1, 1, 6, 6), torch.eye(6)[None, None]
    seen = lambda window, doc=None: (local_attention(nothing, nothing, v, window, doc)[0, 0] > 0).sum(1).tolist()
    assert seen(4) == [3, 4, 5, 5, 4, 3]
    assert seen(4, torch.tensor([[0, 0, 0, 1, 1, 1]])) == [3, 3, 3, 3, 3, 3]
    assert seen(0) == [1] * 6


def test_local_transformer_sees_its_reach_and_no_further():
    ltn = awake(LocalTransformer(16, 2, 2, 4)).eval()
    x = torch.randn(1, 150, 16)
    other = x.clone()
    other[0, 70] += 3
    with torch.no_grad():
        moved = (ltn(x) - ltn(other)).abs().amax(2)[0] > 1e-6
    assert moved.nonzero()[:, 0].tolist() == list(range(66, 75))  # two layers of +-2


def test_local_transformer_on_two_clips_in_a_stream():
    ltn = awake(LocalTransformer(16, 2, 2, 8)).eval()
    a, b = torch.randn(1, 70, 16), torch.randn(1, 33, 16)
    doc = torch.tensor([[0] * 70 + [1] * 33])
    with torch.no_grad():
        both, alone = ltn(torch.cat([a, b], 1), doc), torch.cat([ltn(a), ltn(b)], 1)
        torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
        assert (ltn(torch.cat([a, b], 1)) - alone).abs().max() > 1e-2  # without clip numbers they do see each other
    with pytest.raises(BadInput, match="ltn_heads=3"):
        LocalTransformer(16, 1, 3, 4)


def test_local_transformer_by_hand():
    """Pre-norm blocks: banded attention with rotary positions, then SwiGLU of 8/3 of the width; a norm at the end."""
    ltn, T, heads = awake(LocalTransformer(16, 2, 2, 4)).eval(), 40, 2
    assert ltn.layers[0].feed_forward.w1.weight.shape == (42, 16)
    for name, w in ltn.named_parameters():
        w.data *= 0.005 if ".wo." in name or ".w2." in name else 1
    p = {k: v.detach().double() for k, v in ltn.state_dict().items()}
    torch.manual_seed(5)
    x = torch.randn(1, T, 16) * 3e-3  # all that meets a norm is about as small as the root of its epsilon
    turn = torch.polar(torch.ones(T, 4).double(), torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(4).double() / 4))

    def norm(h, name):
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"]

    def heads_of(h):  # (1, T, 16) -> (1, heads, T, 8)
        return h.unflatten(-1, (heads, 8)).transpose(1, 2)

    def turned(h):  # number i of the first half and number i of the second are one complex number
        z = torch.complex(h[..., :4], h[..., 4:]) * turn
        return torch.cat([z.real, z.imag], -1)

    h = x.double()
    for n in ("layers.0.", "layers.1."):
        a = norm(h, n + "attention_norm")
        q, k, v = (heads_of(a @ p[f"{n}attention.{w}.weight"].T) for w in ("wq", "wk", "wv"))
        h = h + dense(turned(q), turned(k), v, 4).transpose(1, 2).flatten(2) @ p[n + "attention.wo.weight"].T
        a = norm(h, n + "ffn_norm")
        w1, w2, w3 = (p[f"{n}feed_forward.{w}.weight"].T for w in ("w1", "w2", "w3"))
        h = h + ((a @ w1) * torch.sigmoid(a @ w1) * (a @ w3)) @ w2
    with torch.no_grad():
        torch.testing.assert_close(ltn(x), norm(h, "norm").float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width, heads", [(16, 3), (18, 4), (6, 2), (15, 5)], ids=str)
def test_local_transformer_refuses_heads_that_do_not_divide_or_are_odd(width, heads):
    with pytest.raises(BadInput, match=f"ltn_heads={heads}: .* width {width}"):
        LocalTransformer(width, 1, heads, 4)


@pytest.mark.parametrize("kind", ADAPTORS)
def test_adaptor_by_hand(kind):
    adaptor = awake(Adaptor(5, 7, kind))
    assert sorted(dict(adaptor.named_parameters())) == ["w1.weight", "w2.weight"][:1 if kind == "linear" else 2]
    x = torch.randn(11, 5)
    gelu = lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2  # itself, not its approximation by tanh
    with torch.no_grad():
        w1, w2 = (w.T for w in (adaptor.w1.weight, adaptor.w1.weight if kind == "linear" else adaptor.w2.weight))
        want = {"mlp": lambda: gelu(x @ w1) @ w2, "mlp_noact": lambda: x @ w1 @ w2, "linear": lambda: x @ w1}[kind]()
        torch.testing.assert_close(adaptor(x), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="adaptor=conv"):
        Adaptor(5, 7, "conv")

# ---------------------------------------------------------------------------------------------------------------------
# Packing

def test_packed_equals_one_by_one():
    llama, lens = tiny_llama(), [5, 1, 17, 9]
    tokens = TOKENS.flatten()[:sum(lens)]
    with torch.no_grad():
        alone = torch.cat([llama(t[None])[0] for t in tokens.split(lens)])
        packed = llama(tokens[None], lens=lens)[0]
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
        at = torch.tensor([4, 5, 31, 0])
        picked = llama(tokens[None], lens=lens, at=at)[0]
    torch.testing.assert_close(picked, alone[at], rtol=1e-4, atol=1e-5)


def test_neither_checkpointing_nor_leaving_positions_out_changes_a_gradient():
    found, at = [], torch.tensor([7, 19, 20, 48])
    for checkpointing, picked in itertools.product((False, True), repeat=2):
        llama = tiny_llama()
        llama.activation_checkpointing = checkpointing
        h = llama.tok_embeddings(TOKENS[:1]).detach().requires_grad_()
        logits = llama(h=h, lens=[20, 30], at=at)[0] if picked else llama(h=h, lens=[20, 30])[0, at]
        loss = F.cross_entropy(logits, TOKENS[1, at])
        loss.backward()
        found.append([loss.detach(), h.grad] + [p.grad for p in llama.layers.parameters()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_last_feed_forward_sees_only_the_wanted_positions():
    llama, seen = tiny_llama(), []
    for layer in llama.layers:
        layer.feed_forward.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        llama(TOKENS[:1], lens=[20, 30], at=torch.tensor([19, 49]))
    assert seen == [50] * (len(llama.layers) - 1) + [2]

# ---------------------------------------------------------------------------------------------------------------------
# Decoding

LENS = [3, 11, 1, 6, 20, 2]  # ragged prefixes


def prefixes(dim=32):
    torch.manual_seed(1)
    return torch.randn(sum(LENS), dim) * 0.2


@torch.no_grad()
def next_log_probs(llama, prefix, answers):
    """log p of the token after prefix + each answer (equally long lists of ids), by a full forward."""
    written = llama.tok_embeddings(torch.tensor(answers, dtype=torch.long))
    h = torch.cat([prefix.expand(len(answers), -1, -1), written], 1)
    return llama(h=h)[:, -1].log_softmax(-1)


def slow_beam(llama, prefix, eos, beam, length_penalty, max_new):
    """generate's docstring, one clip at a time, with lists and full forwards."""
    live, ended = [(0.0, [])], []
    for step in range(1, max_new + 1):
        log_p = next_log_probs(llama, prefix, [ids for _, ids in live])
        candidates = [(s + log_p[b, v].item(), ids + [v]) for b, (s, ids) in enumerate(live)
                      for v in range(log_p.shape[1])]
        candidates.sort(reverse=True)
        ended += [(s / ((5 + step) / 6) ** length_penalty, ids[:-1]) for s, ids in candidates[:beam] if ids[-1] in eos]
        live = [c for c in candidates if c[1][-1] not in eos][:beam]
        if len(ended) >= beam:
            break
    return (max(ended)[1], True) if ended else (live[0][1], False)


def test_greedy_is_the_argmax_of_full_forwards():
    llama, h = tiny_llama(), prefixes()
    found = generate(llama, [(h[None], LENS)], [96], max_new_tokens=40)  # 96 is no token: nothing ends it
    for prefix, (ids, ended) in zip(h.split(LENS), found):
        assert not ended and len(ids) == 40  # the cache makes room in steps of 32
        for i, token in enumerate(ids):
            assert token == next_log_probs(llama, prefix, [ids[:i]])[0].argmax()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beam", [1, 2, 3, 5])
@pytest.mark.parametrize("eos", [[3], [1, 3, 5, 7]], ids=["one EOS", "four EOS"])
def test_beam_equals_slow_beam_search_and_batched_equals_single(beam, length_penalty, eos):
    # few words, so that EOS comes up early, late and never
    llama, h = tiny_llama(vocab_size=16), prefixes()
    how = dict(beam=beam, length_penalty=length_penalty, max_new_tokens=9)
    batched = generate(llama, [(h[None], LENS)], eos, **how)
    for prefix, found in zip(h.split(LENS), batched):
        assert found == slow_beam(llama, prefix, eos, beam, length_penalty, 9)
        assert [found] == generate(llama, [(prefix[None], [len(prefix)])], eos, **how)
        assert not set(found[0]) & set(eos)
    few, many = sum(LENS[:2]), len(h) - sum(LENS[:2])  # prefixes that are read in parts, padded each for itself
    assert batched == generate(llama, zip(h[None].split([few, many], 1), (LENS[:2], LENS[2:])), eos, **how)


def test_beam_cases_are_not_all_alike():
    llama, h = tiny_llama(vocab_size=16), prefixes()
    for eos in ([3], [1, 3, 5, 7]):
        found = [a for n in (1, 2, 5) for a in generate(llama, [(h[None], LENS)], eos, beam=n, max_new_tokens=9)]
        lens = {len(ids) for ids, _ in found}
        assert len(lens) > 2, lens
    penalised = [generate(llama, [(h[None], LENS)], [3], 5, p, 9) for p in (0.0, 2.0)]
    assert penalised[0] != penalised[1]


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
@pytest.mark.long
def test_wide_beam_finds_the_best_of_all_answers(length_penalty):
    llama, h, eos = tiny_llama(vocab_size=5), prefixes(), 2
    words = [0, 1, 3, 4]
    how = dict(beam=100, length_penalty=length_penalty, max_new_tokens=3)  # nothing falls off the beam
    found = generate(llama, [(h[None], LENS)], [eos], **how)
    for prefix, (ids, ended) in zip(h.split(LENS), found):
        scores = {}
        for n in range(3):
            for answer in itertools.product(words, repeat=n):
                steps = [next_log_probs(llama, prefix, [list(answer[:i])])[0, t].item()
                         for i, t in enumerate(answer + (eos,))]
                scores[answer] = sum(steps) / ((5 + n + 1) / 6) ** length_penalty
        assert ended and tuple(ids) == max(scores, key=scores.get)


def test_max_new_tokens_cuts():
    llama, h = tiny_llama(), prefixes()
    long = generate(llama, [(h[None], LENS)], [96], max_new_tokens=12)
    short = generate(llama, [(h[None], LENS)], [96], max_new_tokens=4)
    assert [(ids[:4], False) for ids, _ in long] == short
    first = generate(llama, [(h[None], LENS)], [96], beam=3, max_new_tokens=1)
    assert all(len(ids) == 1 and not ended for ids, ended in first)


class Words:
    """A tokenizer of numbers: "7 8" <-> [7, 8]."""
    bos_id, eos_ids, eos_id, vocab_size = 1, [2], 2, 96
    encode = staticmethod(lambda text: [int(w) for w in text.split()])
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))


def test_translate_keeps_the_order_and_does_not_depend_on_the_batch(tmp_path, capsys):
    model = tiny_sllama(tmp_path, prompt="5 {clip} 7")
    torch.manual_seed(0)
    features = [torch.randn(n, 24) for n in (9, 2, 30, 1, 14)]
    together = translate(model, features, Words, beam=3, max_new_tokens=8, batch_size=5)
    assert together == translate(model, features, Words, beam=3, max_new_tokens=8, batch_size=2)
    assert together == [translate(model, [f], Words, beam=3, max_new_tokens=8)[0] for f in features]
    assert len(set(together)) > 1
    translate(model, features, Words, beam=1, max_new_tokens=1)
    assert "did not end" in capsys.readouterr().err  # a cut answer is said aloud

# ---------------------------------------------------------------------------------------------------------------------
# SLLaMA

def tiny_sllama(folder, tensors={}, seed=0, lora=(), **changes):
    """Built on the meta device, then loaded, as train.py does. The LLM is frozen. lora: the layers that have it."""
    hf_folder(folder)
    cfg = page(**dict(ltn_dim=16, ltn_layers=1, ltn_heads=2, window=4) | changes)
    raw = open_llm(str(folder))
    with torch.device("meta"):
        model = SLLaMA(raw.args, 24, cfg)
    model.llm.requires_grad_(False)
    if lora:
        apply_lora(model.llm, 2, 4, lora)
    model.load(raw, "cpu", seed, tensors)
    return model.eval()


def two_clips():
    torch.manual_seed(2)
    first = Sample(torch.randn(3, 24), [1, 5], [7], [8, 9, 2])
    return [first, Sample(torch.randn(2, 24), [1, 5], [7], [10, 2])]


def test_frames_come_in_at_the_size_of_words_in_bfloat16_too(tmp_path):
    """Each row's length is taken in float32: in bfloat16 it would be off by up to 1 part in 256."""
    hf_folder(tmp_path, dtype=torch.bfloat16)
    raw = open_llm(str(tmp_path))
    words = raw.read("tok_embeddings.weight")
    assert words.dtype == torch.bfloat16
    with torch.device("meta"):
        model = SLLaMA(raw.args, 24, page(ltn_dim=16, ltn_layers=1, ltn_heads=2))
    model.load(raw, "cpu", 0)
    assert torch.isclose(model.scale, words.double().pow(2).mean().sqrt().float(), rtol=1e-5)


def test_load_gives_every_parameter_a_value(tmp_path):
    model = tiny_sllama(tmp_path)
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        assert t.device.type == "cpu" and t.isfinite().all(), name
        assert name == "mean" or t.abs().sum() > 0, name
    rms = model.llm.tok_embeddings.weight.pow(2).mean().sqrt()
    assert torch.isclose(model.scale, rms)  # frames come in at the size of words
    assert not model.mean.any() and model.std.eq(1).all()  # features as they are, until a training set says more
    assert distance(tiny_hf(), model.llm) < 1e-4
    same, other = tiny_sllama(tmp_path), tiny_sllama(tmp_path, seed=1)
    for name, p in model.named_parameters():
        assert torch.equal(p, same.get_parameter(name)), name
        drawn = p.requires_grad and p.dim() > 1
        assert torch.equal(p, other.get_parameter(name)) != drawn, name


def test_load_takes_a_checkpoint_and_names_what_does_not_fit(tmp_path):
    model = tiny_sllama(tmp_path)
    state = {k: v.detach() + 1 for k, v in model.vision_state().items()}
    assert not any(k.startswith("llm.") for k in state)
    for name, value in tiny_sllama(tmp_path, state).vision_state().items():
        assert torch.equal(value, state[name]), name
    for change, word in (({"adaptor.w1.weight": torch.ones(3, 3)}, "adaptor.w1.weight"),
                         ({"adaptor.w9.weight": torch.ones(3)}, "adaptor.w9.weight")):
        with pytest.raises(BadInput, match=word):
            tiny_sllama(tmp_path, {**state, **change})
    for missing in ("ltn.norm.weight", "std"):
        with pytest.raises(BadInput, match=missing):
            tiny_sllama(tmp_path, {k: v for k, v in state.items() if k != missing})


def test_load_takes_all_of_a_lora_or_none(tmp_path):
    state = {k: v.detach().clone() for k, v in tiny_sllama(tmp_path).vision_state().items()}
    load = lambda state: tiny_sllama(tmp_path, state, lora=["wq", "w2"])
    fresh = load(state)  # a stage that only now begins with LoRA
    own = {k: p.detach() for k, p in fresh.named_parameters() if "lora_" in k}
    assert len(own) == 2 * 2 * 2 and {"lora_A", "lora_B"} == {k.split(".")[-1] for k in own}
    assert all(p.any() == k.endswith("lora_A") for k, p in own.items())
    state |= {k: p + 1 for k, p in own.items()}
    for name, value in load(state).named_parameters():
        assert name not in state or torch.equal(value, state[name]), name
    for name in own:
        with pytest.raises(BadInput, match=f"has no {name}"):
            load({k: v for k, v in state.items() if k != name})
    with pytest.raises(BadInput, match="has no .*lora_"):
        load({k: v for k, v in state.items() if not k.endswith("lora_B")})


def test_what_a_checkpoint_of_the_vision_holds(tmp_path):
    """What is outside of the LLM, with the statistics, and the word embeddings where they learn; never LoRA."""
    state = {k: v.detach().clone() for k, v in tiny_sllama(tmp_path).vision_state().items()}
    block = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
             "feed_forward.w3", "attention_norm", "ffn_norm"]
    others = ["ltn.norm.weight", "proj.weight", "adaptor.w1.weight", "adaptor.w2.weight", "mean", "std", "scale"]
    assert sorted(state) == sorted([f"ltn.layers.0.{w}.weight" for w in block] + others)
    model = tiny_sllama(tmp_path, state, lora=["wq", "w2"])
    assert model.vision_state().keys() == state.keys()
    words = "llm.tok_embeddings.weight"
    model.llm.tok_embeddings.requires_grad_(True)
    assert model.vision_state().keys() == state.keys() | {words}
    # embeddings that have learnt come back, also where they are frozen now; the scale stays the checkpoint's
    state |= {words: torch.randn(96, 32), "scale": torch.tensor(0.7)}
    back = tiny_sllama(tmp_path, state)
    assert torch.equal(back.llm.tok_embeddings.weight, state[words]) and back.scale == torch.tensor(0.7)
    assert back.vision_state().keys() == state.keys()  # and stay


@pytest.mark.parametrize("rows, processes", [(5, 2), (6, 2), (5, 4), (7, 3), (1, 2)], ids=str)
def test_a_process_fills_its_own_rows(rows, processes):
    """As FSDP2 deals them out: blocks of rows, all as large as the first; the last ones may have fewer, or none."""
    whole = torch.arange(rows * 3.0).view(rows, 3)
    expected = [*whole.split(math.ceil(rows / processes)), *[whole[:0]] * processes]
    for rank in range(processes):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
        linear = torch.nn.Linear(3, rows, bias=False, device="meta")
        fully_shard(linear, mesh=init_device_mesh("cpu", (processes,)))
        fill(linear.to_empty(device="cpu").weight, whole)
        assert torch.equal(linear.weight.detach().to_local(), expected[rank])
        dist.destroy_process_group()


@pytest.mark.parametrize("window", [0, 4, 8, 12, 16])
def test_window_of_the_configuration_is_the_reach_of_a_frame(tmp_path, window):
    model = tiny_sllama(tmp_path, window=window)
    stream = lambda x: model.embed(pack([Sample(x, [], [], None)]))[0]
    x = torch.randn(40, 24)
    other = x.clone()
    other[20] += 3
    with torch.no_grad():
        moved = (stream(x) - stream(other)).abs().amax(1) > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(20 - window // 2, 20 + window // 2 + 1))  # one layer


def test_language_of_the_configuration_is_in_the_prompt(tmp_path):
    prompt = "<sign> {clip} </sign> into {language} text, {language}"
    model = tiny_sllama(tmp_path, prompt=prompt, language="Chinese")
    assert model.prompt == "<sign> {clip} </sign> into Chinese text, Chinese"


def test_loss_of_a_bfloat16_llm_is_computed_in_float32(tmp_path):
    model = tiny_sllama(tmp_path)
    model.llm.bfloat16()
    batch = pack(two_clips() * 20)  # so many tokens that their sum in bfloat16 would be off by whole numbers
    with torch.no_grad():
        loss, n = model(batch)
        logits = model.llm(h=model.embed(batch), lens=batch.lens, at=batch.target_at)[0]
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and n == 100
    expected = -logits.double().log_softmax(-1)[torch.arange(100), batch.targets].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_frames_enter_standardised_and_at_the_size_of_words(tmp_path):
    """In float32, though a store's features are float16: their mean may be large beside their deviation."""
    model = tiny_sllama(tmp_path, ltn=False, adaptor="linear")
    torch.manual_seed(4)
    model.mean.copy_(torch.randn(24) * 300), model.std.copy_(torch.rand(24) + 0.01), model.scale.fill_(0.3)
    x = (model.mean + torch.randn(6, 24)).half()
    with torch.no_grad():
        h = model.embed(pack([Sample(x[:2], [1, 5], [7], [8, 2]), Sample(x[2:], [], [], None)]))[0]
        frames = (x.double() - model.mean) / model.std @ model.adaptor.w1.weight.double().T * 0.3
        words = model.llm.tok_embeddings(torch.tensor([1, 5, 7, 8]))
    expected = torch.cat([words[:2], frames[:2].float(), words[2:], frames[2:].float()])
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-4)


def test_initial_weights_are_a_function_of_name_shape_and_seed():
    torch.manual_seed(3)
    a = init_weight("proj.weight", (64, 256), 0)
    torch.manual_seed(4)
    assert torch.equal(a, init_weight("proj.weight", (64, 256), 0))  # not of the global generator
    for other in (init_weight("other.weight", (64, 256), 0), init_weight("proj.weight", (64, 256), 1)):
        assert not torch.equal(a, other)
    assert abs(a.std().item() * 16 - 1) < 0.05  # 1/sqrt(fan in)
    assert init_weight("x.lora_B", (4, 2), 0).abs().sum() == 0
    assert init_weight("x.lora_A", (2, 16), 0).abs().max() <= 0.25  # kaiming_uniform(a=sqrt(5)): 1/sqrt(fan in)


def test_initial_weights_by_kind():
    assert init_weight("norm.weight", (7,), 0).eq(1).all() and init_weight("conv.bias", (7,), 0).eq(0).all()
    for shape in ((500, 40), (300, 10, 2, 2)):  # of a convolution all that a number is made of counts
        a, w = init_weight("x.lora_A", shape, 0), init_weight("x.weight", shape, 0)
        assert a.std().item() == pytest.approx((3 * 40) ** -0.5, rel=0.03) and a.mean().abs() < 0.005
        assert 0.99 < a.max() * 40**0.5 <= 1 and -1 <= a.min() * 40**0.5 < -0.99  # evenly between these two
        assert w.std().item() == pytest.approx(40**-0.5, rel=0.03) and w.abs().max() > 3 * 40**-0.5  # normally
    seeds = [init_weight("x.weight", (3, 3), seed) for seed in (0, 1, 2, 1337, 2**31)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seeds, 2))


def test_targets_by_hand():
    batch = pack(two_clips())
    #                               0  1  2  3  4  5  6  7    8  9 10 11 12  13
    assert batch.tokens.tolist() == [1, 5, 0, 0, 0, 7, 8, 9] + [1, 5, 0, 0, 7, 10]
    assert batch.frame_at.tolist() == [2, 3, 4, 10, 11] and batch.clip.tolist() == [0, 0, 0, 1, 1]
    assert batch.target_at.tolist() == [5, 6, 7, 12, 13]  # the last of the prompt, and each token of the answer
    assert batch.targets.tolist() == [8, 9, 2, 10, 2]  # the answers and their EOS, nothing else
    batch = pack([Sample(torch.zeros(2, 24), [1], [], [8, 2])])  # align: nothing between the frames and the answer
    assert batch.tokens.tolist() == [1, 0, 0, 8]
    assert batch.target_at.tolist() == [2, 3] and batch.targets.tolist() == [8, 2]


@pytest.mark.parametrize("changes", [{}, dict(ltn=False), dict(ltn_dim=0, ltn_heads=4, adaptor="linear")],
                         ids=["", "no ltn", "no projection"])
def test_loss_equals_clip_by_clip(tmp_path, changes):
    model = tiny_sllama(tmp_path, **changes)
    model.mean.fill_(0.3), model.std.fill_(1.7)
    loss, n = model(pack(two_clips()))
    expected = 0
    for s in two_clips():  # no packing, no index: the clip's pieces side by side
        x = (s.features - 0.3) / 1.7
        x = x if model.proj is None else x @ model.proj.weight.T
        x = x if model.ltn is None else model.ltn(x[None])[0]
        word = lambda ids: model.llm.tok_embeddings(torch.tensor(ids))
        h = torch.cat([word(s.before), model.adaptor(x) * model.scale, word(s.after), word(s.answer)])
        log_p = model.llm(h=h[None])[0].log_softmax(-1)
        start = len(h) - len(s.answer)
        expected -= sum(log_p[start + i - 1, token] for i, token in enumerate(s.answer))
    assert n == 5
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_what_learns_and_nothing_else(tmp_path):
    model = tiny_sllama(tmp_path)
    model(pack(two_clips()))[0].backward()
    for name, p in model.named_parameters():
        if name.startswith("llm."):
            assert p.grad is None, name
        else:
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_batch_without_targets(tmp_path):
    # the share of a process that has run out of clips: it must add nothing, and no NaN
    model = tiny_sllama(tmp_path, label_smoothing=0.1).train()
    loss, n = model(pack(two_clips(), with_targets=False))
    assert loss.item() == 0 and n == 0
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or not p.grad.any(), name  # any() is true for NaN


def test_label_smoothing_is_for_training_alone(tmp_path):
    plain, smooth = tiny_sllama(tmp_path), tiny_sllama(tmp_path, label_smoothing=0.2)
    batch = pack(two_clips())
    assert torch.equal(plain(batch)[0], smooth(batch)[0])
    assert not torch.isclose(plain.train()(batch)[0], smooth.train()(batch)[0])

# ---------------------------------------------------------------------------------------------------------------------
# Backbones

def googlenet(seed=0):
    """A GoogLeNet whose BatchNorms have met data, so that eval mode differs from training."""
    torch.manual_seed(seed)
    net = GoogLeNet()
    for name, t in net.state_dict().items():
        if name.endswith("running_var") or "bn.weight" in name:
            t.uniform_(0.8, 1.2)
        elif "running_mean" in name or "bn.bias" in name:
            t.normal_(0, 0.1)
        elif t.dim() == 4:
            t.normal_(0, (2 / t[0].numel()) ** 0.5)
    return net


def test_googlenet_is_a_function_of_the_frame():
    net, x = googlenet(), torch.rand(2, 3, 224, 224) * 2 - 1
    a = net.features(x)
    assert a.shape == (2, 1024) and a.std() > 0.01 and not a.requires_grad
    net.train()
    assert not any(m.training for m in net.modules())
    torch.testing.assert_close(net.features(x[:1]), a[:1], rtol=1e-4, atol=1e-5)  # whatever frames are beside it
    assert sum(p.numel() for p in net.parameters()) == 6_624_904 - 1_025_000  # torchvision's, less its classifier
    # torchvision's too, and not PyTorch's default
    assert all(m.eps == 0.001 for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_googlenet_loads_its_weights(tmp_path):
    net = googlenet()
    state = {**net.state_dict(), "fc.weight": torch.ones(1000, 1024), "aux1.conv.conv.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "new.pth")
    # the format of torchvision's file, which is from 2018
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "net.safetensors")
    for file in ("new.pth", "old.pth", "net.safetensors"):
        loaded = GoogLeNet().load(str(tmp_path / file)).state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in net.state_dict().items() if "num_batches" not in k), file
    name = "inception4c.branch3.1.bn.running_var"
    for change, word in (({name: None}, name), ({name: torch.ones(3)}, name),
                         ({"inception6.conv.weight": torch.ones(1)}, "inception6")):
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path / "bad.pth")
        with pytest.raises(BadInput, match=word):
            GoogLeNet().load(str(tmp_path / "bad.pth"))


@pytest.mark.parametrize("aux", [True, False])
def test_googlenet_equals_torchvision(tmp_path, aux):
    models = pytest.importorskip("torchvision.models")
    theirs = models.googlenet(weights=None, init_weights=False, aux_logits=aux, transform_input=True).eval()
    theirs.load_state_dict(googlenet().state_dict(), strict=False)
    torch.save(theirs.state_dict(), tmp_path / "googlenet.pth")
    theirs.fc, ours = torch.nn.Identity(), GoogLeNet().load(str(tmp_path / "googlenet.pth"))
    x = torch.rand(2, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():  # frames prepared as torchvision's users do, and as data.py does
        a, b = ours.features((x - 0.5) / 0.5), theirs((x - mean) / std)
    assert a.std() > 0.01 and (a - b).abs().max() < 1e-4


def test_random_cnn_is_the_same_for_everybody():
    torch.manual_seed(5)
    a, x = RandomCNN(), torch.rand(2, 3, 64, 64)
    torch.manual_seed(6)
    b = RandomCNN()
    assert torch.equal(a.features(x), b.features(x)) and a.features(x).shape == (2, 1024)
    assert not torch.equal(a.features(x), RandomCNN(seed=1).features(x))
    assert not any(p.requires_grad for p in a.parameters())

# ---------------------------------------------------------------------------------------------------------------------
# Devices

class Devices(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses an operation among tensors of two devices, but for copies and plain numbers, as CUDA would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = {x.device.type for x in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor) and x.dim()}
        assert len(found) < 2 or "copy" in str(func), f"{func} of {found}"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("is_cuda, sizes", [(False, [8, 8, 4]), (True, [20])])
def test_prefixes_that_are_read_together(is_cuda, sizes):
    """A CPU saves filling, a GPU starts fewer kernels."""
    device = SimpleNamespace(is_cuda=is_cuda, device="cpu")
    model = SimpleNamespace(mean=device, embed=lambda part: part.tokens)
    parts = list(streams_of(model, [torch.zeros(n, 4) for n in range(1, 21)], ([1], [5, 6])))
    assert [len(lens) for _, lens in parts] == sizes
    assert [n for _, lens in parts for n in lens] == list(range(4, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing, bits", [(False, 16), (True, 16), (False, 8), (True, 4)])
def test_everything_stays_on_its_device(monkeypatch, dtype, checkpointing, bits):
    """On the meta device, which computes nothing but lets no tensor of another device come in: as on a GPU."""
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=60, head_dim=8)
    cfg = page(ltn_dim=16, ltn_layers=2, ltn_heads=2, window=4, label_smoothing=0.1, llm_bits=bits)
    with torch.device("meta"):
        model = SLLaMA(args, 24, cfg).to(dtype)
    apply_lora(model.llm, 2, 4, ["wq", "w2"], 0.1)
    model.llm.activation_checkpointing = checkpointing
    samples = [Sample(torch.randn(n, 24), [1, 5], [6], answer) for n, answer in ((9, [7, 2]), (1, [8, 9, 2]))]
    with Devices():
        loss, n = model(pack(samples, "meta"))
        loss.backward()
    assert loss.device.type == "meta" and n == 5
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.device.type == "meta" and p.grad.dtype == p.dtype for p in learning)

    # what the search reads off a tensor, the meta device has not: no beam ends, and tokens are made up
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: False)
    monkeypatch.setattr(torch.Tensor, "__index__", lambda t: 3)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: [0] * len(t))
    model.requires_grad_(False).eval()
    with Devices():
        found = generate(model.llm, streams_of(model, [s.features for s in samples], ([1, 5], [6])), [2, 3], 3, 1.0, 5)
    assert [len(ids) for ids, _ in found] == [5, 5]

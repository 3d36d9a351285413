"""
The folders of the paper's seven LLMs and of Qwen3 as they are published: the same files under the same names, with
the same keys in them, tiny random weights and tokenizers. Ids and logits are those of transformers.

    python -m pytest tests/test_layouts.py
"""
import base64
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_model import distance, meta_folder, tiny_hf

import train
from lib.program import BadInput
from lib.tokenizer import Tokenizer
from lib.weights import write_hf
from model import LLaMA

pytest.importorskip("google.protobuf", reason="transformers reads a tokenizer.model with it")
transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
pytestmark = pytest.mark.filterwarnings("ignore")

CORPUS = ["am tag zehn grad in köln", "translate the sign language into german text", "schöne grüße und guten abend",
          "今天我想吃面条。", "sign </sign> text, [INST] user: hello!"] * 20
TEXTS = ["am tag zehn grad", " ein leerzeichen", "zwei  leerzeichen", "Köln, Grüße und ÄÖÜß", "今天我想吃面条。", "",
         "😀 und 雪", "eine\nzeile", "am ende ", "[INST] <sign>", "</sign> \n Translate the sign language. [/INST]",
         "<|im_start|>user\nhallo<|im_end|>\n<|im_start|>assistant", "ein</s><s> anderer", "3,14 % & mehr!", "\t", "▁a"]

# ---------------------------------------------------------------------------------------------------------------------
# What the tokenizers are made of

token = lambda content, **more: {"content": content, "lstrip": False, "normalized": False, "rstrip": False,
                                 "single_word": False, **more}
wrapped = lambda content: {"__type": "AddedToken", **token(content, normalized=True)}
listed = lambda names, first=0: {str(first + i): token(name, special=True) for i, name in enumerate(names)}
NAMES = ["<unk>", "<s>", "</s>"]


def pieces(folder, control=(), name="tokenizer.model"):
    """A tokenizer.model with LLaMA's own settings."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        hard_vocab_limit=False, control_symbols=list(control), minloglevel=2)
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer.model").rename(folder / name)


def pieces_json(folder, metaspace):
    """A tokenizer.json of the tokenizer.model there. metaspace: as Mistral v0.3 writes spaces, else as LLaMA-2 does."""
    sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    merges = [(piece[:i], piece[i:]) for piece in vocab for i in range(1, len(piece))
              if piece[:i] in vocab and piece[i:] in vocab and not piece.startswith("<")]
    merges.sort(key=lambda m: (vocab[m[0] + m[1]], vocab[m[0]], vocab[m[1]]))
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True,
                                                     unk_token="<unk>"))
    n, d = tokenizers.normalizers, tokenizers.decoders
    if metaspace:
        tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tok.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    tok.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    control = [sp.id_to_piece(i) for i in range(len(sp)) if sp.is_control(i) or sp.is_unknown(i)]
    tok.add_special_tokens([tokenizers.AddedToken(c, normalized=False) for c in control])
    tok.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok.save(str(folder / "tokenizer.json"))


QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+")


def bytes_json(folder, added, qwen):
    """A tokenizer.json of bytes as Qwen's, or as DeepSeek's; what is added stands behind its pieces."""
    p = tokenizers.pre_tokenizers
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = p.Split(tokenizers.Regex(QWEN if qwen else r"[\r\n]|\s?\p{L}+|\s?\p{P}+|[一-龥]+|\p{N}"), "isolated")
    tok.pre_tokenizer = p.Sequence([split, p.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.normalizer = tokenizers.normalizers.NFC() if qwen else None
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    tok.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=p.ByteLevel.alphabet()))
    first = tok.get_vocab_size()
    tok.add_special_tokens([tokenizers.AddedToken(a, normalized=False) for a in added])
    tok.save(str(folder / "tokenizer.json"))
    if qwen:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
    return first


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))

# ---------------------------------------------------------------------------------------------------------------------
# The folders

OF_LLAMA2 = {"add_bos_token": True, "add_eos_token": False, "bos_token": wrapped("<s>"), "eos_token": wrapped("</s>"),
             "clean_up_tokenization_spaces": False, "legacy": False, "model_max_length": 10**30, "pad_token": None,
             "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": wrapped("<unk>")}
MAP = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>")}


def llama2(folder):
    pieces(folder), pieces_json(folder, metaspace=False)
    write(folder, tokenizer_config=OF_LLAMA2, special_tokens_map=MAP,
          generation_config={"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "pad_token_id": 0})


def vicuna(folder):
    pieces(folder)
    write(folder, tokenizer_config={**OF_LLAMA2, "pad_token": None, "padding_side": "right"},
          special_tokens_map={**MAP, "pad_token": "<unk>"},
          generation_config={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})


def chinese_llama2(folder):
    pieces(folder)
    write(folder, tokenizer_config={**OF_LLAMA2, "legacy": True, "use_fast": False}, special_tokens_map=MAP,
          generation_config={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})


def mistral(folder):
    control = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    pieces(folder, control), pieces_json(folder, metaspace=True)
    shutil.copy(folder / "tokenizer.model", folder / "tokenizer.model.v3")
    write(folder, params={"dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2,
                          "norm_eps": 1e-05, "vocab_size": 512, "rope_theta": 1e6},
          tokenizer_config={"add_bos_token": True, "add_eos_token": False, "add_prefix_space": None,
                            "added_tokens_decoder": listed(NAMES + control), "bos_token": "<s>", "eos_token": "</s>",
                            "clean_up_tokenization_spaces": False, "legacy": False, "model_max_length": 10**30,
                            "pad_token": None, "sp_model_kwargs": {}, "spaces_between_special_tokens": False,
                            "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
                            "use_default_system_prompt": False},
          special_tokens_map=MAP, generation_config={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2})


CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def qwen(folder, **more):
    first = bytes_json(folder, CHAT, qwen=True)
    write(folder, tokenizer_config={
        "add_prefix_space": False, "added_tokens_decoder": listed(CHAT, first),
        "additional_special_tokens": CHAT[1:], "bos_token": None, "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072, "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None, **more},
        generation_config={"bos_token_id": first, "eos_token_id": [first + 2, first], "pad_token_id": first})
    return {"bos_token_id": first, "eos_token_id": first + 2}


def qwen3(folder):
    return qwen(folder, add_bos_token=False)


def deepseek(folder):
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    first = bytes_json(folder, names, qwen=False)
    write(folder, tokenizer_config={
        "add_bos_token": True, "add_eos_token": False, "bos_token": wrapped(names[0]), "eos_token": wrapped(names[1]),
        "clean_up_tokenization_spaces": False, "legacy": True, "model_max_length": 4096, "pad_token": wrapped(names[1]),
        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizerFast", "unk_token": None},
        generation_config={"_from_model_config": True, "bos_token_id": first, "eos_token_id": first + 1})
    return {"bos_token_id": first, "eos_token_id": first + 1}


FORMS = {"safetensors": "model", "bin": "pytorch_model"}
# name: the kind, its shards, what config.json says beside sizes, its tokenizer
FOLDERS = {
    "Llama-2-7b-hf": ("llama", "safetensors bin", dict(rms_norm_eps=1e-5), llama2),
    "Llama-2-13b-hf": ("llama", "safetensors bin", dict(rms_norm_eps=1e-5, num_key_value_heads=4), llama2),
    "vicuna-7b-v1.5": ("llama", "bin", dict(rms_norm_eps=1e-5, num_key_value_heads=4), vicuna),
    "Mistral-7B-Instruct-v0.3": ("mistral", "safetensors", dict(rms_norm_eps=1e-5, sliding_window=None,
                                                                rope_theta=1e6), mistral),
    "Qwen2-7B-Instruct": ("qwen2", "safetensors", dict(rope_theta=1e6, sliding_window=131072, use_sliding_window=False,
                                                       max_window_layers=28), qwen),
    "deepseek-llm-7b-chat": ("llama", "bin", dict(num_key_value_heads=4), deepseek),
    "chinese-llama-2-7b": ("llama", "bin", dict(rms_norm_eps=1e-5, num_key_value_heads=4), chinese_llama2),
    "Qwen3-8B": ("qwen3", "safetensors", dict(head_dim=16, rope_theta=1e6, attention_bias=False, sliding_window=None,
                                              use_sliding_window=False, max_window_layers=36), qwen3),
}


def publish(folder, name):
    """Write the folder -> the model of transformers."""
    kind, forms, says, tokenizer = FOLDERS[name]
    folder.mkdir()
    ids = tokenizer(folder) or {"bos_token_id": 1, "eos_token_id": 2}
    rope = {k: says[k] for k in ("rope_theta",) if k in says}
    more = {k: v for k, v in says.items() if k not in rope} | {"rope_parameters": {"rope_type": "default", **rope}}
    model = tiny_hf(kind, vocab_size=512, **more if rope else {k: v for k, v in says.items() if k not in rope})
    c = model.config
    write(folder, config={
        "architectures": [type(model).__name__], "hidden_act": "silu", "hidden_size": c.hidden_size,
        "initializer_range": 0.02, "intermediate_size": c.intermediate_size, "max_position_embeddings": 4096,
        "model_type": kind, "num_attention_heads": c.num_attention_heads, "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads, "rms_norm_eps": c.rms_norm_eps, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True, "vocab_size": 512,
        **({"pretraining_tp": 1, "rope_scaling": None} if kind == "llama" else {}), **says, **ids})
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    names = sorted(state)
    for form in forms.split():
        stem = FORMS[form]
        files = [f"{stem}-{i + 1:05d}-of-00002.{form}" for i in range(2)]
        for i, file in enumerate(files):
            part = {k: state[k] for k in names[i::2]}
            if form == "bin":  # as transformers wrote them until 4.31
                if kind == "llama":
                    part |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
                torch.save(part, folder / file)
            else:
                save_file(part, folder / file, metadata={"format": "pt"})
        weight_map = {k: files[i % 2] for i, k in enumerate(names)}
        write(folder, **{f"{stem}.{form}.index": {"metadata": {"total_size": 1}, "weight_map": weight_map}})
    if kind == "mistral":  # its own layout beside it, of other numbers: nobody may read it
        save_file({"norm.weight": torch.zeros(32)}, folder / "consolidated.safetensors")
    return model


@pytest.mark.parametrize("name", FOLDERS)
def test_published(tmp_path, name):
    model = publish(tmp_path / "llm", name)
    folder = str(tmp_path / "llm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = LLaMA.from_pretrained(folder)
    assert distance(model, ours) < 1e-4 and distance(theirs, ours) < 1e-4

    tokenizer, theirs = Tokenizer(folder).fit(512), transformers.AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, *train.sft["prompt"].split("{clip}")]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == ids, text
    # what begins and what ends a text
    assert tokenizer.eos_id == theirs.eos_token_id
    begins = theirs("am tag").input_ids[0]
    if name != "deepseek-llm-7b-chat":  # see below
        assert tokenizer.bos_id == (begins if begins == theirs.bos_token_id else -1)


def test_deepseek_begins_with_bos(tmp_path):
    """transformers 4 puts it there, as tokenizer_config.json says and the LLM was trained; 5 forgets."""
    publish(tmp_path / "llm", "deepseek-llm-7b-chat")
    tokenizer = Tokenizer(str(tmp_path / "llm"))
    assert tokenizer.id_of("<｜begin▁of▁sentence｜>") == tokenizer.bos_id != tokenizer.eos_id

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers of fine-tunes, and what else lies in folders

def same_ids(folder, texts=TEXTS):
    tokenizer, theirs = Tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    assert tokenizer.eos_id == theirs.eos_token_id
    return tokenizer


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("json_too", [True, False], ids=["json", "model"])
@pytest.mark.parametrize("how", ["added_tokens_decoder", "added_tokens.json"])
def test_added_tokens(tmp_path, how, json_too, legacy):
    """Newer fine-tunes list them in tokenizer_config.json, older ones in a file of their own."""
    pieces(tmp_path)
    if json_too:
        pieces_json(tmp_path, metaspace=False)
    n = len(SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")))
    config = {**OF_LLAMA2, "legacy": legacy}
    write(tmp_path, config={"model_type": "llama", "eos_token_id": 2})
    if how == "added_tokens_decoder":
        config |= {"added_tokens_decoder": listed(NAMES) | listed(CHAT[1:], n), "eos_token": "<|im_end|>"}
    else:
        write(tmp_path, added_tokens={t: n + i for i, t in enumerate(CHAT[1:])},
              special_tokens_map={"eos_token": "<|im_end|>", "additional_special_tokens": CHAT[1:]})
    write(tmp_path, tokenizer_config=config)
    tokenizer = same_ids(tmp_path)
    assert tokenizer.eos_ids == [n + 1, 2] and tokenizer.bos_id == 1
    assert tokenizer.encode("<|im_start|>") == [n]
    with pytest.raises(BadInput, match=f"needs token {n} .* {n} rows"):  # no text before it does
        Tokenizer(str(tmp_path), eos_id=2).fit(n).encode("<|im_start|>")
    assert Tokenizer(str(tmp_path), eos_id=2).fit(n).encode("am tag")


def test_the_map_of_special_tokens(tmp_path):
    """transformers believes it more than a tokenizer_config.json that does not list the added tokens, else less."""
    first = bytes_json(tmp_path, CHAT, qwen=False)
    write(tmp_path, config={"model_type": "llama", "bos_token_id": first, "eos_token_id": first},
          special_tokens_map={"bos_token": token(CHAT[1]), "eos_token": CHAT[2]})
    assert same_ids(tmp_path).eos_ids == [first + 2, first]
    for says, eos in (({"eos_token": CHAT[0]}, [first + 2, first]),
                      ({"eos_token": CHAT[0], "added_tokens_decoder": listed(CHAT, first)}, [first])):
        write(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **says})
        assert same_ids(tmp_path).eos_ids == eos


@pytest.mark.parametrize("puts", [True, False])
@pytest.mark.parametrize("says", [
    {}, {"bos_token": "<|im_start|>", "add_bos_token": None},
    {"bos_token": "<|im_start|>", "add_bos_token": True}], ids=str)
def test_tokenizer_json_says_whether_there_is_a_bos(tmp_path, puts, says):
    """A token that it puts in front is BOS; tokenizer_config.json overrules it."""
    first = bytes_json(tmp_path, CHAT, qwen=False)
    if puts:
        tok = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tok.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", first + 1)])
        tok.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast", **says},
          config={"model_type": "llama", "bos_token_id": first, "eos_token_id": first})
    bos = Tokenizer(str(tmp_path)).bos_id
    assert bos == (first + 1 if puts or says.get("add_bos_token") else -1)
    if not says.get("add_bos_token"):
        assert (transformers.AutoTokenizer.from_pretrained(tmp_path)("am").input_ids[0] == bos) == puts


def test_what_a_call_has_left_in_tokenizer_json(tmp_path):
    bytes_json(tmp_path, CHAT, qwen=True)
    write(tmp_path, tokenizer_config={"eos_token": "<|im_end|>"})
    expected = [Tokenizer(str(tmp_path)).encode(text) for text in TEXTS]
    tok = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tok.enable_truncation(4), tok.enable_padding(length=32)
    tok.save(str(tmp_path / "tokenizer.json"))
    assert [Tokenizer(str(tmp_path)).encode(text) for text in TEXTS] == expected


def test_llama_3s_tokenizer_model(tmp_path):
    """It is tiktoken's: beside a tokenizer.json nobody needs it."""
    lines = (base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(BadInput, match="tokenizer.model: .* tiktoken.* Llama 3 .* tokenizer.json"):
        Tokenizer(str(tmp_path))
    bytes_json(tmp_path, CHAT, qwen=True)
    write(tmp_path, tokenizer_config={"eos_token": "<|im_end|>"})
    assert Tokenizer(str(tmp_path)).decode(Tokenizer(str(tmp_path)).encode("am tag")) == "am tag"


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_a_pointer_instead_of_a_tokenizer(tmp_path, file):
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32)
    with pytest.raises(BadInput, match=f"{file}: .*git lfs pull"):
        Tokenizer(str(tmp_path))


@pytest.mark.parametrize("above", [True, False])
def test_metas_folder_merged(tmp_path, above):
    """download.sh puts tokenizer.model one folder above; a folder of ours has it, and what transformers must know."""
    model = tiny_hf(vocab_size=512)
    meta_folder(tmp_path / "llama-2-7b", model, shards=2)
    pieces(tmp_path if above else tmp_path / "llama-2-7b")
    source, merged = str(tmp_path / "llama-2-7b"), tmp_path / "merged"
    ours = Tokenizer(source)
    llama = LLaMA.from_pretrained(source)
    write_hf(str(merged), llama.args, llama.state_dict().items(), source, torch.float32)
    with safe_open(merged / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}  # transformers before 5 reads no other
    assert same_ids(merged).encode("am tag") == ours.encode("am tag")
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    assert ours.bos_id == theirs.bos_token_id == 1
    assert theirs("am tag").input_ids == [1, *ours.encode("am tag")]
    assert theirs.eos_token_id == ours.eos_id == Tokenizer(str(merged)).eos_id == 2
    # a run that has learnt another EOS, as with stories260K
    for ids in ((2, 1), (0, 1)):
        other = str(tmp_path / f"other{ids[0]}")
        write_hf(other, llama.args, llama.state_dict().items(), source, torch.float32, ids=ids)
        theirs = transformers.AutoTokenizer.from_pretrained(other)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs("am").input_ids[0]) == (*ids, ids[0])
    read = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert read.config.eos_token_id == 2 and distance(read, LLaMA.from_pretrained(source)) < 1e-4

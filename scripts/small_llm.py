"""
A small LLaMA for a data set of one's own where no real one is at hand, trained on the training sentences alone.

    python -m scripts.small_llm dataset=phoenix_states to=weights/phoenix_small
    python train.py dataset=phoenix_states backbone= llm=weights/phoenix_small

It learns to restore a sentence from its content words, shuffled and blurred, as the toy's does. The most frequent words
count as function words. Dropout, label smoothing and the dev sentences keep it from learning the others by heart: it is
left as it was when it restored these best.
It has read nothing but these sentences: good for trials of the whole recipe at full size, no substitute for a real LLM.
With steps=0 it has not even read these: for runs that train all of it (freeze_llm=false lora_rank=0).
"""
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter

import torch
import torch.nn.functional as F

from lib.configurator import configure, page_one, usage_error
from lib.features import row_of_clip
from lib.files import read_jsonl, whole_folder
from lib.program import ROOT, BadInput, Progress, launch
from lib.scores import unspaced
from lib.tensors import init_weight, pairs, stateless
from lib.tokenizer import Tokenizer
from lib.weights import ModelArgs, write_hf
from model import LLaMA

dataset = ""  # a data set that data.py has made
data_dir = "data"  # holds the data sets
to = ""  # folder to write; it must not exist
language = "German"  # its name goes into the prompt
function_words = 40  # so many of the most frequent words are left out of what the sentence is restored from
pieces = 2000  # of the tokenizer
dim = 256  # width
layers = 4  # of the LLM
steps = 1500  # of training, 0 = none
batch = 48  # sentences a step
lr = 2e-3  # peak
dropout = 0.2  # of embeddings, and in the blocks
label_smoothing = 0.1  # likewise against learning by heart
seed = 1337  # of its first weights and of the sentences' order

# noise on the embeddings of content words, in units of their own size: frames will never be as sharp as words
BLUR = 2.0
EVERY = 100  # steps between two looks at dev
FUNCTION_WORDS = set("am im in an auf der den die es bei grad gibt 在 会 有 ， 气温 度 。".split())
# one meaning, so one word among the content words
NEGATIONS = {"nicht": "nicht", "keine": "nicht", "keinen": "nicht", "不会": "不", "没有": "不"}
PROMPT = page_one(f"{ROOT}/train.py", ("sft",))[1]["sft"]["prompt"]


def written(words, language):
    """Words as the language writes them."""
    return words.replace(" ", "") if language == "Chinese" else words


def prompt_in(language):
    """What stands before a clip in the prompt, and what stands after it."""
    return [part.strip() for part in PROMPT.replace("{language}", language).split("{clip}")]


def train_tokenizer(folder, texts, pieces, longest=16):
    """A SentencePiece model with LLaMA's own settings: BPE, byte fallback, no normalisation. longest: characters."""
    import sentencepiece
    with open(f"{folder}/tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=f, model_type="bpe", vocab_size=pieces, byte_fallback=True,
            split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            character_coverage=1.0, hard_vocab_limit=False, max_sentencepiece_length=longest, minloglevel=2)


def train_tokenizer_json(folder, texts, pieces, bos, longest=None):
    """A byte-level BPE in tokenizer.json, as Qwen2's (no BOS) and DeepSeek's. longest: bytes, None = any."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise BadInput("tokenizers: is not installed, and this LLM's tokenizer needs it "
                       "(pip install tokenizers)") from None
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=pieces, special_tokens=["<s>", "</s>"],
                                                       show_progress=False, initial_alphabet=alphabet,
                                                       max_token_length=longest))
    tok.save(f"{folder}/tokenizer.json")
    with open(f"{folder}/tokenizer_config.json", "w") as f:
        json.dump({"bos_token": "<s>" if bos else None, "eos_token": "</s>", "add_bos_token": bos}, f)


def content_words(words, rng, function_words=FUNCTION_WORDS):
    """The content words of a sentence, shuffled. Now and then a function word stays, as something to overlook."""
    left = [NEGATIONS.get(w, w) for w in words.split() if w not in function_words or rng.random() < 0.1]
    return [left[i] for i in rng.permutation(len(left))]


def text_batch_of(texts, tokenizer, rng, language="German", function_words=FUNCTION_WORDS):
    """
    A packed stream of (content words -> sentence), half of them inside the prompt.
    -> tokens (1, N), lengths, target_at, targets, blurred (N,)
    """
    prompt = [tokenizer.encode(part) for part in prompt_in(language)]
    bos = [tokenizer.bos_id] * (tokenizer.bos_id >= 0)
    tokens, lens, at, targets, blurred = [], [], [], [], []
    for words in texts:
        before, after = prompt if rng.random() < 0.5 else ([], [])
        pieces = [t for w in content_words(words, rng, function_words) for t in tokenizer.encode(w)]
        signed = [t for t in pieces for _ in range(rng.integers(1, 5))]  # a sign lasts for several frames
        answer = tokenizer.encode(written(words, language)) + [tokenizer.eos_id]
        document = bos + before + signed + after + answer[:-1]
        at += range(len(tokens) + len(document) - len(answer), len(tokens) + len(document))
        targets += answer
        tokens += document
        blurred += [0.0] * len(bos + before) + [1.0] * len(signed) + [0.0] * (len(after) + len(answer) - 1)
        lens.append(len(document))
    return torch.tensor([tokens]), lens, torch.tensor(at), torch.tensor(targets), torch.tensor(blurred)


def untrained(name, shape, seed, n_layers):
    """
    A first value for an LLM of which a run trains everything: words of unit size, and what the blocks add as small as
    GPT-2's, so that for the later blocks words and frames still are what they were.
    """
    w = init_weight(name, shape, seed)
    if name == "tok_embeddings.weight":
        return w * shape[1] ** 0.5
    return w / (2 * n_layers) ** 0.5 if name.endswith(("wo.weight", "w2.weight")) else w


def train_llama(folder, texts, seed, steps, batch, language="German", layout="meta", tokenizer="sp", pieces=640,
                function_words=FUNCTION_WORDS, lr=3e-3, dropout=0.0, label_smoothing=0.0, dev=(), **sizes):
    """
    Train a tiny LLM on texts and write it to folder, in Meta's raw layout or as a Hugging Face folder.
    steps: 0 leaves it untrained.
    dev: sentences; the weights are kept that restore them best, and content words are blurred by any amount up to BLUR.
    sizes: of ModelArgs, where they are not the toy's.
    """
    with tempfile.TemporaryDirectory() as words:
        corpus = [written(t, language) for t in texts[:2000]]
        # the prompt weighs as much as the rest, so that it too is a piece a word
        corpus += prompt_in(language) * len(corpus)
        # without spaces a piece would be several words, of which each combination had to be learnt
        longest = {"longest": 3 if tokenizer == "sp" else 9} if language == "Chinese" else {}
        if tokenizer == "sp":
            train_tokenizer(words, corpus, pieces, **longest)
        else:
            train_tokenizer_json(words, corpus, pieces, bos=sizes.get("model_type") != "qwen2", **longest)
        tokenizer = Tokenizer(words)
        small = dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=352, head_dim=32)
        args = ModelArgs(**small | sizes, vocab_size=tokenizer.vocab_size)
        llama = LLaMA(args, dropout=dropout)
        with torch.no_grad():
            for name, p in llama.named_parameters():
                p.copy_(init_weight(name, p.shape, seed) if steps else untrained(name, p.shape, seed, args.n_layers))
        params = list(llama.parameters())
        print(f"tiny LLaMA ({args.model_type}): {sum(p.numel() for p in params) / 1e6:.2f}M parameters, "
              f"{tokenizer.vocab_size} pieces, "
              + ("learns to restore sentences from their content words" if steps else "untrained"))
        optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        show, rng = Progress("tiny LLaMA", steps), stateless(seed, "text")
        noise = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of dropout

        def loss_of(some, rng, noise):
            tokens, lens, at, targets, signed = text_batch_of(some, tokenizer, rng, language, function_words)
            h = llama.tok_embeddings(tokens)
            blur = BLUR * h.detach().pow(2).mean().sqrt() * torch.randn(h.shape, generator=noise)
            blur = blur * rng.random() if dev else blur
            h = F.dropout(h + blur * signed[:, None], dropout, llama.training)
            smooth = label_smoothing if llama.training else 0.0
            return F.cross_entropy(llama(h=h, lens=lens, at=at)[0], targets, label_smoothing=smooth)

        best = math.inf
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
            loss = loss_of([texts[i] for i in rng.integers(len(texts), size=batch)], rng, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            show(step + 1, unit="steps")
            if dev and ((step + 1) % EVERY == 0 or step + 1 == steps):
                llama.eval()
                with torch.no_grad():  # the same words are left out and blurred each time
                    again = stateless(seed, "dev"), torch.Generator().manual_seed(seed)
                    parts = [loss_of(dev[i:i + batch], *again).item() for i in range(0, len(dev), batch)]
                llama.train()
                if sum(parts) / len(parts) < best:
                    best, kept = sum(parts) / len(parts), {k: v.clone() for k, v in llama.state_dict().items()}
        if steps:
            print(f"tiny LLaMA: loss {loss.item():.3f} a token at the end"
                  + (f", the best on dev {best:.3f}" if dev else ""), flush=True)
            if dev:
                llama.load_state_dict(kept)
        shutil.rmtree(folder, ignore_errors=True)
        if layout == "hf":
            return write_hf(folder, args, llama.state_dict().items(), words, torch.float32)
        with whole_folder(folder) as part:
            shutil.copytree(words, part, dirs_exist_ok=True)
            write_meta(llama, part)


def write_meta(llama, folder):
    """Write a LLaMA as Meta does: consolidated.00.pth, with rotary pairs side by side, and params.json."""
    a, state = llama.args, llama.state_dict()
    for name in state:
        if name.endswith(("wq.weight", "wk.weight")):
            state[name] = pairs(state[name], a.head_dim)
    torch.save(state, f"{folder}/consolidated.00.pth")
    keys = "dim n_layers n_heads n_kv_heads vocab_size norm_eps".split()
    with open(f"{folder}/params.json", "w") as f:
        json.dump({key: getattr(a, key) for key in keys} | {"vocab_size": -1}, f)  # it follows from the weights


def main():
    start = time.time()
    cfg = configure(__file__, shares=("dropout", "label_smoothing"))
    for key in ("dataset", "to"):
        if not getattr(cfg, key):
            usage_error(__file__, f"{key}: is missing")
    if os.path.exists(cfg.to):
        raise BadInput(f"to={cfg.to}: exists already")
    where = os.path.join(cfg.data_dir, cfg.dataset)
    texts_of = lambda split: [row["text"] for row in read_jsonl(f"{where}/{split}.jsonl", "a clip", row_of_clip)]
    texts, dev = texts_of("train"), texts_of("dev") if os.path.exists(f"{where}/dev.jsonl") else []
    if cfg.steps and unspaced(texts):
        raise BadInput(f"{where}/train.jsonl: sentences without spaces show no words to restore them from; steps=0 "
                       "makes an LLM that has read nothing")
    common = {w for w, _ in Counter(" ".join(texts).split()).most_common(cfg.function_words)}
    print(f"{len(texts)} sentences; counted as function words: {' '.join(sorted(common))}", flush=True)
    os.makedirs(os.path.dirname(os.path.abspath(cfg.to)), exist_ok=True)
    sizes = dict(dim=cfg.dim, n_layers=cfg.layers, n_heads=cfg.dim // 32, n_kv_heads=cfg.dim // 64,
                 hidden_dim=cfg.dim * 11 // 4)
    train_llama(cfg.to, texts, cfg.seed, cfg.steps, cfg.batch, cfg.language, pieces=cfg.pieces,
                function_words=common, lr=cfg.lr, dropout=cfg.dropout, label_smoothing=cfg.label_smoothing, dev=dev,
                **sizes)
    print(f"{cfg.to}: made in {time.time() - start:.0f} s")


if __name__ == "__main__":
    launch(main)

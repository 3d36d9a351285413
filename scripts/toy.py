"""
The embedded default: a small sign language as real video files, and a tiny LLaMA that knows its German and has never seen a sign.

    python -m scripts.toy                  # clips, tokenizer, LLaMA and features into data/toy (train.py does it by itself where it is absent)
    python -m scripts.toy name=toy_zh      # another sign language with Chinese sentences, the stand-in for CSL-Daily
    python -m scripts.toy llm=llm_qwen2    # another tiny LLM beside the LLaMA, in another format: the stand-ins for Table 7

A stick figure signs weather sentences: one handshape, place and movement a sign, in an order unlike German's; a head shake from the
last sign on is all that says "not". Speed, place, size, brightness and noise vary; between signs the hands travel.
The LLaMA (Meta's layout: params.json, consolidated.00.pth, tokenizer.model) is trained on text alone, to restore a sentence from its
content words in the wrong order: that stands in for what a real LLM has learnt from reading. Trained on plain sentences
instead it would write fluent weather and never look at the clip.
"""
import io
import itertools
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import av
import numpy as np
import torch
import torch.nn.functional as F

from config import BadInput, Progress, configure, launch, print0, rank, usage_error, whole
from data import stateless
from lora import export_hf
from model import LLaMA, ModelArgs, init_weight
from readers import read_clips
from video import Extractor, barrier, prepare
from weights import load_json

data_dir = "data"  # the toy goes to data_dir/NAME
name = "toy"  # toy (German) or toy_zh (Chinese)
llm = "llm"  # which tiny LLM: llm, llm_13b, llm_vicuna, llm_mistral, llm_qwen2, llm_deepseek, llm_chinese
seed = 1337  # everything follows from it: sentences, signs, clips, tokenizer, LLaMA
n_train = 1000  # clips to learn from
n_dev = 100  # clips to select on
n_test = 100  # clips to report on; their sentences occur neither in train nor in dev nor in the LLaMA's text
text_steps = 300  # steps of the LLaMA's training on text
text_batch = 64  # sentences a step
threads = 0  # of that training, 0 = all cores that are free

# ---------------------------------------------------------------------------------------------------------------------
# The languages. Sign order: degrees, place, time, manner, weather (with or without head shake); word order is the language's own

LANGUAGE = {"toy": "German", "toy_zh": "Chinese"}  # name of the data set -> what its sentences are written in
TIMES = "HEUTE MORGEN ABEND NACHT MONTAG MITTWOCH SAMSTAG SONNTAG".split()
PLACES = "NORD SUED KUESTE ALPEN RHEIN INSEL".split()
WEATHER = "REGEN SCHNEE SONNE WIND WOLKEN NEBEL".split()
MANNER = ["", *"SPAETER LANGE WIEDER OFT".split()]
DEGREES = ["", *"NULL FUENF ZEHN ZWANZIG DREISSIG".split()]
SIGNS = [s for signs in (TIMES, PLACES, WEATHER, MANNER, DEGREES) for s in signs if s]
# sign -> its words; of weather: as it is and as it is not, with room for place and manner
GERMAN = {"HEUTE": "heute", "MORGEN": "morgen", "ABEND": "am abend", "NACHT": "in der nacht", "MONTAG": "am montag", "MITTWOCH": "am mittwoch",
          "SAMSTAG": "am samstag", "SONNTAG": "am sonntag", "NORD": "im norden", "SUED": "im süden", "KUESTE": "an der küste", "ALPEN": "in den alpen",
          "RHEIN": "am rhein", "INSEL": "auf den inseln", "SPAETER": "später", "LANGE": "lange", "WIEDER": "wieder", "OFT": "oft",
          "NULL": "null", "FUENF": "fünf", "ZEHN": "zehn", "ZWANZIG": "zwanzig", "DREISSIG": "dreißig",
          "REGEN": ("regnet es {}", "regnet es {} nicht"), "SCHNEE": ("schneit es {}", "schneit es {} nicht"),
          "SONNE": ("scheint {} die sonne", "scheint {} die sonne nicht"), "WIND": ("weht {} der wind", "weht {} der wind nicht"),
          "WOLKEN": ("gibt es {} wolken", "gibt es {} keine wolken"), "NEBEL": ("gibt es {} nebel", "gibt es {} keinen nebel")}
CHINESE = {"HEUTE": "今天", "MORGEN": "明天", "ABEND": "晚上", "NACHT": "夜里", "MONTAG": "星期一", "MITTWOCH": "星期三", "SAMSTAG": "星期六", "SONNTAG": "星期天",
           "NORD": "北部", "SUED": "南部", "KUESTE": "海边", "ALPEN": "山区", "RHEIN": "河边", "INSEL": "岛上",
           "SPAETER": "稍后", "LANGE": "一直", "WIEDER": "再次", "OFT": "经常", "NULL": "零", "FUENF": "五", "ZEHN": "十", "ZWANZIG": "二十", "DREISSIG": "三十",
           "REGEN": ("在 {} 会 下雨", "在 {} 不会 下雨"), "SCHNEE": ("在 {} 会 下雪", "在 {} 不会 下雪"), "SONNE": ("在 {} 会 出太阳", "在 {} 不会 出太阳"),
           "WIND": ("在 {} 会 刮风", "在 {} 不会 刮风"), "WOLKEN": ("在 {} 有 云", "在 {} 没有 云"), "NEBEL": ("在 {} 有 雾", "在 {} 没有 雾")}
FUNCTION_WORDS = set("am im in an auf der den die es bei grad gibt 在 会 有 ， 气温 度 。".split())
NEGATIONS = {"nicht": "nicht", "keine": "nicht", "keinen": "nicht", "不会": "不", "没有": "不"}  # one meaning, so one word among the content words
PROMPT = "[INST] <sign> {clip} </sign> \n Translate the sign language into {language} text. [/INST]"  # section 3.2; the same as train.py's


def words_of(language, time, place, weather, manner, degrees, negated):
    """The signs of a sentence -> its words in the language, with spaces between."""
    word = GERMAN if language == "German" else CHINESE
    middle = word[weather][negated].format(" ".join(word[s] for s in (place, manner) if s))
    if language == "German":
        return f"{word[time]} {middle}" + (f" bei {word[degrees]} grad" if degrees else "")
    return f"{word[time]} {middle}" + (f" ， 气温 {word[degrees]} 度" if degrees else "") + " 。"


def written(words, language):
    """Words as the language writes them."""
    return words if language == "German" else words.replace(" ", "")


def sentences(seed, n, language="German"):
    """n different sentences: [(signs in signing order, number of the sign with the head shake or -1, words)]."""
    rng = stateless(seed, "sentences")
    everything = list(itertools.product(TIMES, PLACES, WEATHER, MANNER, DEGREES, (False, True)))
    chosen = []
    for i in rng.permutation(len(everything))[:n]:
        time, place, weather, manner, degrees, negated = everything[i]
        signs = [s for s in (degrees, place, time, manner, weather) if s]
        chosen.append((signs, len(signs) - 1 if negated else -1, words_of(language, time, place, weather, manner, degrees, negated)))
    return chosen

# ---------------------------------------------------------------------------------------------------------------------
# The figure

SIZE = 64  # pixels
HEAD, NECK, HIP = (0.0, -0.62), (0.0, -0.38), (0.0, 0.75)  # the figure's own units: 1 is half its height, y down
SHOULDERS, REST = ((-0.30, -0.34), (0.30, -0.34)), ((-0.34, 0.55), (0.34, 0.55))


def sign_table(seed):
    """sign -> (place, movement, fingers, what the other hand does); a dictionary of the language. Any two differ in two of the four at least."""
    places = [(-0.30, -0.75), (0.32, -0.72), (0.0, -0.30), (-0.42, -0.05), (0.45, -0.05), (0.0, 0.25)]
    forms = list(itertools.product(range(len(places)), range(8), (0, 1, 3, 5), range(3)))
    chosen = []
    for i in stateless(seed, "signs").permutation(len(forms)):
        if all(sum(a != b for a, b in zip(forms[i], other)) >= 2 for other in chosen):
            chosen.append(forms[i])
    return {sign: (places[form[0]],) + form[1:] for sign, form in zip(SIGNS, chosen)}


def movement(kind, t):
    """The path of a hand around its place, t (n,) from 0 to 1 -> (n, 2)."""
    w, up = 2 * np.pi * t, 2 * t - 1
    paths = [(0.22 * up, 0 * t), (0 * t, 0.22 * up), (0.2 * np.cos(w), 0.2 * np.sin(w)), (0.2 * np.cos(w), -0.2 * np.sin(w)),
             (0.2 * up, 0.12 * np.sin(2 * w)), (0.12 * np.sin(2 * w), 0.2 * up), (0.2 * up, 0.2 * up), (0.06 * np.sin(2 * w), 0 * t)]
    return np.stack(paths[kind], -1)


def choreography(signs, shaken, table, rng):
    """Signs -> right hand (T, 2), left hand (T, 2), fingers of both (T, 2), turn of the head (T,)."""
    speed = rng.uniform(0.8, 1.3)
    right, left, fingers = [np.array([REST[1]])], [np.array([REST[0]])], [np.zeros((1, 2))]
    for number, sign in enumerate(signs):
        place, kind, shape, other = table[sign]
        n = max(4, round(rng.uniform(6, 8) / speed))
        path = np.array(place) + movement(kind, np.linspace(0, 1, n)) + rng.normal(0, 0.015, (n, 2))
        mirror = path * (-1, 1) if other == 1 else np.tile([(-0.25, 0.15)], (n, 1)) if other == 2 else np.tile([REST[0]], (n, 1))
        between = max(1, round(rng.uniform(1.5, 3.5) / speed))
        s = (np.arange(1, between + 1) / (between + 1))[:, None]
        right += [right[-1][-1:] * (1 - s) + path[:1] * s, path]
        left += [left[-1][-1:] * (1 - s) + mirror[:1] * s, mirror]
        fingers += [np.tile(fingers[-1][-1:], (between, 1)), np.tile([(shape, shape if other else 0)], (n, 1))]
        if number == shaken:
            shake_from = sum(map(len, right[:-2]))  # it sets in on the way to the sign
    home = np.linspace(0, 1, max(3, round(4 / speed)))[:, None]  # and the hands go back to rest
    right, left = (np.concatenate(p + [p[-1][-1:] * (1 - home) + REST[i] * home]) for p, i in ((right, 1), (left, 0)))
    fingers = np.concatenate(fingers + [np.tile(fingers[-1][-1:], (len(home), 1))])
    head = np.zeros(len(right))
    if shaken >= 0:
        head[shake_from:] = 0.28 * np.sin(1.2 * speed * np.arange(len(head) - shake_from))
    return right, left, fingers, head


def render(signs, shaken, table, rng):
    """Signs -> frames (T, SIZE, SIZE, 3) uint8."""
    right, left, fingers, head = choreography(signs, shaken, table, rng)
    T = len(right)
    lines = []  # (start (T, 2), end (T, 2), thickness, brightness)
    fixed = lambda p: np.tile(np.array([p], float), (T, 1))
    face = fixed(HEAD) + head[:, None] * (1, 0)
    lines += [(fixed(NECK), fixed(HIP), 0.10, 0.45), (fixed(SHOULDERS[0]), fixed(SHOULDERS[1]), 0.07, 0.45), (face, face, 0.17, 0.6)]
    lines += [(face + (dx + 0 * dx, -0.04) + head[:, None] * (0.6, 0), face + (dx, -0.04) + head[:, None] * (0.6, 0), 0.035, 0.1) for dx in (-0.06, 0.06)]
    for hand, shoulder, side, number in ((right, SHOULDERS[1], 1, fingers[:, 0]), (left, SHOULDERS[0], -1, fingers[:, 1])):
        elbow = (fixed(shoulder) + hand) / 2 + (side * 0.18, 0.14)
        lines += [(fixed(shoulder), elbow, 0.05, 0.7), (elbow, hand, 0.045, 0.8), (hand, hand, 0.07, 1.0)]
        for f in range(int(number.max())):  # a finger that a sign does not show has no length
            angle = -np.pi / 2 + side * (f - 2) * 0.45
            lines.append((hand, hand + 0.19 * (f < number)[:, None] * (np.cos(angle), np.sin(angle)), 0.025, 1.0))
    scale = rng.uniform(0.85, 1.1) * SIZE * 0.46
    shift = SIZE / 2 + rng.uniform(-4, 4, 2)
    image = np.full((T, SIZE, SIZE), rng.uniform(0.05, 0.25), np.float32)
    for a, b, thick, bright in lines:
        a, b = (p * scale + shift for p in (a, b))  # (T, 2) pixels
        thick = thick * scale + 0.5
        ends = np.concatenate([a, b])
        (x0, y0), (x1, y1) = np.clip(ends.min(0) - thick, 0, SIZE).astype(int), np.clip(ends.max(0) + thick + 1, 0, SIZE).astype(int)
        (ax, ay), (dx, dy) = (p.astype(np.float32).T[..., None, None] for p in (a, b - a))  # (T, 1, 1) each
        px, py = np.arange(x0, x1, dtype=np.float32) - ax, np.arange(y0, y1, dtype=np.float32)[:, None] - ay  # from the line's start
        along = np.clip((px * dx + py * dy) / np.maximum(dx * dx + dy * dy, 1e-6), 0, 1)
        distance = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)  # of each pixel from the line, (T, rows, columns)
        part = image[:, y0:y1, x0:x1]
        part += np.clip(thick - distance, 0, 1) * (bright - part)  # smooth edges
    image = image * rng.uniform(0.8, 1.1) + 0.03 * rng.standard_normal(image.shape, np.float32)
    grey = (np.clip(image, 0, 1) * 255).astype(np.uint8).reshape(T, SIZE, SIZE, 1)
    return np.repeat(grey, 3, 3)


def write_mp4(path, video, fps=25):
    """frames (T, H, W, 3) uint8 -> an H.264 file."""
    with av.open(path, "w") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": "20", "threads": "1", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def make_clip(job):
    path, signs, shaken, seed, number = job
    write_mp4(path, render(signs, shaken, sign_table(seed), stateless(seed, "clip", number)))


def make_clips(root, seed, language, counts, workers, show):
    """Render the clips and write root/clips.tsv, the form of anybody's own clips. A kill leaves no table, so the next run starts over."""
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(root)
    chosen = sentences(seed, sum(counts.values()), language)
    split = [s for s, n in counts.items() for _ in range(n)]
    jobs = [(os.path.join(root, f"{i:05d}.mp4"), signs, shaken, seed, i) for i, (signs, shaken, _) in enumerate(chosen)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(make_clip, jobs, chunksize=10), 1):
            show(done)
    with whole(os.path.join(root, "clips.tsv")) as f:
        f.write("file\ttext\tsplit\tgloss\n")
        for (path, signs, shaken, *_), (_, _, words), s in zip(jobs, chosen, split):
            gloss = " ".join(g + "(-)" * (i == shaken) for i, g in enumerate(signs))
            f.write(f"{os.path.basename(path)}\t{written(words, language)}\t{s}\t{gloss}\n")

# ---------------------------------------------------------------------------------------------------------------------
# The tiny LLaMA and its tokenizer, from text alone

BLUR = 2.0  # noise on the embeddings of content words, in units of their own size: frames will never be as sharp as words


# What stands in for which LLM of the paper: sizes, model type, layout and tokenizer of its files; the rest as the first one's
LLMS = {"llm": {}, "llm_13b": dict(dim=160, n_layers=5, n_heads=5, n_kv_heads=5, hidden_dim=432), "llm_vicuna": dict(layout="hf"),
        "llm_mistral": dict(layout="hf", model_type="mistral", n_kv_heads=1, rope_theta=1e6),
        "llm_qwen2": dict(layout="hf", model_type="qwen2", qkv_bias=True, rope_theta=1e6, tokenizer="json"),
        "llm_deepseek": dict(layout="hf", norm_eps=1e-6, tokenizer="json"), "llm_chinese": dict(layout="hf", pieces=704)}


def train_tokenizer(folder, texts, pieces):
    """A SentencePiece model with LLaMA's own settings (BPE, byte fallback, no normalisation), one piece a word."""
    import sentencepiece
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=pieces, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2)
    with open(os.path.join(folder, "tokenizer.model"), "wb") as f:
        f.write(model.getvalue())


def train_tokenizer_json(folder, texts, pieces, bos):
    """A byte-level BPE in tokenizer.json, as Qwen2's (no BOS) and DeepSeek's."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise BadInput("tokenizers: is not installed, and this LLM's tokenizer needs it (pip install tokenizers)") from None
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=pieces, special_tokens=["<s>", "</s>"], show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"bos_token": "<s>" if bos else None, "eos_token": "</s>"}, f)


def content_words(words, rng, function_words=FUNCTION_WORDS):
    """What is left of a sentence: its content words, shuffled; now and then a function word stays, as something to overlook."""
    left = [NEGATIONS.get(w, w) for w in words.split() if w not in function_words or rng.random() < 0.1]
    return [left[i] for i in rng.permutation(len(left))]


def text_batch_of(texts, tokenizer, rng, language="German", function_words=FUNCTION_WORDS):
    """Packed stream of (content words -> sentence), half of them inside the prompt: tokens (1, N), lengths, target_at, targets, blurred (N,)."""
    prompt = [tokenizer.encode(p.strip()) for p in PROMPT.replace("{language}", language).split("{clip}")]
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


def train_llama(folder, texts, seed, steps, batch, language="German", layout="meta", tokenizer="sp", pieces=640, function_words=FUNCTION_WORDS, **sizes):
    """Train a tiny LLM on texts and write it to folder, in Meta's raw layout or as a Hugging Face folder. sizes: of ModelArgs."""
    from data import Tokenizer
    part = folder + ".new"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    corpus = [written(t, language) for t in texts[:2000]]
    # the prompt weighs as much as the rest, so that it too is a piece a word
    corpus += [p.strip() for p in PROMPT.replace("{language}", language).split("{clip}")] * len(corpus)
    if tokenizer == "sp":
        train_tokenizer(part, corpus, pieces)
    else:
        train_tokenizer_json(part, corpus, pieces, bos=sizes.get("model_type") != "qwen2")
    tokenizer = Tokenizer(part)
    args = ModelArgs(**dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=352, vocab_size=tokenizer.vocab_size, head_dim=32) | sizes)
    llama = LLaMA(args)
    with torch.no_grad():
        for name, p in llama.named_parameters():
            p.copy_(init_weight(name, p.shape, seed))
    params = list(llama.parameters())
    print(f"tiny LLaMA ({args.model_type}): {sum(p.numel() for p in params) / 1e6:.2f}M parameters, {tokenizer.vocab_size} pieces, "
          "learns to restore sentences from their content words")
    peak = 3e-3
    optimizer = torch.optim.AdamW(params, lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    show, rng = Progress("tiny LLaMA", steps), stateless(seed, "text")
    noise = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        tokens, lens, at, targets, signed = text_batch_of([texts[i] for i in rng.integers(len(texts), size=batch)], tokenizer, rng, language, function_words)
        h = llama.tok_embeddings(tokens)
        blur = BLUR * h.detach().pow(2).mean().sqrt() * torch.randn(h.shape, generator=noise)
        loss = F.cross_entropy(llama(h=h + blur * signed[:, None], lens=lens, at=at)[0], targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        show(step + 1, unit="steps")
    print(f"tiny LLaMA: loss {loss.item():.3f} a token at the end", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if layout == "hf":
        export_hf(llama, folder, part)
        return shutil.rmtree(part)
    state = llama.state_dict()
    for name in state:  # Meta's files keep rotary pairs side by side: the inverse of what weights.open_meta does
        if name.endswith(("wq.weight", "wk.weight")):
            w = state[name]
            state[name] = w.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2).reshape(w.shape)
    torch.save(state, os.path.join(part, "consolidated.00.pth"))
    with open(os.path.join(part, "params.json"), "w") as f:
        json.dump({"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads,
                   "vocab_size": -1, "norm_eps": args.norm_eps}, f)
    os.rename(part, folder)


def build(data_dir, name="toy", llm="llm", threads=0, **asked):
    """
    Make what is missing of the toy in data_dir/name: clips, LLM, features. Under torchrun every process calls it; the first one does most.
    asked: page one's other variables; what is not asked for is as the toy that lies there was begun, else as on page one.
    """
    folder, language = os.path.join(data_dir, name), LANGUAGE[name]
    noted, root, llm_folder = (os.path.join(folder, f) for f in ("toy.json", "clips", llm))
    begun = load_json(noted) if os.path.exists(noted) else {}
    for key, value in asked.items():
        if key in begun and begun[key] != value:
            raise BadInput(f"{folder}: was made with {key}={begun[key]}, not {value}; remove it or give another data_dir")
    here = {"seed": seed, "n_train": n_train, "n_dev": n_dev, "n_test": n_test, "text_steps": text_steps, "text_batch": text_batch} | begun | asked
    made = [os.path.join(folder, f) for s in ("train", "dev", "test") for f in (s + ".jsonl", os.path.join("toycnn", s + ".safetensors"))]
    if os.path.exists(llm_folder) and all(map(os.path.exists, made)):
        return
    print0(f"toy: {folder} is not complete; rendering clips, training a tiny LLM on text, extracting features")
    counts = {"train": here["n_train"], "dev": here["n_dev"], "test": here["n_test"]}
    begin = here["seed"] + list(LANGUAGE).index(name)  # other signs and other sentences in the other language
    if rank() == 0:
        os.makedirs(folder, exist_ok=True)
        with whole(noted) as f:  # the other processes may be reading it
            json.dump(here, f)
        no_clips, no_llm = not os.path.exists(os.path.join(root, "clips.tsv")), not os.path.exists(llm_folder)
        before, cores = torch.get_num_threads(), os.cpu_count()
        half = threads or (max(1, cores // 2) if no_clips else cores)  # clips are rendered on half of the cores while the LLM learns on the other
        with ThreadPoolExecutor(1) as beside:
            if no_clips:
                show = (lambda done: None) if no_llm else Progress("clips", sum(counts.values()))  # one line of progress at a time
                clips = beside.submit(make_clips, root, begin, language, counts, max(1, cores - half) if no_llm else cores, show)
            if no_llm:
                torch.set_num_threads(half)  # torchrun gives each process one; the others are waiting at the barrier
                every = sentences(begin, None, language)
                train_llama(llm_folder, [words for *_, words in every[:counts["train"]] + every[sum(counts.values()):]],
                            begin + list(LLMS).index(llm), here["text_steps"], here["text_batch"], language, **LLMS[llm])
                torch.set_num_threads(before)
            if no_clips:
                clips.result()  # an error in there is an error here
    barrier()
    if not all(map(os.path.exists, made)):
        prepare(name, read_clips(root)[0], data_dir, Extractor("toycnn", device="cpu"))


def main():
    start, cfg = time.time(), configure(__file__, choices={"name": tuple(LANGUAGE), "llm": tuple(LLMS)})
    for key, value in vars(cfg).items():
        if isinstance(value, int) and value < (key not in ("seed", "threads")):
            usage_error(__file__, f"{key}={value}: must be at least {int(key not in ('seed', 'threads'))}")
    # what stands as on page one was not asked for: a toy that was begun otherwise goes on as it was begun
    build(cfg.data_dir, cfg.name, cfg.llm, cfg.threads, **{k: v for k, v in vars(cfg).items() if isinstance(v, int) and k != "threads" and v != globals()[k]})
    print0(f"toy: built in {time.time() - start:.0f} s")


if __name__ == "__main__":
    launch(main)

"""
The embedded default: a small sign language as real video files, and a tiny LLaMA that knows its German and has never seen a sign.

    python -m scripts.toy                  # clips, tokenizer, LLaMA and features into data/toy (train.py does it by itself where it is absent)

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
from data import Extractor, barrier, prepare, stateless
from model import Docs, LLaMA, ModelArgs, init_weight, load_json
from readers import read_clips

data_dir = "data"  # the toy goes to data_dir/toy
seed = 1337  # everything follows from it: sentences, signs, clips, tokenizer, LLaMA
n_train = 1000  # clips to learn from
n_dev = 100  # clips to select on
n_test = 100  # clips to report on; their sentences occur neither in train nor in dev nor in the LLaMA's text
text_steps = 300  # steps of the LLaMA's training on text
text_batch = 64  # sentences a step

# ---------------------------------------------------------------------------------------------------------------------
# The language: sign -> words of a German sentence. Sign order: degrees, place, time, manner, weather (with or without head shake)

TIMES = {"HEUTE": "heute", "MORGEN": "morgen", "ABEND": "am abend", "NACHT": "in der nacht", "MONTAG": "am montag", "MITTWOCH": "am mittwoch",
         "SAMSTAG": "am samstag", "SONNTAG": "am sonntag"}
PLACES = {"NORD": "im norden", "SUED": "im süden", "KUESTE": "an der küste", "ALPEN": "in den alpen", "RHEIN": "am rhein", "INSEL": "auf den inseln"}
MANNER = {"": "", "SPAETER": "später", "LANGE": "lange", "WIEDER": "wieder", "OFT": "oft"}
WEATHER = {"REGEN": ("regnet es {}", "regnet es {} nicht"), "SCHNEE": ("schneit es {}", "schneit es {} nicht"),
           "SONNE": ("scheint {} die sonne", "scheint {} die sonne nicht"), "WIND": ("weht {} der wind", "weht {} der wind nicht"),
           "WOLKEN": ("gibt es {} wolken", "gibt es {} keine wolken"), "NEBEL": ("gibt es {} nebel", "gibt es {} keinen nebel")}
DEGREES = {"": "", "NULL": "null", "FUENF": "fünf", "ZEHN": "zehn", "ZWANZIG": "zwanzig", "DREISSIG": "dreißig"}
SIGNS = [s for words in (TIMES, PLACES, WEATHER, MANNER, DEGREES) for s in words if s]
FUNCTION_WORDS = set("am im in an auf der den die es bei grad gibt".split())
NEGATIONS = {"nicht", "kein", "keine", "keinen"}  # one meaning, so one word among the content words
PROMPT = "[INST] <sign> {clip} </sign> \n Translate the sign language into German text. [/INST]"  # section 3.2; the same as train.py's


def german(time, place, weather, manner, degrees, negated):
    """The signs of a sentence -> its German."""
    middle = WEATHER[weather][negated].format(" ".join(w for w in (PLACES[place], MANNER[manner]) if w))
    return f"{TIMES[time]} {middle}" + (f" bei {DEGREES[degrees]} grad" if degrees else "")


def sentences(seed, n):
    """n different sentences: [(signs in signing order, number of the sign with the head shake or -1, German)]."""
    rng = stateless(seed, "sentences")
    everything = list(itertools.product(TIMES, PLACES, WEATHER, MANNER, DEGREES, (False, True)))
    chosen = []
    for i in rng.permutation(len(everything))[:n]:
        time, place, weather, manner, degrees, negated = everything[i]
        signs = [s for s in (degrees, place, time, manner, weather) if s]
        chosen.append((signs, len(signs) - 1 if negated else -1, german(time, place, weather, manner, degrees, negated)))
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


def make_clips(root, seed, counts, workers, show):
    """Render the clips and write root/clips.tsv, the form of anybody's own clips. A kill leaves no table, so the next run starts over."""
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(root)
    chosen = sentences(seed, sum(counts.values()))
    split = [s for s, n in counts.items() for _ in range(n)]
    jobs = [(os.path.join(root, f"{i:05d}.mp4"), signs, shaken, seed, i) for i, (signs, shaken, _) in enumerate(chosen)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(make_clip, jobs, chunksize=10), 1):
            show(done)
    with whole(os.path.join(root, "clips.tsv")) as f:
        f.write("file\ttext\tsplit\tgloss\n")
        for (path, signs, shaken, *_), (_, _, text), s in zip(jobs, chosen, split):
            gloss = " ".join(g + "(-)" * (i == shaken) for i, g in enumerate(signs))
            f.write(f"{os.path.basename(path)}\t{text}\t{s}\t{gloss}\n")

# ---------------------------------------------------------------------------------------------------------------------
# The tiny LLaMA and its tokenizer, from text alone

BLUR = 2.0  # noise on the embeddings of content words, in units of their own size: frames will never be as sharp as words


def train_tokenizer(folder, texts):
    """A SentencePiece model with LLaMA's own settings (BPE, byte fallback, no normalisation), one piece a word."""
    import sentencepiece
    model = io.BytesIO()
    # the prompt weighs as much as the rest, so that it too is a piece a word
    corpus = texts + [p.strip() for p in PROMPT.split("{clip}")] * len(texts)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=640, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0, minloglevel=2)
    with open(os.path.join(folder, "tokenizer.model"), "wb") as f:
        f.write(model.getvalue())


def content_words(text, rng):
    """What is left of a sentence: its content words, shuffled; now and then a function word stays, as something to overlook."""
    words = ["nicht" if w in NEGATIONS else w for w in text.split() if w not in FUNCTION_WORDS or rng.random() < 0.1]
    return [words[i] for i in rng.permutation(len(words))]


def text_batch_of(texts, tokenizer, rng):
    """Packed stream of (content words -> sentence), half of them inside the prompt: tokens (1, N), pos (1, N), docs, target_at, targets."""
    prompt = [tokenizer.encode(p.strip()) for p in PROMPT.split("{clip}")]
    tokens, lens, at, targets, blurred = [], [], [], [], []
    for text in texts:
        before, after = prompt if rng.random() < 0.5 else ([], [])
        pieces = [t for w in content_words(text, rng) for t in tokenizer.encode(w)]
        signed = [t for t in pieces for _ in range(rng.integers(1, 5))]  # a sign lasts for several frames
        answer = tokenizer.encode(text) + [tokenizer.eos_id]
        document = [tokenizer.bos_id] + before + signed + after + answer[:-1]
        at += range(len(tokens) + len(document) - len(answer), len(tokens) + len(document))
        targets += answer
        tokens += document
        blurred += [0.0] * (1 + len(before)) + [1.0] * len(signed) + [0.0] * (len(after) + len(answer) - 1)
        lens.append(len(document))
    pos = torch.cat([torch.arange(n) for n in lens])
    return torch.tensor([tokens]), pos[None], Docs.of(lens), torch.tensor(at), torch.tensor(targets), torch.tensor(blurred)


def train_llama(folder, texts, seed, steps, batch):
    """Train the tiny LLaMA on texts and write it to folder in Meta's raw layout."""
    from data import Tokenizer
    part = folder + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    train_tokenizer(part, texts[:2000])
    tokenizer = Tokenizer(part)
    args = ModelArgs(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=352, vocab_size=tokenizer.vocab_size, head_dim=32)
    llama = LLaMA(args)
    with torch.no_grad():
        for name, p in llama.named_parameters():
            p.copy_(init_weight(name, p.shape, seed))
    params = list(llama.parameters())
    print(f"tiny LLaMA: {sum(p.numel() for p in params) / 1e6:.2f}M parameters, {tokenizer.vocab_size} pieces, learns to restore sentences from their content words")
    peak = 3e-3
    optimizer = torch.optim.AdamW(params, lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    show, rng = Progress("tiny LLaMA", steps), stateless(seed, "text")
    noise = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        tokens, pos, docs, at, targets, signed = text_batch_of([texts[i] for i in rng.integers(len(texts), size=batch)], tokenizer, rng)
        h = llama.tok_embeddings(tokens)
        blur = BLUR * h.detach().pow(2).mean().sqrt() * torch.randn(h.shape, generator=noise)
        loss = F.cross_entropy(llama(h=h + blur * signed[:, None], pos=pos, docs=docs, at=at)[0], targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        show(step + 1, unit="steps")
    print(f"tiny LLaMA: loss {loss.item():.3f} a token at the end", flush=True)
    state = llama.state_dict()
    for name in state:  # Meta's files keep rotary pairs side by side: the inverse of what model.open_meta does
        if name.endswith(("wq.weight", "wk.weight")):
            w = state[name]
            state[name] = w.unflatten(0, (-1, 2, args.head_dim // 2)).transpose(1, 2).reshape(w.shape)
    torch.save(state, os.path.join(part, "consolidated.00.pth"))
    with open(os.path.join(part, "params.json"), "w") as f:
        json.dump({"dim": args.dim, "n_layers": args.n_layers, "n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads,
                   "vocab_size": -1, "norm_eps": args.norm_eps}, f)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)


def build(data_dir, **asked):
    """
    Make what is missing of the toy in data_dir/toy: clips, LLaMA, features. Under torchrun every process calls it; the first one does most.
    asked: page one's other variables; what is not asked for is as the toy that lies there was begun, else as on page one.
    """
    folder, noted = os.path.join(data_dir, "toy"), os.path.join(data_dir, "toy", "toy.json")
    begun = load_json(noted) if os.path.exists(noted) else {}
    for key, value in asked.items():
        if key in begun and begun[key] != value:
            raise BadInput(f"{folder}: was made with {key}={begun[key]}, not {value}; remove it or give another data_dir")
    here = {"seed": seed, "n_train": n_train, "n_dev": n_dev, "n_test": n_test, "text_steps": text_steps, "text_batch": text_batch} | begun | asked
    root = os.path.join(data_dir, "toy", "clips")
    llm = os.path.join(data_dir, "toy", "llm")
    made = [os.path.join(folder, f) for s in ("train", "dev", "test") for f in (s + ".jsonl", os.path.join("toycnn", s + ".safetensors"))]
    if os.path.exists(llm) and all(map(os.path.exists, made)):
        return
    print0(f"toy: {folder} is not complete; rendering clips, training a tiny LLaMA on text, extracting features")
    counts = {"train": here["n_train"], "dev": here["n_dev"], "test": here["n_test"]}
    if rank() == 0:
        os.makedirs(folder, exist_ok=True)
        with whole(noted) as f:  # the other processes may be reading it
            json.dump(here, f)
        no_clips, no_llm = not os.path.exists(os.path.join(root, "clips.tsv")), not os.path.exists(llm)
        threads, cores = torch.get_num_threads(), os.cpu_count()
        half = max(1, cores // 2) if no_clips else cores  # clips are rendered on half of the cores while the LLaMA learns on the other
        with ThreadPoolExecutor(1) as beside:
            if no_clips:
                show = (lambda done: None) if no_llm else Progress("clips", sum(counts.values()))  # one line of progress at a time
                clips = beside.submit(make_clips, root, here["seed"], counts, max(1, cores - half) if no_llm else cores, show)
            if no_llm:
                torch.set_num_threads(half)  # torchrun gives each process one; the others are waiting at the barrier
                every = sentences(here["seed"], None)
                train_llama(llm, [text for *_, text in every[:counts["train"]] + every[sum(counts.values()):]],
                            here["seed"], here["text_steps"], here["text_batch"])
                torch.set_num_threads(threads)
            if no_clips:
                clips.result()  # an error in there is an error here
    barrier()
    prepare("toy", read_clips(root)[0], data_dir, Extractor("toycnn", device="cpu"))


def main():
    start, cfg = time.time(), configure(__file__)
    for key, value in vars(cfg).items():
        if key != "data_dir" and value < (key != "seed"):
            usage_error(__file__, f"{key}={value}: must be at least {int(key != 'seed')}")
    build(**vars(cfg))
    print0(f"toy: built in {time.time() - start:.0f} s")


if __name__ == "__main__":
    launch(main)

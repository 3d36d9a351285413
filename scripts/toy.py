"""
The embedded default: a small sign language as real video files, and a tiny LLaMA that has never seen a sign.

    python -m scripts.toy                # clips, tokenizer, LLaMA and features into data/toy; train.py runs this itself
    python -m scripts.toy name=toy_zh    # another sign language with Chinese sentences, the stand-in for CSL-Daily
    python -m scripts.toy name=hard      # harder to read, and by people never seen; hard_zh too
    python -m scripts.toy llm=llm_qwen2  # another tiny LLM beside the LLaMA, in another format: stand-ins for Table 7

A stick figure signs weather sentences: one handshape, place and movement a sign, in an order unlike German's. A head
shake from the last sign on is all that says "not". Speed, place, size, brightness and noise vary; between signs the
hands travel.
The LLaMA (Meta's layout: params.json, consolidated.00.pth, tokenizer.model) is trained on text alone, to restore a
sentence from its content words in the wrong order: that stands in for what a real LLM has learnt from reading.
Trained on plain sentences instead it would write fluent weather and never look at the clip.
"""
import itertools
import json
import os
import re
import shutil
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import av
import numpy as np
import torch

from lib.configurator import configure
from lib.extract import Extractor, prepare
from lib.files import load_json, whole
from lib.program import BadInput, Progress, barrier, launch, print0, rank
from lib.readers import SPLITS, read_clips
from lib.tensors import stateless
from scripts.small_llm import train_llama, written

data_dir = "data"  # the toy goes to data_dir/NAME
name = "toy"  # toy (German) or toy_zh (Chinese), or the harder hard and hard_zh
llm = "llm"  # which tiny LLM: llm, llm_13b, llm_vicuna, llm_mistral, llm_qwen2, llm_deepseek, llm_chinese
seed = 1337  # everything follows from it: sentences, signs, clips, tokenizer, LLaMA
n_train = 1000  # clips to learn from
n_dev = 100  # clips to select on
n_test = 100  # clips to report on; their sentences occur neither in train nor in dev nor in the LLaMA's text
text_steps = 300  # steps of the LLaMA's training on text
text_batch = 64  # sentences a step
threads = 0  # of that training, 0 = all cores that are free

# ---------------------------------------------------------------------------------------------------------------------
# The languages

# name of the data set -> what its sentences are written in
LANGUAGE = {"toy": "German", "toy_zh": "Chinese", "hard": "German", "hard_zh": "Chinese"}
# Signs and their words, in groups: time, place, weather, manner, degrees. Of weather: as it is and as it is not,
# with room for place and manner
LEXICON = """
HEUTE: heute | 今天
MORGEN: morgen | 明天
ABEND: am abend | 晚上
NACHT: in der nacht | 夜里
MONTAG: am montag | 星期一
MITTWOCH: am mittwoch | 星期三
SAMSTAG: am samstag | 星期六
SONNTAG: am sonntag | 星期天

NORD: im norden | 北部
SUED: im süden | 南部
KUESTE: an der küste | 海边
ALPEN: in den alpen | 山区
RHEIN: am rhein | 河边
INSEL: auf den inseln | 岛上

REGEN: regnet es {} / regnet es {} nicht | 在 {} 会 下雨 / 在 {} 不会 下雨
SCHNEE: schneit es {} / schneit es {} nicht | 在 {} 会 下雪 / 在 {} 不会 下雪
SONNE: scheint {} die sonne / scheint {} die sonne nicht | 在 {} 会 出太阳 / 在 {} 不会 出太阳
WIND: weht {} der wind / weht {} der wind nicht | 在 {} 会 刮风 / 在 {} 不会 刮风
WOLKEN: gibt es {} wolken / gibt es {} keine wolken | 在 {} 有 云 / 在 {} 没有 云
NEBEL: gibt es {} nebel / gibt es {} keinen nebel | 在 {} 有 雾 / 在 {} 没有 雾

SPAETER: später | 稍后
LANGE: lange | 一直
WIEDER: wieder | 再次
OFT: oft | 经常

NULL: null | 零
FUENF: fünf | 五
ZEHN: zehn | 十
ZWANZIG: zwanzig | 二十
DREISSIG: dreißig | 三十
"""
GROUPS = [[re.split("[:|] ", line) for line in group.split("\n")] for group in LEXICON.strip().split("\n\n")]
TIMES, PLACES, WEATHER, MANNER, DEGREES = ([sign for sign, _, _ in group] for group in GROUPS)
SIGNS = [*TIMES, *PLACES, *WEATHER, *MANNER, *DEGREES]
GERMAN, CHINESE = ({line[0]: line[n].strip() for group in GROUPS for line in group} for n in (1, 2))


def words_of(language, time, place, weather, manner, degrees, negated):
    """The signs of a sentence -> its words in the language, with spaces between."""
    word = GERMAN if language == "German" else CHINESE
    middle = word[weather].split(" / ")[negated].format(" ".join(word[s] for s in (place, manner) if s))
    if language == "German":
        return f"{word[time]} {middle}" + (f" bei {word[degrees]} grad" if degrees else "")
    return f"{word[time]} {middle}" + (f" ， 气温 {word[degrees]} 度" if degrees else "") + " 。"


def sentences(seed, n, language="German"):
    """
    n different sentences: [(signs in signing order, number of the sign with the head shake or -1, words)].
    Signs are in the order degrees, place, time, manner, weather; words in the language's own.
    """
    everything = list(itertools.product(TIMES, PLACES, WEATHER, ["", *MANNER], ["", *DEGREES], (False, True)))
    chosen = []
    for i in stateless(seed, "sentences").permutation(len(everything))[:n]:
        time, place, weather, manner, degrees, negated = everything[i]
        signs = [s for s in (degrees, place, time, manner, weather) if s]
        chosen.append((signs, len(signs) - 1 if negated else -1, words_of(language, *everything[i])))
    return chosen

# ---------------------------------------------------------------------------------------------------------------------
# The figure

SIZE = 64  # pixels
HEAD, NECK, HIP = (0.0, -0.62), (0.0, -0.38), (0.0, 0.75)  # the figure's own units: 1 is half its height, y down
SHOULDERS, REST = ((-0.30, -0.34), (0.30, -0.34)), ((-0.34, 0.55), (0.34, 0.55))
# how somebody signs, ranges that a clip's own values come from: speed, frames a sign at speed 1, size of the figure,
# its width to its size, noise of the camera
Signer = namedtuple("Signer", "speed frames size width noise")
ANYBODY = Signer((0.8, 1.3), (6, 8), (0.85, 1.1), 1.0, 0.03)
N_SIGNERS = 22  # of a hard toy; the last two sign what is selected and reported on, the others what is learnt from


def signer(seed, number):
    """One of a hard toy's signers: a pace and a build of their own, in a noisier picture."""
    speed, size, width = stateless(seed, "signer", number).uniform((0.8, 0.85, 0.85), (1.3, 1.1, 1.15))
    return Signer((0.95 * speed, 1.05 * speed), (5, 7), (0.98 * size, 1.02 * size), width, 0.04)


def sign_table(seed, pairs=False):
    """
    sign -> (place, movement, fingers, what the other hand does). Any two differ in two of the four at least.
    pairs: but for two of four, which differ in their movement alone (HEUTE and MORGEN, SONNE and WIND).
    """
    places = [(-0.30, -0.75), (0.32, -0.72), (0.0, -0.30), (-0.42, -0.05), (0.45, -0.05), (0.0, 0.25)]
    forms = list(itertools.product(range(len(places)), range(8), (0, 1, 3, 5), range(3)))
    chosen = []
    for i in stateless(seed, "signs").permutation(len(forms)):
        new, (place, kind, *hands) = [forms[i]], forms[i]
        if pairs and len(chosen) % 4 == 0:
            new.append((place, kind ^ 1, *hands))  # across and up, one turn and the other, ...
        if all(sum(a != b for a, b in zip(form, other)) >= 2 for other in chosen for form in new):
            chosen += new
    return {sign: (places[form[0]],) + form[1:] for sign, form in zip(SIGNS, chosen)}


def movement(kind, t):
    """The path of a hand around its place, t (n,) from 0 to 1 -> (n, 2)."""
    w, up = 2 * np.pi * t, 2 * t - 1
    paths = [(0.22 * up, 0 * t), (0 * t, 0.22 * up), (0.2 * np.cos(w), 0.2 * np.sin(w)),
             (0.2 * np.cos(w), -0.2 * np.sin(w)), (0.2 * up, 0.12 * np.sin(2 * w)), (0.12 * np.sin(2 * w), 0.2 * up),
             (0.2 * up, 0.2 * up), (0.06 * np.sin(2 * w), 0 * t)]
    return np.stack(paths[kind], -1)


def choreography(signs, shaken, table, rng, who=ANYBODY):
    """Signs -> right hand (T, 2), left hand (T, 2), fingers of both (T, 2), turn of the head (T,)."""
    speed = rng.uniform(*who.speed)
    right, left, fingers = [np.array([REST[1]])], [np.array([REST[0]])], [np.zeros((1, 2))]
    for number, sign in enumerate(signs):
        place, kind, shape, other = table[sign]
        n = max(4, round(rng.uniform(*who.frames) / speed))
        path = np.array(place) + movement(kind, np.linspace(0, 1, n)) + rng.normal(0, 0.015, (n, 2))
        # the other hand rests, does the same, or is held still before the body
        mirror = (np.tile([REST[0]], (n, 1)), path * (-1, 1), np.tile([(-0.25, 0.15)], (n, 1)))[other]
        between = max(1, round(rng.uniform(1.5, 3.5) / speed))
        s = (np.arange(1, between + 1) / (between + 1))[:, None]
        right += [right[-1][-1:] * (1 - s) + path[:1] * s, path]
        left += [left[-1][-1:] * (1 - s) + mirror[:1] * s, mirror]
        fingers += [np.tile(fingers[-1][-1:], (between, 1)), np.tile([(shape, shape if other else 0)], (n, 1))]
        if number == shaken:
            shake_from = sum(map(len, right[:-2]))  # it sets in on the way to the sign
    # and the hands go back to rest
    home = np.linspace(0, 1, max(3, round(4 / speed)))[:, None]
    right, left = (np.concatenate(p + [p[-1][-1:] * (1 - home) + REST[i] * home]) for p, i in ((right, 1), (left, 0)))
    fingers = np.concatenate(fingers + [np.tile(fingers[-1][-1:], (len(home), 1))])
    head = np.zeros(len(right))
    if shaken >= 0:
        head[shake_from:] = 0.28 * np.sin(1.2 * speed * np.arange(len(head) - shake_from))
    return right, left, fingers, head


def render(signs, shaken, table, rng, who=ANYBODY):
    """Signs -> frames (T, SIZE, SIZE, 3) uint8."""
    right, left, fingers, head = choreography(signs, shaken, table, rng, who)
    T = len(right)
    fixed = lambda p: np.tile(np.array([p], float), (T, 1))
    face = fixed(HEAD) + head[:, None] * (1, 0)
    # lines: start (T, 2), end (T, 2), thickness, brightness
    lines = [(fixed(NECK), fixed(HIP), 0.10, 0.45), (*map(fixed, SHOULDERS), 0.07, 0.45), (face, face, 0.17, 0.6)]
    for dx in (-0.06, 0.06):
        eye = face + (dx, -0.04) + head[:, None] * (0.6, 0)
        lines.append((eye, eye, 0.035, 0.1))
    for hand, shoulder, side, number in zip((right, left), SHOULDERS[::-1], (1, -1), fingers.T):
        elbow = (fixed(shoulder) + hand) / 2 + (side * 0.18, 0.14)
        lines += [(fixed(shoulder), elbow, 0.05, 0.7), (elbow, hand, 0.045, 0.8), (hand, hand, 0.07, 1.0)]
        for f in range(int(number.max())):  # a finger that a sign does not show has no length
            angle = -np.pi / 2 + side * (f - 2) * 0.45
            lines.append((hand, hand + 0.19 * (f < number)[:, None] * (np.cos(angle), np.sin(angle)), 0.025, 1.0))
    scale = rng.uniform(*who.size) * SIZE * 0.46
    shift = SIZE / 2 + rng.uniform(-4, 4, 2)
    image = np.full((T, SIZE, SIZE), rng.uniform(0.05, 0.25), np.float32)
    for a, b, thick, bright in lines:
        a, b = (p * (scale * who.width, scale) + shift for p in (a, b))  # (T, 2) pixels
        thick = thick * scale + 0.5
        ends = np.concatenate([a, b])
        x0, y0 = np.clip(ends.min(0) - thick, 0, SIZE).astype(int)  # the part of the picture that the line can touch
        x1, y1 = np.clip(ends.max(0) + thick + 1, 0, SIZE).astype(int)
        (ax, ay), (dx, dy) = (p.astype(np.float32).T[..., None, None] for p in (a, b - a))  # (T, 1, 1) each
        px = np.arange(x0, x1, dtype=np.float32) - ax  # from the line's start
        py = np.arange(y0, y1, dtype=np.float32)[:, None] - ay
        along = np.clip((px * dx + py * dy) / np.maximum(dx * dx + dy * dy, 1e-6), 0, 1)
        distance = np.sqrt((px - along * dx) ** 2 + (py - along * dy) ** 2)  # pixels from the line, (T, rows, columns)
        part = image[:, y0:y1, x0:x1]
        part += np.clip(thick - distance, 0, 1) * (bright - part)  # smooth edges
    image = image * rng.uniform(0.8, 1.1) + who.noise * rng.standard_normal(image.shape, np.float32)
    grey = (np.clip(image, 0, 1) * 255).astype(np.uint8).reshape(T, SIZE, SIZE, 1)
    return np.repeat(grey, 3, 3)


def write_mp4(path, video, fps=25, codec="h264", pix_fmt="yuv420p"):
    """frames (T, H, W, 3) uint8 -> an H.264 file, or what another ending and codec make of them."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "20", "threads": "1", "preset": "ultrafast"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = pix_fmt
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def make_clip(job):
    path, signs, shaken, seed, number, by = job
    who = ANYBODY if by is None else signer(seed, by)
    write_mp4(path, render(signs, shaken, sign_table(seed, pairs=by is not None), stateless(seed, "clip", number), who))


def make_clips(root, seed, language, counts, workers, show, hard=False):
    """
    Render the clips and write root/clips.tsv, the form of anybody's own clips.
    A kill leaves no table, so the next run starts over.
    """
    shutil.rmtree(root, ignore_errors=True)
    os.makedirs(root)
    chosen = sentences(seed, sum(counts.values()), language)
    split = [s for s, n in counts.items() for _ in range(n)]
    by = [i % (N_SIGNERS - 2) if s == "train" else N_SIGNERS - 2 + i % 2 for i, s in enumerate(split)]
    jobs = [(f"{root}/{i:05d}.mp4", *signed, seed, i, by[i] if hard else None) for i, (*signed, _) in enumerate(chosen)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(make_clip, jobs, chunksize=10), 1):
            show(done)
    with whole(f"{root}/clips.tsv") as f:
        f.write("file\ttext\tsplit\tgloss\n")
        for (path, signs, shaken, *_), (_, _, words), s in zip(jobs, chosen, split):
            gloss = " ".join(g + "(-)" * (i == shaken) for i, g in enumerate(signs))
            f.write(f"{os.path.basename(path)}\t{written(words, language)}\t{s}\t{gloss}\n")

# ---------------------------------------------------------------------------------------------------------------------
# Its tiny LLMs: see small_llm.py

# What stands in for which LLM of the paper: sizes, model type, layout and tokenizer of its files. The rest is as the
# first one's
LLMS = {
    "llm": {},
    "llm_13b": dict(dim=160, n_layers=5, n_heads=5, n_kv_heads=5, hidden_dim=432),
    "llm_vicuna": dict(layout="hf"),
    "llm_mistral": dict(layout="hf", model_type="mistral", n_kv_heads=1, rope_theta=1e6),
    "llm_qwen2": dict(layout="hf", model_type="qwen2", qkv_bias=True, rope_theta=1e6, tokenizer="json"),
    "llm_deepseek": dict(layout="hf", norm_eps=1e-6, tokenizer="json"),
    "llm_chinese": dict(layout="hf", pieces=704),
}
ASKED = "seed n_train n_dev n_test text_steps text_batch".split()  # the variables of page one that shape the toy


def build(data_dir, name="toy", llm="llm", threads=0, **asked):
    """
    Make what is missing of the toy in data_dir/name: clips, LLM, features.
    Under torchrun every process calls it; the first one does most.
    asked: variables in ASKED; what is not asked for is as the toy that lies there was begun, else as on page one.
    """
    folder, language = os.path.join(data_dir, name), LANGUAGE[name]
    noted, root, llm_folder = (f"{folder}/{f}" for f in ("toy.json", "clips", llm))
    begun = load_json(noted) if os.path.exists(noted) else {}
    for key, value in asked.items():
        if key in begun and begun[key] != value:
            raise BadInput(f"{folder}: was made with {key}={begun[key]}, not {value}; "
                           "remove it or give another data_dir")
    here = {key: globals()[key] for key in ASKED} | begun | asked
    counts = {split: here["n_" + split] for split in SPLITS}
    made = [f"{folder}/{f}" for s in SPLITS for f in (s + ".jsonl", f"toycnn/{s}.safetensors")]
    if os.path.exists(llm_folder) and all(map(os.path.exists, made)):
        return
    print0(f"toy: {folder} is not complete; rendering clips, training a tiny LLM on text, extracting features")
    begin = here["seed"] + list(LANGUAGE).index(name)  # other signs and other sentences in the other language
    if rank() == 0:
        os.makedirs(folder, exist_ok=True)
        with whole(noted) as f:  # the other processes may be reading it
            json.dump(here, f)
        no_clips, no_llm = not os.path.exists(f"{root}/clips.tsv"), not os.path.exists(llm_folder)
        before, cores = torch.get_num_threads(), os.cpu_count()
        # clips are rendered on half of the cores while the LLM learns on the other
        half = threads or (max(1, cores // 2) if no_clips else cores)
        with ThreadPoolExecutor(1) as beside:
            if no_clips:
                # one line of progress at a time
                show = (lambda done: None) if no_llm else Progress("clips", sum(counts.values()))
                workers = max(1, cores - half) if no_llm else cores
                clips = beside.submit(make_clips, root, begin, language, counts, workers, show, name.startswith("hard"))
            if no_llm:
                torch.set_num_threads(half)  # torchrun gives each process one; the others are waiting at the barrier
                every = [words for *_, words in sentences(begin, None, language)]
                texts = every[:counts["train"]] + every[sum(counts.values()):]
                train_llama(llm_folder, texts, begin + list(LLMS).index(llm), here["text_steps"], here["text_batch"],
                            language, **LLMS[llm])
                torch.set_num_threads(before)
            if no_clips:
                clips.result()  # an error in there is an error here
    barrier()
    if not all(map(os.path.exists, made)):
        prepare(name, read_clips(root)[0], data_dir, Extractor("toycnn", device="cpu"))


def main():
    start = time.time()
    cfg = configure(__file__, choices={"name": tuple(LANGUAGE), "llm": tuple(LLMS)}, positive=ASKED[1:])
    # what stands as on page one was not asked for: a toy that was begun otherwise goes on as it was begun
    asked = {key: value for key, value in vars(cfg).items() if key in ASKED and value != globals()[key]}
    build(cfg.data_dir, cfg.name, cfg.llm, cfg.threads, **asked)
    print0(f"toy: built in {time.time() - start:.0f} s")


if __name__ == "__main__":
    launch(main)

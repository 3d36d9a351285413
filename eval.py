"""
Decoding with a KV cache (greedy and beam search), BLEU and ROUGE by one fixed protocol, and translations of single clips.

    python eval.py                                     # the newest sft run on its test split -> hyps.jsonl, scores.json
    torchrun --nproc_per_node=2 eval.py                # the same, the clips shared out
    python eval.py control=all                         # and what it scores on other clips' features, on blanks and on noise: without looking
    python eval.py ckpt=out/toy/sft video=clip.mp4     # one translation on stdout
    python eval.py hyps=A.jsonl lang=de                # scores lines {"name","hyp","ref"} made by anyone
    python eval.py hyps=A.jsonl against=B.jsonl lang=de  # is A better than B, or is it chance?
"""
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from config import BadInput, Progress, configure, launch, pick_device, pick_dtype, print0, rank, usage_error, whole, world
from data import Clips, Sample, Tokenizer, pack, prompt_ids, stateless, thin
from lora import apply_lora, read_adapter
from model import Cache, SLLaMA, open_llm
from readers import SPLITS
from video import Extractor, rate_of
from weights import LIMITS, load_json, load_tensors

ckpt = ""  # run folder (its best/, else its last/) or checkpoint folder; "" = the newest sft run under out_dir
out_dir = "out"  # folder that holds the runs
split = "test"  # train, dev or test
beam = 4  # beam width, 1 = greedy (paper: silent; the field: 4 to 10)
length_penalty = 1.0  # exponent of ((5+len)/6), 0 = none (paper: silent)
max_new_tokens = 200  # an answer that has not ended by then is cut, and counted on screen
beams = ""  # e.g. 1,4,8: each is tried on dev with each of length_penalties, and the best dev BLEU-4 decodes the split
length_penalties = ""  # e.g. 0,1,2
control = "none"  # none; shuffle (another clip's features), blank, noise: what the model scores without the right clip; all: each of these
video = ""  # translate this file or folder of frames and nothing else
videos = ""  # translate every clip in this folder: a line name<TAB>sentence each
hyps = ""  # score this file of lines {"name","hyp","ref"} and nothing else
against = ""  # hyps: another such file of the same clips; tells whether the difference is significant
lang = ""  # de, en, zh, ...: how to cut sentences into tokens; "" = by the run's language
dataset = ""  # "" = the run's
data_dir = ""  # "" = the run's
backbone = ""  # label of the features; "" = the run's
weights = ""  # video: file of the CNN's weights; "" = the one the features were made with
llm = ""  # folder of the LLM; "" = the run's
bos_id = -1  # -1 = the run's
eos_id = -1  # -1 = the run's
batch_size = 16  # clips decoded together
dtype = "auto"  # auto (bfloat16 on a GPU that has it, else float32), float32, bfloat16, float16
device = "auto"  # auto, cpu, cuda
seed = 1337  # of the shuffle and noise controls

CONTROLS = ("shuffle", "blank", "noise")
VIDEO_ENDINGS = (".mp4", ".webm", ".gif", ".mov", ".avi", ".mkv")
UNSPACED = ("zh", "yue", "ja", "th")  # written without spaces between words
LANGUAGES = {"German": "de", "English": "en", "Chinese": "zh"}
SAMPLES = 1000  # of the bootstrap
PART = 8  # clips whose prefixes are read together

# ---------------------------------------------------------------------------------------------------------------------
# Scores; sacrebleu is imported where it is used, since `help` waits for every import up there

def _metric(lang, order=4):
    if not re.fullmatch(r"[a-z]{2,3}", lang):
        raise BadInput(f"lang={lang}: is no language code such as de, en, zh")
    from sacrebleu.metrics import BLEU
    # one character a token for Chinese and its like, sacrebleu's default for languages with spaces
    return BLEU(tokenize="char" if lang in UNSPACED else "13a", smooth_method="exp", max_ngram_order=order, force=True)


def language_code(language, lang=""):
    """The name of a language in a prompt, or its code where one is given -> code. BadInput names the variable, before anything is computed."""
    lang = lang or LANGUAGES.get(language, "")
    if not lang:
        raise BadInput(f"lang: say the code of {language}, lang=xx")
    _metric(lang)
    return lang


def _check(hyps, refs):
    if len(hyps) != len(refs) or not hyps:
        raise BadInput(f"{len(hyps)} hypotheses and {len(refs)} references: there must be as many, and one at least")


def bleu(hyps, refs, lang):
    """Two lists of sentences -> [BLEU-1, ..., BLEU-4] in percent: sacrebleu's corpus BLEU of maximal order n, exp smoothing."""
    _check(hyps, refs)
    return [_metric(lang, n).corpus_score(hyps, [refs]).score for n in (1, 2, 3, 4)]


def _lcs(a, b):
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge(hyps, refs, lang):
    """Two lists of sentences -> ROUGE-L in percent as coco-caption computes it: F with beta 1.2, mean over sentences."""
    _check(hyps, refs)
    cut = (lambda s: list("".join(s.split()))) if lang in UNSPACED else str.split
    total, beta2 = 0.0, 1.2**2
    for hyp, ref in zip(hyps, refs):
        h, r = cut(hyp), cut(ref)
        if common := _lcs(h, r):
            p, q = common / len(h), common / len(r)
            total += (1 + beta2) * p * q / (q + beta2 * p)
    return 100 * total / len(hyps)


PUNCTUATION = str.maketrans("，。？！：；（）", ",.?!:;()")


def variants(lang):
    """The treatments of both sides that move published numbers: name -> function of a sentence. Never the headline."""
    if lang == "zh":
        return {"punctuation mapped to ASCII": lambda s: s.translate(PUNCTUATION), "punctuation stripped": lambda s: re.sub(r"[^\w\s]", "", s)}
    return {'" ." appended': lambda s: s + " ."}


def report(hyps, refs, lang):
    """All scores of a system as one dict, with the signatures that make them comparable and a bootstrap interval (Koehn 2004) of BLEU-4."""
    from sacrebleu.metrics import CHRF
    metric, chrf = _metric(lang), CHRF()
    sampled = metric.corpus_score(hyps, [refs], n_bootstrap=SAMPLES) if len(refs) > 1 else None  # sacrebleu's fixed seed: the same each time
    metric.corpus_score(hyps, [refs])  # the signature counts the references
    scores = {"bleu": bleu(hyps, refs, lang), "rouge": rouge(hyps, refs, lang), "chrf": chrf.corpus_score(hyps, [refs]).score,
              "bleu4_95": [sampled._mean - sampled._ci, sampled._mean + sampled._ci] if sampled else None,
              "exact": 100 * sum(h == r for h, r in zip(hyps, refs)) / len(refs), "clips": len(refs), "lang": lang, "variants": {}}
    for name, change in variants(lang).items():
        h, r = [change(s) for s in hyps], [change(s) for s in refs]
        scores["variants"][name] = {"bleu": bleu(h, r, lang), "rouge": rouge(h, r, lang), "chrf": CHRF().corpus_score(h, [r]).score}
    scores["signature"] = {"bleu": str(metric.get_signature()), "chrf": str(chrf.get_signature()),
                           "rouge": f"ROUGE-L|F:beta1.2|tok:{'char' if lang in UNSPACED else 'space'}|mean:sentence"}
    return scores


def print_scores(title, rows):
    """A table of scores, name -> report; the first row's variants, interval and signatures stand with it."""
    line = lambda name, s: print(f"{name:32} " + " ".join(f"{b:6.2f}" for b in s["bleu"]) + f" {s['rouge']:6.2f} {s['chrf']:6.2f}")
    (first, scores), *others = rows.items()
    print(f"\n{title:32} BLEU-1 BLEU-2 BLEU-3 BLEU-4  ROUGE   chrF")
    line(first, scores)
    for name, s in scores["variants"].items():
        line(f"  ({name})", s)
    for name, s in others:
        line(name, s)
    interval = "BLEU-4 {:.2f} to {:.2f} (95 %), ".format(*scores["bleu4_95"]) if scores["bleu4_95"] else ""
    print(f"{scores['clips']} clips, {interval}{scores['exact']:.0f} % exact\n" + "\n".join(scores["signature"].values()), flush=True)

# ---------------------------------------------------------------------------------------------------------------------
# Decoding

@torch.inference_mode()
def generate(llm, streams, eos_ids, beam=1, length_penalty=1.0, max_new_tokens=200):
    """
    Beam search (beam=1: greedy). streams: packed prefixes of a few sequences each, (h (1, N, dim), their lengths); all n of them then go on
    together. Returns for each (token ids without EOS, whether EOS was reached). A hypothesis scores sum(log p) / ((5+len)/6)**length_penalty
    (Wu et al. 2016, eq. 14); a sequence is done once `beam` of its hypotheses have ended. Every step is one cached forward of n x beam tokens.
    """
    cache, logits, lens = Cache(beam, max_new_tokens), [], []
    for h, some in streams:
        lens += some
        logits.append(llm(h=h, lens=some, cache=cache, at=torch.tensor(some, device=h.device).cumsum(0) - 1)[0])
    logits = torch.cat(logits)  # (n, V)
    n, device = len(lens), logits.device
    lens = torch.tensor(lens, device=device)
    rows, eos = torch.arange(n, device=device)[:, None], torch.tensor(eos_ids, device=device)
    logits = logits[:, None].expand(n, beam, -1)
    scores = torch.full((n, beam), float("-inf"), device=device)
    scores[:, 0] = 0.0  # the beams are one and the same at first
    tokens = torch.zeros(n, beam, max_new_tokens, dtype=torch.long, device=device)
    best_score, best_len = torch.full((n,), float("-inf"), device=device), torch.zeros(n, dtype=torch.long, device=device)
    best, closed = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device), torch.zeros(n, dtype=torch.long, device=device)
    for step in range(max_new_tokens):
        # enough candidates that `beam` of them go on, were every EOS of every beam among them
        enough = beam * (1 + len(eos_ids))
        top, token = logits.topk(min(enough, logits.shape[-1]))  # (n, beam, k): no sum over the whole vocabulary is written down
        top = scores[..., None] + top.float() - logits.float().logsumexp(-1, keepdim=True)
        k = top.shape[-1]
        top, j = top.flatten(1).topk(min(enough, beam * k))
        source, token = j // k, token.flatten(1).gather(1, j)
        ends = torch.isin(token, eos)
        closes = ends & (torch.arange(top.shape[1], device=device) < beam) & top.isfinite() & (closed < beam)[:, None]
        value, j = (top / ((6 + step) / 6) ** length_penalty).masked_fill(~closes, float("-inf")).max(1)
        better = value > best_score
        best_score = torch.where(better, value, best_score)
        best_len = torch.where(better, step, best_len)
        best = torch.where(better[:, None], tokens[rows[:, 0], source[rows[:, 0], j]], best)
        closed += closes.sum(1)
        scores, j = top.masked_fill(ends, float("-inf")).topk(beam)
        source, token = source.gather(1, j), token.gather(1, j)  # (n, beam)
        tokens = tokens[rows, source]
        tokens[:, :, step] = token
        if step + 1 == max_new_tokens or bool((closed >= beam).all()):
            break
        if beam > 1:
            cache.reorder(source)
        cache.step = step
        logits = llm(h=llm.tok_embeddings(token), pos=(lens[:, None] + step).expand(n, beam), cache=cache)  # (n, beam, V)
    ended = best_score.isfinite()  # else the clip's best beam as far as it came
    return [(best[i, :best_len[i]].tolist(), True) if ended[i] else (tokens[i, 0].tolist(), False) for i in range(n)]


def prefixes(sllama, features, prompt):
    """What generate reads of clips, a list of (T, D): their frames between the prompt's tokens, PART clips a packed stream, computed when asked for."""
    for start in range(0, len(features), PART):
        part = pack([Sample("", f, *prompt, None) for f in features[start:start + PART]], sllama.mean.device)
        yield sllama.embed(part), part.lens


@torch.inference_mode()
def translate(sllama, features, tokenizer, beam=4, length_penalty=1.0, max_new_tokens=200, batch_size=16, progress=None, warn=True):
    """
    Features of clips, a list of (T, D) -> list of sentences. Clips of like length are decoded together; the order is kept.
    progress: called with the number of clips done; warn: say on stderr how many answers were cut at max_new_tokens.
    """
    prompt, out, cut = prompt_ids(sllama.prompt, tokenizer), [None] * len(features), 0
    order = sorted(range(len(features)), key=lambda i: len(features[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        streams = prefixes(sllama, [features[i] for i in chosen], prompt)
        answers = generate(sllama.llm, streams, tokenizer.eos_ids, beam, length_penalty, max_new_tokens)
        for i, (ids, ended) in zip(chosen, answers):
            out[i] = tokenizer.decode(ids).strip()
            cut += not ended
        if progress:
            progress(start + len(chosen))
    if cut and warn:
        print(f"{cut} of {len(features)} answers did not end within max_new_tokens={max_new_tokens} and were cut there", file=sys.stderr)
    return out

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def find_checkpoint(path):
    """A run folder (its best/, else its last/) or a checkpoint folder -> checkpoint folder."""
    for sub in ("", "best", "best.1", "last", "last.1"):  # .1: a kill between the two renames of a save
        if os.path.exists(os.path.join(path, sub, "state.json")):
            return os.path.join(path, sub).rstrip("/")
    raise BadInput(f"{path}: holds no checkpoint (neither it nor its best/ or last/ has a state.json)")


def read_checkpoint(folder):
    """-> (state.json as a dict, tensors by name in SLLaMA, what lora.read_adapter says or None)"""
    state = load_json(os.path.join(folder, "state.json"))
    for key, kind in {"config": dict, "dim_in": int, "step": int}.items():
        if type(state.get(key)) is not kind:
            raise BadInput(f"{folder}/state.json: has no {key}")
    for key, kind in {"ltn": bool, "freeze_llm": bool, **dict.fromkeys(("ltn_dim", "ltn_layers", "ltn_heads", "window", "max_frames", "bos_id", "eos_id"), int),
                      **dict.fromkeys(("stage", "dataset", "data_dir", "backbone", "llm", "adaptor", "prompt", "language", "lang"), str)}.items():
        value = state["config"].get(key)
        if value is not None and (type(value) is not kind or kind is int and not -1 <= value <= LIMITS["rows"] or key == "ltn_layers" and value > LIMITS["layers"]):
            raise BadInput(f"{folder}/state.json: its config has {key}={repr(value)[:50]}")
    tensors, lora = load_tensors(os.path.join(folder, "vision.safetensors")), None
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        lora = read_adapter(folder)
        tensors |= {"llm." + k: v for k, v in lora[4].items()}
    elif not state["config"].get("freeze_llm", True):
        raise BadInput(f"{folder}: has no adapter_config.json, though its run has trained a LoRA")
    return state, tensors, lora


def load_model(ckpt, device="auto", dtype="auto", **overrides):
    """
    A trained model from a run or checkpoint folder -> (SLLaMA in eval mode, Tokenizer, the run's configuration, of which .said describes the LLM).
    dtype "stored": the LLM's own.
    """
    state, tensors, lora = read_checkpoint(find_checkpoint(ckpt))
    cfg = SimpleNamespace(**state["config"] | {k: v for k, v in overrides.items() if v not in ("", -1)}, state=state)
    device = pick_device(device)[0]
    raw = open_llm(cfg.llm)
    tokenizer = Tokenizer(cfg.llm, cfg.bos_id, cfg.eos_id).fit(raw.args.vocab_size)
    dtype = raw.read("tok_embeddings.weight").dtype if dtype == "stored" else pick_dtype(dtype, device)[0]
    try:
        with torch.device("meta"):
            sllama = SLLaMA(raw.args, state["dim_in"], cfg).to(dtype)
    except AttributeError as e:
        raise BadInput(f"{find_checkpoint(ckpt)}/state.json: its config has no {e.name}") from None
    if lora:
        apply_lora(sllama.llm, *lora[:4])
    for name, b in sllama.named_buffers():
        setattr(sllama, name, b.float())  # statistics of the features, not weights
    sllama.requires_grad_(False).load(raw, device, 0, tensors)
    cfg.said = raw.describe(dtype)
    return sllama.eval(), tokenizer, cfg

# ---------------------------------------------------------------------------------------------------------------------

def newest_run(out_dir):
    """The sft run under out_dir whose checkpoint is the newest."""
    states = glob.glob(os.path.join(glob.escape(out_dir), "**", "sft", "*", "state.json"), recursive=True)
    if not states:
        raise BadInput(f"{out_dir}: holds no sft run; train one (train.py stage=align, then stage=sft) or give ckpt=")
    return os.path.dirname(os.path.dirname(max(states, key=os.path.getmtime)))


def controlled(features, control, seed, sllama):
    """The features that a control puts in the place of the real ones."""
    n = len(features)
    if control == "shuffle":  # one cycle through all clips: nobody keeps his own
        if n < 2:
            raise BadInput("control=shuffle: needs two clips at least")
        order = stateless(seed, "shuffle").permutation(n)
        out = [None] * n
        for k in range(n):
            out[order[k]] = features[order[(k + 1) % n]]
        return out
    if control == "blank":
        return [torch.zeros_like(f) for f in features]
    if control == "noise":  # as large as real features, frame by frame
        mean, std = sllama.mean.cpu(), sllama.std.cpu()
        return [mean + std * torch.from_numpy(stateless(seed, "noise", i).standard_normal(f.shape, "float32")) for i, f in enumerate(features)]
    return features


def read_split(trained, split):
    """A split of the run's data set -> (Clips, their features, their sentences)."""
    clips = Clips(trained.data_dir, trained.dataset, trained.backbone, split, trained.max_frames)
    if clips.too_long:
        print0(f"{clips.too_long} of {len(clips)} {split} clips are longer than max_frames={trained.max_frames} and are thinned out evenly, as in training")
    if clips.features(0).shape[1] != trained.state["dim_in"]:
        raise BadInput(f"{clips.store.path}: features of width {clips.features(0).shape[1]}, the run was trained on {trained.state['dim_in']}")
    return clips, [clips.features(i) for i in range(len(clips))], [row["text"] for row in clips.rows]


def baselines(clips, train, sllama):
    """What needs no LLM at all: {name: [sentence]}, the train sentence of the nearest mean feature, and the most frequent one."""
    average = lambda c: torch.stack([((c.features(i).float() - sllama.mean.cpu()) / sllama.std.cpu()).mean(0) for i in range(len(c))])  # (clips, D)
    distance = torch.cdist(average(clips), average(train))
    names = {row["name"]: j for j, row in enumerate(train.rows)}
    for i, row in enumerate(clips.rows):
        if row["name"] in names:
            distance[i, names[row["name"]]] = float("inf")  # split=train: nobody finds himself
    texts = [row["text"] for row in train.rows]
    return {"nearest training clip": [texts[j] for j in distance.argmin(1)],
            "most frequent sentence": [Counter(texts).most_common(1)[0][0]] * len(clips)}


def read_hyps(path):
    """A file of lines {"name","hyp","ref"} -> {name: (hyp, ref)}."""
    found = {}
    try:
        lines = list(open(path, encoding="utf-8-sig"))  # not splitlines: a sentence may hold U+2028
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            name, hyp, ref = str(row["name"]), row["hyp"], row["ref"]
            if not isinstance(hyp, str) or not isinstance(ref, str):
                raise ValueError("hyp and ref must be texts")
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f'{path}:{number}: is not a line {{"name", "hyp", "ref"}} ({e})') from None
        if name in found:
            raise BadInput(f"{path}:{number}: {name} stands there twice")
        found[name] = hyp, ref
    if not found:
        raise BadInput(f"{path}: has no lines")
    return found


def score_files(path, other, lang):
    """hyps=FILE: its scores. against=FILE: beside those of another system, with the p-value of a paired bootstrap test (Koehn 2004)."""
    if not lang:
        raise BadInput("lang: say the language of the sentences, lang=de")
    _metric(lang)
    mine = read_hyps(path)
    files = {path: mine}
    if other:
        theirs = files[other] = read_hyps(other)
        if alone := sorted(mine.keys() ^ theirs.keys()):
            raise BadInput(f"{other if alone[0] in mine else path}: has no clip {alone[0]}, which the other file has ({len(alone)} such)")
        if unlike := [name for name in mine if mine[name][1] != theirs[name][1]]:
            raise BadInput(f"{other}: the reference of {unlike[0]} is another than in {path} ({len(unlike)} such)")
    refs = [ref for _, ref in mine.values()]
    hyps = {f: [rows[name][0] for name in mine] for f, rows in files.items()}
    print_scores(f"lang={lang}", {("" if f == path else "against ") + os.path.basename(f): report(h, refs, lang) for f, h in hyps.items()})
    if other:
        from sacrebleu.metrics import CHRF
        from sacrebleu.significance import PairedTest
        logging.getLogger("sacrebleu").setLevel(logging.WARNING)
        systems = [(other, hyps[other]), (path, hyps[path])]  # sacrebleu tests against the first
        test = PairedTest(systems, {"BLEU": _metric(lang), "chrF": CHRF()}, [refs], test_type="bs", n_samples=SAMPLES)()[1]
        for metric, (theirs, ours) in zip(("BLEU-4", "chrF"), list(test.values())[1:]):  # the first holds the names
            verdict = "significant" if ours.p_value < 0.05 else "may well be chance"
            print(f"{metric:6} {ours.score - theirs.score:+.2f}, p = {ours.p_value:.3f}: {verdict} (paired bootstrap, {SAMPLES} samples of {len(refs)} clips)")


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def gathered(sentences):
    """{number of a clip: sentence} of each process -> all of them, on every process."""
    if world() == 1:
        return sentences
    parts = [None] * world()
    dist.all_gather_object(parts, sentences)
    return {i: s for part in parts for i, s in part.items()}


def decode(sllama, features, tokenizer, what, how):
    """translate(), the clips shared out among the processes. Every process gets all sentences."""
    mine = range(rank(), len(features), world())
    out = gathered(dict(zip(mine, translate(sllama, [features[i] for i in mine], tokenizer, progress=Progress(what, len(mine)), **how))))
    return [out[i] for i in range(len(features))]


def translate_videos(cfg, folder, sllama, tokenizer, trained, how, say):
    """video=, videos=: a sentence on stdout for each clip, everything else by say."""
    made = trained.state["extractor"]
    if made.get("imported"):
        raise BadInput(f"{folder}: its features ({made['backbone']}) were imported, and no extractor can make them from a video")
    fps = made.get("fps", 0.0)  # what the model has learnt from; 0 = clips of several rates, or unknown ones
    extractor = Extractor(made["backbone"], cfg.weights or made["weights"], cfg.device, fps)
    if cfg.videos and not (os.path.isdir(cfg.videos) and os.listdir(cfg.videos)):
        raise BadInput(f"videos={cfg.videos}: is not a folder with clips in it")
    paths = [cfg.video] if cfg.video else sorted(os.path.join(cfg.videos, f) for f in os.listdir(cfg.videos))
    failed = 0
    for path in paths:
        if cfg.videos and not os.path.isdir(path) and not path.lower().endswith(VIDEO_ENDINGS):
            say(f"{path}: passed over, its ending is none of {' '.join(VIDEO_ENDINGS)}")
            continue
        try:
            own = rate_of(path, fps)
            if fps and abs(own / fps - 1) > 0.01:
                say(f"{path}: its {own or 'unknown number of'} frames a second are resampled to {fps:g}, as in training")
            features = torch.from_numpy(extractor(path))
        except BadInput as e:
            if cfg.video:
                raise
            failed += 1
            say(f"eval.py: {e}")  # the other clips of the folder are fine
            continue
        if 0 < trained.max_frames < len(features):
            say(f"{path}: {len(features)} frames are thinned out evenly to max_frames={trained.max_frames}, as in training")
        (sentence,) = translate(sllama, [thin(features, trained.max_frames)], tokenizer, **how)
        print(" ".join(sentence.split()) if cfg.video else f"{os.path.basename(path)}\t{' '.join(sentence.split())}", flush=True)
    if failed:
        raise BadInput(f"videos={cfg.videos}: {failed} of {len(paths)} clips could not be translated")


def main():
    cfg = configure(__file__, choices={"split": SPLITS, "control": ("none", *CONTROLS, "all"), "device": ("auto", "cpu", "cuda"),
                                       "dtype": ("auto", "float32", "bfloat16", "float16")})
    for key, low in {"beam": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}.items():
        if getattr(cfg, key) < low:
            usage_error(__file__, f"{key}={getattr(cfg, key)}: must be at least {low}")
    try:
        widths, penalties = [int(b) for b in cfg.beams.split(",") if b], [float(p) for p in cfg.length_penalties.split(",") if p]
        if min(widths, default=1) < 1:
            raise ValueError("a beam is at least 1")
    except ValueError as e:
        usage_error(__file__, f"beams={cfg.beams} length_penalties={cfg.length_penalties}: are no lists of numbers such as 1,4,8 ({e})")
    if cfg.against and not cfg.hyps:
        usage_error(__file__, "against: is compared with hyps=FILE, which is missing")
    if rank() and (cfg.hyps or cfg.video or cfg.videos):
        return  # one process is enough, and the sentence is to be printed once
    if cfg.hyps:
        return score_files(cfg.hyps, cfg.against, cfg.lang)
    folder = cfg.ckpt or newest_run(cfg.out_dir)
    say = lambda *args: print0(*args, file=sys.stderr if cfg.video or cfg.videos else sys.stdout)
    sllama, tokenizer, trained = load_model(folder, cfg.device, cfg.dtype, llm=cfg.llm, data_dir=cfg.data_dir, dataset=cfg.dataset,
                                            backbone=cfg.backbone, bos_id=cfg.bos_id, eos_id=cfg.eos_id)
    say(f"LLM: {trained.said}")
    say(f"{find_checkpoint(folder)}: {trained.stage} run on {trained.dataset}, step {trained.state['step']}; "
        f"{sum(p.numel() for p in sllama.parameters()) / 1e6:.2f}M parameters in all, on {sllama.mean.device}")
    how = dict(beam=cfg.beam, length_penalty=cfg.length_penalty, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size)

    if cfg.video or cfg.videos:
        return translate_videos(cfg, folder, sllama, tokenizer, trained, how, say)
    lang = language_code(trained.language, cfg.lang or trained.lang)
    if world() > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    swept = []
    if widths or penalties:
        _, features, refs = read_split(trained, "dev")  # chosen on dev alone: test is only ever read to report
        for width, penalty in itertools.product(widths or [cfg.beam], penalties or [cfg.length_penalty]):
            hyps = decode(sllama, features, tokenizer, f"dev, beam {width}, length penalty {penalty:g}", how | {"beam": width, "length_penalty": penalty})
            swept.append({"beam": width, "length_penalty": penalty, "dev_bleu4": bleu(hyps, refs, lang)[3]})
            say(f"dev: beam {width}, length penalty {penalty:g}: BLEU-4 {swept[-1]['dev_bleu4']:.2f}")
        how |= {k: v for k, v in max(swept, key=lambda s: s["dev_bleu4"]).items() if k in how}

    clips, features, refs = read_split(trained, cfg.split)
    standin = json.loads(clips.store.metadata.get("settings", "{}")).get("standin")
    controls = {"none": ["none"], "all": ["none", *CONTROLS]}.get(cfg.control, [cfg.control])
    found, start = {}, time.time()
    for control in controls:
        what = f"decoding {cfg.split}" + (f", control {control}" if control != "none" else "")
        found[control] = decode(sllama, controlled(features, control, cfg.seed, sllama), tokenizer, what, how)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank():
        return
    home = folder.rstrip("/")
    if os.path.basename(home) in ("best", "last"):
        home = os.path.dirname(home)  # a run's scores stand in its folder, whichever checkpoint was named
    checkpoint = find_checkpoint(folder)
    facts = {"split": cfg.split, "dataset": trained.dataset, "checkpoint": checkpoint, "step": trained.state["step"], "llm": trained.said, "decoding": how,
             "sweep": swept, "standin": standin, "seconds": round(time.time() - start, 1), "references": f"{clips.path}, untouched",
             "sha256": {os.path.basename(f): sha256(f) for f in (clips.path, clips.store.path, *sorted(glob.glob(glob.escape(checkpoint) + "/*.safetensors")))
                        if os.path.basename(f) != "optimizer.safetensors"}}
    scores = {c: report(h, refs, lang) | {"control": c} | facts for c, h in found.items()}
    rows = {"model" if c == "none" else f"CONTROL {c}": s for c, s in scores.items()}
    if "none" in found and os.path.exists(os.path.join(trained.data_dir, trained.dataset, "train.jsonl")):
        train = Clips(trained.data_dir, trained.dataset, trained.backbone, "train", trained.max_frames)
        simple = {name: report(hyps, refs, lang) for name, hyps in baselines(clips, train, sllama).items()}
        scores["none"]["baselines"] = {name: {k: s[k] for k in ("bleu", "rouge", "chrf")} for name, s in simple.items()}
        rows |= simple
    for i, row in list(enumerate(clips.rows))[:3]:
        print(f"\n{row['name']}\n  reference  {row['text']}\n  model      {found[controls[0]][i]}")
    print_scores(f"{trained.dataset} {cfg.split}" + ", STAND-IN" * bool(standin), rows)
    if standin:
        print(f"NOT a score of the data set: {standin}")
    for control in controls:
        # nothing but the run's own data set and test split may go by the plain name
        marks = (cfg.dataset if cfg.dataset != trained.state["config"]["dataset"] else "", cfg.split if cfg.split != "test" else "",
                 control if control != "none" else "")
        suffix = "".join("." + m for m in marks if m)
        for name, lines in ((f"hyps{suffix}.jsonl", [{"name": r["name"], "hyp": h, "ref": r["text"]} for r, h in zip(clips.rows, found[control])]),
                            (f"scores{suffix}.json", [scores[control]])):
            with whole(os.path.join(home, name)) as f:
                f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        print(f"written to {os.path.join(home, f'hyps{suffix}.jsonl')} and scores{suffix}.json")


if __name__ == "__main__":
    launch(main)

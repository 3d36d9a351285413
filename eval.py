"""
Decoding with a KV cache (greedy and beam search), BLEU and ROUGE by one fixed protocol, and translations of single clips.

    python eval.py                                     # the newest sft run on its test split -> hyps.jsonl, scores.json
    torchrun --nproc_per_node=2 eval.py                # the same, the clips shared out
    python eval.py control=shuffle                     # each sentence gets another clip's features: what the score is without looking
    python eval.py ckpt=out/toy/sft video=clip.mp4     # one translation on stdout
    python eval.py hyps=FILE.jsonl lang=de             # scores lines {"name","hyp","ref"} made by anyone
"""
import glob
import json
import os
import re
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from sacrebleu.metrics import BLEU, CHRF

from config import BadInput, Progress, configure, launch, print0, rank, usage_error, whole
from data import Clips, Extractor, Sample, Tokenizer, pack, pick_device, prompt_ids, stateless, thin, world
from lora import apply_lora, read_adapter
from model import LIMITS, Cache, SLLaMA, describe, load_json, load_tensors, open_llm
from readers import SPLITS

ckpt = ""  # run folder (its best/, else its last/) or checkpoint folder; "" = the newest sft run under out_dir
out_dir = "out"  # folder that holds the runs
split = "test"  # train, dev or test
beam = 4  # beam width, 1 = greedy (paper: silent; the field: 4 to 10)
length_penalty = 1.0  # exponent of ((5+len)/6), 0 = none (paper: silent)
max_new_tokens = 200  # an answer that has not ended by then is cut, and counted on screen
control = "none"  # none; shuffle, blank, noise: what the model scores without the right clip
video = ""  # translate this file or folder of frames and nothing else
videos = ""  # translate every clip in this folder: a line name<TAB>sentence each
hyps = ""  # score this file of lines {"name","hyp","ref"} and nothing else
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

VIDEO_ENDINGS = (".mp4", ".webm", ".gif", ".mov", ".avi", ".mkv")
UNSPACED = ("zh", "yue", "ja", "th")  # written without spaces between words
LANGUAGES = {"German": "de", "English": "en", "Chinese": "zh"}

# ---------------------------------------------------------------------------------------------------------------------
# Scores

def _metric(lang, order=4):
    if not re.fullmatch(r"[a-z]{2,3}", lang):
        raise BadInput(f"lang={lang}: is no language code such as de, en, zh")
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
    """All scores of a system as one dict, with the signatures that make them comparable."""
    metric = _metric(lang)
    metric.corpus_score(hyps, [refs])  # the signature counts the references
    chrf = CHRF()
    scores = {"bleu": bleu(hyps, refs, lang), "rouge": rouge(hyps, refs, lang), "chrf": chrf.corpus_score(hyps, [refs]).score,
              "exact": 100 * sum(h == r for h, r in zip(hyps, refs)) / len(refs), "clips": len(refs), "lang": lang, "variants": {}}
    for name, change in variants(lang).items():
        h, r = [change(s) for s in hyps], [change(s) for s in refs]
        scores["variants"][name] = {"bleu": bleu(h, r, lang), "rouge": rouge(h, r, lang)}
    scores["signature"] = {"bleu": str(metric.get_signature()), "chrf": str(chrf.get_signature()),
                           "rouge": f"ROUGE-L|F:beta1.2|tok:{'char' if lang in UNSPACED else 'space'}|mean:sentence"}
    return scores


def print_scores(scores, title):
    row = lambda name, s: print(f"{name:32} " + " ".join(f"{b:6.2f}" for b in s["bleu"]) + f" {s['rouge']:6.2f}")
    print(f"\n{title:32} BLEU-1 BLEU-2 BLEU-3 BLEU-4  ROUGE")
    row("", scores)
    for name, s in scores["variants"].items():
        row(f"  ({name})", s)
    print(f"{scores['clips']} clips, chrF {scores['chrf']:.2f}, {scores['exact']:.0f} % exact\n{scores['signature']['bleu']}\n{scores['signature']['rouge']}", flush=True)

# ---------------------------------------------------------------------------------------------------------------------
# Decoding

@torch.no_grad()
def generate(llm, h, docs, eos_ids, beam=1, length_penalty=1.0, max_new_tokens=200):
    """
    Beam search (beam=1: greedy) from packed prefixes, h (1, N, dim) as docs lays them out. Returns for each document
    (token ids without EOS, whether EOS was reached). A hypothesis scores sum(log p) / ((5+len)/6)**length_penalty (Wu et al. 2016,
    eq. 14); a clip is done once `beam` of its hypotheses have ended. Every step is one cached forward of n x beam tokens.
    """
    n, device = len(docs.lens), h.device
    rows, eos = torch.arange(n, device=device)[:, None], torch.tensor(eos_ids, device=device)
    cache = Cache(docs, beam, max_new_tokens)
    pos = docs.back % docs.rows.shape[1]  # position within each document
    logits = llm(h=h, pos=pos[None], docs=docs, cache=cache, at=docs.lens.cumsum(0) - 1)[0]  # (n, V)
    logits = logits[:, None].expand(n, beam, -1)
    scores = torch.full((n, beam), float("-inf"), device=device)
    scores[:, 0] = 0.0  # the beams are one and the same at first
    tokens = torch.zeros(n, beam, max_new_tokens, dtype=torch.long, device=device)
    best_score, best_len = torch.full((n,), float("-inf"), device=device), torch.zeros(n, dtype=torch.long, device=device)
    best, closed = torch.zeros(n, max_new_tokens, dtype=torch.long, device=device), torch.zeros(n, dtype=torch.long, device=device)
    for step in range(max_new_tokens):
        total = scores[..., None] + logits.float().log_softmax(-1)  # (n, beam, V)
        V = total.shape[-1]
        # enough candidates that `beam` of them go on, were every EOS of every beam among them
        top, index = total.flatten(1).topk(min(beam * (1 + len(eos_ids)), beam * V))
        source, token = index // V, index % V
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
        cache.reorder(source)
        cache.step = step
        logits = llm(h=llm.tok_embeddings(token), pos=(docs.lens[:, None] + step).expand(n, beam), cache=cache)  # (n, beam, V)
    ended = best_score.isfinite()  # else the clip's best beam as far as it came
    return [(best[i, :best_len[i]].tolist(), True) if ended[i] else (tokens[i, 0].tolist(), False) for i in range(n)]


@torch.no_grad()
def translate(sllama, features, tokenizer, beam=4, length_penalty=1.0, max_new_tokens=200, batch_size=16, progress=None, warn=True):
    """
    Features of clips, a list of (T, D) -> list of sentences. Clips of like length are decoded together; the order is kept.
    progress: called with the number of clips done; warn: say on stderr how many answers were cut at max_new_tokens.
    """
    before, after = prompt_ids(sllama.prompt, tokenizer)
    device, out, cut = sllama.mean.device, [None] * len(features), 0
    order = sorted(range(len(features)), key=lambda i: len(features[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        batch = pack([Sample(str(i), features[i], before, after, None) for i in chosen], device)
        answers = generate(sllama.llm, sllama.embed(batch), batch.docs, tokenizer.eos_ids, beam, length_penalty, max_new_tokens)
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

def pick_dtype(dtype, device):
    """-> (torch dtype, the reason)"""
    if dtype != "auto":
        return getattr(torch, dtype), f"dtype={dtype}"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "auto: a GPU with bfloat16"
    return torch.float32, "auto: " + ("a GPU without its own bfloat16" if device.type == "cuda" else "no GPU")


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
    args, shapes, read = open_llm(cfg.llm)
    tokenizer = Tokenizer(cfg.llm, cfg.bos_id, cfg.eos_id).fit(args.vocab_size)
    dtype = read("tok_embeddings.weight").dtype if dtype == "stored" else pick_dtype(dtype, device)[0]
    try:
        with torch.device("meta"):
            sllama = SLLaMA(args, state["dim_in"], cfg).to(dtype)
    except AttributeError as e:
        raise BadInput(f"{find_checkpoint(ckpt)}/state.json: its config has no {e.name}") from None
    if lora:
        apply_lora(sllama.llm, *lora[:4])
    for name, b in sllama.named_buffers():
        setattr(sllama, name, b.float())  # statistics of the features, not weights
    sllama.requires_grad_(False).load(cfg.llm, device, 0, tensors)
    cfg.said = describe(cfg.llm, args, shapes, dtype)
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


def score_file(path, lang):
    """hyps=FILE: score lines {"name","hyp","ref"} made by anyone."""
    found, names = [], set()
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
        if name in names:
            raise BadInput(f"{path}:{number}: {name} stands there twice")
        names.add(name)
        found.append((hyp, ref))
    if not found:
        raise BadInput(f"{path}: has no lines")
    if not lang:
        raise BadInput("lang: say the language of the sentences, lang=de")
    print_scores(report([h for h, _ in found], [r for _, r in found], lang), os.path.basename(path))


def main():
    cfg = configure(__file__, choices={"split": SPLITS, "control": ("none", "shuffle", "blank", "noise"), "device": ("auto", "cpu", "cuda"),
                                       "dtype": ("auto", "float32", "bfloat16", "float16")})
    for key, low in {"beam": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}.items():
        if getattr(cfg, key) < low:
            usage_error(__file__, f"{key}={getattr(cfg, key)}: must be at least {low}")
    if rank() and (cfg.hyps or cfg.video or cfg.videos):
        return  # one process is enough, and the sentence is to be printed once
    if cfg.hyps:
        return score_file(cfg.hyps, cfg.lang)
    folder = cfg.ckpt or newest_run(cfg.out_dir)
    say = lambda *args: print0(*args, file=sys.stderr if cfg.video or cfg.videos else sys.stdout)
    sllama, tokenizer, trained = load_model(folder, cfg.device, cfg.dtype, llm=cfg.llm, data_dir=cfg.data_dir, dataset=cfg.dataset,
                                            backbone=cfg.backbone, bos_id=cfg.bos_id, eos_id=cfg.eos_id)
    say(f"LLM: {trained.said}")
    say(f"{find_checkpoint(folder)}: {trained.stage} run on {trained.dataset}, step {trained.state['step']}; "
        f"{sum(p.numel() for p in sllama.parameters()) / 1e6:.2f}M parameters in all, on {sllama.mean.device}")
    how = dict(beam=cfg.beam, length_penalty=cfg.length_penalty, max_new_tokens=cfg.max_new_tokens, batch_size=cfg.batch_size)

    if cfg.video or cfg.videos:
        made = trained.state["extractor"]
        extractor = Extractor(made["backbone"], cfg.weights or made["weights"], cfg.device)
        if cfg.videos and not (os.path.isdir(cfg.videos) and os.listdir(cfg.videos)):
            raise BadInput(f"videos={cfg.videos}: is not a folder with clips in it")
        paths = [cfg.video] if cfg.video else sorted(os.path.join(cfg.videos, f) for f in os.listdir(cfg.videos))
        failed = 0
        for path in paths:
            if cfg.videos and not os.path.isdir(path) and not path.lower().endswith(VIDEO_ENDINGS):
                say(f"{path}: passed over, its ending is none of {' '.join(VIDEO_ENDINGS)}")
                continue
            try:
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
        return

    lang = language_code(trained.language, cfg.lang or trained.lang)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    clips = Clips(trained.data_dir, trained.dataset, trained.backbone, cfg.split, trained.max_frames)
    if clips.too_long:
        say(f"{clips.too_long} of {len(clips)} clips are longer than max_frames={trained.max_frames} and are thinned out evenly, as in training")
    features = [clips.features(i) for i in range(len(clips))]
    if features[0].shape[1] != trained.state["dim_in"]:
        raise BadInput(f"{clips.store.path}: features of width {features[0].shape[1]}, the run was trained on {trained.state['dim_in']}")
    features = controlled(features, cfg.control, cfg.seed, sllama)
    start = time.time()
    mine = range(rank(), len(clips), world())
    show = Progress("decoding", len(mine))
    out = dict(zip(mine, translate(sllama, [features[i] for i in mine], tokenizer, progress=show, **how)))
    if dist.is_initialized():
        gathered = [None] * world()
        dist.all_gather_object(gathered, out)
        out = {i: s for part in gathered for i, s in part.items()}
        dist.destroy_process_group()
    if rank():
        return
    found, refs = [out[i] for i in range(len(clips))], [row["text"] for row in clips.rows]
    scores = report(found, refs, lang) | {"control": cfg.control, "split": cfg.split, "dataset": trained.dataset, "checkpoint": find_checkpoint(folder),
                                              "step": trained.state["step"], "decoding": how, "seconds": round(time.time() - start, 1)}
    for row, hyp in list(zip(clips.rows, found))[:3]:
        print(f"\n{row['name']}\n  reference  {row['text']}\n  model      {hyp}")
    title = f"{trained.dataset} {cfg.split}" + (f", CONTROL {cfg.control}" if cfg.control != "none" else "")
    print_scores(scores, title)
    home = folder.rstrip("/")
    if os.path.basename(home) in ("best", "last"):
        home = os.path.dirname(home)  # a run's scores stand in its folder, whichever checkpoint was named
    # nothing but the run's own data set and test split may go by the plain name
    marks = (cfg.dataset if cfg.dataset != trained.state["config"]["dataset"] else "", cfg.split if cfg.split != "test" else "",
             cfg.control if cfg.control != "none" else "")
    suffix = "".join("." + m for m in marks if m)
    for name, lines in ((f"hyps{suffix}.jsonl", [{"name": r["name"], "hyp": h, "ref": r["text"]} for r, h in zip(clips.rows, found)]),
                        (f"scores{suffix}.json", [scores])):
        with whole(os.path.join(home, name)) as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    print(f"written to {os.path.join(home, f'hyps{suffix}.jsonl')} and scores{suffix}.json, {scores['seconds']:.0f} s")


if __name__ == "__main__":
    launch(main)

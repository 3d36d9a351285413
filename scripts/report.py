"""
One HTML page about a run: its curves, its scores beside their controls, every sentence.
For some clips also: which frames the model looked at.

    python -m scripts.report                        # the newest sft run -> report.html in its folder
    python -m scripts.report ckpt=out/toy/align    # any run; the page says which command makes what is not there yet

The page is one file that fetches nothing: pictures lie inside, curves are drawn here. Its skeleton is
scripts/report.html.
"""
import base64
import contextlib
import difflib
import hashlib
import html
import json
import math
import os
import re
import shlex
from collections import defaultdict
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import CHRF

from data import Clips, Sample, pack, prompt_ids
from eval import load_model
from lib.checkpoint import find_checkpoint, home_of, newest_run, read_log
from lib.configurator import configure, page_one, usage_error
from lib.controls import CONTROLS
from lib.files import load_json, whole
from lib.program import ROOT, BadInput, Progress, launch
from lib.scores import UNSPACED, language_code, read_hyps
from lib.tensors import load_tensors
from lib.video import frames
from lib.weights import open_llm
from scripts.attention import recorded

ckpt = ""  # run folder or checkpoint folder; "" = the newest sft run under out_dir
out_dir = "out"  # holds the runs
data_dir = ""  # holds the data set; "" = the run's
llm = ""  # folder of the LLM; "" = the run's
to = ""  # file to write; "" = report.html in the run's folder
clips = 12  # so many are looked at closely: the worst, the best and some between; 0 = none, and no model is loaded
layers = ""  # of the LLM, counted from 0, whose attention is averaged, e.g. 16-23; "" = all
side = 72  # height of a frame on the page, in pixels
device = "auto"  # auto, cpu, cuda

TILES = 64  # frames of a clip that are shown; more are thinned out evenly, the attention is not
POINTS = 400  # of a curve
esc = html.escape
WITHOUT = {"shuffle": "control: another clip's video", "blank": "control: blank features", "noise": "control: noise"}
PARTS = {"proj": "projection of the features", "ltn": "local transformer"}

# ---------------------------------------------------------------------------------------------------------------------
# What the model looked at

def words(sentence, lang):
    """The words of a sentence, or its characters where it is written without spaces, as matches."""
    return list(re.finditer(r"\S" if lang in UNSPACED else r"\S+", sentence))


def writers(ids, sentence, tokenizer, lang):
    """
    For each word the indexes of the tokens that write it.
    A token may write several characters, and a character be several tokens (bytes).
    """
    found, at = [[] for _ in words(sentence, lang)], 0
    for k in range(len(ids)):
        # half a character is no prefix: it stays where it is
        end = max(at, len(os.path.commonprefix([sentence, tokenizer.decode(ids[:k + 1]).lstrip()])))
        start = re.compile(r"\s*").match(sentence, at).end()  # a space belongs to the word after it
        for i, word in enumerate(words(sentence, lang)):
            if start < word.end() and word.start() < max(end, start + 1):
                found[i].append(k)
        at = end
    return found


def layer_range(text, n):
    """"" or "3" or "2-5" -> slice of n layers."""
    if m := re.fullmatch(r"(\d+)(?:-(\d+))?", text or f"0-{n - 1}"):
        first, last = int(m[1]), int(m[2] or m[1])
        if first <= last < n:
            return slice(first, last + 1)
    raise BadInput(f"layers={text}: is no range such as 2-5 of the LLM's {n} layers, counted from 0")


def reach_in(ltn, T):
    """How many of a clip of T frames one can see before and after itself."""
    return [min(n, T - 1) for n in ltn.reach]


@torch.no_grad()
def look(sllama, tokenizer, features, hyp, lang, part=slice(None)):
    """
    The model reads a clip, features (T, D), and then the hypothesis, as if it were writing it.
    -> rows (words, T) that sum to 1: how the positions that write a word share out their look among the frames, mean
    over the layers of `part` and over heads; (words,) how much of the whole look that was; band (T, window + 1) or
    None: how the local transformer mixes the frames around each frame.
    """
    before, after = prompt_ids(sllama.prompt, tokenizer)
    answer = tokenizer.encode(hyp)
    batch = pack([Sample(features, before, after, answer + [tokenizer.eos_id])], sllama.mean.device)
    with recorded(sllama.ltn or torch.nn.ModuleList()) as local, recorded(sllama.llm.layers[part]) as far:
        sllama(batch)
    average = lambda weights: torch.stack([w.mean(0) for w in weights.values()]).mean(0).cpu()  # (H, T, T) -> (T, T)
    seen = average(far)[batch.target_at.cpu()][:, batch.frame_at.cpu()]  # (tokens and EOS, T)
    # NOTE the first token of a sequence is a sink that LLMs park attention on. Only what falls on the frames is
    # compared, and the rest is told apart
    share = seen.sum(1)
    tokens = writers(answer, hyp, tokenizer, lang)
    # a word that no token can be found for: the first's
    mean = lambda x: torch.stack([x[t or [0]].mean(0) for t in tokens]) if tokens else x[:0]
    band = None
    if local:
        back, ahead = reach_in(sllama.ltn, len(features))
        band = torch.stack([row[t:t + back + 1 + ahead] for t, row in enumerate(F.pad(average(local), (back, ahead)))])
    return mean(seen / share[:, None].clamp_min(1e-30)), mean(share), band


def jpeg(rgb):
    """uint8 (H, W, 3) -> data URI."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = rgb.shape[:2]
    codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1, 25)
    codec.qmin = codec.qmax = 4
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb)).reformat(format="yuvj420p")
    data = b"".join(map(bytes, [*codec.encode(frame), *codec.encode(None)]))
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def strip(path, n, side):
    """n frames of a clip, evenly spaced -> (data URI of them side by side, width of one / its height)."""
    def small(frame):
        height, width = frame.shape[:2]
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
        width = max(2, round(side * width / height / 2) * 2)
        return picture.reformat(width, side, "rgb24", interpolation="AREA").to_ndarray()

    video = list(map(small, frames(path)))  # a large clip is never held as a whole
    at = ((np.arange(n) + 0.5) * len(video) / n).astype(int)
    return jpeg(np.concatenate([video[t] for t in at], 1)), video[0].shape[1] / side

# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the page

def marked(ref, hyp, lang):
    """-> both sentences as HTML in which what differs is marked, and the indexes of the hypothesis' words that are."""
    a, b = ([w[0] for w in words(s, lang)] for s in (ref, hyp))
    gap, out, wrong = "" if lang in UNSPACED else " ", ([], []), set()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            wrong |= {*range(k, m)}
        for half, part in zip(out, (a[i:j], b[k:m])):
            if part:
                text = esc(gap.join(part))
                half.append(text if kind == "equal" else f"<mark>{text}</mark>")
    return gap.join(out[0]), gap.join(out[1]) or "<i>(empty)</i>", wrong


def table(columns, rows, label, kind="", caption=""):
    """
    Columns, rows of texts -> a table in a box of its own, which scrolls where the page is narrow.
    What looks like a number stands right.
    """
    side = lambda text: ' class="n"' if re.fullmatch(r"-?[\d,.]+|", text) else ""
    heads = zip(columns, rows[0] if rows else columns)
    tops = "".join(f'<th scope="col"{side(below)}>{esc(name)}' for name, below in heads)
    body = "".join(f'<tr><th scope="row">{esc(first)}' + "".join(f"<td{side(t)}>{esc(t)}" for t in rest)
                   for first, *rest in rows)
    hidden = "" if caption else "hidden"  # a caption there must be: a screen reader reads it
    return (f'<div class="box" tabindex="0" role="region" aria-label="{esc(label)}"><table class="{kind}">'
            f'<caption class="{hidden}">{esc(caption or label)}</caption><thead><tr>{tops}<tbody>{body}</table></div>')


def ticks(top, n=5):
    """Round numbers from 0 to top."""
    step = 10.0 ** math.floor(math.log10(top / n))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step * n >= top)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def chart(y_label, series, stages, log=False):
    """series: class -> [(step, value, hint)]; stages: [(first step, name)]. -> SVG, the values also on hover."""
    W, H = 470, 250
    left, right, top, bottom = 72, W - 24, 26, H - 40  # of the plane; 0.0001 and 100000 have room beside it
    steps, values, _ = zip(*(point for some in series.values() for point in some))
    low, high, last = min(values), max(values), max(steps)
    if log:  # whole decades; at most five of them are named
        low = math.floor(math.log10(low))
        high = max(math.ceil(math.log10(high)), low + 1)
        rows = [10.0 ** e for e in range(low, high + 1, math.ceil((high - low) / 5))]
    else:
        low, rows = 0, ticks(max(high, 1))
        if rows[-1] < high:
            rows.append(rows[-1] + rows[1])
        high = rows[-1]
    x = lambda step: left + (right - left) * step / last
    y = lambda v: top + (bottom - top) * (1 - ((math.log10(v) if log else v) - low) / (high - low))
    out = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(y_label)} over steps; the values on dev stand in '
           'the table below">']
    for v in rows:
        out.append(f'<path class="grid" d="M{left} {y(v):.1f}H{right}"/>'
                   f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    for step in ticks(last):
        out.append(f'<text x="{x(step):.1f}" y="{bottom + 17}" text-anchor="middle">{step:g}</text>')
    for first, name in stages:
        out.append(f'<path class="stage" d="M{x(first):.1f} {top - 14}V{bottom}"/>'
                   f'<text class="stage" x="{x(first) + 5:.1f}" y="{top - 6}">{esc(name)}</text>')
    out.append(f'<text x="{(left + right) / 2}" y="{H - 4}" text-anchor="middle">steps</text>'
               f'<text transform="translate(11 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">{esc(y_label)}'
               '</text>')
    for kind, some in series.items():
        some = some[::math.ceil(len(some) / POINTS) or 1]
        for (first, _), (until, _) in zip(stages, [*stages[1:], (math.inf, "")]):  # a line of its own for each stage
            if line := [f"{x(step):.1f} {y(v):.1f}" for step, v, _ in some if first < step <= until]:
                out.append(f'<path class="{kind}" d="M{"L".join(line)}"/>')
        for step, v, hint in some:
            out.append(f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(v):.1f}" r="3.5"><title>{esc(hint)}</title>'
                       '</circle>')
    return "".join(out) + "</svg>"


def by_step(run):
    """The lines of a run's log.jsonl with a loss that is a number, each with the dev scores of its step."""
    found = defaultdict(dict)
    for entry in map(json.loads, read_log(f"{run}/log.jsonl")):
        found[entry["step"]] |= entry
    return [e for step, e in sorted(found.items()) if step > 0 and 0 <= e.get("loss", -1) < math.inf]


def curves(runs):
    """[(stage, run folder)] -> both charts, and the values on dev as a table; the stages stand end to end."""
    train, dev, scores, stages, rows, first = [], [], [], [], [], 0
    for stage, run in runs:
        if log := by_step(run):
            stages.append((first, stage))
        for e in log:
            at, said, loss = first + e["step"], f"{stage}, step {e['step']}", e.get("dev_loss", math.inf)
            train.append((at, max(e["loss"], 1e-6), f"{said}: train loss {e['loss']:.4f}"))
            if loss < math.inf:
                dev.append((at, max(loss, 1e-6), f"{said}: dev loss {loss:.4f}"))
                bleu, rouge = e.get("dev_bleu", [None])[-1], e.get("dev_rouge")
                if bleu is not None:
                    scores.append((at, bleu, f"{said}: dev BLEU-4 {bleu:.2f}"))
                decoded = ("" if v is None else f"{v:.2f}" for v in (bleu, rouge))
                rows.append([said, f"{e.get('epoch', 0):g}", f"{e['loss']:.4f}", f"{loss:.4f}", *decoded])
        first += log[-1]["step"] if log else 0
    if not train:
        return '<p class="todo">The run has logged nothing yet.</p>'
    loss = chart("loss a token (log scale)", {"train": train, "dev": dev}, stages, True)
    out = (f'<div class="pair"><figure>{loss}<figcaption><i class="key"></i>train <i class="key dev"></i>dev'
           "</figcaption></figure>")
    if scores:
        decoded = chart("dev BLEU-4", {"dev": scores}, stages)
        out += f'<figure>{decoded}<figcaption><i class="key dev"></i>dev clips, decoded</figcaption></figure>'
    out += "</div>"
    if rows:
        values = table("stage,epoch,train loss,dev loss,BLEU-4,ROUGE".split(","), rows, "values on dev")
        out += f"<details><summary>Values on dev</summary>{values}</details>"
    return out


def gap(real, shuffled):
    """One sentence on what the model has seen."""
    a, b = real["bleu"][3], shuffled["bleu"][3]
    mine, other = real.get("bleu4_95"), shuffled.get("bleu4_95")
    said = f"With its own video a sentence scores BLEU-4 <b>{a:.2f}</b>, with another clip's <b>{b:.2f}</b>: "
    if a <= b or mine and other and mine[0] <= other[1]:
        return said + ("<b>no difference beyond chance</b>. Nothing here shows that the model looks at the video; "
                       "the score is what fluent guessing earns.")
    return said + f"the gap of <b>{a - b:.2f}</b> is what the model has seen, all else is fluent guessing."


def score_table(run, again):
    """scores.json and its controls -> (HTML, what scores.json holds)."""
    files = {"": "scores.json"} | {c: f"scores.{c}.json" for c in CONTROLS}
    paths = {c: f"{run}/{f}" for c, f in files.items()}
    found = {c: load_json(path) for c, path in paths.items() if os.path.exists(path)}
    real = found.pop("", {})
    if not real:
        return f'<p class="todo">No scores yet. <code>{again}</code> makes them, with their controls.</p>', {}
    same = "checkpoint step split decoding sha256".split()
    stale = {c: " *" for c, s in found.items() if any(s.get(k) != real.get(k) for k in same)}
    named = {"the model": real} | real.get("variants", {})
    named |= {WITHOUT[c] + stale.get(c, ""): s for c, s in found.items()}
    named |= {name + ", no LLM": s for name, s in real.get("baselines", {}).items()}
    rows = [[name, *(f"{v:.2f}" for v in (*s["bleu"], s["rouge"], s["chrf"]))] for name, s in named.items()]
    interval = real.get("bleu4_95")
    interval = f", BLEU-4 {interval[0]:.2f} to {interval[1]:.2f} (95 %, bootstrap)" if interval else ""
    how = ", ".join(f"{k}={v:g}" for k, v in real.get("decoding", {}).items() if k != "batch_size")
    standin = "STAND-IN features: " if real.get("standin") else ""
    out = (f'<p class="todo">A score alone says little: <code>{again}</code> also scores the model on other clips\' '
           "videos.</p>")
    if "shuffle" in found:
        out = f'<p class="lead">{gap(real, found["shuffle"])}</p>'
    out += table(",BLEU-1,BLEU-2,BLEU-3,BLEU-4,ROUGE,chrF".split(","), rows, "scores", "scores",
                 f"{standin}{real['clips']} {real['split']} clips{interval}; "
                 f"{real['exact']:.0f} % of the sentences are exact. Decoded with {how}.")
    if stale:
        out += (f'<p class="todo">* made with another checkpoint, split or decoding than the model\'s row; '
                f"<code>{again}</code> makes all anew.</p>")
    return out + f'<p class="fine">{"<br>".join(map(esc, real["signature"].values()))}</p>', real


def head(run, folder, c, real):
    """What was run, what of it learns, and all settings -> HTML."""
    v, get = c.get("versions", {}), lambda key: str(c.get(key, "?"))
    facts = {
        "data set": get("dataset"), "features": get("backbone"), "stage": get("stage"),
        "LLM": real.get("llm") or get("llm"), "language": get("language"), "prompt": get("prompt"),
        "training": f"{get('epochs')} epochs, {get('batch_size')} clips a step, peak learning rate {get('lr')}",
        "folder": run,
        "made with": f"Python {v.get('python')}, torch {v.get('torch')}, {v.get('processes')} process(es), "
                     f"commit {str(v.get('commit'))[:12]}"}
    out, standin = "", real.get("standin")
    if folder:
        state = load_json(f"{folder}/state.json")
        facts["checkpoint"] = f"{folder}, step {state.get('step')}"
        standin = standin or state.get("extractor", {}).get("standin")
        out = what_learns(folder, c)
    _, _, comments = page_one(f"{ROOT}/train.py", ("align", "sft"))
    says = comments | comments.get(get("stage"), {})
    rows = [[k, str(x), str(says.get(k, ""))] for k, x in c.items() if k != "versions"]
    settings = table(("", "value", "what it is"), rows, "all settings", "settings")
    mark = f'<p class="standin"><b>STAND-IN</b> Nothing here is a score of the data set: {esc(standin or "")}.</p>'
    facts = "".join(f"<div><dt>{k}<dd>{esc(x)}</div>" for k, x in facts.items())
    return (f"{mark if standin else ''}<dl>{facts}</dl>{out}"
            f"<details><summary>All settings</summary>{settings}</details>")


def what_learns(folder, c):
    """The parts of a checkpoint, their sizes, and which of them learn in the stage of its run -> a table."""
    learns = {"ltn": c.get("train_ltn"), "proj": c.get("train_ltn"), "adaptor": True, "LoRA": True,
              "word embeddings": c.get("train_embeddings"), "LLM": not c.get("freeze_llm") and not c.get("lora_rank")}
    sizes = dict.fromkeys(learns, 0)
    for file in filter(os.path.exists, (f"{folder}/{f}.safetensors" for f in ("vision", "adapter_model"))):
        for name, t in load_tensors(file).items():
            part = name.split(".")[0]
            if "lora_" in name:
                part = "LoRA"
            elif part == "llm":
                part = "word embeddings" if "tok_embeddings" in name else "LLM"
            if part in sizes:  # the others are statistics of the features
                sizes[part] += t.numel()
    with contextlib.suppress(BadInput):  # its folder need not be on this machine
        sizes["LLM"] = open_llm(str(c.get("llm"))).args.size() - sizes["word embeddings"]
    rows = [[PARTS.get(p, p), f"{n:,}", "learns" if learns[p] else "frozen"] for p, n in sizes.items() if n]
    return table(("part", "parameters", "in this stage"), rows, "what learns")


def closely(chosen, hyps, folder, lang, split, cfg):
    """What the page shows of some clips -> ([dict for its script], CSS with their frames, [what is missing and why])"""
    try:
        sllama, tokenizer, run = load_model(folder, cfg.device, llm=cfg.llm, data_dir=cfg.data_dir)
        data = Clips(run, split)
    except BadInput as e:
        return [], "", [f"No clip can be looked at closely: {e}"]
    part, at = layer_range(cfg.layers, len(sllama.llm.layers)), {row["name"]: i for i, row in enumerate(data.rows)}
    found, rules, notes, progress = [], "", [], Progress("clips looked at", len(chosen))
    rounded = lambda rows: [[round(v, 4) for v in row] for row in rows.tolist()]
    for done, name in enumerate(chosen, 1):
        if name not in at:
            notes.append(f"{name}: is no clip of {data.path}")
            continue
        (hyp, ref), features, video = hyps[name], data.features(at[name]), data.rows[at[name]].get("video", "")
        seen, share, band = look(sllama, tokenizer, features, hyp, lang, part)
        wrong, tiles, shown = marked(ref, hyp, lang)[2], min(len(features), TILES), False
        if video and os.path.exists(video):
            try:
                uri, ratio = strip(video, tiles, cfg.side)
                rules += f".s{len(found)}{{--strip:url({uri});--n:{tiles};--ratio:{ratio:.3f}}}"
                shown = True
            except BadInput as e:
                notes.append(str(e))
        each = enumerate(zip(words(hyp, lang), share.tolist(), rounded(seen)))
        found.append({"name": name, "frames": len(features), "merge": run.merge, "tiles": tiles, "strip": shown,
                      "words": [[w[0], i in wrong, s, row] for i, (w, s, row) in each],
                      "band": [] if band is None else rounded(band),
                      "reach": reach_in(sllama.ltn, len(features)) if sllama.ltn else (0, 0)})
        progress(done)
    return found, rules, notes


def sentences(hyps, scores, looked, lang):
    """The rows of the table of all clips, worst first."""
    rows, index = [], {clip["name"]: i for i, clip in enumerate(looked)}
    for name in sorted(hyps, key=lambda n: scores[n]):
        (hyp, ref), i = hyps[name], index.get(name)
        a, b, _ = marked(ref, hyp, lang)
        title = esc(name)
        if i is not None:
            title = f'<button type="button" class="open" data-clip="{i}">{title}</button>'
        rows.append(f'<tr><th scope="row" data-v="{esc(name)}">{title}<td class="n">{scores[name]:.1f}'
                    f'<td class="n">{len(words(ref, lang))}<td><div class="both" lang="{lang}">'
                    f'<span>ref</span><p dir="auto">{a}</p><span>hyp</span><p dir="auto">{b}</p></div>')
        if i is not None and looked[i]["strip"]:
            at = np.linspace(0, looked[i]["tiles"] - 1, 6).astype(int)
            tiles = "".join(f'<i class="tile" style="--j:{j}"></i>' for j in at)
            rows[-1] += f'<div class="mini s{i}" aria-hidden="true">{tiles}</div>'
    return "\n".join(rows)


def filled(name, parts):
    """A page of this folder with {{name}} in it and one script -> the page with its parts."""
    page = open(f"{ROOT}/scripts/{name}", encoding="utf-8").read()
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1].encode()
    # the page allows itself this script and no other
    parts["hash"] = base64.b64encode(hashlib.sha256(script).digest()).decode()
    # in one go: what a sentence says in braces stays a text
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], page)


def main():
    cfg = configure(__file__)
    if cfg.side < 16:
        usage_error(__file__, f"side={cfg.side}: must be at least 16")
    folder = cfg.ckpt or newest_run(cfg.out_dir)
    run = home_of(folder)
    if not os.path.exists(f"{run}/config.json"):
        raise BadInput(f"{run}: holds no config.json, it is no run's folder")
    c = load_json(f"{run}/config.json")
    notes, hyps, looked, rules, lang = [], {}, [], "", ""  # without a language words lie between spaces
    with contextlib.suppress(BadInput):
        lang = language_code(c.get("language", ""), c.get("lang", ""))
    try:
        folder = find_checkpoint(folder)
    except BadInput as e:
        folder = ""
        notes.append(str(e))
    again = f"python eval.py ckpt={shlex.quote(run)} control=all"
    scores, real = score_table(run, esc(again))
    if os.path.exists(path := f"{run}/hyps.jsonl"):
        hyps = read_hyps(path)
    else:
        notes.append(f"No sentences yet: {again} writes them.")
    chrf = CHRF()
    each = {name: chrf.sentence_score(hyp, [ref]).score for name, (hyp, ref) in hyps.items()}
    if hyps and not cfg.clips:
        notes.append("clips=0: none was looked at closely.")
    elif hyps and folder:
        worst = sorted(hyps, key=each.get)
        # both ends, and more of the worse half
        ranks = {round((i / max(1, cfg.clips - 1)) ** 2 * (len(worst) - 1)) for i in range(cfg.clips)}
        chosen = [worst[r] for r in sorted(ranks)]
        looked, rules, more = closely(chosen, hyps, folder, lang, real.get("split", "test"), cfg)
        notes += more
    runs = [(c.get("stage", "run"), run)]
    if c.get("stage") == "sft":
        runs.insert(0, ("align", home_of(c.get("init_from") or f"{run}/../align")))
    parts = {
        "title": esc(" / ".join(str(c[key]) for key in ("dataset", "run", "stage") if c.get(key))),
        "head": head(run, folder, c, real), "scores": scores, "curves": curves(runs), "strips": rules,
        "notes": "".join(f'<p class="todo">{esc(n)}</p>' for n in notes),
        "layers": f"layers {esc(cfg.layers)}" if cfg.layers else "all layers",
        "unit": "characters" if lang in UNSPACED else "words",
        "rows": sentences(hyps, each, looked, lang), "none": "" if hyps else "hidden",
        "data": json.dumps(looked, ensure_ascii=False).replace("<", "\\u003c")}  # no sentence can close the script
    page = filled("report.html", parts)
    to = cfg.to or f"{run}/report.html"
    os.makedirs(os.path.dirname(os.path.abspath(to)), exist_ok=True)
    with whole(to) as f:
        f.write(page)
    print(f"{to}: {len(page.encode()) / 1e6:.2f} MB, {len(hyps)} sentences, {len(looked)} clips looked at closely")


if __name__ == "__main__":
    launch(main)

"""
One HTML page about a run: its curves, its scores beside their controls, every sentence, and for some clips which frames the model looked at.

    python -m scripts.report                        # the newest sft run -> report.html in its folder
    python -m scripts.report ckpt=out/toy/align     # any run; the page says which command makes what is not there yet

The page is one file that fetches nothing: pictures lie inside, curves are drawn here. scripts/report.html is its skeleton.
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
from fractions import Fraction

import av
import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import CHRF

from config import BadInput, Progress, configure, launch, read_literals, usage_error, whole
from data import Clips, Sample, pack, prompt_ids
from eval import CONTROLS, UNSPACED, find_checkpoint, language_code, load_model, newest_run, read_hyps
from model import open_llm
from scripts.attention import recorded
from video import frames
from weights import load_json, load_tensors

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
HERE = os.path.dirname(os.path.abspath(__file__))
esc = html.escape
WITHOUT = {"shuffle": "control: another clip's video", "blank": "control: blank features", "noise": "control: noise"}
PARTS = {"proj": "projection of the features", "ltn": "local transformer"}

# ---------------------------------------------------------------------------------------------------------------------
# What the model looked at

def words(sentence, lang):
    """The words of a sentence, or its characters where it is written without spaces, as matches."""
    return list(re.finditer(r"\S" if lang in UNSPACED else r"\S+", sentence))


def writers(ids, sentence, tokenizer, lang):
    """For each word the indexes of the tokens that write it. A token may write several characters, and a character be several tokens (bytes)."""
    found, at = [[] for _ in words(sentence, lang)], 0
    for k in range(len(ids)):
        end = max(at, len(os.path.commonprefix([sentence, tokenizer.decode(ids[:k + 1]).lstrip()])))  # half a character is no prefix: it stays where it is
        start = re.compile(r"\s*").match(sentence, at).end()  # a space belongs to the word after it
        for i, word in enumerate(words(sentence, lang)):
            if start < word.end() and word.start() < max(end, start + 1):
                found[i].append(k)
        at = end
    return found


def layer_range(text, n):
    """"" or "3" or "2-5" -> slice of n layers."""
    if not (m := re.fullmatch(r"(\d+)(?:-(\d+))?", text or f"0-{n - 1}")) or not int(m[1]) <= int(m[2] or m[1]) < n:
        raise BadInput(f"layers={text}: is no range such as 2-5 of the LLM's {n} layers, counted from 0")
    return slice(int(m[1]), int(m[2] or m[1]) + 1)


@torch.no_grad()
def look(sllama, tokenizer, features, hyp, lang, part=slice(None)):
    """
    The model reads a clip, features (T, D), and then the hypothesis, as if it were writing it. -> rows (words, T) that sum to 1: how the positions that
    write a word share out their look among the frames, mean over the layers of `part` and over heads; (words,) how much of the whole look that was; band (T, window + 1)
    or None: how the local transformer mixes the frames around each frame.
    """
    before, after = prompt_ids(sllama.prompt, tokenizer)
    answer = tokenizer.encode(hyp)
    batch = pack([Sample("", features, before, after, answer + [tokenizer.eos_id])], sllama.mean.device)
    with recorded(sllama.ltn or torch.nn.ModuleList()) as local, recorded(sllama.llm.layers[part]) as far:
        sllama(batch)
    seen = torch.stack([w.mean(0)[batch.target_at] for w in far.values()]).mean(0)[:, batch.frame_at].cpu()  # (tokens and EOS, T)
    # NOTE the first token of a sequence is a sink that LLMs park attention on; only what falls on the frames is compared, and the rest is told apart
    share = seen.sum(1)
    tokens = writers(answer, hyp, tokenizer, lang)
    mean = lambda x: torch.stack([x[t or [0]].mean(0) for t in tokens]) if tokens else x[:0]  # a word that no token can be found for: the first's
    band = None
    if local:
        w, reach = torch.stack([w.mean(0) for w in local.values()]).mean(0).cpu(), sllama.ltn.layers[0].attention.window // 2  # (T, T)
        band = torch.stack([row[t:t + 2 * reach + 1] for t, row in enumerate(F.pad(w, (reach, reach)))])
    return mean(seen / share[:, None].clamp_min(1e-30)), mean(share), band


def jpeg(rgb):
    """uint8 (H, W, 3) -> data URI."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = rgb.shape[:2]
    codec.pix_fmt, codec.time_base, codec.qmin, codec.qmax = "yuvj420p", Fraction(1, 25), 4, 4
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb)).reformat(format="yuvj420p")
    return "data:image/jpeg;base64," + base64.b64encode(b"".join(bytes(p) for p in [*codec.encode(frame), *codec.encode(None)])).decode()


def strip(path, n, side):
    """n frames of a clip, evenly spaced -> (data URI of them side by side, width of one / its height)."""
    width = lambda frame: max(2, round(side * frame.shape[1] / frame.shape[0] / 2) * 2)
    small = lambda frame: av.VideoFrame.from_ndarray(np.ascontiguousarray(frame)).reformat(width(frame), side, "rgb24", interpolation="AREA").to_ndarray()
    video = [small(frame) for frame in frames(path)]  # a large clip is never held as a whole
    at = ((np.arange(n) + 0.5) * len(video) / n).astype(int)
    return jpeg(np.concatenate([video[t] for t in at], 1)), video[0].shape[1] / side

# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the page

def marked(ref, hyp, lang):
    """-> the two sentences as HTML in which they differ in what is marked, and the indexes of the hypothesis' words that are."""
    a, b = ([w[0] for w in words(s, lang)] for s in (ref, hyp))
    gap, out, wrong = "" if lang in UNSPACED else " ", ([], []), set()
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        wrong |= set(range(k, m)) if kind != "equal" else set()
        for half, part in zip(out, (a[i:j], b[k:m])):
            if part:
                half.append(esc(gap.join(part)) if kind == "equal" else f"<mark>{esc(gap.join(part))}</mark>")
    return gap.join(out[0]), gap.join(out[1]) or '<i>(empty)</i>', wrong


def table(columns, rows, label, kind="", caption=""):
    """Columns, rows of texts -> a table in a box of its own, which scrolls where the page is narrow. What looks like a number stands right."""
    side = lambda text: ' class="n"' if re.fullmatch(r"-?[\d,.]+|", text) else ""
    tops = "".join(f'<th scope="col"{side(rows[0][i]) if rows else ""}>{esc(name)}' for i, name in enumerate(columns))
    body = "".join(f'<tr><th scope="row">{esc(first)}' + "".join(f"<td{side(t)}>{esc(t)}" for t in rest) for first, *rest in rows)
    hidden = "" if caption else "hidden"  # a caption there must be: a screen reader reads it
    return (f'<div class="box" tabindex="0" role="region" aria-label="{esc(label)}"><table class="{kind}"><caption class="{hidden}">{esc(caption or label)}</caption>'
            f"<thead><tr>{tops}<tbody>{body}</table></div>")


def ticks(top, n=5):
    """Round numbers from 0 to top."""
    step = 10.0 ** math.floor(math.log10(top / n))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if m * step * n >= top)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def chart(y_label, series, stages, log=False):
    """series: class -> [(step, value, hint)]; stages: [(first step, name)]. -> SVG, the values also on hover."""
    W, H, left, right, top, bottom = 430, 250, 48, 10, 26, 40
    points = [p for some in series.values() for p in some]
    low, high, last = min(p[1] for p in points), max(p[1] for p in points), max(p[0] for p in points)
    if log:  # whole decades; at most five of them are named
        low = math.floor(math.log10(low))
        high = max(math.ceil(math.log10(high)), low + 1)
        rows = [10.0 ** e for e in range(low, high + 1, -(-(high - low) // 5))]
    else:
        low, rows = 0, ticks(max(high, 1))
        rows += [rows[-1] + rows[1]] * (rows[-1] < high)
        high = rows[-1]
    x = lambda step: left + (W - left - right) * step / last
    y = lambda v: top + (H - top - bottom) * (1 - ((math.log10(v) if log else v) - low) / (high - low))
    out = [f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{esc(y_label)} over steps; the values on dev stand in the table below">']
    out += [f'<path class="grid" d="M{left} {y(v):.1f}H{W - right}"/><text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>' for v in rows]
    out += [f'<text x="{x(step):.1f}" y="{H - bottom + 17}" text-anchor="middle">{step:g}</text>' for step in ticks(last)]
    out += [f'<path class="stage" d="M{x(first):.1f} {top - 14}V{H - bottom}"/><text class="stage" x="{x(first) + 5:.1f}" y="{top - 6}">{esc(name)}</text>'
            for first, name in stages]
    out.append(f'<text x="{(left + W - right) / 2}" y="{H - 4}" text-anchor="middle">steps</text>'
               f'<text transform="translate(11 {(top + H - bottom) / 2}) rotate(-90)" text-anchor="middle">{esc(y_label)}</text>')
    for kind, some in series.items():
        some = some[::-(-len(some) // POINTS) or 1]
        for (first, _), (until, _) in zip(stages, [*stages[1:], (math.inf, "")]):  # a line of its own for each stage
            if line := [f"{x(step):.1f} {y(v):.1f}" for step, v, _ in some if first < step <= until]:
                out.append(f'<path class="{kind}" d="M{"L".join(line)}"/>')
        out += [f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(v):.1f}" r="3.5"><title>{esc(hint)}</title></circle>' for step, v, hint in some]
    return "".join(out) + "</svg>"


def read_log(run):
    """The lines of a run's log.jsonl whose loss is a number."""
    path, found = os.path.join(run, "log.jsonl"), []
    for line in open(path, encoding="utf-8") if os.path.exists(path) else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
            entry = json.loads(line)
            found += [entry] if entry["step"] > 0 and 0 <= entry["loss"] < math.inf else []
    return found


def curves(runs):
    """[(stage, run folder)] -> both charts, and the values on dev as a table; the stages stand end to end."""
    train, dev, scores, stages, rows, first = [], [], [], [], [], 0
    for stage, run in runs:
        log = read_log(run)
        stages += [(first, stage)] * bool(log)
        for e in log:
            at, said, loss, bleu = first + e["step"], f"{stage}, step {e['step']}", e.get("dev_loss"), e.get("dev_bleu", [None])[-1]
            train.append((at, max(e["loss"], 1e-6), f"{said}: train loss {e['loss']:.4f}"))
            if loss is not None and loss < math.inf:
                dev.append((at, max(loss, 1e-6), f"{said}: dev loss {loss:.4f}"))
                scores += [(at, bleu, f"{said}: dev BLEU-4 {bleu:.2f}")] if bleu is not None else []
                rows.append([said, f"{e.get('epoch', 0):g}", f"{e['loss']:.4f}", f"{loss:.4f}", *("" if v is None else f"{v:.2f}" for v in (bleu, e.get("dev_rouge")))])
        first += log[-1]["step"] if log else 0
    if not train:
        return '<p class="todo">The run has logged nothing yet.</p>'
    loss = chart("loss a token (log scale)", {"train": train, "dev": dev}, stages, True)
    out = f'<figure>{loss}<figcaption><i class="key"></i>train <i class="key dev"></i>dev</figcaption></figure>'
    if scores:
        out += f'<figure>{chart("dev BLEU-4", {"dev": scores}, stages)}<figcaption><i class="key dev"></i>dev clips, decoded</figcaption></figure>'
    values = table(("stage", "epoch", "train loss", "dev loss", "BLEU-4", "ROUGE"), rows, "values on dev")
    return f'<div class="pair">{out}</div>' + (f"<details><summary>Values on dev</summary>{values}</details>" if rows else "")


def gap(real, shuffled):
    """One sentence on what the model has seen."""
    a, b, mine, other = real["bleu"][3], shuffled["bleu"][3], real.get("bleu4_95"), shuffled.get("bleu4_95")
    said = f"With its own video a sentence scores BLEU-4 <b>{a:.2f}</b>, with another clip's <b>{b:.2f}</b>: "
    if a <= b or mine and other and mine[0] <= other[1]:
        return said + "<b>no difference beyond chance</b>. Nothing here shows that the model looks at the video; the score is what fluent guessing earns."
    return said + f"the gap of <b>{a - b:.2f}</b> is what the model has seen, all else is fluent guessing."


def score_table(run, again):
    """scores.json and its controls -> (HTML, what scores.json holds)."""
    path = lambda control: os.path.join(run, "scores" + "." * bool(control) + control + ".json")
    found = {c: load_json(path(c)) for c in ("", *CONTROLS) if os.path.exists(path(c))}
    if not (real := found.get("")):
        return f'<p class="todo">No scores yet. <code>{again}</code> makes them, with their controls.</p>', {}
    stale = [c for c, s in found.items() if any(s.get(k) != real.get(k) for k in ("checkpoint", "step", "split", "decoding", "sha256"))]
    named = {"the model": real} | real.get("variants", {}) | {WITHOUT[c] + " *" * (c in stale): found[c] for c in CONTROLS if c in found}
    named |= {name + ", no LLM": s for name, s in real.get("baselines", {}).items()}
    rows = [[name, *(f"{v:.2f}" for v in (*s["bleu"], s["rouge"], s["chrf"]))] for name, s in named.items()]
    interval = ", BLEU-4 {:.2f} to {:.2f} (95 %, bootstrap)".format(*real["bleu4_95"]) if real.get("bleu4_95") else ""
    how = ", ".join(f"{k}={v:g}" for k, v in real.get("decoding", {}).items() if k != "batch_size")
    out = f'<p class="lead">{gap(real, found["shuffle"])}</p>' if "shuffle" in found else \
        f'<p class="todo">A score alone says little: <code>{again}</code> also scores the model on other clips\' videos.</p>'
    out += table(("", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE", "chrF"), rows, "scores", "scores",
                 f"{'STAND-IN features: ' if real.get('standin') else ''}{real['clips']} {real['split']} clips{interval}; "
                 f"{real['exact']:.0f} % of the sentences are exact. Decoded with {how}.")
    if stale:
        out += f'<p class="todo">* made with another checkpoint, split or decoding than the model\'s row; <code>{again}</code> makes all anew.</p>'
    return out + f'<p class="fine">{"<br>".join(esc(s) for s in real["signature"].values())}</p>', real


def head(run, folder, c, real):
    """What was run, what of it learns, and all settings -> HTML."""
    v, get = c.get("versions", {}), lambda key: str(c.get(key, "?"))
    facts = {"data set": get("dataset"), "features": get("backbone"), "stage": get("stage"), "LLM": real.get("llm") or get("llm"),
             "language": get("language"), "prompt": get("prompt"),
             "training": f"{get('epochs')} epochs, {get('batch_size')} clips a step, peak learning rate {get('lr')}", "folder": run,
             "made with": f"Python {v.get('python')}, torch {v.get('torch')}, {v.get('processes')} process(es), commit {str(v.get('commit'))[:12]}"}
    learns = {"ltn": c.get("train_ltn"), "proj": c.get("train_ltn"), "adaptor": True, "LoRA": True, "word embeddings": c.get("train_embeddings"), "LLM": False}
    sizes, out, standin = dict.fromkeys(learns, 0), "", real.get("standin")
    if folder:
        state = load_json(os.path.join(folder, "state.json"))
        standin, facts["checkpoint"] = standin or state.get("extractor", {}).get("standin"), f"{folder}, step {state.get('step')}"
        files = [os.path.join(folder, f) for f in ("vision.safetensors", "adapter_model.safetensors")]
        for name, t in (pair for f in files if os.path.exists(f) for pair in load_tensors(f).items()):
            part = "LoRA" if "lora_" in name else "word embeddings" if name.startswith("llm.") else name.split(".")[0]
            if part in sizes:  # the others are statistics of the features
                sizes[part] += t.numel()
        with contextlib.suppress(BadInput):  # its folder need not be on this machine
            sizes["LLM"] = sum(math.prod(s) for s in open_llm(get("llm")).shapes.values()) - sizes["word embeddings"]
        out = table(("part", "parameters", "in this stage"), [[PARTS.get(p, p), f"{n:,}", "learns" if learns[p] else "frozen"] for p, n in sizes.items() if n], "what learns")
    page = read_literals(os.path.join(HERE, "..", "train.py"))
    says = {k: comment for k, (_, comment) in page.items()} | page.get(get("stage"), ({}, {}))[1]
    settings = table(("", "value", "what it is"), [[k, str(x), str(says.get(k, ""))] for k, x in c.items() if k != "versions"], "all settings", "settings")
    mark = f'<p class="standin"><b>STAND-IN</b> Nothing here is a score of the data set: {esc(standin)}.</p>' if standin else ""
    return f'{mark}<dl>{"".join(f"<div><dt>{k}<dd>{esc(x)}</div>" for k, x in facts.items())}</dl>{out}<details><summary>All settings</summary>{settings}</details>'


def closely(chosen, hyps, folder, lang, split, cfg):
    """What the page shows of some clips -> ([dict for its script], rules of CSS with their frames, [what is missing and why])."""
    try:
        sllama, tokenizer, run = load_model(folder, cfg.device, llm=cfg.llm, data_dir=cfg.data_dir)
        data = Clips(run.data_dir, run.dataset, run.backbone, split, run.max_frames)
    except BadInput as e:
        return [], "", [f"No clip can be looked at closely: {e}"]
    part = layer_range(cfg.layers, len(sllama.llm.layers))
    at, found, rules, notes, progress = {row["name"]: i for i, row in enumerate(data.rows)}, [], "", [], Progress("clips looked at", len(chosen))
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
                rules, shown = rules + f".s{len(found)}{{--strip:url({uri});--n:{tiles};--ratio:{ratio:.3f}}}", True
            except BadInput as e:
                notes.append(str(e))
        written = [[w[0], i in wrong, s, row] for i, (w, s, row) in enumerate(zip(words(hyp, lang), share.tolist(), rounded(seen)))]
        found.append({"name": name, "frames": len(features), "tiles": tiles, "strip": shown, "words": written, "band": rounded(band) if band is not None else []})
        progress(done)
    return found, rules, notes


def sentences(hyps, scores, looked, lang):
    """The rows of the table of all clips, worst first."""
    rows, index = [], {clip["name"]: i for i, clip in enumerate(looked)}
    for name in sorted(hyps, key=lambda n: scores[n]):
        (hyp, ref), i = hyps[name], index.get(name)
        a, b, _ = marked(ref, hyp, lang)
        title = esc(name) if i is None else f'<button type="button" class="open" data-clip="{i}">{esc(name)}</button>'
        rows.append(f'<tr><th scope="row" data-v="{esc(name)}">{title}<td class="n">{scores[name]:.1f}<td class="n">{len(words(ref, lang))}<td>'
                    f'<div class="both" lang="{lang}"><span>ref</span><p dir="auto">{a}</p><span>hyp</span><p dir="auto">{b}</p></div>')
        if i is not None and looked[i]["strip"]:
            tiles = "".join(f'<i class="tile" style="--j:{j}"></i>' for j in np.linspace(0, looked[i]["tiles"] - 1, 6).astype(int))
            rows[-1] += f'<div class="mini s{i}" aria-hidden="true">{tiles}</div>'
    return "\n".join(rows)


def home(folder):
    """A run's folder, whichever of its checkpoints is named."""
    folder = folder.rstrip("/")
    return os.path.dirname(folder) if re.fullmatch(r"(best|last)(\.\d+)?", os.path.basename(folder)) else folder


def main():
    cfg = configure(__file__, choices={"device": ("auto", "cpu", "cuda")})
    for key, low in {"clips": 0, "side": 16}.items():
        if getattr(cfg, key) < low:
            usage_error(__file__, f"{key}={getattr(cfg, key)}: must be at least {low}")
    folder = cfg.ckpt or newest_run(cfg.out_dir)
    run = home(folder)
    if not os.path.exists(os.path.join(run, "config.json")):
        raise BadInput(f"{run}: holds no config.json, it is no run's folder")
    c = load_json(os.path.join(run, "config.json"))
    notes, hyps, looked, rules, lang = [], {}, [], "", ""  # without a language words lie between spaces
    with contextlib.suppress(BadInput):
        lang = language_code(c.get("language", ""), c.get("lang", ""))
    try:
        folder = find_checkpoint(folder)
    except BadInput as e:
        folder, notes = "", [str(e)]
    again = f"python eval.py ckpt={shlex.quote(run)} control=all"
    scores, real = score_table(run, esc(again))
    if os.path.exists(path := os.path.join(run, "hyps.jsonl")):
        hyps = read_hyps(path)
    else:
        notes.append(f"No sentences yet: {again} writes them.")
    chrf = CHRF()
    each = {name: chrf.sentence_score(hyp, [ref]).score for name, (hyp, ref) in hyps.items()}
    if hyps and not cfg.clips:
        notes.append("clips=0: none was looked at closely.")
    elif hyps and folder:
        worst = sorted(hyps, key=lambda n: each[n])
        ranks = {round((i / max(1, cfg.clips - 1)) ** 2 * (len(worst) - 1)) for i in range(cfg.clips)}  # both ends, and more of the worse half
        looked, rules, more = closely([worst[r] for r in sorted(ranks)], hyps, folder, lang, real.get("split", "test"), cfg)
        notes += more
    before = [("align", home(c.get("init_from") or os.path.join(os.path.dirname(run), "align")))] if c.get("stage") == "sft" else []
    parts = {"title": esc(" / ".join(str(c[key]) for key in ("dataset", "run", "stage") if c.get(key))), "head": head(run, folder, c, real), "scores": scores,
             "curves": curves([*before, (c.get("stage", "run"), run)]), "strips": rules, "notes": "".join(f'<p class="todo">{esc(n)}</p>' for n in notes),
             "layers": f"layers {esc(cfg.layers)}" if cfg.layers else "all layers", "unit": "characters" if lang in UNSPACED else "words",
             "rows": sentences(hyps, each, looked, lang), "none": "" if hyps else "hidden",
             "data": json.dumps(looked, ensure_ascii=False).replace("<", "\\u003c")}  # no sentence can close the script
    page = open(os.path.join(HERE, "report.html"), encoding="utf-8").read()
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    parts["hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the page allows itself this script and no other
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], page)  # in one go: what a sentence says in braces stays a text
    to = cfg.to or os.path.join(run, "report.html")
    os.makedirs(os.path.dirname(os.path.abspath(to)), exist_ok=True)
    with whole(to) as f:
        f.write(page)
    print(f"{to}: {len(page.encode()) / 1e6:.2f} MB, {len(hyps)} sentences, {len(looked)} clips looked at closely")


if __name__ == "__main__":
    launch(main)

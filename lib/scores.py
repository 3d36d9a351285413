"""
BLEU and ROUGE by one fixed protocol: text in, numbers out.
sacrebleu is imported where it is used, since `help` waits for every import up there.
"""
import io
import json
import logging
import os
import re

import numpy as np

from lib.files import read_jsonl, read_text, whole
from lib.program import BadInput

# codes of what is written without spaces between words, those of ISO 639-3 and their like behind them
UNSPACED = {"zh": "zh", "yue": "yue", "ja": "ja", "th": "th",
            "zho": "zh", "chi": "zh", "cmn": "zh", "jpn": "ja", "jp": "ja", "tha": "th"}
LANGUAGES = {"German": "de", "English": "en", "Chinese": "zh"}
SAMPLES = 1000  # of the bootstrap


def plain_code(lang):
    """zh for zh-CN, zh_hans, cmn, zho; the like for Japanese and Thai; other codes as they are."""
    plain = UNSPACED.get(re.split("[-_]", lang.lower())[0], lang)
    if not re.fullmatch(r"[a-z]{2,3}", plain):
        raise BadInput(f"lang={lang}: is no language code such as de, en, zh")
    return plain


def unspaced(sentences):
    """Whether any of them is written without spaces between words."""
    return any(re.search("[\u0e00-\u0e7f\u3040-\u9fff]{4}", sentence) for sentence in sentences)


def say_if_unspaced(refs, lang):
    """A line where sentences without spaces are about to be cut at spaces."""
    if lang not in UNSPACED and unspaced(refs):
        print(f"lang={lang}: but the sentences are written without spaces; zh, ja and th are scored by characters")


def _metric(lang, order=4):
    lang = plain_code(lang)
    from sacrebleu.metrics import BLEU
    # one character a token for Chinese and its like, sacrebleu's default for languages with spaces
    return BLEU(tokenize="char" if lang in UNSPACED else "13a", smooth_method="exp", max_ngram_order=order, force=True)


def language_code(language, lang):
    """The name of a language in a prompt, or its code where one is given -> code. BadInput names the variable."""
    lang = lang or LANGUAGES.get(language, "")
    if not lang:
        raise BadInput(f"lang: say the code of {language}, lang=xx")
    return plain_code(lang)


def _check(hyps, refs):
    if len(hyps) != len(refs) or not hyps:
        raise BadInput(f"{len(hyps)} hypotheses and {len(refs)} references: there must be as many, and one at least")


def bleu(hyps, refs, lang):
    """Two lists of sentences -> [BLEU-1, ..., BLEU-4] in percent: sacrebleu's corpus BLEU of maximal order n."""
    _check(hyps, refs)
    return [_metric(lang, n).corpus_score(hyps, [refs]).score for n in (1, 2, 3, 4)]


def counts_of(hyps, refs, lang):
    """What BLEU-4 is made of, sentence by sentence -> (sentences, 10): hits and n-grams of four orders, two lengths."""
    metric = _metric(lang)
    metric.effective_order = True  # of a sentence alone; what is counted is the same
    scores = [metric.sentence_score(hyp, [ref]) for hyp, ref in zip(hyps, refs)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores])


def bleu4_of(counts):
    """The sum of such rows -> BLEU-4 in percent, as `bleu` has it."""
    from sacrebleu.metrics import BLEU
    counts = counts.tolist()
    return BLEU.compute_bleu(counts[:4], counts[4:8], *counts[8:], smooth_method="exp").score


def _lcs(a, b):
    """Length of the longest common subsequence of two lists or texts."""
    row = [0] * (len(b) + 1)
    for x in a:
        previous = 0
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge(hyps, refs, lang):
    """Two lists of sentences -> ROUGE-L in percent as coco-caption has it: F with beta 1.2, mean over sentences."""
    _check(hyps, refs)
    lang = plain_code(lang)
    cut = (lambda s: "".join(s.split())) if lang in UNSPACED else str.split
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
        return {"punctuation mapped to ASCII": lambda s: s.translate(PUNCTUATION),
                "punctuation stripped": lambda s: re.sub(r"[^\w\s]", "", s)}
    return {'" ." appended': lambda s: s + " ."}


def report(hyps, refs, lang):
    """All scores of a system as one dict, with signatures and a bootstrap interval (Koehn 2004) of BLEU-4."""
    from sacrebleu.metrics import CHRF
    metric, chrf = _metric(lang), CHRF()

    def scored(hyps, refs):
        return {"bleu": bleu(hyps, refs, lang), "rouge": rouge(hyps, refs, lang),
                "chrf": chrf.corpus_score(hyps, [refs]).score}

    # resampled with sacrebleu's own seed: the same each time
    sampled = metric.corpus_score(hyps, [refs], n_bootstrap=SAMPLES) if len(refs) > 1 else None
    metric.corpus_score(hyps, [refs])  # the signature counts the references
    return scored(hyps, refs) | {
        "bleu4_95": [sampled._mean - sampled._ci, sampled._mean + sampled._ci] if sampled else None,
        "exact": 100 * sum(h == r for h, r in zip(hyps, refs)) / len(refs),
        "clips": len(refs), "lang": lang,
        "variants": {name: scored(list(map(change, hyps)), list(map(change, refs)))
                     for name, change in variants(lang).items()},
        "signature": {"bleu": str(metric.get_signature()), "chrf": str(chrf.get_signature()),
                      "rouge": f"ROUGE-L|F:beta1.2|tok:{'char' if lang in UNSPACED else 'space'}|mean:sentence"}}


def print_scores(title, rows):
    """A table of scores, name -> report; the first row's variants, interval and signatures stand with it."""
    def line(name, s):
        print(f"{name:32} " + " ".join(f"{b:6.2f}" for b in s["bleu"]) + f" {s['rouge']:6.2f} {s['chrf']:6.2f}")

    (first, scores), *others = rows.items()
    print(f"\n{title:32} BLEU-1 BLEU-2 BLEU-3 BLEU-4  ROUGE   chrF")
    line(first, scores)
    for name, s in scores["variants"].items():
        line(f"  ({name})", s)
    for name, s in others:
        line(name, s)
    interval = "BLEU-4 {:.2f} to {:.2f} (95 %), ".format(*scores["bleu4_95"]) if scores["bleu4_95"] else ""
    print(f"{scores['clips']} clips, {interval}{scores['exact']:.0f} % exact")
    print("\n".join(scores["signature"].values()), flush=True)

# ---------------------------------------------------------------------------------------------------------------------
# Files of hypotheses

def write_scored(home, suffix, rows, hyps, scores):
    """A split's sentences beside their references, and its scores -> home/hyps{suffix}.jsonl, scores{suffix}.json."""
    lines = [{"name": r["name"], "hyp": h, "ref": r["text"]} for r, h in zip(rows, hyps)]
    for name, some in ((f"hyps{suffix}.jsonl", lines), (f"scores{suffix}.json", [scores])):
        with whole(f"{home}/{name}") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in some)
    print(f"written to {home}/hyps{suffix}.jsonl and scores{suffix}.json")


def read_hyps(path, refs=""):
    """A file of lines {"name","hyp","ref"}, or two of texts line by line -> {name or line: (hyp, ref)}."""
    found = {}

    def take(row):
        name, pair = str(row["name"]), (row["hyp"], row["ref"])
        if not all(isinstance(text, str) for text in pair):
            raise ValueError("hyp and ref must be texts")
        if name in found:
            raise BadInput(f"{name} stands there twice")
        found[name] = pair

    if not refs:
        read_jsonl(path, 'a line {"name", "hyp", "ref"}; two aligned text files are hyps=A.txt refs=B.txt', take)
        return found
    hyps, lines = ([line.strip() for line in io.StringIO(read_text(file))] for file in (path, refs))
    if len(hyps) != len(lines) or not hyps:
        raise BadInput(f"{path} has {len(hyps)} lines, {refs} has {len(lines)}: there must be as many, "
                       "a sentence each, and one at least")
    return dict(enumerate(zip(hyps, lines), 1))


def score_files(path, other, lang, refs=""):
    """hyps=FILE: its scores. against=FILE: beside another system's, with the p-value of a paired bootstrap test."""
    if not lang:
        raise BadInput("lang: say the language of the sentences, lang=de")
    lang = plain_code(lang)
    mine = read_hyps(path, refs)
    files = {path: mine}
    if other:
        theirs = files[other] = read_hyps(other, refs)
        if alone := sorted(mine.keys() ^ theirs.keys()):
            raise BadInput(f"{other if alone[0] in mine else path}: has no clip {alone[0]}, which the other file has "
                           f"({len(alone)} such)")
        if unlike := [name for name in mine if mine[name][1] != theirs[name][1]]:
            raise BadInput(f"{other}: the reference of {unlike[0]} is another than in {path} ({len(unlike)} such)")
    refs = [ref for _, ref in mine.values()]
    say_if_unspaced(refs, lang)
    hyps = {f: [rows[name][0] for name in mine] for f, rows in files.items()}
    title = lambda f: ("" if f == path else "against ") + os.path.basename(f)
    print_scores(f"lang={lang}", {title(f): report(h, refs, lang) for f, h in hyps.items()})
    if other:
        compare(hyps[path], hyps[other], refs, lang)


def compare(hyps, others, refs, lang):
    """Print how much better the first system is, and whether that may be chance: paired bootstrap (Koehn 2004)."""
    from sacrebleu.metrics import CHRF
    from sacrebleu.significance import PairedTest
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)
    systems = [("others", others), ("ours", hyps)]  # sacrebleu tests against the first
    metrics = {"BLEU": _metric(lang), "chrF": CHRF()}
    test = PairedTest(systems, metrics, [refs], test_type="bs", n_samples=SAMPLES)()[1]
    for metric, (theirs, ours) in zip(("BLEU-4", "chrF"), list(test.values())[1:]):  # the first holds the names
        verdict = "significant" if ours.p_value < 0.05 else "may well be chance"
        print(f"{metric:6} {ours.score - theirs.score:+.2f}, p = {ours.p_value:.3f}: {verdict} "
              f"(paired bootstrap, {SAMPLES} samples of {len(refs)} clips)")

"""
The scores against sacrebleu and against second implementations written here, files of hypotheses, controls.

    python -m pytest tests/test_eval.py
"""
import gzip
import json
import math
import pickle
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest
import sacrebleu
import torch

import eval as evaluation
from lib.controls import baselines, controlled
from lib.program import BadInput
from lib.scores import _lcs, bleu, report, rouge, score_files, variants
from lib.tensors import stateless

ROOT = Path(__file__).resolve().parents[1]

GERMAN = ["am montag regnet es im süden bei zehn grad", "in der nacht gibt es an der küste keine wolken",
          "heute scheint in den alpen die sonne nicht", "guten abend liebe zuschauer",
          "und nun die wettervorhersage für morgen freitag den zwölften august",
          "am tag elf grad im vogtland und einundzwanzig grad am oberrhein", "schnee"]
ENGLISH = ["The next area we're going to talk about is rhythm.", "A major concern is landslides in mountainous areas.",
           "It cost $3.50, i.e. 1,000 times less (in 2009-10)!", "\"Well,\" he said; \"that's it: don't you think?\"",
           "Open the door.", "What's the 1st rule of state-of-the-art A/B tests?", "No."]
CHINESE = ["今天我想吃面条。", "他们每天早上都去公园跑步，对吗？", "我的2个朋友在ABC公司工作。", "请把门打开！",
           "天气预报说：明天有雨", "我妈妈做的菜很好吃；你要不要尝一尝？", "好"]
SPACED = [" ".join(s) for s in CHINESE]
TEXTS = {"German": (GERMAN, "de"), "English": (ENGLISH, "en"), "Chinese": (CHINESE, "zh"),
         "Chinese, spaced": (SPACED, "zh")}


def spoilt(refs, rng, cut):
    """
    Hypotheses of every quality: tokens dropped, doubled, swapped, taken from another sentence; the first is right.
    """
    hyps = refs[:1]
    for ref in refs[1:]:
        tokens = cut(ref)
        for _ in range(rng.integers(0, len(tokens) // 2 + 2)):
            if not tokens:
                break
            i, j = rng.integers(len(tokens), size=2)
            kind = rng.integers(4)
            if kind == 0:
                del tokens[i]
            elif kind == 1:
                tokens.insert(i, tokens[j])
            elif kind == 2:
                tokens[i], tokens[j] = tokens[j], tokens[i]
            else:
                other = cut(refs[rng.integers(len(refs))])
                tokens[i] = other[rng.integers(len(other))]
        hyps.append(("" if cut is list else " ").join(tokens))
    return hyps


def pairs(name, n=3):
    """n pairs of (hyps, refs), and their language."""
    refs, lang = TEXTS[name]
    for k in range(n):
        yield spoilt(refs, stateless("spoilt", k), list if name == "Chinese" else str.split), refs, lang


# ---------------------------------------------------------------------------------------------------------------------
# Second implementations

def mteval(line):
    """Tokens as NIST's mteval-v13a cuts them: punctuation apart, but . and , stay between digits, and - in words."""
    line = f" {line.replace('&quot;', chr(34)).replace('&amp;', '&').replace('&lt;', '<').replace('&gt;', '>')} "
    line = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", line)
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", line).split()


def own_bleu(hyps, refs, lang):
    """
    BLEU-1 to BLEU-4 of Papineni et al. 2002 over a corpus; the k-th order without a match counts 1/2^k matches
    (mteval's smoothing).
    """
    cut = (lambda s: [c for c in s if not c.isspace()]) if lang == "zh" else mteval
    match, total, hyp_len, ref_len = [0] * 4, [0] * 4, 0, 0
    for hyp, ref in zip(hyps, refs):
        h, r = cut(hyp), cut(ref)
        hyp_len, ref_len = hyp_len + len(h), ref_len + len(r)
        for n in range(1, 5):
            in_h, in_r = (Counter(tuple(t[i:i + n]) for i in range(len(t) - n + 1)) for t in (h, r))
            match[n - 1] += (in_h & in_r).total()
            total[n - 1] += in_h.total()
    scores = []
    for order in range(1, 5):
        if not match[0] or not all(total[:order]):
            scores.append(0.0)
            continue
        logs, k = 0.0, 0
        for m, t in zip(match[:order], total):
            k += m == 0
            logs += math.log((m or 0.5**k) / t)
        scores.append(100 * math.exp(min(0, 1 - ref_len / hyp_len) + logs / order))
    return scores


def own_rouge(hyps, refs, lang):
    """
    coco-caption's Rouge: F = (1+b^2) P R / (R + b^2 P) with b = 1.2 and P, R of the longest common subsequence; the
    mean of the sentences.
    """
    cut = (lambda s: s.replace(" ", "")) if lang == "zh" else (lambda s: s.split(" "))
    scores = []
    for hyp, ref in zip(hyps, refs):
        h, r = cut(hyp), cut(ref)

        @lru_cache(None)
        def lcs(i, j):
            if not i or not j:
                return 0
            return lcs(i - 1, j - 1) + 1 if h[i - 1] == r[j - 1] else max(lcs(i - 1, j), lcs(i, j - 1))
        if n := lcs(len(h), len(r)):
            p, q = n / len(h), n / len(r)
            scores.append((1 + 1.2**2) * p * q / (q + 1.2**2 * p))
        else:
            scores.append(0.0)
    return 100 * sum(scores) / len(scores)


# ---------------------------------------------------------------------------------------------------------------------
# Scores

@pytest.mark.parametrize("name", TEXTS)
def test_bleu(name):
    for hyps, refs, lang in pairs(name):
        got = bleu(hyps, refs, lang)
        metrics = [sacrebleu.metrics.BLEU(tokenize="char" if lang == "zh" else "13a", max_ngram_order=n)
                   for n in (1, 2, 3, 4)]
        assert got == pytest.approx([m.corpus_score(hyps, [refs]).score for m in metrics], abs=1e-9)
        assert got == pytest.approx(own_bleu(hyps, refs, lang), abs=0.01)
        assert 5 < got[3] < got[2] < got[1] < got[0] < 100  # cumulative, as the field prints it


@pytest.mark.parametrize("name", TEXTS)
def test_rouge(name):
    for hyps, refs, lang in pairs(name):
        assert rouge(hyps, refs, lang) == pytest.approx(own_rouge(hyps, refs, lang), abs=1e-9)
        assert 5 < rouge(hyps, refs, lang) < 100


def test_rouge_by_hand():
    # "a b c d" against "a c e": 2 in common, P = 2/4, R = 2/3
    assert rouge(["a b c d"], ["a c e"], "en") == pytest.approx(100 * 2.44 * (1 / 3) / (2 / 3 + 1.44 / 2))


def test_bleu_by_hand():
    # 3 of 4 words, 2 of 3 pairs; as long as the reference
    assert bleu(["a b c x"], ["a b c d"], "en")[:2] == pytest.approx([75, 100 * (3 / 4 * 2 / 3) ** 0.5])
    # shorter by half: exp(1 - 4/2)
    assert bleu(["a b"], ["a b c d"], "en")[:2] == pytest.approx([100 * math.exp(-1)] * 2)


@pytest.mark.parametrize("name", TEXTS)
def test_perfect(name):
    refs, lang = TEXTS[name]
    assert bleu(refs, refs, lang) == pytest.approx([100] * 4) and rouge(refs, refs, lang) == pytest.approx(100)


def test_spaces_do_not_matter_in_chinese():
    for (hyps, refs, _) in pairs("Chinese"):
        for change in (lambda s: " ".join(s), lambda s: "  ".join(s) + " "):
            for h, r in ((list(map(change, hyps)), refs), (hyps, list(map(change, refs)))):
                assert bleu(h, r, "zh") == pytest.approx(bleu(hyps, refs, "zh"))
                assert rouge(h, r, "zh") == pytest.approx(rouge(hyps, refs, "zh"))


@pytest.mark.parametrize("hyps", [[""], ["regnet"], ["xyzzy"], ["am montag"], ["regnet", ""], ["", GERMAN[1]],
                                  ["", ""], [" ", "\n"]])
def test_short_hypotheses(hyps):
    refs = GERMAN[:len(hyps)]
    got = bleu(hyps, refs, "de")
    assert got == pytest.approx(own_bleu(hyps, refs, "de"), abs=0.01)
    assert all(map(math.isfinite, got)) and 0 <= rouge(hyps, refs, "de") <= 100
    if not "".join(hyps).strip():
        assert got == [0] * 4 and rouge(hyps, refs, "de") == 0


def test_one_word_against_one_word():
    assert bleu(["schnee"], ["schnee"], "de")[0] == pytest.approx(100)
    assert rouge(["schnee"], ["schnee"], "de") == pytest.approx(100)


def test_lcs():
    for a, b, n in (("", "", 0), ("abc", "", 0), ("abc", "abc", 3), ("abcbdab", "bdcaba", 4), ("aaaa", "aa", 2),
                    ("abc", "cba", 1), ("xaxbxc", "abc", 3)):
        assert _lcs(list(a), list(b)) == _lcs(list(b), list(a)) == n


@pytest.mark.parametrize("metric", [bleu, rouge])
@pytest.mark.parametrize("hyps, refs", [([], []), (["a"], []), (["a"], ["a", "b"]), (["a", "b"], ["a"])])
def test_unequal_lengths(metric, hyps, refs):
    with pytest.raises(BadInput, match=f"{len(hyps)} .* {len(refs)} "):
        metric(hyps, refs, "de")


@pytest.mark.parametrize("lang", ["German", "", "d", "DE", "de-DE"])
def test_wrong_language(lang):
    with pytest.raises(BadInput, match="lang="):
        bleu(["a"], ["a"], lang)


def test_report():
    ((hyps, refs, lang),) = pairs("German", 1)
    got = report(hyps, refs, lang)
    assert got["bleu"] == bleu(hyps, refs, lang) and got["rouge"] == rouge(hyps, refs, lang)
    assert got["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hyps, [refs]).score)
    assert got["exact"] == pytest.approx(100 * sum(map(str.__eq__, hyps, refs)) / 7) and got["clips"] == 7
    assert "tok:13a" in got["signature"]["bleu"] and "smooth:exp" in got["signature"]["bleu"]
    assert "beta1.2" in got["signature"]["rouge"]
    assert "tok:char" in report(CHINESE, CHINESE, "zh")["signature"]["bleu"]
    json.dumps(got)  # it goes into scores.json


def test_interval():
    """Koehn 2004: 95 % of the scores of resampled corpora lie in it; drawn here a second time."""
    ((hyps, refs, lang),) = pairs("German", 1)
    low, high = report(hyps, refs, lang)["bleu4_95"]
    rng, drawn = stateless("bootstrap"), []
    for _ in range(1000):
        chosen = rng.integers(len(refs), size=len(refs))
        drawn.append(bleu([hyps[i] for i in chosen], [refs[i] for i in chosen], lang)[3])
    drawn.sort()
    assert (high - low) == pytest.approx(drawn[974] - drawn[25], rel=0.15) and low < bleu(hyps, refs, lang)[3] < high
    wide, narrow = (report(hyps * n, refs * n, lang)["bleu4_95"] for n in (1, 30))
    assert narrow[1] - narrow[0] < 0.3 * (wide[1] - wide[0])
    assert report(hyps[:1], refs[:1], lang)["bleu4_95"] is None  # one sentence has no spread


@pytest.mark.parametrize("file, lang", [("labels.train", "de"), ("csl_daily.labels.train", "zh")])
@pytest.mark.parametrize("n", [1, 2, 100, 5000])
@pytest.mark.long
def test_real_corpora(real, file, lang, n):
    """The sentences of PHOENIX-2014T and CSL-Daily against spoilt copies of themselves."""
    with gzip.open(real / "labels" / file) as f:
        rows = pickle.load(f)  # plain dicts of texts, from the folder that the tests trust
    refs = [row["text"] for row in rows.values()][:n]
    cut = list if lang == "zh" else str.split
    hyps = spoilt(refs, stateless("real", n), cut)
    assert len(refs) == n
    assert bleu(hyps, refs, lang) == pytest.approx(own_bleu(hyps, refs, lang), abs=0.01)
    some = slice(0, 300)  # the second implementation is a slow one
    assert rouge(hyps[some], refs[some], lang) == pytest.approx(own_rouge(hyps[some], refs[some], lang), abs=0.01)


def test_variants():
    ((hyps, refs, _),) = pairs("German", 1)
    (dot,) = report(hyps, refs, "de")["variants"].values()
    dotted = [h + " ." for h in hyps], [r + " ." for r in refs]
    assert (dot["bleu"], dot["rouge"]) == (bleu(*dotted, "de"), rouge(*dotted, "de"))
    assert dot["rouge"] > rouge(hyps, refs, "de")  # why it is printed: a dot for free
    mapped, stripped = variants("zh").values()
    assert mapped("你好，ABC。对吗？") == "你好,ABC.对吗?" and stripped("你好，“ABC”。 对吗?") == "你好ABC 对吗"
    full, ascii_ = ["今天我想吃面条。对吗？"], ["今天我想吃面条.对吗?"]
    got = report(ascii_, full, "zh")
    assert got["bleu"][3] < 100 and all(v["bleu"][3] == pytest.approx(100) for v in got["variants"].values())


# ---------------------------------------------------------------------------------------------------------------------
# Files of hypotheses

@pytest.fixture
def file(tmp_path):
    """Content (lines, or rows) -> path of a file of hypotheses."""
    def write(content):
        if isinstance(content, list):
            content = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"
                              for row in content)
        path = tmp_path / "theirs.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)
    return write


def rows(hyps, refs):
    return [{"name": f"clip{i}", "hyp": h, "ref": r} for i, (h, r) in enumerate(zip(hyps, refs))]


GOOD = json.dumps({"name": "a", "hyp": "b", "ref": "c"})


def command(*args):
    return subprocess.run([sys.executable, "eval.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line(file):
    ((hyps, refs, lang),) = pairs("German", 1)
    done = command("hyps=" + file(rows(hyps, refs)), "lang=de")
    assert done.returncode == 0 and not done.stderr
    said = report(hyps, refs, lang)
    assert "theirs.jsonl" in done.stdout and "7 clips" in done.stdout and said["signature"]["bleu"] in done.stdout
    plain, dotted = (list(map(float, re.findall(r"\d+\.\d\d", line))) for line in done.stdout.splitlines()[2:4])
    assert plain == pytest.approx(bleu(hyps, refs, lang) + [rouge(hyps, refs, lang), said["chrf"]], abs=0.006)
    assert dotted[4] > plain[4]


def test_command_line_error_is_one_line(file):
    done = command("hyps=" + file([GOOD, "{"]), "lang=de")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("eval.py: ") and "theirs.jsonl:2: " in done.stderr


def test_sentences_with_odd_characters(file, capsys):
    refs = ["eins\u2028zwei", "mit\ttab \x85 und \x0c", "\"zitat\" \\ ende"]
    score_files(file(rows(refs, refs)), "", "de")
    assert "3 clips" in capsys.readouterr().out
    # as Windows writes it, without a last line end
    score_files(file("\ufeff" + json.dumps({"name": 1, "hyp": "über", "ref": "über"})), "", "de")
    assert "1 clips" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}\n\n", "\n{}\n \n", "\ufeff{}\r\n\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_blank_lines_and_encodings(file, capsys, content, encoding):
    """What editors and PowerShell leave in a file is passed over."""
    line = json.dumps({"name": "a", "hyp": "ja gut so", "ref": "ja gut für alle"}, ensure_ascii=False)
    score_files(file(content.replace("{}", line).lstrip("\ufeff" * (encoding == "utf-16")).encode(encoding)), "", "de")
    assert "1 clips" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_two_aligned_files(tmp_path, capsys, encoding):
    """A sentence a line, an empty one too; another count of lines is one line that names both files."""
    refs = ["heute regnet es im norden", "zeile\u2028zwei für alle", "ja"]
    hyps = ["heute regnet es im süden", "", "ja"]
    for name, texts in (("pred.txt", hyps), ("ref.txt", refs), ("fewer.txt", refs[:2])):
        (tmp_path / name).write_bytes("".join(t + "\r\n" for t in texts).encode(encoding))
    path = lambda name: str(tmp_path / name)
    score_files(path("pred.txt"), "", "de", path("ref.txt"))
    out = capsys.readouterr().out
    assert "3 clips" in out and f"{bleu(hyps, refs, 'de')[0]:6.2f}" in out and "33 % exact" in out
    with pytest.raises(BadInput, match="pred.txt has 3 lines, .*fewer.txt has 2"):
        score_files(path("pred.txt"), "", "de", path("fewer.txt"))
    with pytest.raises(BadInput, match="pred.txt:1: is not a line.*refs="):
        score_files(path("pred.txt"), "", "de")


@pytest.mark.parametrize("code, plain", [
    *dict.fromkeys(("zh", "zh-CN", "zh-cn", "zh_TW", "zh-hans", "zho", "chi", "cmn", "cmn-Hans"), "zh").items(),
    *dict.fromkeys(("ja", "ja-JP", "jpn", "jp"), "ja").items(), ("yue", "yue"), ("th-TH", "th"), ("de", "de")])
def test_names_of_languages(code, plain):
    texts = ["今天天气很好", "我想吃面条"], ["今天天气不好", "我想吃米饭"]
    assert bleu(*texts, code) == bleu(*texts, plain) and rouge(*texts, code) == rouge(*texts, plain)


def test_a_language_with_spaces_for_a_text_without(file, capsys):
    texts = ["今天天气很好", "我想吃面条"]
    for lang, says in (("en", True), ("zh-cn", False)):
        score_files(file(rows(texts, texts)), "", lang)
        assert ("written without spaces" in capsys.readouterr().out) == says
    score_files(file(rows(GERMAN, GERMAN)), "", "de")
    assert "written without spaces" not in capsys.readouterr().out


@pytest.mark.parametrize("content, says", [
    ([GOOD, '{"name": "b", "hyp": "b"'], ":2: "), ([GOOD, '{"name": "b", "hyp": "b"}'], ":2: "),
    ([GOOD, "[1]"], ":2: "), ([GOOD, "3"], ":2: "), ([GOOD, "null"], ":2: "), ([GOOD, "", "{"], ":3: "),
    ([GOOD, {"name": "b", "hyp": None, "ref": "c"}], ":2: "), ([GOOD, {"name": "b", "hyp": "b", "ref": ["c"]}], ":2: "),
    ([GOOD, GOOD], ":2: a stands there twice"), ([{"name": [], "hyp": "b", "ref": "c"}] * 2, ":2: "), ("", "no lines"),
    (GOOD.replace("b", "ü").encode("latin-1"), "UTF-8"), (GOOD.encode("utf-16-le"), ":1: ")])
def test_wrong_files(file, capsys, content, says):
    path = file(content)
    with pytest.raises(BadInput) as e:
        score_files(path, "", "de")
    assert path in str(e.value) and says in str(e.value) and "\n" not in str(e.value)
    assert not capsys.readouterr().out


def test_two_systems(tmp_path, capsys):
    """A system that is plainly worse, one that is the same but for a word, and files that do not belong together."""
    refs = (GERMAN * 8)[:50]

    def write(name, hyps, refs=refs):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows(hyps, refs)))

    write("good.jsonl", refs), write("bad.jsonl", [" ".join(r.split()[::-1]) for r in refs])
    write("near.jsonl", ["guten abend"] + refs[1:])
    compare = lambda a, b: score_files(str(tmp_path / a), str(tmp_path / b), "de")
    compare("good.jsonl", "bad.jsonl")
    out = capsys.readouterr().out
    p = float(re.search(r"BLEU-4 \+\d+\.\d+, p = (\d\.\d+): significant", out)[1])
    assert p < 0.01 and "against bad.jsonl" in out
    compare("near.jsonl", "good.jsonl")
    p = float(re.search(r"BLEU-4 -\d+\.\d+, p = (\d\.\d+): may well be chance", capsys.readouterr().out)[1])
    assert p > 0.05
    write("fewer.jsonl", refs[:-1], refs[:-1]), write("other.jsonl", refs, ["ja"] + refs[1:])
    for name, words in (("fewer.jsonl", "fewer.jsonl: has no clip clip49"),
                        ("other.jsonl", "the reference of clip0 is another")):
        with pytest.raises(BadInput, match=words):
            compare("good.jsonl", name)
    with pytest.raises(BadInput, match="fewer.jsonl: has no clip clip49"):
        compare("fewer.jsonl", "good.jsonl")


@pytest.mark.parametrize("args", [["against=b.jsonl"], ["refs=b.txt"], ["beams=4,x"], ["beams=0"],
                                  ["length_penalties=1;2"], ["control=shuffled"], ["hyps=a.jsonl", "video=b.mp4"],
                                  ["videos=folder", "video=b.mp4"]], ids=lambda a: a[0])
def test_wrong_command_lines(args, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["eval.py", *args])
    with pytest.raises(SystemExit) as stop:
        evaluation.main()
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and err.count("\n") == 1 and args[0].split("=")[0] in err and not out


@pytest.mark.parametrize("lang", ["", "German"])
def test_wrong_language_of_a_file(file, capsys, lang):
    with pytest.raises(BadInput, match="lang"):
        score_files(file([GOOD]), "", lang)
    assert not capsys.readouterr().out


def test_absent_file(tmp_path):
    with pytest.raises((BadInput, OSError), match="absent.jsonl"):
        score_files(str(tmp_path / "absent.jsonl"), "", "de")


# ---------------------------------------------------------------------------------------------------------------------
# Controls

FEATURES = [torch.full((3 + i % 4, 5), float(i)) for i in range(20)]
REAL = torch.arange(5.0) * 10, torch.arange(1.0, 6.0)  # mean and deviation of the features


@pytest.mark.parametrize("n", [2, 3, 20])
def test_shuffle_is_a_permutation_without_fixed_point(n):
    out = controlled(FEATURES[:n], "shuffle", 1337, *REAL)
    order = [int(x[0, 0]) for x in out]
    assert sorted(order) == list(range(n)) and all(i != j for i, j in enumerate(order))
    assert all(x is FEATURES[j] for x, j in zip(out, order))  # the very features
    assert [int(x[0, 0]) for x in controlled(FEATURES[:n], "shuffle", 1337, *REAL)] == order
    if n == 20:
        assert [int(x[0, 0]) for x in controlled(FEATURES, "shuffle", 1, *REAL)] != order


def test_shuffle_of_one_clip():
    with pytest.raises(BadInput, match="shuffle"):
        controlled(FEATURES[:1], "shuffle", 1337, *REAL)


def test_blank():
    out = controlled(FEATURES, "blank", 1337, *REAL)
    assert [x.shape for x in out] == [x.shape for x in FEATURES] and all((x == 0).all() for x in out)
    assert FEATURES[1][0, 0] == 1  # the real ones are left alone


def test_noise():
    out = controlled(FEATURES, "noise", 1337, *REAL)
    assert [x.shape for x in out] == [x.shape for x in FEATURES] and all(x.isfinite().all() for x in out)
    assert all((a == b).all() for a, b in zip(out, controlled(FEATURES, "noise", 1337, *REAL)))
    assert (out[0] != out[4]).all() and (out[0] != controlled(FEATURES, "noise", 1, *REAL)[0]).all()
    (big,) = controlled([torch.zeros(4000, 5)], "noise", 1337, *REAL)  # spread as real features are
    torch.testing.assert_close(big.mean(0), REAL[0], rtol=0, atol=0.4)
    torch.testing.assert_close(big.std(0), REAL[1], rtol=0.05, atol=0)


class Few:
    """Clips as data.Clips shows them."""

    def __init__(self, texts, features, names=None):
        self.rows = [{"name": n, "text": t} for n, t in zip(names or map(str, range(99)), texts)]
        self.features = lambda i: features[i]

    def __len__(self):
        return len(self.rows)


def test_baselines():
    frame = lambda *x: torch.tensor(x, dtype=torch.float16)
    real = torch.tensor([0.0, 100.0]), torch.tensor([1.0, 100.0])  # the second feature is large and says little
    train = Few(["a", "b", "b"], [frame([0, 100], [2, 100]), frame([8, 0]), frame([-8, 250])])
    test = Few(["x", "y"], [frame([7, 190]), frame([-1, 90], [0, 90], [1, 90])], ["u", "v"])
    assert baselines(test, train, *real) == {"nearest training clip": ["b", "a"], "most frequent sentence": ["b", "b"]}
    assert baselines(train, train, *real)["nearest training clip"] == ["b", "a", "a"]  # nobody finds himself


def test_no_control():
    assert all(a is b for a, b in zip(controlled(FEATURES, "none", 1337, *REAL), FEATURES))

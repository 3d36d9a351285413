"""
scripts/report.py on a tiny run that is made here: what stands on the page, that it is true, and that a browser can use
it.

    python -m pytest tests/test_report.py

The last test needs selenium, chromium and chromedriver, and else is skipped.
"""
import base64
import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import chromium, page
from safetensors.torch import save_file

from lib.program import BadInput
from lib.tensors import init_weight, to_hf
from lib.tokenizer import Tokenizer
from lib.weights import ModelArgs
from model import SLLaMA, reach
from scripts import report
from scripts.small_llm import train_tokenizer, train_tokenizer_json
from scripts.toy import write_mp4

SHOW = "<script>alert(1)</script> & {{rows}} <!-- </script>"
HYPS = {"a": ("am abend weht der wind", "am abend weht der wind"),
        "b": ("am montag <b>regnet</b> es", "am dienstag <b>regnet</b> es lange"), "c": ("", "heute scheint die sonne"),
        "d<i>": (SHOW, f"in der nacht {SHOW}"), "e": ("am abend der wind weht", "schnee")}


def tiny_run(root, language="German", hyps=HYPS, video=True):
    """
    A data set of a few clips with random features and an sft run of a random model on it, as data.py, train.py and
    eval.py leave them.
    """
    data, llm, run = root / "data" / "tiny", root / "llm", root / "out" / "tiny" / "sft"
    for folder in (data / "cnn", llm, run / "best", run.parent / "align"):
        folder.mkdir(parents=True)
    train_tokenizer(str(llm), [ref for _, ref in HYPS.values()] * 9, 330)
    vocab_size = Tokenizer(str(llm)).vocab_size
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=vocab_size, head_dim=8)
    variables = page("sft", dataset="tiny", data_dir=str(root / "data"), backbone="cnn", llm=str(llm),
                     out_dir=str(root / "out"), ltn_dim=12, ltn_heads=2, language=language, freeze_llm=True)
    cfg, model = vars(variables), SLLaMA(args, 16, variables)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(init_weight(name, p.shape, 0))
    save_file({to_hf(k): v.contiguous() for k, v in model.llm.state_dict().items()}, llm / "model.safetensors")
    (llm / "config.json").write_text(json.dumps(dict(
        model_type="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=vocab_size, head_dim=8, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)))
    save_file({k: v.contiguous() for k, v in model.vision_state().items()}, run / "best" / "vision.safetensors")
    state = {"config": cfg, "dim_in": 16, "extractor": {}, "step": 8, "best": 1.0}
    (run / "best" / "state.json").write_text(json.dumps(state))
    versions = {"python": "3", "torch": "2", "commit": "abc", "processes": 1}
    (run / "config.json").write_text(json.dumps(cfg | {"versions": versions}))
    rng = np.random.default_rng(0)
    rows = [{"name": name, "text": ref, "video": str(root / f"{i}.mp4")}
            for i, (name, (_, ref)) in enumerate(hyps.items())]
    for row in rows if video else ():
        write_mp4(row["video"], rng.integers(0, 255, (20, 32, 48, 3), dtype=np.uint8))
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    features = {row["name"]: torch.randn(20 + 80 * (i == 1), 16).half() for i, row in enumerate(rows)}
    save_file(features, data / "cnn" / "test.safetensors")
    with open(run / "hyps.jsonl", "w") as f:
        f.writelines(json.dumps({"name": name, "hyp": hyp, "ref": ref}) + "\n" for name, (hyp, ref) in hyps.items())
    for folder, steps in ((run.parent / "align", 12), (run, 8)):
        write_log(folder, range(1, steps + 1), range(4, steps + 1, 4), '{"step": 99, "loss": NaN}\n{"step": 1')
    nearest = {"bleu": [9, 8, 7, 6], "rouge": 5, "chrf": 4}
    for control, bleu4 in (("", 20.0), (".shuffle", 3.0), (".noise", 2.0)):
        (run / f"scores{control}.json").write_text(json.dumps({
            "bleu": [50, 40, 30, bleu4], "rouge": 30.0, "chrf": 40.0, "bleu4_95": [bleu4 - 2, bleu4 + 2], "exact": 20.0,
            "clips": 5, "split": "test", "standin": None, "step": 8, "decoding": {"beam": 4},
            "signature": {"bleu": "nrefs:1"}, "baselines": {"nearest training clip": nearest}}))
    return run


def write_log(folder, steps, looks, more=""):
    """A log.jsonl: a line for each of these steps, and one of its own for each look at dev."""
    lines = []
    for s in steps:
        lines.append({"step": s, "epoch": s / 4, "loss": 3 / s})
        if s in looks:
            lines.append({"step": s, "dev_loss": 4 / s, "dev_bleu": [40, 30, 20, 10 + s], "dev_rouge": 50.0})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("report"))


def page_of(run, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["report.py", f"ckpt={run}", f"to={run}/page.html", "device=cpu", *args])
    report.main()
    return (run / "page.html").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


class Reader(HTMLParser):
    """Elements that are opened, their attributes, and the text of the page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, text):
        self.text += text


def test_the_whole_page(run, monkeypatch):
    page = page_of(run, monkeypatch, "clips=9")
    read = Reader(page)
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids)) and {"scores", "curves", "clip", "clips"} <= set(ids)
    links = [a[k] for _, a in read.tags for k in ("for", "aria-labelledby", "href") if k in a]
    assert all(link.removeprefix("#") in ids for link in links if link.split(":")[0] != "data")
    assert [t for t, _ in read.tags if t in ("header", "main", "nav", "footer")] == ["header", "nav", "main", "footer"]
    # nothing is fetched: no address but what lies in the page itself
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?\s*(https?:)?//", page) and "@import" not in page
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert all(u.startswith("data:image/jpeg;base64,") for u in re.findall(r"url\((.*?)\)", page))
    assert len(page) < 1e6
    # the sentences are texts, wherever they stand; the page has its own two scripts
    shown = page.count("&lt;script&gt;alert(1)") + page.count("\\u003cscript>alert(1)")
    assert [t for t, _ in read.tags].count("script") == 2 and page.count("alert(1)") == shown
    assert "d<i>" in read.text and "<b>regnet</b>" in read.text
    said = "With its own video a sentence scores BLEU-4 20.00, with another clip's 3.00: the gap of 17.00"
    assert said in read.text and "STAND-IN" not in page
    assert "local transformer" in page and "learns" in page and "frozen" in page
    assert page.count("<svg") == 2 and "align, step 4: dev BLEU-4 14.00" in page
    assert "sft, step 8: dev loss 0.5000" in page and "step 99" not in page


def test_what_the_page_says_of_a_clip(run, monkeypatch):
    clips = data_of(page_of(run, monkeypatch, "clips=9"))
    assert {c["name"] for c in clips} == HYPS.keys() and clips[0]["name"] == "c" and clips[-1]["name"] == "a"
    for c in clips:
        hyp, ref = HYPS[c["name"]]
        assert [w[0] for w in c["words"]] == hyp.split() and c["strip"]
        assert c["frames"] == (100 if c["name"] == "b" else 20) and c["tiles"] == min(c["frames"], 64)
        for _, _, share, row in c["words"]:
            assert len(row) == c["frames"] and abs(sum(row) - 1) < 1e-2 and 0 < share < 1
        for t, row in enumerate(c["band"]):  # nine frames at most, none before the first or after the last
            assert len(row) == sum(c["reach"]) + 1 == 9 and abs(sum(row) - 1) < 1e-3
            assert all((v > 0) == (0 <= t + k - c["reach"][0] < c["frames"]) for k, v in enumerate(row))
    (b,) = [c for c in clips if c["name"] == "b"]
    assert [w[0] for w in b["words"] if w[1]] == ["montag"]


def test_the_look_of_a_frame_that_sees_its_whole_clip(run):
    sllama, tokenizer, _ = report.load_model(str(run), "cpu")
    sllama.ltn.window, sllama.ltn.reach = 100, reach(100)
    band = report.look(sllama, tokenizer, torch.randn(11, 16), "am abend", "de")[2]
    assert band.shape == (11, 21) and report.reach_in(sllama.ltn, 11) == [10, 10]
    assert torch.allclose(band.sum(1), torch.ones(11))
    for t, row in enumerate(band):  # frame t - 10 to t + 10, those that are there
        assert (row > 0).tolist() == [0 <= t + k - 10 < 11 for k in range(21)]


def test_the_look_is_that_of_the_model(run):
    """
    Against the definition, for one word of one token: the mean of the recorded weights at the position before it, on
    the frames alone.
    """
    sllama, tokenizer, _ = report.load_model(str(run), "cpu")
    x = torch.randn(11, 16)
    seen, share, band = report.look(sllama, tokenizer, x, "am abend", "de")
    assert seen.shape == (2, 11) and torch.allclose(seen.sum(1), torch.ones(2)) and band.shape == (11, 9)
    before, after = report.prompt_ids(sllama.prompt, tokenizer)
    answer = tokenizer.encode("am abend")
    batch = report.pack([report.Sample(x, before, after, answer + [tokenizer.eos_id])])
    with report.recorded(sllama.llm) as weights:
        sllama(batch)
    first = len(report.writers(answer, "am abend", tokenizer, "de")[0])  # tokens of the first word
    start = len(before) + len(x) + len(after) - 1
    mean = torch.stack(list(weights.values())).mean((0, 1))[start:start + first, len(before):len(before) + len(x)]
    assert torch.allclose(seen[0], (mean / mean.sum(1, keepdim=True)).mean(0), atol=1e-6)
    assert torch.allclose(share[0], mean.sum(1).mean(), atol=1e-6)
    one, *_ = report.look(sllama, tokenizer, x, "am abend", "de", report.layer_range("1", 2))
    assert not torch.allclose(one, seen)
    assert report.look(sllama, tokenizer, x, "", "de")[0].shape == (0, 11)
    for text in ("2", "1-0", "0-2", "x", "-1"):
        with pytest.raises(BadInput, match="layers="):
            report.layer_range(text, 2)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_writers(tmp_path, kind):
    """
    Each word has the tokens that write it: pieces of words, spaces apart, characters of several bytes, tokens of
    several characters.
    """
    pytest.importorskip(kind)
    texts = ["am abend weht der wind", "今天 天气"] * 20
    if kind == "sentencepiece":
        train_tokenizer(str(tmp_path), texts, 300)
    else:
        train_tokenizer_json(str(tmp_path), texts, 300, bos=True)
    tokenizer = Tokenizer(str(tmp_path))
    for text, lang in (("am abend weht wind xyz", "de"), ("今天下雨了，好", "zh"), ("今天 下雨", "zh"), ("a", "de"),
                       ("", "de")):
        ids = tokenizer.encode(text)
        found = report.writers(ids, text, tokenizer, lang)
        assert len(found) == len(report.words(text, lang)) and all(found)
        assert sorted({k for t in found for k in t}) == list(range(len(ids)))  # no token is lost
        assert all(a[-1] <= b[0] + (lang == "zh") for a, b in zip(found, found[1:]))  # nor out of order
        for word, tokens in zip(report.words(text, lang), found):
            assert word[0] in tokenizer.decode(ids[tokens[0]:tokens[-1] + 1])
    letters = SimpleNamespace(decode=lambda ids: "".join("ab c"[i] for i in ids))
    assert report.writers([0, 1, 2, 3], "ab c", letters, "de") == [[0, 1], [2, 3]]


def test_marked():
    marked = report.marked("der wind weht", "der sturm weht", "de")
    assert marked == ("der <mark>wind</mark> weht", "der <mark>sturm</mark> weht", {1})
    assert report.marked("a < b", "a < b", "en")[:2] == ("a &lt; b", "a &lt; b")
    marked = report.marked("今天下雨", "今天下雪了", "zh")
    assert marked == ("今天下<mark>雨</mark>", "今天下<mark>雪了</mark>", {3, 4})
    assert report.marked("eins zwei", "", "de") == ("<mark>eins zwei</mark>", "<i>(empty)</i>", set())


def test_pictures():
    rgb = np.zeros((16, 40, 3), np.uint8)
    rgb[:, 20:, 0] = 255
    uri = report.jpeg(rgb)
    with report.av.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as f:
        back = next(f.decode(video=0)).to_ndarray(format="rgb24").astype(int)
    assert back.shape == rgb.shape and all(abs(back[8, x] - rgb[8, x]).max() < 12 for x in (5, 35))


@pytest.mark.parametrize("top", [1, 3, 7.3, 12, 97, 1071, 2e5])
def test_ticks(top):
    found = report.ticks(top)
    assert found[0] == 0 and 2 <= len(found) <= 6 and found[-1] <= top


def test_gap():
    score = lambda b, low, high: {"bleu": [0, 0, 0, b], "bleu4_95": [low, high]}
    assert "the gap of <b>7.00</b>" in report.gap(score(10, 9, 11), score(3, 2, 4))
    assert "no difference beyond chance" in report.gap(score(5, 2, 8), score(3, 1, 5))
    assert "no difference beyond chance" in report.gap({"bleu": [0, 0, 0, 1]}, {"bleu": [0, 0, 0, 2]})


def test_odd_runs(tmp_path, monkeypatch):
    """
    Chinese, no videos, a stand-in; then without controls, scores, sentences, checkpoint, log: the page says what is
    missing and which command makes it.
    """
    chinese = {"一": ("今天下雪了", "今天下雨"), "二": ("", "好"), "三": ("你好</script>", "你好")}
    run = tiny_run(tmp_path, "Chinese", chinese, video=False)
    scores = json.loads((run / "scores.json").read_text())
    (run / "scores.json").write_text(json.dumps(scores | {"standin": "made from <states>", "step": 9}))
    page = page_of(run, monkeypatch)
    assert "今天下<mark>雪了</mark>" in page and "STAND-IN" in page and "made from &lt;states&gt;" in page
    assert "control: noise *" in page
    assert [len(c["words"]) for c in data_of(page)] == [0, 5, 11] and not any(c["strip"] for c in data_of(page))
    assert ">characters</button>" in page
    (run / "scores.shuffle.json").unlink()
    assert "control=all" in page_of(run, monkeypatch, "clips=0")
    (run / "scores.json").unlink()
    (tmp_path / "llm").rename(tmp_path / "away")
    page = page_of(run, monkeypatch)
    assert "No scores yet" in page and "No clip can be looked at closely" in page and data_of(page) == []
    (run / "hyps.jsonl").unlink(), (run / "log.jsonl").unlink(), shutil.rmtree(run / "best")
    page = page_of(run, monkeypatch)
    assert f"python eval.py ckpt={run} control=all" in page and "holds no checkpoint" in page
    assert page.count("<svg") == 2  # align's curves
    (run.parent / "align" / "log.jsonl").unlink()
    assert "logged nothing" in page_of(run, monkeypatch)
    (run / "config.json").unlink()
    with pytest.raises(BadInput, match="config.json"):
        page_of(run, monkeypatch)


def test_align_run(tmp_path, monkeypatch):
    run = tiny_run(tmp_path)
    config = json.loads((run / "config.json").read_text()) | {"stage": "align", "train_ltn": True}
    (run / "config.json").write_text(json.dumps(config))
    (run / "hyps.jsonl").unlink()
    page = page_of(run, monkeypatch)
    assert "No sentences yet" in page and page.count("<svg") == 2 and "sft, step" not in page
    assert page.count("<td>learns") == 3


def test_what_learns_of_an_llm_that_learns_itself(tmp_path):
    """lora_rank=0: its matrices are not taken for word embeddings."""
    names = ("adaptor.w1.weight", "llm.layers.0.attention.wq.weight", "llm.output.weight", "llm.tok_embeddings.weight")
    save_file({name: torch.zeros(3, 5) for name in names}, tmp_path / "vision.safetensors")
    told = lambda **c: re.findall(r"<th scope=.row.[^>]*>([^<]+)<td[^>]*>([^<]+)<td>([^<]+)",
                                  report.what_learns(str(tmp_path), {"llm": "nowhere", **c}))
    rows = [("adaptor", "15", "learns"), ("word embeddings", "15", "frozen"), ("LLM", "30", "learns")]
    assert told(freeze_llm=False, lora_rank=0, train_embeddings=False) == rows
    assert told(freeze_llm=False, lora_rank=8, train_embeddings=True)[1:] == [
        ("word embeddings", "15", "learns"), ("LLM", "30", "frozen")]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another such run, whose files a test may change."""
    return tiny_run(tmp_path_factory.mktemp("other"), video=False)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MADE_WITH = {"checkpoint": "out/tiny/sft/best", "step": 8, "split": "test",
             "decoding": {"beam": 4, "length_penalty": 1.0}, "sha256": {"features": "aa", "llm": "bb"}}


@pytest.mark.parametrize("key, value", [
    ("", ""), ("checkpoint", "out/tiny/sft/last"), ("step", 7), ("split", "dev"),
    ("decoding", {"beam": 1, "length_penalty": 1.0}), ("sha256", {"features": "cc", "llm": "bb"})])
def test_a_control_of_something_else_is_marked(other, monkeypatch, key, value):
    """
    Another checkpoint, step, split, decoding, or other features: such a control is none for these scores, and a
    star says so.
    """
    for name in ("scores", "scores.shuffle", "scores.noise"):
        rewrite(other / f"{name}.json", **MADE_WITH | ({key: value} if key and name == "scores.noise" else {}))
    page = page_of(other, monkeypatch, "clips=0")
    text = Reader(page).text
    assert "control: another clip's video" in text and "another clip's video *" not in text
    assert ("control: noise *" in text) == ("* made with another checkpoint" in text) == bool(key)


def test_what_the_score_table_says(other, monkeypatch):
    for name in ("scores", "scores.shuffle", "scores.noise"):
        rewrite(other / f"{name}.json", **MADE_WITH)
    greedy = {"bleu": [1, 2, 3, 4], "rouge": 5, "chrf": 6}
    rewrite(other / "scores.json", bleu=[51, 41, 31, 21.25], rouge=33.333, chrf=44.446, bleu4_95=[19.0, 23.5],
            exact=40.4, variants={"greedy": greedy})
    page = page_of(other, monkeypatch, "clips=0")
    rows = re.findall(r"<tr>(<th scope=.row.>.*?)(?=<tr>|</table>)", page, re.S)
    cells = {re.sub("<.*?>", "", name): said for name, *said in (re.split("<td.*?>", row) for row in rows)}
    assert cells["the model"] == "51.00 41.00 31.00 21.25 33.33 44.45".split()
    assert cells["greedy"] == "1.00 2.00 3.00 4.00 5.00 6.00".split()
    assert cells["control: another clip&#x27;s video"][3] == "3.00"
    assert cells["nearest training clip, no LLM"] == "9.00 8.00 7.00 6.00 5.00 4.00".split()
    text = Reader(page).text
    said = ("5 test clips, BLEU-4 19.00 to 23.50 (95 %, bootstrap); 40 % of the sentences are exact. "
            "Decoded with beam=4, length_penalty=1.")
    assert said in text
    assert "the gap of 18.25" in text


def steps_of(svg):
    """Step -> place, from the named steps of a chart's axis."""
    found = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([\d.]+)</text>', svg)
    (x0, s0), *_, (x1, s1) = [(float(x), float(s)) for x, s in found]
    return lambda step: x0 + (x1 - x0) * (step - s0) / (s1 - s0)


def test_curves_stand_at_their_steps(other, monkeypatch):
    """
    Whatever log_every was: align's 12 steps and then sft's 8, each value at its own step, the second stage from the
    first one's last.
    """
    for folder, steps in ((other.parent / "align", (2, 4, 6, 8, 10, 12)), (other, (4, 8))):
        write_log(folder, steps, steps)
    loss, bleu = re.findall("<svg.*?</svg>", page_of(other, monkeypatch, "clips=0"), re.S)
    want = [("align", s, s) for s in (2, 4, 6, 8, 10, 12)] + [("sft", s, 12 + s) for s in (4, 8)]
    for svg, kind, hints in (
            (loss, "train", [f"{stage}, step {s}: train loss {3 / s:.4f}" for stage, s, _ in want]),
            (loss, "dev", [f"{stage}, step {s}: dev loss {4 / s:.4f}" for stage, s, _ in want]),
            (bleu, "dev", [f"{stage}, step {s}: dev BLEU-4 {10 + s:.2f}" for stage, s, _ in want])):
        place, near = steps_of(svg), lambda xs: pytest.approx(xs, abs=0.2)
        dot = rf'<circle class="{kind}" cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+"><title>(.*?)</title>'
        dots = re.findall(dot, svg)
        assert [hint for *_, hint in dots] == hints
        assert [float(x) for x, *_ in dots] == near([place(s) for *_, s in want])
        lines = [line.split("L") for line in re.findall(rf'<path class="{kind}" d="M(.*?)"', svg)]
        assert [len(line) for line in lines] == [6, 2]  # a line of its own for each stage, through its own points
        assert [p for line in lines for p in line] == [f"{x} {y}" for x, y, _ in dots]
        begins = re.findall(r'<path class="stage" d="M([\d.]+) ', svg)
        assert [float(x) for x in begins] == near([place(0), place(12)])
        down = [float(y) for _, y, _ in dots]
        assert down[:6] == sorted(down[:6], reverse=svg == bleu)  # a larger value stands higher


@pytest.fixture(scope="module")
def browser():
    yield from chromium()


@pytest.mark.long
def test_in_a_browser(browser, run, monkeypatch):
    clips = data_of(page_of(run, monkeypatch, "clips=9"))
    js, screen = browser.execute_script, dict(height=800, deviceScaleFactor=1, mobile=False)
    size = lambda width: browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen | {"width": width})
    every = lambda css: browser.find_elements("css selector", css)
    first = lambda css: every(css)[0]
    size(1200)
    browser.get(f"file://{run}/page.html")
    rows = "[...document.querySelectorAll('#all tbody tr:not([hidden]) th')]"
    order = lambda: js(f"return {rows}.map(e => e.textContent)")
    worst = order()
    assert worst[0] == "c" and worst[-1] == "a"
    # sorted by the keyboard: the clips' names, there and back; then by the buttons
    name = first("#all thead button")
    js("arguments[0].focus()", name)
    name.send_keys("\n")
    assert order() == sorted(HYPS) and first("#all th").get_attribute("aria-sort") == "ascending"
    name.send_keys(" ")
    assert order() == sorted(HYPS)[::-1] and len(every("#all [aria-sort]")) == 1
    first("[data-sort=descending]").click()
    assert order()[0] == "a" and order()[-1] == "c"
    assert first("[data-sort=descending]").get_attribute("aria-pressed") == "true"
    first("#filter").send_keys("MONTAG")
    assert order() == ["b"] and first("#count").text == "1 of 5"
    # a clip, then another word of it: its frames light up, and the sentence says which
    first("#all tr:not([hidden]) .open").click()
    assert "montag" in first("#pair").text and len(every("#sheet button")) == 64
    pressed = lambda: [e.text for e in every("#words [aria-pressed=true]")]
    tiles = "[...document.querySelectorAll('#sheet button')]"
    light = lambda: js(f"return {tiles}.map(e => +e.style.getPropertyValue('--v'))")
    assert pressed() == ["montag"] and max(light()) == 1
    was = light()
    every("#words button")[0].click()
    assert pressed() == ["am"] and light() != was and "“am” looks most at frames" in first("#said").text
    at = first("#at")
    js("arguments[0].focus()", at)
    at.send_keys("\ue014")  # arrow right
    assert at.get_attribute("aria-valuetext") == "frame 2 of 100" and pressed() == []
    ahead = clips[0]["reach"][1]
    assert f"Frame 2 is mixed from frames 1 to {2 + ahead}" in first("#said").text
    assert sum(v > 0 for v in light()) <= 2 + ahead
    first("#back").click()
    assert "montag" not in first("#pair").text
    # the empty one
    js("pick.value = 0; pick.onchange()")
    assert first("#said").text == "The model wrote nothing." and not every("#words button")
    # every control has a name, and nothing in the sentences became an element
    controls = "[...document.querySelectorAll('button, input, select')]"
    assert js(f"return {controls}.every(e => e.textContent.trim() || e.ariaLabel || e.labels?.length)")
    assert js("return document.querySelectorAll('#all b, #pair b, #words b, #all th > i').length") == 0
    for width in (360, 1200):
        size(width)
        for details in every("details"):
            js("arguments[0].open = true", details)
        for k in range(5):
            js("pick.value = arguments[0]; pick.onchange()", k)
            assert js("return document.documentElement.scrollWidth") <= width
        assert js("""
            return [...document.querySelectorAll('body *')].filter(e => !e.closest('.box, .hidden')
                && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))""") == []
    assert browser.get_log("browser") == []

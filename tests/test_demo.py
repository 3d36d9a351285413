"""
scripts/demo.py on a tiny run: what the page is told of a clip is what eval.py says of it, whoever sends what; and a
browser can use it, with a file and with a camera.

    python -m pytest tests/test_demo.py

The last tests need selenium, chromium and chromedriver, and else are skipped.
"""
import base64
import http.client
import json
import sys
import tempfile
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
import pytest
import torch
from conftest import chromium

import eval as evaluation
from lib.configurator import configure
from lib.program import BadInput
from lib.video import read_video
from scripts import demo
from scripts.toy import write_mp4


@pytest.fixture(scope="module")
def run(both_stages):
    """The sft run of the small toy."""
    return both_stages / "out" / "toy" / "sft"


@pytest.fixture(scope="module")
def clip(home):
    return str(home / "data" / "toy" / "clips" / "00025.mp4")


@pytest.fixture(scope="module")
def server(run):
    """The program, serving at a free port, with its model as .model, and where clips lie meanwhile as .films."""
    made = {}

    def handler(model, *rest, real=demo.handler):
        made["model"], made["films"] = model, Path(rest[-1])
        return real(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadingHTTPServer, "serve_forever", lambda self: made.update(server=self))
        patch.setattr(demo, "handler", handler)
        words = ["port=0", "browser=false", "max_new_tokens=12", "max_mb=1"]
        patch.setattr(sys, "argv", ["demo.py", f"ckpt={run}", *words])
        demo.main()
    server = made["server"]
    server.model, server.films = made["model"], made["films"]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method, path="/", body=b"", **headers):
    """-> status, the body of the answer"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def told(server, path, name="/clip.mp4"):
    """What the page is told of this file."""
    status, said = ask(server, "POST", name, open(path, "rb").read())
    assert status == 200
    return [json.loads(line) for line in said.splitlines()]


def by_eval(run, path, monkeypatch, capsys):
    """eval.py video= -> what it prints, and the line on stderr with which it ends"""
    monkeypatch.setattr(sys, "argv", ["eval.py", f"ckpt={run}", f"video={path}", "max_new_tokens=12"])
    capsys.readouterr()
    try:
        evaluation.main()
    except BadInput as e:
        return "", str(e)
    said = capsys.readouterr()
    return said.out.strip(), said.err


def test_a_file_is_what_eval_says(server, run, clip, monkeypatch, capsys):
    first, *growing, last = told(server, clip)
    sentence, _ = by_eval(run, clip, monkeypatch, capsys)
    assert last["sentence"] == sentence and first["notes"] == []
    texts = [line["text"] for line in growing]
    assert texts[0] == "" and 1 <= len(texts) <= 12 and len(texts[-1]) > 0
    frames = len(read_video(clip))
    assert last["frames"] == frames and last["tiles"] == min(frames, 64)
    assert last["picture"].startswith("data:image/jpeg;base64,")
    assert [word for word, *_ in last["words"]] == sentence.split()
    for _, share, row in last["words"]:
        assert len(row) == frames and abs(sum(row) - 1) < 1e-2 and 0 < share < 1


def test_the_best_answers(server, clip, monkeypatch):
    """Those that have ended, the best first, each with its score; of one sentence the better; one that ends in none."""
    real, model = demo.translate, server.model

    def translate(*args, watch, **how):
        score = torch.tensor([[-1.0, -0.5, -3.0]])
        tokens = torch.tensor([model.tokenizer.encode("es regnet"), model.tokenizer.encode("es regnet")])
        n = tokens.shape[1]
        watch(score, torch.tensor([[False, True, True]]), torch.tensor([[0, 1, 1]]), tokens[None], n)
        watch(score, torch.tensor([[True, False, False]]), torch.tensor([[0, 0, 0]]), tokens[None], 0)
        return ["es  regnet"]

    monkeypatch.setattr(demo, "translate", translate)
    *_, last = told(server, clip)
    assert last["answers"] == [["es regnet", -0.5], ["", -1.0]] and last["more"] == []
    assert last["sentence"] == "es regnet"
    monkeypatch.setattr(demo, "translate", lambda *args, watch, **how: real(*args, **how))
    *_, last = told(server, clip)
    assert last["answers"] == [] and last["more"] == ["the answer did not end within max_new_tokens=12"]


def test_the_first_answer_is_the_sentence(server, run, clip, monkeypatch):
    """Where the model does end its answers: generate's own choice is the best of those that were watched."""
    model = server.model
    monkeypatch.setattr(model.tokenizer, "eos_ids", [*range(0, model.tokenizer.vocab_size, 2)])
    *_, last = told(server, clip)
    scores = [score for _, score in last["answers"]]
    assert last["answers"][0][0] == last["sentence"] and len(scores) > 1 and scores == sorted(scores)[::-1]


def test_what_is_unlike_training(server, home, tmp_path):
    """Length, rate and looks, a line each; a clip of training is like training."""
    assert told(server, home / "data" / "toy" / "clips" / "00003.mp4")[0]["notes"] == []
    video = read_video(str(home / "data" / "toy" / "clips" / "00003.mp4"))
    write_mp4(str(tmp_path / "long.mp4"), np.concatenate([video] * 6))
    (line,) = told(server, tmp_path / "long.mp4")[0]["notes"]
    lengths = server.model.train.lengths
    assert line == f"{6 * len(video)} frames: the clips of training have {min(lengths)} to {max(lengths)}"
    write_mp4(str(tmp_path / "noise.mp4"), np.random.default_rng(0).integers(0, 255, video.shape, dtype=np.uint8))
    (line,) = told(server, tmp_path / "noise.mp4")[0]["notes"]
    assert "its pictures are unlike those of training" in line
    write_mp4(str(tmp_path / "fast.mp4"), np.repeat(video, 2, 0), fps=50)
    assert told(server, tmp_path / "fast.mp4", "/fast.mp4")[0]["notes"] == [
        "fast.mp4: its 50.0 frames a second are resampled to 25, as in training"]


def test_how_far_is_far(server):
    """A clip of training, moved: as far as no more than one clip of a hundred lies from its nearest, and farther."""
    model = server.model
    near = torch.cdist(model.known, model.known).fill_diagonal_(9e9).amin(1)
    assert model.usual == near.quantile(0.99) and model.known.shape == (20, 1024)
    own = model.train.features(0).float()
    mean, std = model.sllama.mean, model.sllama.std
    assert torch.allclose(model.known[0], ((own - mean) / std).mean(0), atol=1e-5)
    away = model.known[0] - model.known.mean(0)
    away = away / away.norm()  # away from all others
    moved = lambda far: own + std * far * model.usual * away
    assert list(model.unlike(moved(0.99))) == []
    (line,) = model.unlike(moved(2.5))
    assert "2.5 times as far" in line


def test_without_training_clips(run, clip, tmp_path, capsys):
    """A run whose data set is not here is tried all the same, and compared with nothing."""
    words = {"ckpt": str(run), "data_dir": str(tmp_path), "llm": str(run.parents[2] / "data" / "toy" / "llm")}
    cfg = configure(demo.__file__, [f"{k}={v}" for k, v in words.items()] + ["max_new_tokens=3"])
    model, said = demo.Translator(cfg), []
    assert "no clip can be compared with those of training" in capsys.readouterr().out
    model(clip, lambda **what: said.append(what))
    assert said[0] == {"notes": []} and "sentence" in said[-1]


def test_a_clip_without_pictures(server, clip, monkeypatch):
    def strip(*args):
        raise BadInput("no pictures")

    sentence = told(server, clip)[-1]["sentence"]
    monkeypatch.setattr(demo, "strip", strip)
    last = told(server, clip)[-1]
    assert last["sentence"] == sentence and last["picture"] == ""


@pytest.mark.parametrize("name, content", [("clip.mp4", "half"), ("leer.webm", b""), ("grüße.mp4", b"not a video"),
                                           ("sound.wav", "sound")])
def test_a_broken_file_is_one_line(server, run, clip, tmp_path, monkeypatch, capsys, name, content):
    """The line of eval.py, less the folder; and the next clip is translated as if nothing had been."""
    if content == "half":
        content = open(clip, "rb").read()[:3000]
    elif content == "sound":
        content = b"RIFF" + (36 + 800).to_bytes(4, "little") + b"WAVEfmt " + bytes.fromhex(
            "10000000010001004001000080020000020010006461746120030000") + bytes(800)
    (tmp_path / name).write_bytes(content)
    _, line = by_eval(run, tmp_path / name, monkeypatch, capsys)
    assert line.startswith(f"{tmp_path}/{name}: ")
    assert told(server, tmp_path / name, "/" + quote(name)) == [{"error": line.removeprefix(f"{tmp_path}/")}]
    assert "sentence" in told(server, clip)[-1]


@pytest.mark.parametrize("path, name", [("/../../etc/passwd", "passwd"), ("/..", "clip"), ("/", "clip"),
                                        ("/a%2f..%2fb.mp4", "b.mp4"), ("/%00%0ab.mp4", "__b.mp4"), ("/.b.mp4", "b.mp4"),
                                        ("/" + 200 * "%C3%BC" + ".mp4", 56 * "ü" + ".mp4"), ("/b.mp4%FF", "b.mp4_")])
def test_names_stay_in_their_folder(server, path, name):
    status, said = ask(server, "POST", path, b"x")
    assert status == 200 and json.loads(said)["error"].startswith(f"{name}: cannot be decoded")


def test_who_is_refused(server, run, tmp_path, monkeypatch):
    """A script of another page, by its address or by a name that it gives this machine; more bytes than max_mb."""
    here = f"127.0.0.1:{server.server_port}"
    assert ask(server, "GET")[0] == 200 and ask(server, "GET", Host=f"localhost:{server.server_port}")[0] == 200
    assert ask(server, "POST", "/a.mp4", b"x", Origin=f"http://{here}")[0] == 200
    for headers in ({"Origin": "http://elsewhere.org"}, {"Origin": "null"}, {"Host": "elsewhere.org:80"},
                    {"Host": "elsewhere.org", "Origin": "http://elsewhere.org"}, {"Host": ""}):
        for method in ("GET", "POST"):
            assert ask(server, method, "/a.mp4", b"x", **headers) == (403, "")
    status, said = ask(server, "POST", "/a.mp4", b"", Content_Length="2000000000")
    assert json.loads(said) == {"error": "a.mp4: has 2000 MB, max_mb=1 allows no more"}
    assert ask(server, "PUT", "/a.mp4", b"x")[0] == 501
    # a port that is taken
    monkeypatch.setattr(sys, "argv", ["demo.py", f"ckpt={run}", f"port={server.server_port}", "browser=false"])
    with pytest.raises(BadInput, match=f"host=127.0.0.1 port={server.server_port}: Address already in use"):
        demo.main()


def test_ctrl_c_leaves_no_clip_behind(run, tmp_path, monkeypatch):
    """Not even one that is being translated."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["demo.py", f"ckpt={run}", "port=0", "browser=false"])

    def interrupted(self):
        (films,) = tmp_path.iterdir()
        (films / "sent").mkdir()
        (films / "sent" / "clip.mp4").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main()
    assert not any(tmp_path.iterdir())


def test_a_visitor_who_leaves(server, clip):
    """In the middle of sending or of reading: nothing of the clip stays on the disk, and the next one is translated."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.putrequest("POST", "/a.mp4")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"x")
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", "/a.mp4", open(clip, "rb").read())
    connection.close()
    assert "sentence" in told(server, clip)[-1]
    for _ in range(100):
        if not any(server.films.iterdir()):
            return
        time.sleep(0.05)
    raise AssertionError(list(server.films.iterdir()))

# ---------------------------------------------------------------------------------------------------------------------
# In a browser


class Page:
    """The page in a browser, by what can be seen."""

    def __init__(self, browser, server):
        self.js, self.browser = browser.execute_script, browser
        browser.get(f"http://127.0.0.1:{server.server_port}")
        # what is sent is kept, so that eval.py can read the same bytes
        self.js("const real = fetch; window.fetch = (to, how) => { window.sent = how.body; return real(to, how) }")

    def shown(self, name):
        """The text of a part that can be seen, a space where it has none; None of one that cannot."""
        return self.js("const e = document.getElementById(arguments[0]); return e.offsetParent && (e.innerText || ' ')",
                       name)

    def wait(self):
        """Until a sentence or an error is there."""
        for _ in range(600):
            if self.shown("looked") or self.shown("error"):
                return
            time.sleep(0.05)
        raise TimeoutError

    def choose(self, path):
        self.browser.find_element("id", "file").send_keys(str(path))
        self.wait()

    def film(self, seconds):
        button = self.browser.find_element("id", "camera")
        for _ in range(2):
            button.click()
            while self.js("return arguments[0].disabled", button):
                time.sleep(0.05)
        time.sleep(seconds)
        assert button.text == "Stop and translate"
        button.click()
        self.wait()

    def sent(self):
        """The bytes that went to the program."""
        read = """const done = arguments[0], r = new FileReader()
                  r.onload = () => done(r.result); r.readAsDataURL(window.sent)"""
        return base64.b64decode(self.browser.execute_async_script(read).split(",")[1])


@pytest.fixture(scope="module")
def camera(clip, tmp_path_factory):
    """A clip as Chromium's fake camera takes it: YUV4MPEG2, which begins anew at its end."""
    path, video = tmp_path_factory.mktemp("camera") / "camera.y4m", read_video(clip)
    with open(path, "wb") as f:
        f.write(b"YUV4MPEG2 W%d H%d F25:1 Ip A1:1 C420jpeg\n" % (video.shape[2], video.shape[1]))
        for picture in video:
            f.write(b"FRAME\n" + av.VideoFrame.from_ndarray(picture).reformat(format="yuv420p").to_ndarray().tobytes())
    return path


@pytest.fixture(scope="module")
def browser(camera):
    yield from chromium("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream",
                        f"use-file-for-fake-video-capture={camera}")


@pytest.mark.long
def test_in_a_browser(browser, server, run, clip, tmp_path, monkeypatch, capsys):
    page = Page(browser, server)
    assert not any(map(page.shown, ("video", "hint", "error", "notes", "answer")))
    # a file: the sentence of eval.py, its words, its frames
    page.choose(clip)
    sentence, _ = by_eval(run, clip, monkeypatch, capsys)
    assert page.shown("sentence") == (sentence or "(nothing)") and page.shown("video") and not page.shown("error")
    assert page.shown("words").split() == sentence.split()
    every = lambda css: browser.find_elements("css selector", css)
    assert len(every("#sheet .tile")) == len(read_video(clip))
    if sentence:
        tiles = "[...document.querySelectorAll('#sheet .tile')]"
        light = lambda: page.js(f"return {tiles}.map(e => +e.style.getPropertyValue('--v'))")
        first, word = light(), every("#words button")[-1]
        word.click()
        assert max(light()) == 1 and word.get_attribute("aria-pressed") == "true"
        assert len(every("#words button")) == 1 or light() != first
        assert f"“{word.text}” looks most at frames" in page.shown("said")
    # a broken one: the line of eval.py, and nothing else
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(open(clip, "rb").read()[:3000])
    page.choose(broken)
    assert page.shown("error") == "broken.mp4: is cut off" and not page.shown("answer") and not page.shown("video")
    # one that is too large goes nowhere
    large = tmp_path / "large.mp4"
    large.write_bytes(bytes(3_000_000))
    page.choose(large)
    assert page.shown("error") == "large.mp4: has 3 MB, max_mb=1 allows no more"
    # the camera: the sentence of eval.py for the very bytes that were sent; the camera is off again
    page.film(2)
    (tmp_path / "camera.webm").write_bytes(page.sent())
    said, err = by_eval(run, tmp_path / "camera.webm", monkeypatch, capsys)
    assert page.shown("sentence") == (said or "(nothing)") and page.shown("camera") == "Film yourself"
    video = read_video(str(tmp_path / "camera.webm"))
    assert 25 <= len(video) <= 100 and video.shape[1:] == read_video(clip).shape[1:]
    assert page.js("return document.getElementById('video').srcObject") is None
    # narrow and dark: nothing sticks out, every control has a name
    for width in (360, 1200):
        screen = dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        assert page.js("""
            return [...document.querySelectorAll('body *')].filter(e => !e.closest('.box, .hidden')
                && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))""") == []
        assert page.js("return document.documentElement.scrollWidth") <= width
    controls = "[...document.querySelectorAll('button, input')]"
    assert page.js(f"return {controls}.every(e => e.textContent.trim() || e.ariaLabel || e.labels?.length)")
    assert browser.get_log("browser") == []


@pytest.mark.long
def test_a_camera_that_is_refused(server):
    for browser in chromium("use-fake-device-for-media-stream", "deny-permission-prompts"):
        page = Page(browser, server)
        browser.find_element("id", "camera").click()
        page.wait()
        assert page.shown("error") == "The camera was refused: the address bar of the browser allows it again."


@pytest.mark.long
def test_a_machine_without_a_camera(server):
    for browser in chromium("use-fake-ui-for-media-stream"):
        page = Page(browser, server)
        browser.find_element("id", "camera").click()
        page.wait()
        assert page.shown("error").startswith("No camera: ")

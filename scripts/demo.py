"""
A page to try a trained model: choose a clip, drop one or film yourself, and the sentence grows word by word.

    python -m scripts.demo ckpt=out/mine/sft        # opens http://127.0.0.1:7860 in the browser; Ctrl-C ends it

Below it stand the frames that each word looked at, the other answers of the beam, and what in the clip is unlike
training. The page is scripts/demo.html, its server Python's own. Nothing is fetched from elsewhere, and a clip is gone
from the disk once it is translated.
"""
import contextlib
import html
import json
import os
import re
import shutil
import tempfile
import threading
import urllib.parse
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from data import Clips, spread
from eval import clip_reader, load_model, translate
from lib.checkpoint import newest_run
from lib.configurator import configure
from lib.controls import averages
from lib.program import ROOT, BadInput, launch, print0
from lib.scores import language_code
from scripts.report import TILES, filled, look, strip, words

ckpt = ""  # run folder or checkpoint folder; "" = the newest sft run under out_dir
out_dir = "out"  # holds the runs
data_dir = ""  # holds the data set, with which a clip is compared; "" = the run's
weights = ""  # file of the CNN's weights; "" = the one the features were made with
llm = ""  # folder of the LLM; "" = the run's
beam = 4  # beam width; as many answers are shown
length_penalty = 1.0  # see eval.py
max_new_tokens = 200  # an answer that has not ended by then is cut, and the page says so
side = 72  # height of a frame on the page, in pixels
max_mb = 500  # a larger file is refused
host = "127.0.0.1"  # who may open the page: this machine alone; 0.0.0.0 = whoever reaches it, films of theirs included
port = 7860  # of the page, 0 = any that is free
browser = True  # open the page in the browser
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # auto, float32, bfloat16, float16

HERE = ("127.0.0.1", "localhost")
COMPARED = 500  # training clips at most, spread over the set, with which a clip is compared


class Translator:
    """A trained model, and what it takes to show what it does with a clip."""

    def __init__(self, cfg):
        ckpt = cfg.ckpt or newest_run(cfg.out_dir)
        self.sllama, self.tokenizer, self.run = load_model(ckpt, cfg.device, cfg.dtype, llm=cfg.llm,
                                                           data_dir=cfg.data_dir)
        self.how = {key: getattr(cfg, key) for key in ("beam", "length_penalty", "max_new_tokens")}
        self.side, self.notes, self.lang = cfg.side, [], ""  # without a language words lie between spaces
        with contextlib.suppress(BadInput):
            self.lang = language_code(self.run.language, self.run.lang)
        self.read, _ = clip_reader(self.run, cfg, self.notes.append)
        try:
            self.train = Clips(self.run, "train")
        except BadInput as e:
            self.train = None
            print0(f"no clip can be compared with those of training: {e}")
            return
        some = spread(len(self.train), min(COMPARED, len(self.train)))
        self.known = averages(map(self.train.features, some), self.sllama.mean.cpu(), self.sllama.std.cpu())  # (n, D)
        others = torch.cdist(self.known, self.known).fill_diagonal_(float("inf"))
        self.usual = others.amin(1).quantile(0.99)  # how far a clip of training is from the nearest other, at most

    def unlike(self, features):
        """Yield what is unlike training in a clip's features (T, D)."""
        low, high = min(self.train.lengths), max(self.train.lengths)
        if not low <= len(features) <= high:
            low, own, high = (n * self.run.merge for n in (low, len(features), high))
            yield f"{own} frames: the clips of training have {low} to {high}"
        own = averages([features], self.sllama.mean.cpu(), self.sllama.std.cpu())
        far = torch.cdist(own, self.known).min() / self.usual
        if far > 1:
            yield (f"its pictures are unlike those of training: the mean feature lies {far:.1f} times as far from the "
                   "nearest clip as 99 of 100 clips lie from each other")

    def __call__(self, path, tell):
        """
        A clip -> what the page shows of it, by calls of tell(key=value, ...): notes; text, again and again while it
        grows; then sentence and all else. BadInput where the clip cannot be read.
        """
        self.notes.clear()
        features = self.read(path)
        tell(notes=[*self.notes, *(self.unlike(features) if self.train else ())])
        found = {}  # answer that has ended -> its score

        def watch(score, closes, source, tokens, step):
            """One step of the beam search, see model.generate."""
            written = lambda b: " ".join(self.tokenizer.decode(tokens[0, b, :step].tolist()).split())
            tell(text=written(0))
            for k in closes[0].nonzero().flatten():
                answer = written(source[0, k])
                found[answer] = max(score[0, k].item(), found.get(answer, -torch.inf))

        (sentence,) = translate(self.sllama, [features], self.tokenizer, warn=False, watch=watch, **self.how)
        sentence = " ".join(sentence.split())
        more = [] if found else [f"the answer did not end within max_new_tokens={self.how['max_new_tokens']}"]
        seen, share, _ = look(self.sllama, self.tokenizer, features, sentence, self.lang)
        rows = zip(words(sentence, self.lang), share.tolist(), seen.tolist())
        tiles = min(len(features), TILES)
        picture, ratio = "", 1.0
        with contextlib.suppress(BadInput):  # what can be read need not have pictures
            picture, ratio = strip(path, tiles, self.side)
        tell(sentence=sentence, more=more, answers=sorted(found.items(), key=lambda pair: -pair[1]),
             words=[[word[0], part, [round(v, 4) for v in row]] for word, part, row in rows],
             frames=len(features), merge=self.run.merge, tiles=tiles, picture=picture, ratio=ratio)


def handler(model, page, cfg, films):
    """
    -> the class that answers a browser: GET gives the page, POST /NAME takes a clip and tells what becomes of it.
    films: folder in which a clip lies meanwhile.
    """
    turn = threading.Lock()  # one clip at a time

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds without a byte

        def log_request(self, *args):
            """Whoever films himself needs no line for it in a log."""

        def begin(self, kind):
            """The head of an answer. -> False where the script of another page has asked, and gets none."""
            name = self.headers.get("Host", "")
            origin = self.headers.get("Origin", "//" + name).split("//")[-1]
            # another site can give itself a name that leads to this machine
            own = origin == name and (cfg.host not in HERE or name.rpartition(":")[0] in HERE)
            self.send_response(200 if own else 403)
            self.send_header("Content-Type", kind)
            self.end_headers()
            return own

        def do_GET(self):
            if self.begin("text/html; charset=utf-8"):
                self.wfile.write(page)

        def do_POST(self):
            # the file's own name, for messages, less what could lead out of its folder
            name = re.sub(r"[^\w. -]", "_", urllib.parse.unquote(self.path).rpartition("/")[2])[-60:].lstrip(".")
            size = self.headers.get("Content-Length", "")
            size = int(size) if size.isdecimal() else 0
            tell = lambda **what: self.wfile.write(json.dumps(what).encode() + b"\n")
            if not self.begin("application/x-ndjson"):
                return
            with contextlib.suppress(ConnectionError, TimeoutError), tempfile.TemporaryDirectory(dir=films) as folder:
                path = os.path.join(folder, name or "clip")
                say = lambda what: what.replace(folder + os.sep, "")
                try:
                    if size > cfg.max_mb * 1e6:
                        raise BadInput(f"{name}: has {size / 1e6:.0f} MB, max_mb={cfg.max_mb} allows no more")
                    receive(self.rfile, size, path)
                    with turn:
                        model(path, lambda notes=(), **what: tell(notes=[*map(say, notes)], **what))
                except BadInput as e:
                    tell(error=say(str(e)))

    return Handler


def receive(source, size, path):
    """Write so many bytes to a file; ConnectionError where they do not come."""
    with open(path, "wb") as f:
        while size and (part := source.read(min(size, 1 << 20))):
            f.write(part)
            size -= len(part)
    if size:
        raise ConnectionError


def main():
    cfg = configure(__file__, positive=("beam", "max_new_tokens", "max_mb"), minus_one=("length_penalty",))
    model = Translator(cfg)
    state, folder = model.run.checkpoint.state, model.run.checkpoint.folder
    report = open(f"{ROOT}/scripts/report.html", encoding="utf-8").read()
    page = filled("demo.html", {
        "style": re.search(r"<style>(.*?)</style>", report, re.S)[1], "lang": model.lang, "max_mb": str(cfg.max_mb),
        "title": html.escape(f"{model.run.dataset}, {model.run.language}"),
        "run": html.escape(f"{folder}, step {state['step']}"), "fps": f"{state['extractor'].get('fps', 0):g}"})
    films = tempfile.mkdtemp()
    try:
        server = ThreadingHTTPServer((cfg.host, cfg.port), handler(model, page.encode(), cfg, films))
    except OSError as e:
        os.rmdir(films)
        raise BadInput(f"host={cfg.host} port={cfg.port}: {e.strerror}") from None
    address = f"http://{cfg.host}:{server.server_port}"
    print0(f"{address} (Ctrl-C ends it)")
    if cfg.browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        shutil.rmtree(films, ignore_errors=True)  # a clip that is being translated goes too
        raise


if __name__ == "__main__":
    launch(main)

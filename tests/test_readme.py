"""
What the README and the pages of docs/ say of the code: each of their commands runs, in its order and on next to
nothing, and the files, names, tests and pages that they send a reader to are there.

    python -m pytest tests/test_readme.py
"""
import re
import runpy
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL
from safetensors.numpy import save_file
from test_data import shades, write_image
from test_poses import HOLISTIC, body, write_pose
from test_readers import make_csl, make_phoenix, make_slt, write_pickle
from test_train import in_processes

from lib import program as programs
from lib.cnn import GoogLeNet
from lib.configurator import configure
from lib.video import read_video
from scripts.toy import write_mp4

README = (ROOT / "README.md").read_text(encoding="utf-8")
# the README first: what its commands leave, those of the other pages find
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = re.findall(r"```sh\n(.*?)```", "".join(PAGES.values()), re.S)
COMMANDS = [c.strip() for block in BLOCKS for line in block.splitlines() for c in line.split("#")[0].split("&&")]
STAGES = {"train.py": ("align", "sft")}


def section(title):
    return re.search(rf"^## {title}\n(.*?)^## ", README, re.M | re.S)[1]


def test_what_is_where():
    """Every file of ours that a page names is there; README's tables name the five and all scripts, and no other."""
    for name in re.findall(r"`([\w/]+\.py)\b", "".join(PAGES.values())):
        assert any((ROOT / folder / name).is_file() for folder in (".", "scripts", "config")), name
    first, scripts, *_ = re.findall(r"^(?:\|.*\n)+", section("What is where"), re.M)
    named = lambda table: {f for row in table.splitlines() for f in re.findall(r"`([\w/]+\.py)`", row.split("|")[1])}
    assert named(first) == {path.name for path in ROOT.glob("*.py")}
    assert named(scripts) == {path.name for path in (ROOT / "scripts").glob("*.py")} - {"__init__.py"}
    assert not re.search(r"\| *\d+ *\|", first)  # lengths stand in tests/test_house.py alone


def test_links():
    """Each link of a page leads to a file that is there, and to one of its headings; README leads to every page."""
    for path, text in PAGES.items():
        for link in re.findall(r"\]\((?!https?:)(.*?)\)", text):
            to, _, heading = link.partition("#")
            page = (path.parent / to).resolve() if to else path
            assert page.is_file(), (path.name, link)
            titles = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.M) if heading else ()
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in slugs, (path.name, link)
    assert all(f"(docs/{path.name})" in README for path in PAGES if path.parent.name == "docs")


def test_where_to_change_what():
    """Each name stands in the file that the table names beside it, and each test that it names is there."""
    rows = [row.split("|")[1:4] for row in section("Change it").splitlines() if row.startswith("| ")][1:]
    assert len(rows) == 8
    for _, where, shown in rows:
        for name, file in re.findall(r"`([\w.]+)` (?:in|of) `([\w/]+\.py)`", where):
            source = (ROOT / file).read_text(encoding="utf-8")
            assert all(re.search(rf"\b{part}\b", source) for part in name.removesuffix("()").split(".")), name
        for file, word in re.findall(r"`(tests/\w+\.py)(?: -k (\w+))?`", shown):
            assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(encoding="utf-8"), re.M), (file, word)


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"\b(train|eval|data|lora)\.py", c)])
def test_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    args = [w for w in words[at + 1:] if w not in ("merge", "help")]
    configure(words[at], args, stages=STAGES.get(words[at], ()))

# ---------------------------------------------------------------------------------------------------------------------
# The commands of all pages are run, on next to nothing

# not ours, or this very program, or two hours of all that the others do (tests/test_tables.py runs a few rows of it)
OTHERS = r"(python3(\.\d+)? -m venv|\. \.venv/|(poses-venv/bin/)?pip install|python -m pytest|.*videos?_to_pose"
OTHERS += r"|python -m scripts\.tables)"
OURS = [c for c in COMMANDS if c and not re.match(OTHERS, c)]
# these two really under torchrun, the others in this process
TORCHRUN = [next((c for c in OURS if re.match(rf"torchrun \S+ {name}", c)), "") for name in ("train.py", "eval.py")]
TRAIN = [*SMALL, "epochs=1"]
# what the command looks like, the first that fits: words that make it short, the file that it leaves, what it says
RULES = {
    r"train\.py help$": ([], "", r"^window = 8 +frames.*paper: 8"),
    r"train\.py .*estimate=true": (TRAIN, "", r"^  in all +\d+\.\d\d GB$"),
    r"train\.py": (TRAIN, "{out_dir}/{dataset}/{run}/{stage}/last/state.json", r"^learns: .* in all"),
    r"eval\.py .*video=": (["max_new_tokens=8"], "", r"\A.*\n\Z"),  # the sentence and nothing else
    r"eval\.py .*refs=": ([], "", "100 % exact"),
    r"eval\.py .*against=": ([], "", "95 %"),
    r"eval\.py .*control=": (["max_new_tokens=8"], "", "^CONTROL shuffle "),
    r"eval\.py": (["max_new_tokens=8"], "", "BLEU-4"),
    r"data\.py (dataset=posed|.*\.pose)": ([], "{data_dir}/{dataset}/poses/test.safetensors", "^backbone poses: 76"),
    r"data\.py dataset=mine": ([], "{data_dir}/{dataset}/test.jsonl", "^backbone=googlenet: its weights are there"),
    r"data\.py": (["workers=0"], "{data_dir}/{dataset}/{backbone}/test.safetensors", "^test "),
    r"lora\.py merge": ([], "{to}/model.safetensors", "merged in"),
    r"scripts\.walkthrough": (["max_new_tokens=8"], "", "^reference: "),
    r"scripts\.toy": (["n_train=12", "n_dev=2", "n_test=2", "text_steps=2"], "tiny/toy/test.jsonl", "toy: built in"),
    r"scripts\.report": (["clips=2"], "out/toy/sft/report.html", "report.html"),
    r"scripts\.demo": (["port=0", "browser=false"], "", r"^http://127\.0\.0\.1:\d+ "),  # and it serves nobody
    r"scripts\.small_llm": (["steps=1", "pieces=400", "batch=4"], "{to}/params.json", "made in"),
    r"scripts\.encdec": (["epochs=1", "dim=16", "heads=2", "max_new_tokens=8"], "{to}/hyps.test.txt", "^test, beam"),
    r"scripts\.gguf_to_hf": (["file=tiny.gguf"], "{to}/model.safetensors", ""),
}


@pytest.fixture(scope="module")
def there(home):
    """
    What the pages take for granted, under the names that they use: a toy (of 28 clips), FOLDER, FEATS, POSES, POSED,
    LLAMA, GoogLeNet's weights, clip.mp4, clip.pose.
    """
    (home / "config").symlink_to(ROOT / "config")
    for name in ("pred", "ref"):
        (home / f"{name}.txt").write_text("heute regnet es im norden\n")
    (home / "LLAMA").symlink_to(home / "data" / "toy" / "llm")
    folder = home / "FOLDER"
    torch.save(GoogLeNet().state_dict(), home / "googlenet-1378be20.pth")

    def clip(number, path):
        """The first eight frames of a clip of the toy, all together one batch for GoogLeNet."""
        write_mp4(str(home / path), read_video(str(home / "data" / "toy" / "clips" / f"{number:05}.mp4"))[:8])

    clip(22, "clip.mp4"), clip(23, "data/toy/clips/01100.mp4")
    pose = lambda path: write_pose(home / path, body(HOLISTIC, [11, 12], 8))
    pose("clip.pose")
    # FOLDER is all data sets in one: neccam's pickles, which hold alignments too, PHOENIX-2014T's and CSL-Daily's
    # frames, own clips
    made = make_slt(folder)
    for split, entries in made.items():
        for e in entries:
            e["alignments"] = {f"pami{i}": " ".join("7" * len(e["sign"])) for i in range(3)}
        write_pickle(folder / f"phoenix14t.pami0.{split}", entries)
    features = {split: {e["name"].removeprefix(split + "/"): e["sign"].numpy() for e in entries}
                for split, entries in made.items()}
    make_phoenix(folder, {split: dict.fromkeys(names, "regen") for split, names in features.items()})
    for image in make_csl(folder).glob("sentence/frames_512x512/*/*.jpg"):
        write_image(image, shades(50)[0])
    for i, split in enumerate(("train", "train", "dev", "test")):
        clip(i, f"FOLDER/{i:05}.mp4")
        with open(folder / "clips.tsv", "a") as f:
            f.write("file\ttext\tsplit\n" * (i == 0) + f"{i:05}.mp4\train is coming\t{split}\n")
        pose(f"FOLDER/{i:05}.pose")
    (home / "POSED").mkdir()
    for file in folder.glob("*.pose"):
        shutil.copy(file, home / "POSED")
    (home / "POSED" / "clips.tsv").write_text((folder / "clips.tsv").read_text().replace(".mp4", ".pose"))
    for split, arrays in features.items():
        for kind in ("FEATS", "POSES"):
            (home / kind / split).mkdir(parents=True)
        for name in arrays:
            pose(f"POSES/{split}/{name}.pose")
        save_file(arrays, home / "FEATS" / f"{split}.safetensors")
        for name, x in arrays.items():
            np.save(home / "FEATS" / split / f"{name}.npy", x)
    return home


@pytest.fixture(scope="module")
def ran():
    """The commands that have been run."""
    return []


def run(command, home, monkeypatch, capsys):
    """Run a command of a page in this folder; its rule says what must come of it."""
    words = re.sub(r"^((srun( --\S+)* )?torchrun( --\S+)+|python -m|python) ", "", command)
    rule = next((rule for pattern, rule in RULES.items() if re.match(pattern, words)), None)
    assert rule, f"no rule says how a test can run `{command}`: add one to RULES"
    more, leaves, says = rule
    program, *words = shlex.split(words) + more
    if program == "scripts.gguf_to_hf":
        from test_gguf import tiny_hf, write  # skips where gguf or tokenizers is not installed
        write(home / "tiny.gguf", tiny_hf(vocab_size=261))
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    monkeypatch.chdir(home)
    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", lambda server: server.server_close())
    if command in TORCHRUN:
        said = in_processes(2, home, "", *words, program=path).stdout
    else:
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        monkeypatch.setattr(programs, "launch", lambda main: main())  # the real one ends the process with an error
        capsys.readouterr()
        try:
            with torch.enable_grad():  # and as before at the end: the walkthrough turns gradients off
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as e:
            assert not e.code, capsys.readouterr().err
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
            if dist.is_initialized():
                dist.destroy_process_group()
        said = capsys.readouterr().out
    assert re.search(says, said, re.M), said
    if leaves:
        args = [w for w in words if w != "merge"]
        cfg = configure(str(path), args, stages=STAGES.get(program, ()))
        assert (home / leaves.format(**vars(cfg))).exists()


@pytest.mark.parametrize("number", range(len(OURS)), ids=OURS)
@pytest.mark.long
def test_commands_run(number, there, ran, monkeypatch, capsys):
    """Those before it that were left out (-k, -m) are run first: most need what the earlier ones have made."""
    while len(ran) <= number:
        ran.append(OURS[len(ran)])
        try:
            run(ran[-1], there, monkeypatch, capsys)
        except pytest.skip.Exception:
            if len(ran) == number + 1:
                raise

"""
Measurements, side by side: what is compared takes turns (A B A B), since a machine is never the same for long.

    python -m scripts.bench extract      # frames/s of the extraction beside those of the CNN alone, and its peak memory
    python -m scripts.bench extract root=clips_of_isl workers=4 out=extract.json
    python -m scripts.bench step         # or decode, band, load, scale, start: the LLM's part beside transformers, PEFT
    python -m scripts.bench all table=docs/speed.md      # step, decode, band, and their row in the table of processors
"""
import contextlib
import json
import math
import os
import platform
import sys
import tempfile
from importlib.metadata import version

import numpy as np
import torch

from lib.configurator import configure, usage_error
from lib.extract import BATCH, Decoder, Extractor, prepare
from lib.files import whole
from lib.program import BadInput, launch
from lib.readers import SPLITS, read_clips
from lib.tensors import stateless
from scripts import bench_llm
from scripts.memory import peak_memory
from scripts.toy import write_mp4

backbone = "toycnn,googlenet"  # extract: CNNs to measure, with random weights (the time is the same)
root = ""  # extract: folder of own clips; "" = clips are made: 210x260, 25 frames a second, as PHOENIX-2014T's
clips = 24  # extract: clips to make
length = 100  # extract: their mean length in frames
repeats = 3  # turns that each side takes
workers = 2  # extract: processes that decode
threads = 0  # threads of the CNN or the LLM, 0 = as many as there are cores
labels = ""  # step, decode, scale: folder of PHOENIX-2014T's labels.train, for the lengths of its clips; else like them
tokenizer = ""  # step, decode, scale: folder of a LLaMA's tokenizer.model; "" = a token a byte
llm = "bench"  # step, decode: its size, a name in SIZES of lib/weights.py, random weights; bench: 79M, for two cores
batches = 4  # step: how many
batch_size = 4  # step: clips in each
compile = False  # step: torch.compile on ours
activation_checkpointing = False  # step: both sides recompute their blocks in the backward pass
llm_bits = 16  # step, decode: of the frozen LLM's matrices, 16, 8 or 4; the peer's are bitsandbytes'
device = "auto"  # auto, cpu, cuda
dtypes = ""  # step, decode, band: what both sides compute in, one after the other: float32,bfloat16; "" = as train.py
out = ""  # also write the figures to this file, as JSON
table = ""  # all: a page that has the table of processors; this one's row is put into it


def make_clips(folder, n, length):
    """n clips of a soft patch that moves before a soft background, 210x260 at 25 frames a second. -> their rows"""
    os.makedirs(folder)
    paths = [f"{folder}/{i}.mp4" for i in range(n)]
    for i, path in enumerate(paths):
        rng = stateless(0, "bench", i)
        still = np.kron(rng.integers(0, 256, (26, 21, 3)), np.ones((10, 10, 1))).astype(np.uint8)
        video = np.stack([still] * int(rng.integers(max(1, length // 2), length * 3 // 2 + 1)))
        for t, frame in enumerate(video):
            x, y = int(75 + 60 * np.sin(t / 5)), int(100 + 80 * np.cos(t / 7))
            frame[y:y + 60, x:x + 60] = still[:60, :60] // 2 + 60
        write_mp4(path, video)
    return [{"name": str(i), "text": "-", "video": path} for i, path in enumerate(paths)]


def extract(cfg):
    """The CNN alone on frames that lie in memory, the whole of extract.prepare, and decoding alone in one process."""
    figures = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "workers": cfg.workers, "backbones": {}}
    with tempfile.TemporaryDirectory() as folder:
        if cfg.root:
            splits = read_clips(cfg.root)[0]
            rows = [row for split in SPLITS for row in splits[split]]
        else:
            rows = make_clips(f"{folder}/clips", cfg.clips, cfg.length)
        paths = [row["video"] for row in rows]

        def run(extractor, times=1):
            """An extraction from nothing of all clips, `times` times over."""
            again = [row | {"name": f"{k} {row['name']}"} for k in range(times) for row in rows]
            with contextlib.redirect_stdout(open(os.devnull, "w")), contextlib.redirect_stderr(sys.stdout):
                prepare("bench", {"train": again, "dev": [], "test": []}, tempfile.mkdtemp(dir=folder), extractor)

        for name in cfg.backbone.split(","):
            extractor = Extractor(name, "random", cfg.device, workers=cfg.workers)
            decoder = Decoder(paths, **extractor.how)
            n_frames = sum(len(some) for _, some, _ in decoder)

            def decode():
                for _ in decoder:
                    pass

            peaks = []
            for times in (1, 4):
                with peak_memory() as peak:
                    run(extractor, times)
                peaks.append(peak.together / 2**20)
            some = np.concatenate([some for _, some, _ in Decoder(paths[:4], **extractor.how) if len(some)])[:4 * BATCH]
            batches = [some[i:i + BATCH] for i in range(0, len(some) - BATCH + 1, BATCH)]
            if not batches:
                raise BadInput(f"{len(some)} frames in the first clips: a batch is {BATCH}")

            def alone():
                for i in range(math.ceil(n_frames / BATCH)):  # the last batch is filled up here as there
                    extractor.compute(batches[i % len(batches)])

            print(f"{name} on {extractor.device}: {len(rows)} clips, {n_frames} frames", file=sys.stderr)
            took = bench_llm.turns(cfg.repeats, alone=alone, extraction=lambda: run(extractor), decoding=decode)
            # seconds -> frames a second
            found = {side: {"median": n_frames / t["median"], "low": n_frames / t["high"], "high": n_frames / t["low"],
                            "cpu": n_frames / t["cpu"]} for side, t in took.items()}
            ratio, cpu = (found["extraction"][kind] / found["alone"][kind] for kind in ("median", "cpu"))
            figures["backbones"][name] = {"device": str(extractor.device), "clips": len(rows), "frames": n_frames,
                                          "ratio": ratio, "cpu_ratio": cpu, "peak_mb": peaks, **found}
            say = lambda f: f"{f['median']:.1f} frames/s ({f['low']:.1f} to {f['high']:.1f})"
            print(f"{name}: CNN alone {say(found['alone'])}, extraction {say(found['extraction'])}, ratio {ratio:.3f}\n"
                  f"  ratio by the CPU time of the process that runs the CNN {cpu:.3f}: what a core more for those "
                  f"that decode would bring on a CPU\n"
                  f"  decoding alone, one process: {say(found['decoding'])}\n"
                  f"  peak memory {peaks[0]:.0f} MB with {len(rows)} clips, {peaks[1]:.0f} MB with {4 * len(rows)}",
                  flush=True)
    print(f"{figures['cores']} cores, {figures['threads']} threads for the CNN, {cfg.workers} processes that decode; "
          f"medians of {cfg.repeats} turns")
    return figures


def processor():
    """Its name, what it multiplies bfloat16 with, cores used, and the versions that a figure hangs on."""
    can = torch.cpu.get_capabilities()
    unit = "AMX" if can.get("amx_bf16") else "AVX512-BF16" if can.get("avx512_bf16") else "no bfloat16"
    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{can.get('cpu_name', platform.machine())}, {unit}, {torch.get_num_threads()} cores; {packages}"


def everything(cfg):
    """What the table of processors shows, in float32 and bfloat16, and this one's row of it."""
    cfg.dtypes = cfg.dtypes or "float32,bfloat16"
    figures = [f for name in ("step", "decode", "band") for f in NAMES[name](cfg)]
    cells = []
    for head, what in COLUMNS.items():
        some = [f for f in figures if f.get("what", "").startswith(what) and "ours" in f]
        cells.append(", ".join(f"{f['dtype']} {f['ratio']:.1f} x ({1000 * f['ours']['median']:.0f} ms)" for f in some))
    row = f"| {processor()} | {' | '.join(cells)} |"
    print(TABLE_HEAD, row, sep="\n")
    if cfg.table:
        with open(cfg.table, encoding="utf-8") as f:
            lines = f.read().split("\n")
        at = lines.index(TABLE_HEAD.split("\n")[0]) + 2
        end = at + next(i for i, line in enumerate(lines[at:]) if not line.startswith("|"))
        others = [line for line in lines[at:end] if not line.startswith(f"| {processor().split(';')[0]};")]
        with whole(cfg.table) as f:
            f.write("\n".join([*lines[:at], *others, row, *lines[end:]]))
    return figures


# of the table of processors: heading -> how the lines of its figures begin
COLUMNS = {"SFT step": "sft step", "align step": "align step", "beam 4": "32 clips from features, beam 4",
           "greedy": "32 clips from features, beam 1", "band, 4,096 frames": "band of window 8, T = 4096"}
TABLE_HEAD = f"| processor | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}"
NAMES = {"extract": extract, "all": everything} | bench_llm.NAMES  # what can be measured


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "help"
    if name not in NAMES and name not in ("help", "--help", "-h", "--version"):
        usage_error(__file__, f"{name}: is none of {', '.join(NAMES)}")
    cfg = configure(__file__, sys.argv[2:] if name in NAMES else [name],
                    positive=("clips", "length", "repeats", "batches", "batch_size"))
    torch.set_num_threads(cfg.threads or os.cpu_count())
    figures = NAMES[name](cfg)
    if cfg.out:
        with whole(cfg.out) as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    launch(main)

"""
Draws the README's picture: a clip of the toy's test split, what is computed, what the model wrote. Needs matplotlib.

    python -m scripts.picture          # after training -> docs/sl-llama.png
"""
import json
import os

import numpy as np

from lib.checkpoint import newest_run
from lib.configurator import configure
from lib.program import BadInput, launch
from lib.video import read_video

out_dir = "out"  # holds the runs
ckpt = ""  # run folder with a hyps.jsonl; "" = the newest sft run
data_dir = "data"  # holds the toy
clip = 3  # line of hyps.jsonl to show
to = "docs/sl-llama.png"  # file to write


def main():
    cfg = configure(__file__)
    try:
        import matplotlib
    except ImportError:
        raise BadInput("scripts.picture needs matplotlib (pip install matplotlib)") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    read = lambda *path: [json.loads(line) for line in open(os.path.join(*path))]
    hyp = read(cfg.ckpt or newest_run(cfg.out_dir), "hyps.jsonl")[cfg.clip]
    row = next(row for row in read(cfg.data_dir, "toy", "test.jsonl") if row["name"] == hyp["name"])
    video = read_video(row["video"])
    figure, ax = plt.subplots(figsize=(12, 4.4), dpi=110)
    ax.set_xlim(0, 120)
    ax.set_ylim(0, 44)
    ax.axis("off")
    for i, t in enumerate(np.linspace(3, len(video) - 4, 10).astype(int)):
        ax.imshow(video[t], extent=(i * 12 + 0.4, i * 12 + 11.6, 30, 41.2), aspect="auto", interpolation="bilinear")
    ax.text(0.4, 42, f"{len(video)} frames, signed: {row['gloss']}   ((-): the head shakes)", fontsize=11)
    boxes = (
        (1, 22, "frozen CNN\neach frame → 1024 numbers", "#dddddd"),
        (27, 24, "LocalTransformer\neach frame sees those around it", "#ffd9a8"),
        (55, 16, "Adaptor\nW₂ GELU(W₁ x)", "#ffd9a8"),
        (75, 44, "LLaMA, frozen, + LoRA\n[INST] <sign> frames </sign> Translate … [/INST]", "#c9dcf2"))
    for x, width, text, colour in boxes:
        ax.add_patch(plt.Rectangle((x, 15), width, 9, facecolor=colour, edgecolor="#555555"))
        ax.text(x + width / 2, 19.5, text, ha="center", va="center", fontsize=8)
    for start, end in (((23, 19.5), (27, 19.5)), ((51, 19.5), (55, 19.5)), ((71, 19.5), (75, 19.5)),
                       ((12, 29.5), (12, 24)), ((97, 15), (97, 9))):
        ax.annotate("", end, start, arrowprops=dict(arrowstyle="->", color="#555555", lw=1.5))
    ax.text(119, 6.4, hyp["hyp"], ha="right", fontsize=14, weight="bold")
    ax.text(119, 2.2, f"reference: {hyp['ref']}", ha="right", fontsize=10, color="#555555")
    ax.text(1, 2.2, "orange learns in align; adaptor and LoRA learn in sft", fontsize=10, color="#555555")
    os.makedirs(os.path.dirname(cfg.to) or ".", exist_ok=True)
    figure.savefig(cfg.to, bbox_inches="tight", pad_inches=0.1)
    print(cfg.to)


if __name__ == "__main__":
    launch(main)

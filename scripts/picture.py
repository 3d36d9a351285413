"""
Draws the README's picture: a clip of the toy's test split, what is computed, and what the model wrote. Needs matplotlib.

    python -m scripts.picture          # after training -> docs/sl-llama.png
"""
import json
import os

import numpy as np

from config import BadInput, configure, launch
from eval import newest_run
from video import read_video

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

    hyp = json.loads(open(os.path.join(cfg.ckpt or newest_run(cfg.out_dir), "hyps.jsonl")).read().splitlines()[cfg.clip])
    row = next(r for r in map(json.loads, open(os.path.join(cfg.data_dir, "toy", "test.jsonl"))) if r["name"] == hyp["name"])
    video = read_video(row["video"])
    shown = np.linspace(3, len(video) - 4, 10).astype(int)
    figure, ax = plt.subplots(figsize=(12, 4.4), dpi=110)
    ax.set_xlim(0, 120)
    ax.set_ylim(0, 44)
    ax.axis("off")
    for i, t in enumerate(shown):
        ax.imshow(video[t], extent=(i * 12 + 0.4, i * 12 + 11.6, 30, 41.2), aspect="auto", interpolation="bilinear")
    ax.text(0.4, 42, f"{len(video)} frames, signed: {row['gloss']}   ((-): the head shakes)", fontsize=11)
    boxes = ((1, 22, "frozen CNN\neach frame → 1024 numbers", "#dddddd"), (27, 24, "LocalTransformer\neach frame sees ±4 frames", "#ffd9a8"),
             (55, 16, "Adaptor\nW₂ GELU(W₁ x)", "#ffd9a8"), (75, 44, "LLaMA, frozen, + LoRA\n[INST] <sign> frames </sign> Translate … [/INST]", "#c9dcf2"))
    for x, width, text, colour in boxes:
        ax.add_patch(plt.Rectangle((x, 15), width, 9, facecolor=colour, edgecolor="#555555"))
        ax.text(x + width / 2, 19.5, text, ha="center", va="center", fontsize=8)
    arrow = dict(arrowstyle="->", color="#555555", lw=1.5)
    for a, b in ((23, 27), (51, 55), (71, 75)):
        ax.annotate("", (b, 19.5), (a, 19.5), arrowprops=arrow)
    ax.annotate("", (12, 24), (12, 29.5), arrowprops=arrow)
    ax.annotate("", (97, 9), (97, 15), arrowprops=arrow)
    ax.text(119, 6.4, hyp["hyp"], ha="right", fontsize=14, weight="bold")
    ax.text(119, 2.2, f"reference: {hyp['ref']}", ha="right", fontsize=10, color="#555555")
    ax.text(1, 2.2, "orange learns in align; adaptor and LoRA learn in sft", fontsize=10, color="#555555")
    os.makedirs(os.path.dirname(cfg.to) or ".", exist_ok=True)
    figure.savefig(cfg.to, bbox_inches="tight", pad_inches=0.1)
    print(cfg.to)


if __name__ == "__main__":
    launch(main)

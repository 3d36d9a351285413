"""
A small LLaMA for a data set of one's own where no real one is at hand: trained on the training sentences alone, in the toy's way.

    python -m scripts.small_llm dataset=phoenix_states to=weights/phoenix_small     # then train.py dataset=phoenix_states llm=weights/phoenix_small

It learns to restore a sentence from its content words, shuffled and blurred; the most frequent words count as function words.
It has read nothing but these sentences: good for trials of the whole recipe at full size, no substitute for a real LLM.
"""
import os
import time
from collections import Counter

from config import BadInput, configure, launch, usage_error
from data import read_rows
from scripts.toy import train_llama

dataset = ""  # a data set that data.py has made
data_dir = "data"
to = ""  # folder to write; it must not exist
language = "German"  # its name goes into the prompt
function_words = 40  # so many of the most frequent words are left out of what the sentence is restored from
pieces = 2000  # of the tokenizer
dim = 256  # width
layers = 4
steps = 1500  # of training
batch = 48  # sentences a step
seed = 1337


def main():
    start, cfg = time.time(), configure(__file__)
    for key in ("dataset", "to"):
        if not getattr(cfg, key):
            usage_error(__file__, f"{key}: is missing")
    if os.path.exists(cfg.to):
        raise BadInput(f"to={cfg.to}: exists already")
    texts = [row["text"] for row in read_rows(os.path.join(cfg.data_dir, cfg.dataset, "train.jsonl"))]
    common = {w for w, _ in Counter(w for t in texts for w in t.split()).most_common(cfg.function_words)}
    print(f"{len(texts)} sentences; counted as function words: {' '.join(sorted(common))}", flush=True)
    os.makedirs(os.path.dirname(os.path.abspath(cfg.to)), exist_ok=True)
    train_llama(cfg.to, texts, cfg.seed, cfg.steps, cfg.batch, cfg.language, pieces=cfg.pieces, function_words=common,
                dim=cfg.dim, n_layers=cfg.layers, n_heads=cfg.dim // 32, n_kv_heads=cfg.dim // 64, hidden_dim=cfg.dim * 11 // 4)
    print(f"{cfg.to}: made in {time.time() - start:.0f} s")


if __name__ == "__main__":
    launch(main)

# %% [markdown]
"""
# SL-LLaMA, piece by piece: one clip becomes one sentence

Cells for VS Code and Jupyter (with jupytext), or a program that prints. Every part is called as the project's own
programs call it. Where that teaches something the same is computed by hand beside it, and an `assert` says that the
two agree.

    python -m scripts.walkthrough            # seconds, after both stages of train.py on the toy
    python -m scripts.walkthrough clip=3     # another clip of the test split; pictures go to out/walkthrough
"""
# %%
import copy
import math
import os
import sys

# a notebook stands in scripts/ or above it
sys.path.insert(1, ".." if os.path.basename(os.getcwd()) == "scripts" else ".")

import numpy as np
import torch
import torch.nn.functional as F

from data import Clips, Sample, pack, prompt_ids
from eval import load_model, translate
from lib.configurator import configure
from lib.controls import controlled
from lib.extract import Extractor
from lib.program import BadInput
from lib.video import read_video
from lora import apply_lora, layers, merge_lora
from model import LLaMA, causal_attention, local_attention, rope_table, sees
from scripts.attention import recorded

ckpt = "out/toy/sft"  # run folder of the sft stage, on the toy
clip = 23  # line of its test split, from 0
other = 3  # another line: the control's
beam = 4  # decoding as eval.py's
length_penalty = 1.0  # as in eval.py
max_new_tokens = 200  # as in eval.py
to = "out/walkthrough"  # folder for the pictures; a notebook shows them in its cells

NOTEBOOK = "get_ipython" in globals()
try:
    import matplotlib.pyplot as plt  # without it there are pictures of characters
except ImportError:
    plt = None
if not NOTEBOOK:
    globals().update(vars(configure(__file__)))
    if plt:
        plt.switch_backend("Agg")


def tell():
    """A program has no markdown cells: it prints the one above the call."""
    if not NOTEBOOK:
        above = "".join(open(__file__, encoding="utf-8").readlines()[:sys._getframe(1).f_lineno])
        prose = above.rsplit("# %% [markdown]\n", 1)[1].split("# %%")[0].strip().splitlines()
        print("\n\n" + "\n".join(line.removeprefix("# ") for line in prose) + "\n")


def show(name, panels, labels=(), size=(11, 22)):
    """
    Pictures side by side, {title: (h, w) or (h, w, 3)}, perhaps with a label a row.
    As a figure, and in a terminal as characters, so many rows and columns of them.
    """
    if plt:
        figure, axes = plt.subplots(1, len(panels), figsize=(max(6, 2.4 * len(panels)), 3.2), squeeze=False,
                                    layout="constrained")
        for ax, (title, image) in zip(axes[0], panels.items()):
            ax.imshow(np.asarray(image), cmap="magma", aspect="equal" if image.ndim == 3 else "auto")
            ax.set_title(title, fontsize=9)
            ax.set_yticks(range(len(labels)), labels)
            ax.set_xticks([] if image.ndim == 3 else ax.get_xticks()[1:-1])
        if NOTEBOOK:
            return plt.show()
        os.makedirs(to, exist_ok=True)
        path = f"{to}/{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        print(f"[{path}]")
    rows, width = len(labels) or size[0], size[1]
    margin = [f"{label:>10} " for label in ["", *labels]] if labels else [""] * (rows + 1)
    columns = []
    for title, image in panels.items():
        grey = torch.as_tensor(image).float()
        grey = F.adaptive_max_pool2d((grey.mean(-1) if grey.dim() == 3 else grey)[None], (rows, width))[0]
        level = 4.99 * (grey - grey.min()) / (grey.max() - grey.min() + 1e-9)
        columns.append([f"{title:{width}.{width}}", *("".join(" ·░▒█"[int(v)] for v in line) for line in level)])
    for left, *line in zip(margin, *columns):
        print(left + "  ".join(line))


torch.set_grad_enabled(False)
torch.manual_seed(0)
torch.set_num_threads(1)  # small shapes: threads cost more than they bring

# %% [markdown]
# ## 0. The parts
# A frozen CNN sees each frame alone. The local transformer looks at the frames around, the adaptor takes frames
# into the space of LLaMA's words, and LLaMA, frozen but for its LoRA, writes. Training has two stages:

# %%
try:
    sllama, tokenizer, cfg = load_model(ckpt, device="cpu")
    clips = Clips(cfg, "test")
    if (cfg.backbone, cfg.adaptor, cfg.ltn, cfg.stage) != ("toycnn", "mlp", True, "sft") or sllama.proj is None:
        raise BadInput(f"ckpt={ckpt}: the walk is through the toy's model as train.py's page one has it, stage=sft")
except BadInput as e:
    again = "python train.py stage=align && python train.py stage=sft makes out/toy/sft"
    raise SystemExit(f"walkthrough.py: {e}; {again}") from None
tell()
clip, other = clip % len(clips), other % len(clips)
extractor, llm, embedding = Extractor("toycnn", device="cpu"), sllama.llm, sllama.llm.tok_embeddings.weight
count = lambda *parts, lora=False: sum(p.numel() for part in parts for name, p in part.named_parameters()
                                       if ("lora_" in name) == lora)
for part, n, learns in (("frozen CNN", count(extractor.cnn), "-"),
                        ("local transformer", count(sllama.proj, sllama.ltn), "align"),
                        ("adaptor", count(sllama.adaptor), "align, sft"),
                        ("LLaMA", count(llm), "-"),
                        ("its LoRA", count(llm, lora=True), "sft")):
    print(f"{part:18} {n:10,} parameters   learns in: {learns}")

# %% [markdown]
# ## 1. A clip
# Video comes in, and for training the sentence that goes with it. The signs' names (glosses) are printed for us:
# the model never sees them.

# %%
tell()
row = clips.rows[clip]
video = read_video(row["video"])
T = len(video)
print(f"clip {row['name']}: {video.shape} {video.dtype}, frames x height x width x RGB")
print(f"signed:   {row['gloss']}    ((-): from there on the head shakes)\nsentence: {row['text']}\n")
show("1_clip", {f"frame {t}": video[t] for t in range(2, T, T // 5)[:5]})

# %% [markdown]
# ## 2. The frozen CNN: a frame becomes 1024 numbers
# It never learns, so its features are computed once and kept. The toy's is three random convolutions, each halving
# the side, then a grid of 4 x 4 places with 64 channels; the paper's is an Inception. Whatever the CNN, its numbers are
# standardised with their mean and deviation over the training clips: one learning rate then fits all.

# %%
tell()
features = torch.from_numpy(extractor(row["video"]))  # (T, 1024) float16
assert torch.equal(features, clips.features(clip))  # what data.py has stored, to the bit
# (H, W, 3) of 0..255 -> (1, 3, H, W) of -1..1
x = (torch.from_numpy(video[T // 2]).permute(2, 0, 1)[None] - 127.5) / 127.5
print(f"frame {T // 2}: {tuple(x.shape)}", end="")
for conv in extractor.cnn.convs:
    x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=2).relu()
    print(f" -> {tuple(x.shape)}", end="")
# (1, 64, 8, 8) -> (1, 64, 4, 2, 4, 2) -> (1, 1024)
x = x.unflatten(3, (4, -1)).unflatten(2, (4, -1)).mean((3, 5)).flatten(1)
print(f" -> {tuple(x.shape)}")
assert torch.allclose(x[0], features[T // 2].float(), atol=2e-3)  # the store rounds to float16
x = ((features.float() - sllama.mean) / sllama.std)[None]  # (1, T, 1024)
panels = {"a row a frame, as they come": features.float().sqrt(), "standardised": x[0].clamp(-3, 3)}
show("2_features", panels, size=(11, 50))

# %% [markdown]
# ## 3. The local transformer: a band
# A sign lasts some frames, so a frame looks at those around it and nowhere else, as `reach` says: a band along the
# diagonal. In two layers it reaches twice as far, for its neighbours have looked at theirs.

# %%
tell()
i = torch.arange(20)
band, (before, after) = sees(i[:, None], i, cfg.window), sllama.ltn.reach
print(f"{f'one layer, -{before} to +{after}':44}two layers, -{2 * before} to +{2 * after}")
for lines in zip(band.int(), (band.float() @ band.float() > 0).int()):
    print("     ".join(" ".join(".#"[v] for v in line) for line in lines))

# local_attention never builds the T x T matrix. By hand and with all of it, on 150 frames:
q, k, v = torch.randn(3, 1, 2, 150, 16)  # each (B, heads, frames, width of a head)
i = torch.arange(150)
score = q @ k.transpose(-1, -2) / 16**0.5  # (1, 2, 150, 150): how well frame j's key fits frame i's query
by_hand = score.masked_fill(~sees(i[:, None], i, cfg.window), -math.inf).softmax(-1) @ v
assert torch.allclose(by_hand, local_attention(q, k, v, cfg.window), atol=1e-5)

x = sllama.proj(x)  # (1, T, 1024) -> (1, T, width)
with recorded(sllama.ltn) as weights:
    seen = sllama.ltn(x)  # (1, T, width): each frame, having looked around
print(f"\nwhere the trained layers look, by distance:\n{'':8}" + "".join(f"{d:+6}" for d in range(-before, after + 1)))
for n, w in enumerate(weights.values()):  # (heads, T, T)
    print(f"layer {n} " + "".join(f"{w.diagonal(d, 1, 2).mean():6.2f}" for d in range(-before, after + 1)))
print()
panels = {f"layer {n}: frame i looks at frame j": w.mean(0) for n, w in enumerate(weights.values())}
show("3_band", panels, size=(T // 2, T))

poked = x.clone()
poked[0, T // 2] += 1
moved = (sllama.ltn(poked) - seen).abs().amax((0, 2)).gt(1e-4).nonzero()[:, 0].tolist()
print(f"\na change of frame {T // 2} alone is felt from frame {moved[0]} to frame {moved[-1]}")
assert T // 2 - cfg.ltn_layers * after <= moved[0] and moved[-1] <= T // 2 + cfg.ltn_layers * before

# %% [markdown]
# ## 4. The adaptor: frames that look like words
# W2 GELU(W1 x) takes a frame to the width of LLaMA's word embeddings, at their size. Nobody has told it which word a
# frame belongs to: it has only learnt to make LLaMA write the right sentence. The words nearest to a frame (by the
# cosine) show what came of that. Compare with what was signed.

# %%
tell()
u = seen @ sllama.adaptor.w1.weight.T
gelu = u * (1 + torch.erf(u / 2**0.5)) / 2  # u times the share of a normal distribution below u
by_hand = gelu @ sllama.adaptor.w2.weight.T
assert torch.allclose(by_hand, sllama.adaptor(seen), atol=1e-4)
frames = by_hand[0] * sllama.scale  # (T, dim): the size of LLaMA's embeddings
special = {tokenizer.bos_id: "BOS", tokenizer.eos_id: "EOS"}
piece = lambda i: special.get(i) or tokenizer.decode([i]).replace("\n", "\\n")
# the tokens that such sentences are made of
used = torch.tensor(sorted({i for r in clips.rows for i in tokenizer.encode(r["text"])}))
cosine = F.normalize(frames, dim=1) @ F.normalize(embedding[used], dim=1).T  # (T, used)
print(f"{tuple(seen.shape)} -> {tuple(frames.shape)}\nsigned: {row['gloss']}")
for t in range(2, T, 4):
    near = cosine[t].topk(3)
    words = zip(near.values, used[near.indices].tolist())
    print(f"frame {t:2}:  " + "".join(f"{piece(i):>10} {c:.2f}" for c, i in words))

# %% [markdown]
# ## 5. The prompt, with the clip spliced in
# To LLaMA a clip is a stretch of text: its frames stand between the embeddings of the prompt's tokens, a position each.
# (In align the prompt was BOS and the frames alone.)

# %%
tell()
before, after = prompt_ids(sllama.prompt, tokenizer)
h = sllama.embed(pack([Sample(features, before, after, None)]))  # (1, N, dim), one clip; training packs several
assert torch.allclose(h[0], torch.cat([embedding[before], frames, embedding[after]]), atol=1e-4)
print(f"{' '.join(map(piece, before))}  [{T} frames]  {' '.join(map(piece, after))}\n\n"
      f"{len(before)} + {T} + {len(after)} positions: {tuple(h.shape)}")

# %% [markdown]
# ## 6. LLaMA: the next word
# Each position looks at itself and at what stands before it. The last one, compared with the output vector of every
# word of the vocabulary, says how probable each is to come next.

# %%
tell()
state, rope = h, rope_table(torch.arange(h.shape[1])[None], llm.args.head_dim, llm.args.rope_theta)
for layer in llm.layers:  # each adds to the stream what its attention and its feed-forward have to say
    state = layer(state, rope, None, causal_attention)
logits = llm.norm(state[0]) @ llm.output.weight.T  # (N, dim) (dim, vocabulary) -> (N, vocabulary)
assert torch.allclose(logits, llm(h=h)[0], atol=1e-3)
changed = torch.cat([h[:, :-1], torch.randn_like(h[:, -1:])], 1)
assert torch.allclose(llm(h=changed)[0, :-1], logits[:-1], atol=1e-3)  # causal: another last token, the others stay
print(f"logits {tuple(logits.shape)}; the answer's first word:")
for p, i in zip(*(t.tolist() for t in logits[-1].softmax(-1).topk(5))):
    print(f"{piece(i):>10} {p:7.2%} {'█' * round(40 * p)}")

# %% [markdown]
# ## 7. LoRA: what sft changes in LLaMA
# Beside each frozen W of the attention stands a product of two thin matrices, W' = W + alpha/rank B A. B starts at
# zero, so sft starts from LLaMA as it was. (Below, "without" keeps the adaptor, which has learnt beside the LoRA.)

# %%
tell()
update = lambda w: w.alpha / len(w.lora_A) * w.lora_B @ w.lora_A  # (out, rank) (rank, in) -> (out, in)
lora = next(iter(layers(llm).values()))
x = torch.randn(5, lora.in_features)
assert torch.allclose(lora(x), x @ (lora.weight + update(lora)).T, atol=1e-4)
targets = cfg.lora_targets.split(",")
plain = LLaMA.from_pretrained(cfg.llm)  # as it was
begun = apply_lora(copy.deepcopy(plain), len(lora.lora_A), lora.alpha, targets)
assert torch.equal(begun(h=h), plain(h=h))  # B = 0: the identity
# added into W it costs nothing any more
assert torch.allclose(merge_lora(copy.deepcopy(llm))(h=h)[0], logits, atol=1e-3)
print("size of the update against W\n" + " " * 8 + "".join(f"{t:>7}" for t in targets))
size = {name: update(w).norm() / w.weight.norm() for name, w in layers(llm).items()}
for n in range(len(llm.layers)):
    print(f"layer {n} " + "".join(f"{size[f'layers.{n}.attention.{t}']:7.1%}" for t in targets))
learnt = pack([clips.sample(clip, (before, after), tokenizer)])  # the stream as in training, the reference behind it
# (words, vocabulary) each
with_, without = (m(h=sllama.embed(learnt), at=learnt.target_at)[0].softmax(-1) for m in (llm, plain))
print("\nprobability of each word of the reference, after those before it\n"
      f"{'':12}with LoRA   without   the most probable one without")
for n, i in enumerate(learnt.targets.tolist()):
    print(f"{piece(i):>10} {with_[n, i]:10.2%} {without[n, i]:9.2%}   {piece(without[n].argmax().item())}")

# %% [markdown]
# ## 8. Beam search, step by step
# Taking the most probable word each time cannot go back. A beam keeps the best four beginnings, tries every word behind
# each, and goes on with the best four of all that. One that ends in EOS is done and scores
# sum(log p) / ((5+len)/6)**penalty; undivided, short sentences would win. `model.generate` does the same for many clips
# at once, and keeps keys and values (the cache) where we read everything anew.

# %%
tell()
beams, done = [(0.0, [])], []  # (sum of log p, tokens)
for step in range(max_new_tokens):
    stream = torch.stack([torch.cat([h[0], embedding[ids]]) for _, ids in beams])  # (beams, N + step, dim)
    logp = llm(h=stream)[:, -1].log_softmax(-1)  # (beams, vocabulary)
    longer = [(score + p, ids + [i]) for (score, ids), after_it in zip(beams, logp)
              for p, i in zip(*(t.tolist() for t in after_it.topk(beam * (1 + len(tokenizer.eos_ids)))))]
    longer.sort(key=lambda b: -b[0])
    for score, ids in longer[:beam]:
        if ids[-1] in tokenizer.eos_ids:
            done.append((score / ((5 + len(ids)) / 6) ** length_penalty, ids[:-1]))
            print(f"   done: {done[-1][0]:7.2f}  {tokenizer.decode(ids[:-1])}")
    if len(done) >= beam:
        break
    beams = [b for b in longer if b[1][-1] not in tokenizer.eos_ids][:beam]
    for n, (score, ids) in enumerate(beams):
        print(f"{f'step {step + 1}' if n == 0 else '':8}{score:7.2f}  {tokenizer.decode(ids)}")
_, ids = max(done or beams)
sentence = tokenizer.decode(ids).strip()
how = dict(beam=beam, length_penalty=length_penalty, max_new_tokens=max_new_tokens)
assert [sentence] == translate(sllama, [features], tokenizer, **how)
print(f"\nmodel:     {sentence}\nreference: {row['text']}")

# %% [markdown]
# ## 9. Where each word looked
# LLaMA's attention from the position that wrote a word to the frames, all layers and heads together. Nobody has said
# which frames belong to which word, and the sentence's order is not that of the signs.

# %%
tell()
ids = ids + [tokenizer.eos_id]
written = pack([Sample(features, before, after, ids)])
with recorded(llm) as weights:
    llm(h=sllama.embed(written))
look = sum(w[:, written.target_at][:, :, written.frame_at].sum(0) for w in weights.values())  # (words, T)
words = [f"{n} {piece(i)}" for n, i in enumerate(ids, 1)]
show("9_look", {"a column a frame, first to last": look / look.amax(1, keepdim=True)}, words, size=(0, T))
# those with one place far above the others
sharp = (look.amax(1) / look.sum(1)).topk(min(5, len(ids))).indices.sort().values.tolist()
print("\nand the frames that the most decided of them looked at:")
place = look.argmax(1).tolist()
show("9_frames", {f"{words[n]}: frame {place[n]}": video[place[n]] for n in sharp})

# %% [markdown]
# ## 10. The control
# A fluent sentence proves nothing: weather can be guessed. So the same model gets no clip at all (zeros), then
# another clip. If what it writes follows the clip, it has looked. `eval.py control=all` asks this of the whole test
# split.

# %%
tell()
(blank,) = controlled([features], "blank", 0, sllama.mean, sllama.std)
for name, x, said in (("this clip", features, row["text"]), ("no clip", blank, "nothing"),
                      ("another clip", clips.features(other), clips.rows[other]["text"])):
    print(f"{name:13} {translate(sllama, [x], tokenizer, **how)[0]}\n{'  was signed':13} {said}\n")

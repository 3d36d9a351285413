"""
Decodes a split and scores it, or translates single clips.

    python eval.py                                     # the newest sft run on its test split -> hyps.jsonl, scores.json
    torchrun --nproc_per_node=2 eval.py                # the same, the clips shared out
    python eval.py control=all                         # and under other clips' features, blanks and noise
    python eval.py ckpt=out/toy/sft video=clip.mp4     # one translation on stdout
    python eval.py hyps=A.txt refs=B.txt lang=de       # scores sentences made by anyone, or hyps=A.jsonl as above
    python eval.py hyps=A.jsonl against=B.jsonl lang=de  # is A better than B, or is it chance?

Beam search stands in model.py, BLEU and ROUGE in lib/scores.py, the controls in lib/controls.py.
"""
import glob
import itertools
import os
import sys
import time
from types import SimpleNamespace

import torch

from data import Clips, Sample, pack, prompt_ids, thin
from lib.checkpoint import find_checkpoint, home_of, newest_run, read_checkpoint, say_if_other_code
from lib.configurator import configure, numbers, usage_error
from lib.controls import CONTROLS, baselines, controlled
from lib.extract import open_extractor
from lib.files import sha256
from lib.memory import DECODING_LOWERS, explained
from lib.program import BadInput, Progress, gathered, join, launch, leave, pick_device, pick_dtype, print0, rank, world
from lib.readers import SPLITS
from lib.scores import bleu, language_code, print_scores, report, say_if_unspaced, score_files, write_scored
from lib.tokenizer import Tokenizer
from lib.video import other_rate, visible
from lib.weights import open_llm
from lora import apply_lora
from model import SLLaMA, generate

ckpt = ""  # run folder (its best/, else its last/) or checkpoint folder; "" = the newest sft run under out_dir
out_dir = "out"  # folder that holds the runs
split = "test"  # train, dev or test
beam = 4  # beam width, 1 = greedy (paper: silent; the field: 4 to 10)
length_penalty = 1.0  # exponent of ((5+len)/6), 0 = none (paper: silent)
max_new_tokens = 200  # an answer that has not ended by then is cut, and counted on screen
beams = ""  # e.g. 1,4,8: each is tried on dev with each of length_penalties, the best dev BLEU-4 decodes the split
length_penalties = ""  # e.g. 0,1,2
control = "none"  # shuffle (another clip's features), blank, noise: what it scores without the right clip; all: each
video = ""  # translate this file or folder of frames and nothing else
videos = ""  # translate every clip in this folder: a line name<TAB>sentence each
hyps = ""  # score this file of lines {"name","hyp","ref"} and nothing else
refs = ""  # hyps: a text file of references, hyps=FILE one of as many lines of sentences; "" = they stand in hyps=FILE
against = ""  # hyps: another such file of the same clips; tells whether the difference is significant
lang = ""  # de, en, zh, ...: how to cut sentences into tokens; "" = by the run's language
dataset = ""  # "" = the run's
data_dir = ""  # "" = the run's
backbone = ""  # label of the features; "" = the run's
weights = ""  # video: file of the CNN's weights; "" = the one the features were made with
llm = ""  # folder of the LLM; "" = the run's
llm_bits = ""  # 16, 8 or 4, of its matrices; "" = the run's
bos_id = -1  # -1 = the run's
eos_id = -1  # -1 = the run's
batch_size = 16  # clips decoded together
dtype = "auto"  # auto (bfloat16 where it is fast, see docs/speed.md, else float32), float32, bfloat16, float16
device = "auto"  # auto, cpu, cuda
seed = 1337  # of the shuffle and noise controls

CHOICES = {"split": SPLITS, "control": ("none", *CONTROLS, "all"), "llm_bits": ("", "16", "8", "4")}
PART = 8  # clips whose prefixes are read together on a CPU: a GPU would rather fill up than start more kernels


def load_model(ckpt, device="auto", dtype="auto", **overrides):
    """
    A trained model from a run or checkpoint folder -> (SLLaMA in eval mode, Tokenizer, the run's variables).
    overrides: variables that take the place of the run's; "" and -1 leave them. Beside the variables stand
    .checkpoint (see read_checkpoint) and .said, which describes the LLM.
    """
    checkpoint = read_checkpoint(find_checkpoint(ckpt))
    changed = {k: v for k, v in overrides.items() if v not in ("", -1)}
    trained = SimpleNamespace(**checkpoint.config | changed, checkpoint=checkpoint)
    say_if_other_code(checkpoint)
    device = pick_device(device)[0]
    raw = open_llm(trained.llm)
    dtype = pick_dtype(dtype, device, raw.args.size())[0]
    tokenizer = Tokenizer(trained.llm, trained.bos_id, trained.eos_id).fit(raw.args.vocab_size)
    with torch.device("meta"):
        sllama = SLLaMA(raw.args, checkpoint.state["dim_in"], trained).to(dtype)
    if checkpoint.lora:
        apply_lora(sllama.llm, *checkpoint.lora[:4])
    for name, b in sllama.named_buffers():
        setattr(sllama, name, b.float())  # statistics of the features, not weights
    sllama.requires_grad_(False).load(raw, device, 0, checkpoint.tensors)
    trained.said = raw.describe(dtype, trained.llm_bits)
    return sllama.eval(), tokenizer, trained


def prefixes(sllama, features, prompt):
    """What generate reads of clips, a list of (T, D): frames between the prompt's tokens, PART a stream or all."""
    size = len(features) if sllama.mean.is_cuda else PART
    for start in range(0, len(features), size):
        part = pack([Sample(f, *prompt, None) for f in features[start:start + size]], sllama.mean.device)
        yield sllama.embed(part), part.lens


@torch.inference_mode()
def translate(sllama, features, tokenizer, beam=4, length_penalty=1.0, max_new_tokens=200, batch_size=16,
              progress=None, warn=True, stop=(), watch=None):
    """
    Features of clips, a list of (T, D) -> list of sentences, in their order. Clips of like length go together.
    progress: called with the number of clips done; warn: say on stderr how many answers were cut at max_new_tokens;
    stop: no further batch once it holds anything (program.Signals), and what remains is None; watch: generate's.
    """
    prompt, out, cut = prompt_ids(sllama.prompt, tokenizer), [None] * len(features), 0
    order = sorted(range(len(features)), key=lambda i: len(features[i]))
    for start in range(0, len(order), batch_size):
        if stop:
            break
        chosen = order[start:start + batch_size]
        streams = prefixes(sllama, [features[i] for i in chosen], prompt)
        with explained("decoding", f"{len(chosen)} clips of up to {len(features[chosen[-1]])} frames", DECODING_LOWERS):
            answers = generate(sllama.llm, streams, tokenizer.eos_ids, beam, length_penalty, max_new_tokens, watch)
        for i, (ids, ended) in zip(chosen, answers):
            out[i] = tokenizer.decode(ids).strip()
            cut += not ended
        if progress:
            progress(start + len(chosen))
    if cut and warn:
        print(f"{cut} of {len(features)} answers did not end within max_new_tokens={max_new_tokens} "
              "and were cut there", file=sys.stderr)
    return out


def decode(sllama, features, tokenizer, what, how):
    """translate(), the clips shared out among the processes. Every process gets all sentences."""
    mine = range(rank(), len(features), world())
    out = translate(sllama, [features[i] for i in mine], tokenizer, progress=Progress(what, len(mine)), **how)
    out = gathered(dict(zip(mine, out)))
    return [out[i] for i in range(len(features))]


def fitting(clips, trained):
    """Clips whose features are as wide as those that the run was trained on, else BadInput."""
    dim_in = trained.checkpoint.state["dim_in"]
    if clips and clips.width != dim_in:
        raise BadInput(f"{clips.store.path}: features of width {clips.width}, the run was trained on {dim_in}")
    return clips


def read_split(trained, split):
    """A split of the run's data set -> (Clips, their features, their sentences)."""
    clips = fitting(Clips(trained, split), trained)
    if clips.too_long:
        print0(clips.describe().splitlines()[-1])
    return clips, [clips.features(i) for i in range(len(clips))], [row["text"] for row in clips.rows]


def sweep(cfg, sllama, tokenizer, trained, lang, how, say):
    """Decode dev with each of beams= and length_penalties= -> [{"beam", "length_penalty", "dev_bleu4"}]."""
    _, features, refs = read_split(trained, "dev")  # chosen on dev alone: test is only ever read to report
    tried = []
    for beam, penalty in itertools.product(cfg.beams or [cfg.beam], cfg.length_penalties or [cfg.length_penalty]):
        what = f"dev, beam {beam}, length penalty {penalty:g}"
        setting = {"beam": beam, "length_penalty": penalty}
        hyps = decode(sllama, features, tokenizer, what, how | setting)
        tried.append(setting | {"dev_bleu4": bleu(hyps, refs, lang)[3]})
        say(f"{what}: BLEU-4 {tried[-1]['dev_bleu4']:.2f}")
    return tried


def clip_reader(trained, cfg, say):
    """
    -> a function: path of a clip -> its features (T, D), made as those that the model has learnt from;
    and the endings of files that it reads.
    cfg: .weights and .device of the extractor; say: called with a line on what is done to a clip.
    """
    made = trained.checkpoint.state["extractor"]
    if made.get("imported"):
        raise BadInput(f"{trained.checkpoint.folder}: its features ({made['backbone']}) were imported, "
                       "and no extractor can make them from a video")
    fps = made.get("fps", 0.0)  # what the model has learnt from; 0 = clips of several rates, or unknown ones
    extractor = open_extractor(made, cfg.weights, cfg.device)

    def read(path):
        own = extractor.rate_of(path)
        if other_rate(own, fps):
            say(f"{path}: its {own or 'unknown number of'} frames a second are resampled to {fps:g}, as in training")
        features = torch.from_numpy(extractor(path))
        if 0 < trained.max_frames < len(features):
            say(f"{path}: {len(features)} frames are thinned out to max_frames={trained.max_frames}, as in training")
        return thin(features, trained.max_frames, trained.merge)

    return read, extractor.endings


def translate_videos(cfg, sllama, tokenizer, trained, how, say):
    """video=, videos=: a sentence on stdout for each clip, everything else by say."""
    read, endings = clip_reader(trained, cfg, say)
    if cfg.videos and not (os.path.isdir(cfg.videos) and visible(cfg.videos)):
        raise BadInput(f"videos={cfg.videos}: is not a folder with clips in it")
    paths = [cfg.video] if cfg.video else [f"{cfg.videos}/{f}" for f in visible(cfg.videos)]
    failed = 0
    for path in paths:
        if cfg.videos and not os.path.isdir(path) and not path.lower().endswith(endings):
            say(f"{path}: passed over, its ending is none of {' '.join(endings)}")
            continue
        try:
            (sentence,) = translate(sllama, [read(path)], tokenizer, **how)
        except BadInput as e:
            if cfg.video:
                raise
            failed += 1
            say(f"eval.py: {e}")  # the other clips of the folder are fine
            continue
        sentence = " ".join(sentence.split())
        print(sentence if cfg.video else f"{os.path.basename(path)}\t{sentence}", flush=True)
    if failed:
        raise BadInput(f"videos={cfg.videos}: {failed} of {len(paths)} clips could not be translated")


def main():
    cfg = configure(__file__, choices=CHOICES,
                    positive=("beam", "max_new_tokens", "batch_size"), minus_one=("length_penalty",))
    cfg.beams = numbers(__file__, "beams", cfg.beams, int, 1)
    cfg.length_penalties = numbers(__file__, "length_penalties", cfg.length_penalties, float, -1)
    if (cfg.against or cfg.refs) and not cfg.hyps:
        usage_error(__file__, "against and refs: stand beside hyps=FILE, which is missing")
    if bool(cfg.hyps) + bool(cfg.video) + bool(cfg.videos) > 1:
        usage_error(__file__, "hyps, video and videos: one of them at a time")
    if rank() and (cfg.hyps or cfg.video or cfg.videos):
        return  # one process is enough, and the sentence is to be printed once
    if cfg.hyps:
        return score_files(cfg.hyps, cfg.against, cfg.lang, cfg.refs)

    # the model
    say = lambda *args: print0(*args, file=sys.stderr if cfg.video or cfg.videos else sys.stdout)
    replace = {key: getattr(cfg, key) for key in ("llm", "data_dir", "dataset", "backbone", "bos_id", "eos_id")}
    replace["llm_bits"] = int(cfg.llm_bits or -1)
    sllama, tokenizer, trained = load_model(cfg.ckpt or newest_run(cfg.out_dir), cfg.device, cfg.dtype, **replace)
    folder, state = trained.checkpoint.folder, trained.checkpoint.state
    say(f"{trained.said}\n{folder}: {trained.stage} run on {trained.dataset}, step {state['step']}; "
        f"{sllama.size() / 1e6:.2f}M parameters in all, on {sllama.mean.device}")
    how = {key: getattr(cfg, key) for key in ("beam", "length_penalty", "max_new_tokens", "batch_size")}
    if cfg.video or cfg.videos:
        return translate_videos(cfg, sllama, tokenizer, trained, how, say)

    # the sentences, of the split and of its controls
    lang = language_code(trained.language, cfg.lang or trained.lang)
    if world() > 1:
        join()
    tried = sweep(cfg, sllama, tokenizer, trained, lang, how, say) if cfg.beams or cfg.length_penalties else []
    if tried:
        best = max(tried, key=lambda t: t["dev_bleu4"])
        how |= {"beam": best["beam"], "length_penalty": best["length_penalty"]}
    clips, features, refs = read_split(trained, cfg.split)
    controls = [c for c in ("none", *CONTROLS) if cfg.control in (c, "all")]
    train = fitting(clips.beside("train"), trained) if "none" in controls else None  # opened before hours of decoding
    mean, std, found, began = sllama.mean.cpu(), sllama.std.cpu(), {}, time.time()
    for control in controls:
        what = f"decoding {cfg.split}" + (f", control {control}" if control != "none" else "")
        found[control] = decode(sllama, controlled(features, control, cfg.seed, mean, std), tokenizer, what, how)
    leave()
    if rank():
        return

    # their scores
    say_if_unspaced(refs, lang)
    learnt = glob.glob(glob.escape(folder) + "/*.safetensors")
    files = [clips.path, clips.store.path, *sorted(f for f in learnt if not f.endswith("optimizer.safetensors"))]
    facts = {"split": cfg.split, "dataset": trained.dataset, "checkpoint": folder, "step": state["step"],
             "llm": trained.said, "decoding": how, "sweep": tried, "standin": clips.store.settings.get("standin"),
             "seconds": round(time.time() - began, 1), "references": f"{clips.path}, untouched",
             "sha256": {os.path.basename(f): sha256(f) for f in files}}
    scores = {c: report(h, refs, lang) | {"control": c} | facts for c, h in found.items()}
    rows = {"model" if c == "none" else f"CONTROL {c}": s for c, s in scores.items()}
    if train:
        simple = {name: report(h, refs, lang) for name, h in baselines(clips, train, mean, std).items()}
        scores["none"]["baselines"] = {n: {k: s[k] for k in ("bleu", "rouge", "chrf")} for n, s in simple.items()}
        rows |= simple
    for row, sentence in list(zip(clips.rows, found[controls[0]]))[:3]:
        print(f"\n{row['name']}\n  reference  {row['text']}\n  model      {sentence}")
    print_scores(f"{trained.dataset} {cfg.split}" + (", STAND-IN" if facts["standin"] else ""), rows)
    if facts["standin"]:
        print(f"NOT a score of the data set: {facts['standin']}")

    # and their files, in the run's folder. Only its own data set, features, bits and test split go by the plain name
    marks = {"dataset": cfg.dataset, "backbone": cfg.backbone.replace("/", "_"), "llm_bits": f"{cfg.llm_bits}bits"}
    other = [mark for key, mark in marks.items() if replace[key] not in ("", -1, trained.checkpoint.config[key])]
    for control in controls:
        end = other + [cfg.split] * (cfg.split != "test") + [control] * (control != "none")
        write_scored(home_of(folder), "".join("." + mark for mark in end), clips.rows, found[control], scores[control])


if __name__ == "__main__":
    launch(main)

"""
SL-LLaMA's rows of the paper's Tables 1 to 9, each a few variables of train.py: trains what has not been trained yet,
and writes Markdown and CSV tables.

    python -m scripts.tables page=docs/results.md     # all nine in miniature, on the harder toy, trained to the end
    python -m scripts.tables table=3 seeds=5          # one table, mean and deviation over five seeds
    python -m scripts.tables table=1 setting=paper processes=2 jobs=1    # the paper's own LLMs and data sets

The paper's LLMs are looked for in weights/, its data sets where data.py makes them.
A row that has been run is not run again; one that was interrupted goes on where it stopped.

A claim of the paper's is judged twice, where both of its rows have several seeds: over clips by a paired bootstrap of
the mean over seeds (Koehn 2004), over seeds by dealing the runs to the two rows in every way (an exact permutation
test; of three and three the least p is 0.05). Both must be at 0.05 at most.
"""
import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lib.checkpoint import read_log
from lib.configurator import coerce, configure, page_one
from lib.files import load_json, whole
from lib.program import ROOT, BadInput, Progress, launch
from lib.scores import SAMPLES, bleu4_of, counts_of, read_hyps
from lib.tensors import stateless

table = 0  # 1 to 9, 0 = all
setting = "toy"  # toy: a miniature on 2 cores; paper: PHOENIX-2014T, CSL-Daily and LLMs of 7B and 13B
seeds = 0  # runs of each row; 0 = three of the toy's rows of 7B in Tables 3, 4, 6, 8 and 9, else one
jobs = 2  # runs side by side
processes = 1  # of each run (torchrun)
data_dir = "data"  # holds the data sets
out_dir = "out"  # holds the runs
to = "out/tables"  # folder of the tables
page = ""  # a page between whose two marks they are put as well

# ---------------------------------------------------------------------------------------------------------------------
# The paper's tables. A row: label | LLM | data set | overrides | ROUGE and BLEU-4, as the paper prints them.
# peer: a row of another system's, and what its own paper says where that differs; only Tables 1 and 2 have them.
# claim: what the paper says of its figures | the row that should be the better one > the one that should be the worse
# One row of Table 4 is ours: there is next to no first stage, and the second is as long as both

PAPER = """
1: PHOENIX-2014T
peer | CSGCR (2021) | 38.85 15.18
peer | SLTR-T (2020) | - 20.17
peer | GASLT (2023) | 39.86 15.74
peer | GFSLT (2023) | 40.93 19.66 | without its pre-training; with it (GFSLT-VLP) 21.44
peer | VL-Mapper (2023) | 46.67 21.36
peer | SignBERT+ (2023) | 44.89 20.41
peer | SignFormer (2024) | 46.24 20.02
peer | Sign2GPT (2024) | 45.23 19.42
peer | Sign2GPT+PGP (2024) | 47.11 20.93 | published: ROUGE 48.90, BLEU-4 22.52
SL-LLaMA 7B | 7B | PHOENIX-2014T | | 45.87 20.86
SL-LLaMA 13B | 13B | PHOENIX-2014T | | 49.34 23.73
claim | 13B beats 7B | 1 > 0

2: CSL-Daily
peer | GASLT (2023) | 20.35 4.07
peer | NSLT (2018) | 34.54 7.56
peer | GFSLT (2023) | 35.16 9.88 | without its pre-training; with it (GFSLT-VLP) 11.00
peer | Sign2GPT (2024) | 41.12 12.96
peer | Sign2GPT+PGP (2024) | 33.39 9.73 | published: ROUGE 42.36, BLEU-4 15.40
SL-LLaMA 7B | 7B | CSL-Daily | | 38.29 11.77
SL-LLaMA 13B | 13B | CSL-Daily | | 41.96 13.42
claim | 13B beats 7B | 1 > 0

3: The adaptor
7B, linear | 7B | PHOENIX-2014T | adaptor=linear | 40.63 18.48
7B, MLP without activation | 7B | PHOENIX-2014T | adaptor=mlp_noact | 40.07 18.06
7B, MLP with GELU | 7B | PHOENIX-2014T | | 45.87 20.86
13B, linear | 13B | PHOENIX-2014T | adaptor=linear | 41.59 20.42
13B, MLP without activation | 13B | PHOENIX-2014T | adaptor=mlp_noact | 40.15 19.74
13B, MLP with GELU | 13B | PHOENIX-2014T | | 49.34 23.73
claim | GELU beats a linear layer (7B) | 2 > 0
claim | GELU beats no activation (7B) | 2 > 1
claim | GELU beats a linear layer (13B) | 5 > 3
claim | GELU beats no activation (13B) | 5 > 4

4: What learns in the second stage
7B, adaptor learns | 7B | PHOENIX-2014T | freeze_llm=true train_embeddings=false | 36.13 15.95
7B, adaptor and word embeddings | 7B | PHOENIX-2014T | freeze_llm=true | 37.82 16.12
7B, adaptor, word embeddings, LoRA | 7B | PHOENIX-2014T | | 45.87 20.86
13B, adaptor learns | 13B | PHOENIX-2014T | freeze_llm=true train_embeddings=false | 37.76 16.52
13B, adaptor and word embeddings | 13B | PHOENIX-2014T | freeze_llm=true | 38.93 16.42
13B, adaptor, word embeddings, LoRA | 13B | PHOENIX-2014T | | 49.34 23.73
7B, all of it and the local transformer, after one step of alignment | 7B | PHOENIX-2014T | max_steps=1 train_ltn=true |
claim | LoRA beats a frozen LLM (7B) | 2 > 1
claim | LoRA beats a frozen LLM (13B) | 5 > 4
claim | an alignment stage helps (not in the paper's table) | 2 > 6

5: Visual backbones
ResNet-34 (the paper: ResNet-32) | 7B | PHOENIX-2014T | backbone=timm/resnet34 | 37.06 16.81
ResNet-50 | 7B | PHOENIX-2014T | backbone=timm/resnet50 | 37.31 17.13
EfficientNet-B3 | 7B | PHOENIX-2014T | backbone=timm/efficientnet_b3 | 38.76 17.21
EfficientNet-B7 | 7B | PHOENIX-2014T | backbone=timm/tf_efficientnet_b7 | 39.01 17.59
ViT-B/16 | 7B | PHOENIX-2014T | backbone=timm/vit_base_patch16_224 | 38.04 18.36
Swin-S | 7B | PHOENIX-2014T | backbone=timm/swin_small_patch4_window7_224 | 39.72 19.17
Swin-B | 7B | PHOENIX-2014T | backbone=timm/swin_base_patch4_window7_224 | 40.41 19.42
Inception (GoogLeNet) | 7B | PHOENIX-2014T | backbone=googlenet | 45.87 20.86

6: The local transformer
7B, PHOENIX-2014T, without the local transformer | 7B | PHOENIX-2014T | ltn=false | 41.16 19.27
7B, PHOENIX-2014T, with the local transformer | 7B | PHOENIX-2014T | | 45.87 20.86
7B, CSL-Daily, without the local transformer | 7B | CSL-Daily | ltn=false | 38.86 11.42
7B, CSL-Daily, with the local transformer | 7B | CSL-Daily | | 38.29 11.77
13B, PHOENIX-2014T, without the local transformer | 13B | PHOENIX-2014T | ltn=false | 47.66 21.43
13B, PHOENIX-2014T, with the local transformer | 13B | PHOENIX-2014T | | 49.34 23.73
13B, CSL-Daily, without the local transformer | 13B | CSL-Daily | ltn=false | 41.39 13.34
13B, CSL-Daily, with the local transformer | 13B | CSL-Daily | | 41.96 13.42
claim | the local transformer helps (7B, PHOENIX) | 1 > 0
claim | it helps (7B, CSL) | 3 > 2
claim | it helps (13B, PHOENIX) | 5 > 4
claim | it helps (13B, CSL) | 7 > 6

7: Other LLMs
Vicuna-7B-v1.5, PHOENIX-2014T | Vicuna-7B-v1.5 | PHOENIX-2014T | | 43.54 21.17
Vicuna-7B-v1.5, CSL-Daily | Vicuna-7B-v1.5 | CSL-Daily | | 37.72 10.03
Mistral-7B-Instruct-v0.3, PHOENIX-2014T | Mistral-7B-Instruct-v0.3 | PHOENIX-2014T | | 44.21 20.95
Mistral-7B-Instruct-v0.3, CSL-Daily | Mistral-7B-Instruct-v0.3 | CSL-Daily | | 36.85 11.14
Qwen2-7B-Instruct, PHOENIX-2014T | Qwen2-7B-Instruct | PHOENIX-2014T | | 42.87 20.64
Qwen2-7B-Instruct, CSL-Daily | Qwen2-7B-Instruct | CSL-Daily | | 40.17 12.96
DeepSeek-LLM-7B-chat, PHOENIX-2014T | DeepSeek-LLM-7B-chat | PHOENIX-2014T | | 43.15 19.34
DeepSeek-LLM-7B-chat, CSL-Daily | DeepSeek-LLM-7B-chat | CSL-Daily | | 39.26 12.32
Chinese-LLaMA-2-7B, PHOENIX-2014T | Chinese-LLaMA-2-7B | PHOENIX-2014T | | 43.28 20.03
Chinese-LLaMA-2-7B, CSL-Daily | Chinese-LLaMA-2-7B | CSL-Daily | | 41.17 13.16

8: LoRA rank
LoRA rank 4 | 7B | PHOENIX-2014T | lora_rank=4 | 44.39 18.48
LoRA rank 8 | 7B | PHOENIX-2014T | | 45.87 20.86
LoRA rank 16 | 7B | PHOENIX-2014T | lora_rank=16 | 45.36 20.98
LoRA rank 32 | 7B | PHOENIX-2014T | lora_rank=32 | 45.79 20.07
claim | rank 8 beats rank 4 | 1 > 0

9: Window of the local transformer
window 4 | 7B | PHOENIX-2014T | window=4 | 44.45 19.64
window 8 | 7B | PHOENIX-2014T | | 45.87 20.86
window 12 | 7B | PHOENIX-2014T | window=12 | 43.73 20.02
window 16 | 7B | PHOENIX-2014T | window=16 | 44.16 19.42
claim | window 8 beats 4 | 1 > 0
claim | window 8 beats 12 | 1 > 2
claim | window 8 beats 16 | 1 > 3
"""
PHOENIX, CSL = "PHOENIX-2014T", "CSL-Daily"
PAGE, STAGES, _ = page_one(f"{ROOT}/train.py", ("align", "sft"))


def read_tables(text):
    """-> four dicts by a table's number: titles, rows (label, LLM, data set, overrides, figures), peers, claims"""
    titles, rows, peers, claims = {}, {}, {}, {}
    for block in text.strip().split("\n\n"):
        head, *lines = block.split("\n")
        n = int(head[0])
        titles[n], rows[n], peers[n], claims[n] = head[3:], [], [], []
        for line in lines:
            kind, *cells = (cell.strip() for cell in line.split("|"))
            if kind == "claim":
                claims[n].append((cells[0], *map(int, cells[1].split(" > "))))
            elif kind == "peer":
                name, figures, *note = cells
                peers[n].append((name + "".join(f" ({some})" for some in note), *figures.split()))
            else:
                llm, data, words, figures = cells
                said = (word.split("=") for word in words.split())
                overrides = {key: coerce(value, (PAGE | STAGES["sft"])[key]) for key, value in said}
                rows[n].append((kind, llm, data, overrides, tuple(map(float, figures.split()))))
    return titles, rows, peers, claims


TITLES, ROWS, PEERS, CLAIMS = read_tables(PAPER)
SFT_ALONE = {"lora_rank", "freeze_llm", "train_embeddings", "train_ltn"}  # rows that differ in these share an align run
ALIGN_ALONE = {"max_steps"}

# ---------------------------------------------------------------------------------------------------------------------
# What the rows are measured on: data set and LLM -> arguments of train.py, for both stages and for each

LLMS = """
7B llama-2-7b llm
13B llama-2-13b llm_13b
Vicuna-7B-v1.5 vicuna-7b-v1.5 llm_vicuna
Mistral-7B-Instruct-v0.3 mistral-7b-instruct-v0.3 llm_mistral
Qwen2-7B-Instruct qwen2-7b-instruct llm_qwen2
DeepSeek-LLM-7B-chat deepseek-llm-7b-chat llm_deepseek
Chinese-LLaMA-2-7B chinese-llama-2-7b llm_chinese
"""
# the paper's name -> the folder in weights/, what stands in for it in the toy's
LLMS = {name: folders for name, *folders in map(str.split, LLMS.strip().split("\n"))}
SETTINGS = {
    "paper": {"is": "the paper's data sets and LLMs", PHOENIX: ["phoenix14t"], CSL: ["csl_daily"]},
    "toy": {
        "is": "hard toy, tiny LLMs",
        "clips": ["n_test=400"],
        # Table 5 is a trial of the path alone: few clips at 5 frames a second, and timm's models with random weights
        "backbones": dict(clips={"train": 12, "dev": 4, "test": 4}, args=["weights=random", "fps=5"]),
        PHOENIX: ["hard", "dataset=hard"],
        CSL: ["hard_zh", "dataset=hard_zh", "language=Chinese"],
        "sft": ["train_embeddings=true"],
    },
}
def overrides_of(row, stage):
    """The row's own variables that count in a stage."""
    return {k: v for k, v in row[3].items() if k not in (ALIGN_ALONE if stage == "sft" else SFT_ALONE)}


def arguments(row, cfg, stage):
    """A row -> (its data set's name on the disk, arguments of train.py)."""
    _, llm, data, overrides, _ = row
    here, (weights, standin) = SETTINGS[cfg.setting], LLMS[llm]
    name, *args = here[data]
    if cfg.setting == "paper":
        args, folder = [f"config/{name}_{'13b' if llm == '13B' else '7b'}.py"], f"weights/{weights}"
    else:
        folder = os.path.join(cfg.data_dir, name, standin)
        if "backbone" in overrides:
            name, args = "toy_backbones", ["dataset=toy_backbones", "language=German"]
    args += [f"data_dir={cfg.data_dir}", f"out_dir={cfg.out_dir}", f"llm={folder}", *here.get(stage, [])]
    if ALIGN_ALONE & overrides.keys() and stage == "sft":
        both = [configure(f"{ROOT}/train.py", [*args, f"stage={s}"], stages=tuple(STAGES)).epochs for s in STAGES]
        args.append(f"epochs={sum(both)}")
    return name, args + [f"{k}={v}" for k, v in overrides_of(row, stage).items()]  # the row's own come last and win


def key_of(row, stage):
    """What a row's run is called; rows that are the same run have the same name."""
    # the paper's data sets have GoogLeNet's features anyway
    own = sorted(item for item in overrides_of(row, stage).items() if item != ("backbone", "googlenet"))
    return ",".join([row[1]] + [f"{k}={v}".replace("/", "_") for k, v in own])


REPEATED = {(key_of(row, "sft"), row[2]) for n in (3, 4, 6, 8, 9) for row in ROWS[n] if row[1] == "7B"}


def seeds_of(row, cfg):
    """The seeds of a row's runs."""
    several = cfg.setting == "toy" and (key_of(row, "sft"), row[2]) in REPEATED
    return range(1337, 1337 + (cfg.seeds or (3 if several else 1)))


def log_of(cfg, *words):
    """The file that a run's output goes to."""
    return os.path.join(cfg.out_dir, "tables", "logs", ",".join(map(str, words)).replace("/", "_") + ".log")


def cores_for(processes):
    """How many cores each of these processes has, as a text."""
    return str(max(1, (os.cpu_count() or 1) // processes))


def run(command, log, cfg, beside=0):
    """
    Run a program of this repository, its output to a log file; BadInput with its last word where it fails.
    beside: runs that share the cores, 0 = jobs.
    """
    os.makedirs(os.path.dirname(log), exist_ok=True)
    start = [sys.executable]
    if cfg.processes > 1 and command[0] != "-m":  # a toy is made by one process
        torchrun = os.path.join(os.path.dirname(sys.executable), "torchrun")
        start = [torchrun, f"--nproc_per_node={cfg.processes}", "--master_port=0"]
    threads = {"OMP_NUM_THREADS": cores_for((beside or cfg.jobs) * cfg.processes)}
    with open(log, "a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(start + command, stdout=out, stderr=out, env=threads | dict(os.environ)).returncode
    if code:
        word = os.path.basename(command[0]) + ":"
        said = [line for line in open(log, errors="replace").read().splitlines() if line.startswith(word)]
        last = f": {said[-1]}" if said else ""
        raise BadInput(f"{' '.join(command)}: ended with exit code {code}, see {log}{last}")


def run_of(row, seed, stage, cfg):
    """-> (the run's folder, its log, what is given to train.py)"""
    name, args = arguments(row, cfg, stage)
    place = lambda stage: f"tables/{cfg.setting}/{key_of(row, stage)}/{str(seed)}"
    home = lambda stage: os.path.join(cfg.out_dir, name, place(stage), stage)
    if stage == "sft":
        args.append(f"init_from={home('align')}")
    log = log_of(cfg, name, key_of(row, stage), seed, stage)
    return home(stage), log, [*args, f"stage={stage}", f"seed={seed}", f"run={place(stage)}"]


def train(row, seed, stage, cfg):
    """One stage of a row, and after sft its score on test; what is there already is left as it is. -> its folder"""
    home, log, args = run_of(row, seed, stage, cfg)
    if not os.path.exists(f"{home}/scores.json"):
        run(["train.py", *args, "resume=true"], log, cfg)
        if stage == "sft":
            run(["eval.py", f"ckpt={home}", f"data_dir={cfg.data_dir}"], log, cfg)
    return home


def prepare(rows, cfg):
    """The toy's clips and tiny LLMs that these rows need, and their features."""
    pairs = {(SETTINGS["toy"][row[2]][0], LLMS[row[1]][1]) for row in rows}
    pairs |= {(name, "llm") for name, _ in pairs}

    def build(pair):
        args = [f"data_dir={cfg.data_dir}", f"name={pair[0]}", f"llm={pair[1]}", f"threads={cores_for(cfg.jobs)}"]
        args += SETTINGS["toy"]["clips"]
        run(["-m", "scripts.toy", *args], log_of(cfg, *pair), cfg)

    show, done = Progress("toys", len(pairs)), 0
    for first in (True, False):  # the clips come with the first LLM of a toy; the others can then learn side by side
        with ThreadPoolExecutor(cfg.jobs) as pool:
            for _ in pool.map(build, sorted(p for p in pairs if (p[1] == "llm") == first)):
                done += 1
                show(done, unit="LLMs")
    few, root = SETTINGS["toy"]["backbones"], os.path.join(cfg.data_dir, "toy_backbones", "clips")
    backbones = sorted({row[3]["backbone"] for row in rows if "backbone" in row[3]})
    if backbones and not os.path.exists(f"{root}/clips.tsv"):
        few_clips(os.path.join(cfg.data_dir, SETTINGS["toy"][PHOENIX][0], "clips"), root, few["clips"])
    show = Progress("features", len(backbones))
    for done, backbone in enumerate(backbones, 1):
        args = ["dataset=toy_backbones", "reader=clips", f"root={root}", f"data_dir={cfg.data_dir}", *few["args"]]
        log = log_of(cfg, "toy_backbones", backbone)
        run(["data.py", *args, f"backbone={backbone}"], log, cfg, beside=1)
        show(done, unit="backbones")


def few_clips(source, root, counts):
    """Copy so many clips of each split, with their table."""
    os.makedirs(root, exist_ok=True)
    with open(f"{source}/clips.tsv", encoding="utf-8") as f:
        header, *lines = f.read().splitlines()
    chosen = [line for split, n in counts.items() for line in [li for li in lines if li.split("\t")[2] == split][:n]]
    for line in chosen:
        shutil.copy(os.path.join(source, line.split("\t")[0]), root)
    with whole(f"{root}/clips.tsv") as f:
        f.write("\n".join([header, *chosen]) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# What came out

def mean(values):
    """95.1 or, of several runs, 95.1 ± 0.4"""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def judge(better, worse, lang):
    """
    Two rows' runs, each a list of {clip: (hypothesis, reference)}; where one has fewer, as many of the other count.
    -> (difference of the mean BLEU-4, p over clips, p over seeds or None where one has a single run), each one-sided
    """
    n = min(len(better), len(worse))
    runs = [*better[:n], *worse[:n]]
    names = sorted(runs[0])
    counts = np.stack([counts_of(*zip(*(run[name] for name in names)), lang) for run in runs])  # (2n, clips, 10)
    gap = lambda scores: np.mean(scores[:n]) - np.mean(scores[n:])
    scores = np.array([bleu4_of(of.sum(0)) for of in counts])
    found, rng = gap(scores), stateless(0, "tables", "bootstrap")
    drawn = rng.integers(len(names), size=(SAMPLES, len(names)))
    sampled = np.array([gap([bleu4_of(of[some].sum(0)) for of in counts]) for some in drawn])
    dealt = [gap(np.concatenate([scores[list(hand)], np.delete(scores, hand)]))
             for hand in itertools.combinations(range(2 * n), n)]
    over_seeds = np.mean([np.sign(found) * d >= abs(found) - 1e-9 for d in dealt]) if n > 1 else None
    return found, np.mean(np.sign(found) * sampled <= 0), over_seeds


def verdict(found, over_clips, over_seeds):
    """In words, with its p."""
    sure = max(over_clips, over_seeds or 0) <= 0.05
    word = "cannot be told" if not sure else "agrees" if found > 0 else "disagrees"
    if over_seeds is None:  # another might say otherwise
        return f"with one seed {word} ({found:+.2f}, p = {over_clips:.3f} over clips)"
    return f"{word} ({found:+.2f}, p = {over_clips:.3f} over clips, {over_seeds:.2f} over seeds)"


def row_of(row, found, cfg):
    """A row's cells: label, the paper's ROUGE and BLEU-4, our ROUGE and BLEU-1 to 4, number of runs, measured on."""
    label, _, data, _, paper = row
    where = SETTINGS[cfg.setting]["is"]
    if cfg.setting == "toy":
        where = where.replace("toy", "Chinese toy") if data == CSL else where
    ours = ["failed"] * 5
    if found:
        ours = [mean([s["rouge"] for s in found]), *(mean([s["bleu"][n] for s in found]) for n in range(4))]
    return [label, *(paper or ("", "")), *ours, len(found or ()), where]


def claims_of(number, homes, cfg):
    """The lines that say what has become of the paper's claims in a table."""
    lines = []
    for claim, better, worse in CLAIMS[number]:
        if homes[better] and homes[worse]:
            lang = load_json(f"{homes[better][0]}/scores.json")["lang"]
            runs = ([read_hyps(f"{home}/hyps.jsonl") for home in homes[i]] for i in (better, worse))
            of_paper = [ROWS[number][i][4] for i in (better, worse)]
            said = "paper {} against {}, ".format(*(f[1] for f in of_paper)) if all(of_paper) else ""
            lines.append(f"- {claim}: {said}here {verdict(*judge(*runs, lang))}")
    return lines


def write(number, homes, cfg):
    """
    Table `number` as Markdown and CSV. -> the Markdown
    homes: for each row the folders of its seeds' runs, or None where one failed.
    """
    claims = claims_of(number, homes, cfg)
    lines = [f"## Table {number}: {TITLES[number]}", ""]
    ran_alone = cfg.setting == "toy" and number == 5
    if ran_alone:
        lines += ["Backbones with random weights, 12 clips to learn from: that each row runs, no more.", ""]
    elif claims and not any(" agrees " in line or " disagrees " in line for line in claims):
        lines += ["**Nothing here can be told from chance.**", ""]
    lines += ["| | paper: ROUGE | BLEU-4 | ours: ROUGE | BLEU-4 | measured on |", "|---|---|---|---|---|---|"]
    cells = ["row,paper_rouge,paper_bleu4,rouge,bleu1,bleu2,bleu3,bleu4,runs,measured_on".split(",")]
    for name, rouge, bleu4 in PEERS[number]:
        lines.append(f"| {name} | {rouge} | {bleu4} | | | |")
        cells.append([name, rouge.strip("-"), bleu4] + [""] * 7)
    for row, of_row in zip(ROWS[number], homes):
        found = [load_json(f"{home}/scores.json") for home in of_row or ()]
        cells.append(row_of(row, found, cfg))
        if found and ran_alone:
            cells[-1][3:8] = ["ran"] + [""] * 4
        label, *paper, rouge, _, _, _, bleu4, _, where = cells[-1]
        bleu4 = f"**{bleu4}**" if found and bleu4 else bleu4
        lines.append(f"| {label} | {paper[0]} | {paper[1]} | {rouge} | {bleu4} | {where} |")
    text = "\n".join([*lines, "", *claims]).rstrip() + "\n"
    os.makedirs(cfg.to, exist_ok=True)
    with whole(f"{cfg.to}/table{number}.md") as f:
        f.write(text)
    with whole(f"{cfg.to}/table{number}.csv") as f:
        csv.writer(f).writerows(cells)
    return text


def write_runs(done, cfg):
    """Every run in one CSV: its command, minutes of training, dev BLEU-4 by step, and what came out."""
    head = "table,row,seed,stage,minutes,dev_bleu4,bleu4,rouge,command".split(",")
    lines = []
    for number, row, seed, stage in done:
        home, _, args = run_of(row, seed, stage, cfg)
        log = list(map(json.loads, read_log(f"{home}/log.jsonl")))
        steps = [0] + [e["step"] for e in log if "step_s" in e]
        took = sum((b - a) * e["step_s"] for a, b, e in zip(steps, steps[1:], (e for e in log if "step_s" in e)))
        curve = " ".join(f"{e['step']}:{e['dev_bleu'][3]:.2f}" for e in log if "dev_bleu" in e)
        scores = load_json(f"{home}/scores.json") if os.path.exists(f"{home}/scores.json") else None
        lines.append([number, row[0], seed, stage, f"{took / 60:.1f}", curve, *(
            (f"{scores['bleu'][3]:.2f}", f"{scores['rouge']:.2f}") if scores else ("", "")),
            " ".join(["train.py", *args])])
    with whole(f"{cfg.to}/runs.csv") as f:
        csv.writer(f).writerows([head, *lines])


MARKS = "<!-- tables: written by scripts.tables -->", "<!-- end of the tables -->"


def put_into(page, text):
    """Replace what stands between the two marks of a page."""
    with open(page, encoding="utf-8") as f:
        before, mark, rest = f.read().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise BadInput(f"{page}: has no lines {MARKS[0]} and {MARKS[1]}, between which the tables go")
    with whole(page) as f:
        f.write(f"{before}{mark}\n\n{text}\n{end}{after}")


def main():
    cfg = configure(__file__, choices={"table": tuple(range(10)), "setting": tuple(SETTINGS)},
                    positive=("jobs", "processes"))
    numbers = [cfg.table] if cfg.table else sorted(ROWS)
    rows = [row for n in numbers for row in ROWS[n]]
    if cfg.setting == "toy":
        prepare(rows, cfg)
    homes, failed = {}, {}  # key of a run -> its folder, or what went wrong
    key = lambda row, seed, stage: (arguments(row, cfg, stage)[0], key_of(row, stage), seed, stage)
    for stage in STAGES:
        todo = {key(row, seed, stage): (row, seed) for row in rows for seed in seeds_of(row, cfg)}
        show = Progress(f"{stage} runs", len(todo))

        def one(item):
            name, (row, seed) = item
            try:
                homes[name] = train(row, seed, stage, cfg)
            except BadInput as e:
                failed[name] = str(e)

        with ThreadPoolExecutor(cfg.jobs) as pool:
            for done, _ in enumerate(pool.map(one, todo.items()), 1):
                show(done, unit="runs")
    pages = []
    for n in numbers:
        found = [[homes.get(key(row, seed, "sft")) for seed in seeds_of(row, cfg)] for row in ROWS[n]]
        pages.append(write(n, [some if all(some) else None for some in found], cfg))
        print("\n" + pages[-1], flush=True)
    text = "\n".join(pages)
    with whole(f"{cfg.to}/tables.md") as f:
        f.write(text)
    write_runs([(n, row, seed, stage) for n in numbers for row in ROWS[n] for seed in seeds_of(row, cfg)
                for stage in STAGES if key(row, seed, stage) in homes], cfg)
    print(f"written to {cfg.to}: tables.md, a .md and a .csv of each, runs.csv")
    if failed:
        raise BadInput(f"{len(failed)} runs failed: {'; '.join(failed.values())}")
    if cfg.page:
        put_into(cfg.page, text)


if __name__ == "__main__":
    launch(main)

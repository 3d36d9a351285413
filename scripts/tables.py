"""
SL-LLaMA's rows of the paper's Tables 1 to 9, each a dict of overrides: trains what has not been trained yet, and writes Markdown and CSV tables.

    python -m scripts.tables                          # all nine in miniature on the toy, a proof that every row works
    python -m scripts.tables table=3 seeds=3          # one table, mean and deviation over three seeds
    python -m scripts.tables table=1 setting=paper processes=2 jobs=1    # the paper's own: LLMs in weights/, data sets made by data.py

A row that has been run is not run again; one that was interrupted goes on where it stopped.
"""
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from config import BadInput, Progress, configure, launch, usage_error, whole

table = 0  # 1 to 9, 0 = all
setting = "toy"  # toy: a miniature on 2 cores; paper: PHOENIX-2014T, CSL-Daily and LLMs of 7B and 13B
seeds = 1  # runs of each row
jobs = 2  # runs side by side
processes = 1  # of each run (torchrun)
data_dir = "data"  # holds the data sets
out_dir = "out"  # holds the runs
to = "out/tables"  # folder of the tables

# ---------------------------------------------------------------------------------------------------------------------
# The paper's rows: (label, LLM, data set, overrides, the paper's ROUGE and BLEU-4). A name of an LLM is looked up in SETTINGS.

PHOENIX, CSL = "PHOENIX-2014T", "CSL-Daily"
SL_7B = {PHOENIX: (45.87, 20.86), CSL: (38.29, 11.77)}
SL_13B = {PHOENIX: (49.34, 23.73), CSL: (41.96, 13.42)}
ADAPTOR_ONLY, AND_EMBEDDINGS = {"freeze_llm": True, "train_embeddings": False}, {"freeze_llm": True}
ROWS = {
    1: [("SL-LLaMA 7B", "7B", PHOENIX, {}, SL_7B[PHOENIX]),
        ("SL-LLaMA 13B", "13B", PHOENIX, {}, SL_13B[PHOENIX])],
    2: [("SL-LLaMA 7B", "7B", CSL, {}, SL_7B[CSL]),
        ("SL-LLaMA 13B", "13B", CSL, {}, SL_13B[CSL])],
    3: [("7B, linear", "7B", PHOENIX, {"adaptor": "linear"}, (40.63, 18.48)),
        ("7B, MLP without activation", "7B", PHOENIX, {"adaptor": "mlp_noact"}, (40.07, 18.06)),
        ("7B, MLP with GELU", "7B", PHOENIX, {}, SL_7B[PHOENIX]),
        ("13B, linear", "13B", PHOENIX, {"adaptor": "linear"}, (41.59, 20.42)),
        ("13B, MLP without activation", "13B", PHOENIX, {"adaptor": "mlp_noact"}, (40.15, 19.74)),
        ("13B, MLP with GELU", "13B", PHOENIX, {}, SL_13B[PHOENIX])],
    4: [("7B, adaptor learns", "7B", PHOENIX, ADAPTOR_ONLY, (36.13, 15.95)),
        ("7B, adaptor and word embeddings", "7B", PHOENIX, AND_EMBEDDINGS, (37.82, 16.12)),
        ("7B, adaptor, word embeddings, LoRA", "7B", PHOENIX, {}, SL_7B[PHOENIX]),
        ("13B, adaptor learns", "13B", PHOENIX, ADAPTOR_ONLY, (37.76, 16.52)),
        ("13B, adaptor and word embeddings", "13B", PHOENIX, AND_EMBEDDINGS, (38.93, 16.42)),
        ("13B, adaptor, word embeddings, LoRA", "13B", PHOENIX, {}, SL_13B[PHOENIX])],
    5: [("ResNet-34 (the paper: ResNet-32)", "7B", PHOENIX, {"backbone": "timm/resnet34"}, (37.06, 16.81)),
        ("ResNet-50", "7B", PHOENIX, {"backbone": "timm/resnet50"}, (37.31, 17.13)),
        ("EfficientNet-B3", "7B", PHOENIX, {"backbone": "timm/efficientnet_b3"}, (38.76, 17.21)),
        ("EfficientNet-B7", "7B", PHOENIX, {"backbone": "timm/tf_efficientnet_b7"}, (39.01, 17.59)),
        ("ViT-B/16", "7B", PHOENIX, {"backbone": "timm/vit_base_patch16_224"}, (38.04, 18.36)),
        ("Swin-S", "7B", PHOENIX, {"backbone": "timm/swin_small_patch4_window7_224"}, (39.72, 19.17)),
        ("Swin-B", "7B", PHOENIX, {"backbone": "timm/swin_base_patch4_window7_224"}, (40.41, 19.42)),
        ("Inception (GoogLeNet)", "7B", PHOENIX, {}, SL_7B[PHOENIX])],
    6: [(f"{llm}, {data}, {how} the local transformer", llm, data, {} if how == "with" else {"ltn": False}, paper) for llm, data, how, paper in (
        ("7B", PHOENIX, "without", (41.16, 19.27)), ("7B", PHOENIX, "with", SL_7B[PHOENIX]), ("7B", CSL, "without", (38.86, 11.42)), ("7B", CSL, "with", SL_7B[CSL]),
        ("13B", PHOENIX, "without", (47.66, 21.43)), ("13B", PHOENIX, "with", SL_13B[PHOENIX]), ("13B", CSL, "without", (41.39, 13.34)), ("13B", CSL, "with", SL_13B[CSL]))],
    7: [(f"{llm}, {data}", llm, data, {}, paper) for llm, *papers in (
        ("Vicuna-7B-v1.5", (43.54, 21.17), (37.72, 10.03)), ("Mistral-7B-Instruct-v0.3", (44.21, 20.95), (36.85, 11.14)),
        ("Qwen2-7B-Instruct", (42.87, 20.64), (40.17, 12.96)), ("DeepSeek-LLM-7B-chat", (43.15, 19.34), (39.26, 12.32)),
        ("Chinese-LLaMA-2-7B", (43.28, 20.03), (41.17, 13.16))) for data, paper in zip((PHOENIX, CSL), papers)],
    8: [(f"LoRA rank {r}", "7B", PHOENIX, {} if r == 8 else {"lora_rank": r}, paper) for r, paper in
        ((4, (44.39, 18.48)), (8, SL_7B[PHOENIX]), (16, (45.36, 20.98)), (32, (45.79, 20.07)))],
    9: [(f"window {w}", "7B", PHOENIX, {} if w == 8 else {"window": w}, paper) for w, paper in
        ((4, (44.45, 19.64)), (8, SL_7B[PHOENIX]), (12, (43.73, 20.02)), (16, (44.16, 19.42)))],
}
TITLES = {1: "PHOENIX-2014T", 2: "CSL-Daily", 3: "The adaptor", 4: "What learns in the second stage", 5: "Visual backbones", 6: "The local transformer",
          7: "Other LLMs", 8: "LoRA rank", 9: "Window of the local transformer"}
# what the paper says of its figures: (claim, row that should be the better one, row that should be the worse one)
CLAIMS = {
    1: [("13B beats 7B", 1, 0)], 2: [("13B beats 7B", 1, 0)],
    3: [("GELU beats a linear layer (7B)", 2, 0), ("GELU beats no activation (7B)", 2, 1), ("GELU beats a linear layer (13B)", 5, 3), ("GELU beats no activation (13B)", 5, 4)],
    4: [("LoRA beats a frozen LLM (7B)", 2, 1), ("LoRA beats a frozen LLM (13B)", 5, 4)], 5: [],
    6: [("the local transformer helps (7B, PHOENIX)", 1, 0), ("it helps (7B, CSL)", 3, 2), ("it helps (13B, PHOENIX)", 5, 4), ("it helps (13B, CSL)", 7, 6)], 7: [],
    8: [("rank 8 beats rank 4", 1, 0)], 9: [(f"window 8 beats {w}", 1, i) for w, i in ((4, 0), (12, 2), (16, 3))],
}
# The peers' rows of Tables 1 and 2 as the paper prints them (ROUGE, BLEU-4), and what their own papers say where that differs
PEERS = {
    1: [("CSGCR (2021)", 38.85, 15.18, ""), ("SLTR-T (2020)", None, 20.17, ""), ("GASLT (2023)", 39.86, 15.74, ""),
        ("GFSLT (2023)", 40.93, 19.66, "without its pre-training; with it (GFSLT-VLP) 21.44"), ("VL-Mapper (2023)", 46.67, 21.36, ""),
        ("SignBERT+ (2023)", 44.89, 20.41, ""), ("SignFormer (2024)", 46.24, 20.02, ""),
        ("Sign2GPT (2024)", 45.23, 19.42, ""), ("Sign2GPT+PGP (2024)", 47.11, 20.93, "published: ROUGE 48.90, BLEU-4 22.52")],
    2: [("GASLT (2023)", 20.35, 4.07, ""), ("NSLT (2018)", 34.54, 7.56, ""), ("GFSLT (2023)", 35.16, 9.88, "without its pre-training; with it (GFSLT-VLP) 11.00"),
        ("Sign2GPT (2024)", 41.12, 12.96, ""), ("Sign2GPT+PGP (2024)", 33.39, 9.73, "published: ROUGE 42.36, BLEU-4 15.40")],
}
SFT_ALONE = {"lora_rank", "freeze_llm", "train_embeddings"}  # rows that differ in these share an align run

# ---------------------------------------------------------------------------------------------------------------------
# What the rows are measured on: data set and LLM -> arguments of train.py, for both stages and for each

SETTINGS = {
    "paper": {
        "is": "the paper's data sets and LLMs",
        "data": {(data, size): [f"config/{name}_{size.lower()}.py"] for data, name in ((PHOENIX, "phoenix14t"), (CSL, "csl_daily")) for size in ("7B", "13B")},
        "llm": {"7B": "weights/llama-2-7b", "13B": "weights/llama-2-13b", "Vicuna-7B-v1.5": "weights/vicuna-7b-v1.5",
                "Mistral-7B-Instruct-v0.3": "weights/mistral-7b-instruct-v0.3", "Qwen2-7B-Instruct": "weights/qwen2-7b-instruct",
                "DeepSeek-LLM-7B-chat": "weights/deepseek-llm-7b-chat", "Chinese-LLaMA-2-7B": "weights/chinese-llama-2-7b"},
        "align": [], "sft": [],
    },
    "toy": {
        "is": "toy, 500 clips, tiny LLMs",
        # Table 5 is a trial of the path alone: few clips at 5 frames a second, and timm's models with random weights
        "backbones": dict(clips={"train": 12, "dev": 4, "test": 4}, args=["weights=random", "fps=5"]),
        "data": {(PHOENIX, size): ["dataset=toy"] for size in ("7B", "13B")} | {(CSL, size): ["dataset=toy_zh", "language=Chinese"] for size in ("7B", "13B")},
        "llm": {"7B": "llm", "13B": "llm_13b", "Vicuna-7B-v1.5": "llm_vicuna", "Mistral-7B-Instruct-v0.3": "llm_mistral", "Qwen2-7B-Instruct": "llm_qwen2",
                "DeepSeek-LLM-7B-chat": "llm_deepseek", "Chinese-LLaMA-2-7B": "llm_chinese"},
        "align": ["max_clips=500", "epochs=6", "batch_size=8", "eval_clips=0"],
        "sft": ["max_clips=500", "epochs=3", "batch_size=8", "eval_clips=0", "train_embeddings=true"],  # eval_clips=0: best/ by dev loss, which costs less
    },
}


def arguments(row, cfg, stage):
    """A row -> (its data set's name on the disk, arguments of train.py)."""
    _, llm, data, overrides, _ = row
    here = SETTINGS[cfg.setting]
    args = here["data"][data, llm if llm in ("7B", "13B") else "7B"] + [f"data_dir={cfg.data_dir}", f"out_dir={cfg.out_dir}"]
    name = next((a.split("=")[1] for a in args if a.startswith("dataset=")), None) or {PHOENIX: "phoenix14t", CSL: "csl_daily"}[data]
    if cfg.setting == "toy" and "backbone" in overrides:
        name = "toy_backbones"
        args = [a for a in args if not a.startswith("dataset=")] + [f"dataset={name}", "language=German"]
    folder = here["llm"][llm]
    args.append("llm=" + (os.path.join(cfg.data_dir, "toy" if name == "toy_backbones" else name, folder) if cfg.setting == "toy" else folder))
    args += here[stage] + [f"{k}={v}" for k, v in overrides.items() if stage == "sft" or k not in SFT_ALONE]  # the row's own come last and win
    return name, args


def key_of(row, stage):
    """What a row's run is called; rows that are the same run have the same name."""
    _, llm, _, overrides, _ = row
    return ",".join([llm] + [f"{k}={v}".replace("/", "_") for k, v in sorted(overrides.items()) if stage == "sft" or k not in SFT_ALONE])


def run(command, log, cfg, beside=0):
    """Run a program of this repository, its output to a log file; BadInput with its last word where it fails. beside: runs that share the cores, 0 = jobs."""
    os.makedirs(os.path.dirname(log), exist_ok=True)
    start = [sys.executable]
    if cfg.processes > 1 and command[0] != "-m":  # a toy is made by one process
        start = [os.path.join(os.path.dirname(sys.executable), "torchrun"), f"--nproc_per_node={cfg.processes}", "--master_port=0"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ((beside or cfg.jobs) * cfg.processes)))}
    with open(log, "a") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(start + command, stdout=out, stderr=out, env=threads | dict(os.environ)).returncode
    if code:
        said = [line for line in open(log, errors="replace").read().splitlines() if line.startswith(os.path.basename(command[0]) + ":")]
        raise BadInput(f"{' '.join(command)}: ended with exit code {code}, see {log}" + (f": {said[-1]}" if said else ""))


def train(row, seed, stage, cfg):
    """One stage of a row, and after sft its score on test; what is there already is left as it is."""
    name, args = arguments(row, cfg, stage)
    place = lambda stage: os.path.join("tables", cfg.setting, key_of(row, stage), str(seed))
    home = os.path.join(cfg.out_dir, name, place(stage), stage)
    log = os.path.join(cfg.out_dir, "tables", "logs", f"{name},{key_of(row, stage)},{seed},{stage}.log")
    if stage == "sft":
        args.append(f"init_from={os.path.join(cfg.out_dir, name, place('align'), 'align')}")
    if not os.path.exists(os.path.join(home, "scores.json")):
        run(["train.py", *args, f"stage={stage}", f"seed={seed}", f"run={place(stage)}", "resume=true"], log, cfg)
        if stage == "sft":
            run(["eval.py", f"ckpt={home}"], log, cfg)
    return home


def prepare(rows, cfg):
    """The toy's clips and tiny LLMs that these rows need, and their features."""
    pairs = {(arguments(row, cfg, "align")[0].removesuffix("_backbones"), SETTINGS["toy"]["llm"][row[1]]) for row in rows}
    pairs |= {(name, "llm") for name, _ in pairs}
    build = lambda pair: run(["-m", "scripts.toy", f"data_dir={cfg.data_dir}", f"name={pair[0]}", f"llm={pair[1]}", f"threads={max(1, (os.cpu_count() or 1) // cfg.jobs)}"],
                             os.path.join(cfg.out_dir, "tables", "logs", f"{pair[0]},{pair[1]}.log"), cfg)
    show, done = Progress("toys", len(pairs)), 0
    for first in (True, False):  # the clips come with the first LLM of a toy; the others can then be trained side by side
        with ThreadPoolExecutor(cfg.jobs) as pool:
            for _ in pool.map(build, sorted(p for p in pairs if (p[1] == "llm") == first)):
                done += 1
                show(done, unit="LLMs")
    few = SETTINGS["toy"]["backbones"]
    root = os.path.join(cfg.data_dir, "toy_backbones", "clips")
    backbones = sorted({row[3]["backbone"] for row in rows if "backbone" in row[3]})
    show = Progress("features", len(backbones))
    for done, backbone in enumerate(backbones, 1):
        if not os.path.exists(os.path.join(root, "clips.tsv")):
            os.makedirs(root, exist_ok=True)
            with open(os.path.join(cfg.data_dir, "toy", "clips", "clips.tsv"), encoding="utf-8") as f:
                header, *lines = f.read().splitlines()
            chosen = [line for split, n in few["clips"].items() for line in [li for li in lines if li.split("\t")[2] == split][:n]]
            for line in chosen:
                shutil.copy(os.path.join(cfg.data_dir, "toy", "clips", line.split("\t")[0]), root)
            with whole(os.path.join(root, "clips.tsv")) as f:
                f.write("\n".join([header, *chosen]) + "\n")
        run(["data.py", "dataset=toy_backbones", "reader=clips", f"root={root}", f"data_dir={cfg.data_dir}", f"backbone={backbone}", *few["args"]],
            os.path.join(cfg.out_dir, "tables", "logs", f"toy_backbones,{backbone.replace('/', '_')}.log"), cfg, beside=1)
        show(done, unit="backbones")


def mean(values):
    """95.1 or, of several runs, 95.1 ± 0.4"""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def write(number, scores, cfg):
    """Table `number` as Markdown and CSV. scores: for each row the scores.json of its seeds, or None where it failed. -> the Markdown."""
    is_on = SETTINGS[cfg.setting]["is"]
    lines = [f"## Table {number}: {TITLES[number]}", "", "| | paper: ROUGE | BLEU-4 | ours: ROUGE | BLEU-4 | measured on |", "|---|---|---|---|---|---|"]
    cells = [["row", "paper_rouge", "paper_bleu4", "rouge", "bleu1", "bleu2", "bleu3", "bleu4", "runs", "measured_on"]]
    for name, rouge, bleu4, note in PEERS.get(number, []):
        lines.append(f"| {name}{f' ({note})' if note else ''} | {rouge or '-'} | {bleu4} | | | |")
        cells.append([name + (f" ({note})" if note else ""), rouge or "", bleu4] + [""] * 7)
    for (label, _, data, overrides, (rouge, bleu4)), found in zip(ROWS[number], scores):
        where = is_on + (", 12 clips and random weights: shows that it runs, no more" if cfg.setting == "toy" and "backbone" in overrides else "")
        if data == CSL and cfg.setting == "toy":
            where = where.replace("toy", "Chinese toy")
        if not found:
            lines.append(f"| {label} | {rouge} | {bleu4} | failed | failed | {where} |")
            cells.append([label, rouge, bleu4] + ["failed"] * 5 + [0, where])
            continue
        lines.append(f"| {label} | {rouge} | {bleu4} | {mean([s['rouge'] for s in found])} | **{mean([s['bleu'][3] for s in found])}** | {where} |")
        cells.append([label, rouge, bleu4, mean([s["rouge"] for s in found]), *(mean([s["bleu"][n] for s in found]) for n in range(4)), len(found), where])
    lines.append("")
    for claim, better, worse in CLAIMS[number]:
        if scores[better] and scores[worse]:
            a, b = (statistics.mean(s["bleu"][3] for s in scores[i]) for i in (better, worse))
            verdict = "agrees" if a - b >= 0.5 else "disagrees" if b - a >= 0.5 else "no difference (below 0.5)"
            paper = ROWS[number][better][4][1], ROWS[number][worse][4][1]
            lines.append(f"- {claim}: paper {paper[0]} against {paper[1]}, here {a:.2f} against {b:.2f}: {verdict}")
    os.makedirs(cfg.to, exist_ok=True)
    text = "\n".join(lines).rstrip() + "\n"
    with whole(os.path.join(cfg.to, f"table{number}.md")) as f:
        f.write(text)
    with whole(os.path.join(cfg.to, f"table{number}.csv")) as f:
        csv.writer(f).writerows(cells)
    return text


def main():
    cfg = configure(__file__, choices={"table": tuple(range(10)), "setting": tuple(SETTINGS)})
    for key in ("seeds", "jobs", "processes"):
        if getattr(cfg, key) < 1:
            usage_error(__file__, f"{key}={getattr(cfg, key)}: must be at least 1")
    numbers = [cfg.table] if cfg.table else sorted(ROWS)
    rows = [row for n in numbers for row in ROWS[n]]
    if cfg.setting == "toy":
        prepare(rows, cfg)
    homes, failed = {}, {}
    for stage in ("align", "sft"):
        todo = {(arguments(row, cfg, stage)[0], key_of(row, stage), 1337 + seed): row for row in rows for seed in range(cfg.seeds)}
        show = Progress(f"{stage} runs", len(todo))

        def one(item):
            (name, key, seed), row = item
            try:
                homes[name, key, seed, stage] = train(row, seed, stage, cfg)
            except BadInput as e:
                failed[name, key, seed, stage] = str(e)

        with ThreadPoolExecutor(cfg.jobs) as pool:
            for done, _ in enumerate(pool.map(one, todo.items()), 1):
                show(done, unit="runs")
    pages = []
    for n in numbers:
        scores = []
        for row in ROWS[n]:
            found = [homes.get((arguments(row, cfg, "sft")[0], key_of(row, "sft"), 1337 + seed, "sft")) for seed in range(cfg.seeds)]
            scores.append([json.load(open(os.path.join(home, "scores.json"))) for home in found] if all(found) else None)
        pages.append(write(n, scores, cfg))
        print("\n" + pages[-1], flush=True)
    with whole(os.path.join(cfg.to, "tables.md")) as f:
        f.write("\n".join(pages))
    print(f"written to {cfg.to}: tables.md, and a .md and a .csv of each")
    if failed:
        raise BadInput(f"{len(failed)} runs failed: {'; '.join(failed.values())}")


if __name__ == "__main__":
    launch(main)

"""
A run's folder, written and read: its checkpoints, its log, and what a run goes on from.

    out/DATASET/STAGE/ or out/DATASET/RUN/STAGE/
        config.json  log.jsonl  last/  best/  and the older last.1/, last.2/, ... of keep=
        hyps.jsonl   scores.json                        by eval.py
    a checkpoint folder
        vision.safetensors                              all that has learnt, in this stage or before, but LoRA
        adapter_model.safetensors  adapter_config.json  LoRA, as PEFT writes it
        optimizer.safetensors  state.json               what a resumed run needs
"""
import contextlib
import glob
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.adapter import read_adapter, write_adapter
from lib.configurator import coerce, page_one
from lib.files import hold, load_json, sha256, whole, whole_folder
from lib.program import ROOT, VERSION, BadInput, barrier, print0, rank, warn, world
from lib.tensors import fill, full, load_tensors
from lib.weights import LIMITS

SHOWN = 20  # dev sentences in tensorboard
# variables of a checkpoint's configuration: the least and the most that they can be
BOUNDED = {key: (-1, LIMITS[size]) for key, size in {
    "ltn_dim": "dim", "ltn_layers": "n_layers", "ltn_heads": "n_heads", "bos_id": "vocab_size", "eos_id": "vocab_size",
    "max_frames": "max_position_embeddings"}.items()}
BOUNDED |= {key: (least, LIMITS["max_position_embeddings"]) for key, least in (("window", 0), ("merge", 1))}
BOUNDED |= dict.fromkeys(("dropout", "llm_dropout"), (0, math.nextafter(1, 0)))  # less than 1

# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoint

def find_checkpoint(path):
    """A run folder (its best/, else its last/) or a checkpoint folder -> checkpoint folder."""
    folder = path.rstrip("/")
    for sub in ("", "/best", "/best.1", "/last", "/last.1"):  # .1: a kill between the two renames of a save
        if os.path.exists(f"{folder}{sub}/state.json"):
            return folder + sub
    raise BadInput(f"{path}: holds no checkpoint (neither it nor its best/ or last/ has a state.json)")


def home_of(path):
    """The run's folder of a checkpoint folder in it, where scores belong; of any other folder itself."""
    path = path.rstrip("/")
    if re.fullmatch(r"(best|last)(\.\d+)?", os.path.basename(path)):
        return os.path.dirname(path) or "."
    return path


def newest_run(out_dir):
    """The sft run under out_dir whose checkpoint is the newest."""
    states = glob.glob(os.path.join(glob.escape(out_dir), "**/sft/*/state.json"), recursive=True)
    if not states:
        raise BadInput(f"{out_dir}: holds no sft run; train one (train.py stage=align, then stage=sft) or give ckpt=")
    return os.path.dirname(os.path.dirname(max(states, key=os.path.getmtime)))


def read_checkpoint(folder):
    """-> .folder, .state (state.json), .config (variables), .tensors by SLLaMA's names, .lora (read_adapter's)"""
    state = load_json(f"{folder}/state.json")
    for key, kind in {"config": dict, "extractor": dict, "dim_in": int, "step": int}.items():
        if type(state.get(key)) is not kind:
            raise BadInput(f"{folder}/state.json: has no {key}")
    config = checked(state["config"], f"{folder}/state.json")
    tensors, lora = load_tensors(f"{folder}/vision.safetensors"), None
    if os.path.exists(f"{folder}/adapter_config.json"):
        lora = read_adapter(folder)
        tensors |= {"llm." + name: t for name, t in lora[4].items()}
    elif not config["freeze_llm"] and config["lora_rank"]:
        raise BadInput(f"{folder}: has no adapter_config.json, though its run has trained a LoRA")
    return SimpleNamespace(folder=folder, state=state, config=config, tensors=tensors, lora=lora)


def checked(config, where):
    """A run's variables as train.py's page one has them: of its types, and with its values where they are newer."""
    page, stages, _ = page_one(f"{ROOT}/train.py", ("align", "sft"))
    page |= stages.get(str(config.get("stage")), stages["align"])
    if absent := sorted(page.keys() - config.keys()):
        warn(f"{where}: is older than {', '.join(absent)}: taken as on page one")
    config = page | config
    for key in page:
        try:
            config[key] = coerce(config[key], page[key])
            if key in BOUNDED and not BOUNDED[key][0] <= config[key] <= BOUNDED[key][1]:
                raise ValueError
        except ValueError:
            raise BadInput(f"{where}: its config has {key}={repr(config[key])[:50]}") from None
    return config


def code_now():
    """file -> digest, for the five files and lib/: the code that a checkpoint is written or read by."""
    return {f: sha256(f"{ROOT}/{f}")[:12] for files in ("*.py", "lib/*.py")
            for f in sorted(glob.glob(files, root_dir=ROOT))}


def say_if_other_code(checkpoint):
    """One line where a checkpoint was written by other code than reads it: a change in code is no variable."""
    was, now = checkpoint.state.get("code"), code_now()
    if isinstance(was, dict) and was != now:
        differ = sorted(f for f in was.keys() | now.keys() if was.get(f) != now.get(f))
        warn(f"{checkpoint.folder}: was written by other code than this; what differs: {', '.join(differ)}")


def versions():
    """What a number in a log depends on beside the variables."""
    try:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    return {"sl_llama": VERSION, "python": sys.version.split()[0], "torch": torch.__version__, "commit": commit,
            "processes": world()}

# ---------------------------------------------------------------------------------------------------------------------
# A run

class Run:
    """The folder of a run in training. Only the first process writes; every process must call start, begin and save."""

    def __init__(self, cfg):
        """
        One that cannot be written is an OSError now, and not after the model is loaded; one into which another run
        writes is a BadInput.
        """
        self.cfg, self.file, self.board = cfg, None, None
        self.writer = tensorboard_writer() if cfg.tensorboard else None
        self.parent = os.path.join(cfg.out_dir, cfg.dataset, cfg.run).rstrip("/")
        self.folder = f"{self.parent}/{cfg.stage}"
        self.last = f"{self.folder}/last"
        if rank() == 0 and not cfg.estimate:
            os.makedirs(self.folder, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
            # beside the folder, which may be moved aside
            self.held = hold(f"{self.parent}/.{cfg.stage}.lock", self.folder)

    def start(self, clips, shape, free):
        """
        What this run goes on from: its own last/ with resume=true, else init_from or the align run beside it.
        shape: variables in which a stage must agree with the one it starts from; free: what a resumed run may change.
        -> .folder and .tensors of that checkpoint (None and {}), .resuming, and .at, the state of the loop:
        step, scored (the last step whose dev scores are in the log), best (dev score), skipped (steps).
        """
        cfg = self.cfg
        self.facts = {"config": vars(cfg), "dim_in": clips.width, "extractor": clips.store.settings,
                      "clips": f"{len(clips)} clips of {sum(clips.lengths)} frames", "code": code_now()}
        start = SimpleNamespace(folder=None, tensors={}, resuming=False,
                                at=SimpleNamespace(step=0, scored=0, best=None, skipped=0))
        if cfg.resume:
            there = (p for p in (self.last, self.last + ".1") if os.path.exists(f"{p}/state.json"))
            start.folder = next(there, None)
            start.resuming = start.folder is not None
            if not start.resuming:
                print0(f"resume=true: {self.folder} holds no checkpoint yet, starting at step 0")
        if not start.resuming and not cfg.estimate and (cfg.init_from or cfg.stage == "sft"):
            start.folder = find_checkpoint(cfg.init_from or f"{self.parent}/align")
        if start.folder:
            checkpoint = read_checkpoint(start.folder)
            must_agree = [*shape, "llm", *["lora_alpha"] * (checkpoint.lora is not None)]
            self.compare(checkpoint, sorted(vars(cfg).keys() - free) if start.resuming else must_agree)
            say_if_other_code(checkpoint)
            if checkpoint.config["llm_bits"] != cfg.llm_bits:
                warn(f"{start.folder}: has learnt beside an LLM in {checkpoint.config['llm_bits']} bits, this run's "
                     f"lies in {cfg.llm_bits}")
            start.tensors = checkpoint.tensors
            if start.resuming:
                start.at = self.standing(checkpoint)
        return start

    def compare(self, checkpoint, keys):
        """BadInput names the first of these variables in which a checkpoint's run was another."""
        for key in keys:
            was, now = checkpoint.config.get(key), getattr(self.cfg, key)
            if was != now and not (key == "llm" and os.path.realpath(was) == os.path.realpath(now)):
                raise BadInput(f"{checkpoint.folder}: was trained with {key}={was}, this run says {key}={now}")

    def standing(self, checkpoint):
        """The state of the loop in a checkpoint of this very run."""
        state, where = checkpoint.state, checkpoint.folder
        at = SimpleNamespace(**{key: state.get(key) for key in ("step", "scored", "best", "skipped")})
        numbers = type(at.scored) is int and type(at.skipped) is int and type(at.best) in (int, float, type(None))
        if not numbers or not 0 <= at.scored <= at.step:
            raise BadInput(f"{where}/state.json: is damaged, {vars(at)}")
        if state.get("clips") not in (None, self.facts["clips"]):
            have = f"{self.cfg.data_dir}/{self.cfg.dataset} has {self.facts['clips']}"
            raise BadInput(f"{where}: was trained on {state['clips']}, {have}")
        return at

    def begin(self, start, total, stop):
        """
        Make the folder ready: an earlier run is moved aside, config.json written, log.jsonl cut to where we go on.
        total: steps of the whole run; stop: where this call of it ends.
        """
        self.total, self.stop = total, stop
        self.saved = start.at.step, start.at.scored  # what last/ holds
        if rank() == 0:
            path = f"{self.folder}/log.jsonl"
            if not start.resuming and any(os.path.exists(f"{self.folder}/{f}") for f in ("last", "best")):
                n = next(n for n in range(1, 10**6) if not os.path.exists(f"{self.folder}.{n}"))
                os.rename(self.folder, f"{self.folder}.{n}")  # nothing that was saved is lost
                print0(f"{self.folder} held an earlier run: moved to {self.folder}.{n}")
            os.makedirs(self.folder, exist_ok=True)
            with whole(f"{self.folder}/config.json") as f:
                json.dump(vars(self.cfg) | {"versions": versions()}, f, indent=1)
            with whole(path) as f:
                f.writelines(line for line in read_log(path) if lasts(line, start.at))
            self.file = open(path, "a", buffering=1)
            if self.writer:  # what it was told of later steps, before a kill, is shown no more
                self.board = self.writer(self.folder, purge_step=start.at.step + 1)
        barrier()

    def log(self, entry, sentences=()):
        """
        A line of log.jsonl, of a step that was taken or of dev scores; and the same on the screen, and for tensorboard.
        sentences: [(sentence, reference)] that the dev scores are made of, for tensorboard alone.
        """
        said = f"step {entry['step']}/{self.total}"
        if "loss" in entry:
            left = (self.stop - entry["step"]) * entry["step_s"]
            said += (" epoch {epoch:.2f} loss {loss:.4f} norm {grad_norm:.3f} lr {lr:.1e} {tokens_per_s} tokens/s "
                     "{step_s:.3f} s/step").format(**entry)
            said += (f" {entry['gpu_gb']:.1f} GB" if "gpu_gb" in entry else "") + f", {left:.0f} s left"
        if "dev_loss" in entry:
            said += f" dev loss {entry['dev_loss']:.4f}"
        if "dev_bleu" in entry:
            said += f" BLEU-4 {entry['dev_bleu'][3]:.2f} ROUGE {entry['dev_rouge']:.2f}"
        print0(said)
        try:
            if self.file:
                self.file.write(json.dumps(entry) + "\n")
            if self.board:
                show(self.board, entry, sentences)
        except OSError as e:  # the line waits in the file's buffer for the next one
            warn(f"{self.folder}/log.jsonl: {e.strerror}, the run goes on")

    def lacks(self, at):
        """Whether last/ is older than the loop's state."""
        return self.saved != (at.step, at.scored)

    def kept(self):
        """What a run that fails leaves behind, for its message."""
        step, _ = self.saved
        return f"the checkpoint of step {step} is kept in {self.last}" if step else "there is no checkpoint yet"

    def save(self, name, model, optimizer, at, keep=1, final=False, **more):
        """
        Write the checkpoint folder `name`; keep: with the one before as name.1 and so on. -> whether it is there.
        A disk that is full for an hour need not cost the days in memory: the checkpoint before stays what it is, and
        the run goes on and tries again at the next. Only the last save of a run (final) has no next: BadInput.
        """
        cfg, folder = self.cfg, f"{self.folder}/{name}"
        vision = {k: full(v).contiguous() for k, v in model.vision_state().items()}
        lora = {k.removeprefix("llm."): full(v) for k, v in model.named_parameters() if "lora_" in k}
        moments = {f"{key}.{k}": full(optimizer.state[p][key]).contiguous() for k, p in model.named_parameters()
                   for key in ("exp_avg", "exp_avg_sq") if optimizer and p in optimizer.state}
        failed = torch.zeros(())
        if rank() == 0:
            try:
                with whole_folder(folder, keep) as part:
                    save_file(vision, f"{part}/vision.safetensors")
                    if lora:
                        write_adapter(part, lora, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.llm)
                    if optimizer:
                        save_file(moments, f"{part}/optimizer.safetensors")
                    with open(f"{part}/state.json", "w") as f:
                        json.dump(self.facts | vars(at) | more, f, indent=1)
            except (OSError, SafetensorError) as e:
                failed += 1
                warn(f"{folder}: the checkpoint of step {at.step} could not be written ({e}); the one before is "
                     "untouched" + ("" if final else ", the run goes on"))
        dist.all_reduce(failed)
        if failed and final:
            raise BadInput(f"{folder}: the run ends without its last checkpoint; make room and go on with resume=true")
        if not failed and name == "last":
            self.saved = at.step, at.scored
        return not failed


def tensorboard_writer():
    """-> torch's class that writes what tensorboard shows; BadInput where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("tensorboard=true: needs the package (pip install tensorboard)") from None
    return SummaryWriter


def show(board, entry, sentences):
    """A line of log.jsonl as tensorboard's curves, BLEU-1 to 4 as dev_bleu/1 to 4; SHOWN of the sentences as text."""
    for key in entry.keys() - {"step"}:
        values = enumerate(entry[key], 1) if isinstance(entry[key], list) else [("", entry[key])]
        for n, value in values:
            board.add_scalar(f"{key}/{n}".rstrip("/"), value, entry["step"])
    if sentences:  # four spaces: as they are, whatever stands in them
        lines = [f"    ref  {ref}\n    hyp  {hyp}\n" for hyp, ref in sentences[:SHOWN]]
        board.add_text("dev sentences", "\n".join(lines), entry["step"])
    board.flush()


def read_log(path):
    """The lines of a log.jsonl that are whole; a kill may have cut the last one short."""
    for line in open(path) if os.path.exists(path) else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            int(json.loads(line)["step"])
            yield line


def lasts(line, at):
    """Whether a line of the log belongs to what a run goes on from: the others it will write again."""
    entry = json.loads(line)
    return entry["step"] <= (at.step if "loss" in entry else at.scored)


def load_moments(folder, model, optimizer, steps):
    """
    Give AdamW the moments of a checkpoint, which has taken so many steps.
    Each process takes its own rows, so the number of processes may have changed.
    """
    path = f"{folder}/optimizer.safetensors"
    moments = load_tensors(path)
    for name, p in model.named_parameters():
        if p.requires_grad and steps:  # else all steps so far were skipped
            optimizer.state[p] = {"step": torch.tensor(float(steps), device=p.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" not in moments:
                    raise BadInput(f"{path}: has no {key}.{name}")
                optimizer.state[p][key] = torch.zeros_like(p)
                fill(optimizer.state[p][key], moments[f"{key}.{name}"])

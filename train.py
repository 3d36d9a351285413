"""
Trains SL-LLaMA, one loop for both stages of the paper's Figure 3.

    torchrun --nproc_per_node=2 train.py stage=align      # language alignment: local transformer + adaptor, LLM frozen
    torchrun --nproc_per_node=2 train.py stage=sft        # supervised fine-tuning with a prompt: adaptor + LoRA learn
    python train.py config/phoenix14t_7b.py stage=align   # one process, the paper's setting

On a fresh clone the first command makes the toy and its tiny LLaMA. `python train.py help` prints every variable.
"""
import contextlib
import math
import os
import time

import torch
import torch.distributed as dist

from data import Clips, clips_of_step, deal, micro_batch, my_part, prompt_ids, spread
from eval import translate
from lib.adapter import TARGETS
from lib.checkpoint import Run, load_moments
from lib.configurator import configure, usage_error
from lib.features import only_backbone
from lib.memory import at_once, print_estimate, step_explained
from lib.program import (BadInput, Pace, Signals, barrier, gathered, join, launch, leave, pick_device, pick_dtype,
                         print0, rank, run_program, summed, world)
from lib.scores import bleu, language_code, rouge
from lib.tensors import stateless
from lib.tokenizer import Tokenizer
from lib.weights import open_llm
from lora import apply_lora, unfreeze
from model import ADAPTORS, SLLaMA

# what to run
stage = "align"  # align, then sft
dataset = "toy"  # folder in data_dir (paper: PHOENIX-2014T, CSL-Daily)
data_dir = "data"  # holds the data sets
backbone = "toycnn"  # label of the features, "" = the only ones (paper: a pre-trained Inception; Table 5 for others)
llm = ""  # folder of raw LLaMA weights, Meta's or Hugging Face's; "" = the toy's (paper: LLaMA-2 7B and 13B)
llm_bits = 16  # of its frozen matrices: 16, 8, or 4 (NF4); all else and what learns as ever (paper: 16)
out_dir = "out"  # holds the runs: out_dir/dataset/stage
run = ""  # a name: the run goes to out_dir/dataset/NAME/stage
init_from = ""  # checkpoint to start from; "" = nothing for align, the align run beside it for sft
resume = False  # go on from the run's last/
estimate = False  # only print the memory that the run will need, in GB a process
seed = 1337  # first weights, order of the clips, frame drop
bos_id = -1  # -1 = the tokenizer's own
eos_id = -1  # -1 = the tokenizer's own
# the model
ltn = True  # the local transformer (Table 6)
ltn_dim = 192  # its width, 0 = the features' (paper: 1024)
ltn_layers = 2  # its depth (paper: silent)
ltn_heads = 6  # its heads (paper: silent)
window = 8  # frames that each sees beside itself, see model.reach (paper: 8; Table 9: 4, 8, 12, 16)
adaptor = "mlp"  # mlp, mlp_noact, linear (paper: mlp; Table 3)
dropout = 0.0  # of what goes into local transformer and LLM, and in the local transformer's blocks (paper: silent)
llm_dropout = 0.0  # of word embeddings, and in the LLM's blocks (paper: silent)
lora_rank = 8  # 0 = the LLM's matrices learn instead (paper: 8; Table 8: 4, 8, 16, 32)
lora_alpha = 16.0  # the update is scaled by alpha/rank (paper: silent)
lora_dropout = 0.0  # (paper: silent)
lora_targets = "wq,wk,wv,wo"  # of wq,wk,wv,wo,w1,w2,w3 (paper: each attention weight)
# the clips and the loss
max_clips = 0  # learn from so many train clips, spread over the set; 0 = all
max_frames = 0  # longer clips are thinned out evenly to so many, 0 = no limit (paper: silent)
merge = 1  # frames whose mean is one token (paper: 1)
concat = 0.0  # chance that another train clip, and its sentence, follow a clip (Kondo et al. 2021; paper: 0)
language = "German"  # its name goes into the prompt
lang = ""  # its code, which picks BLEU's tokens; "" = by language: German, English, Chinese
label_smoothing = 0.0  # (paper: silent)
# the optimizer; epochs, batch_size and lr differ between the stages, see below
grad_accum = 1  # micro-batches a step and process (paper: silent)
beta2 = 0.95  # of AdamW (paper: silent)
weight_decay = 0.01  # of AdamW, on matrices alone (paper: silent)
warmup = 30  # steps of linear warm-up, then cosine to a tenth (paper: silent)
grad_clip = 1.0  # largest norm of the gradient, 0 = any (paper: silent)
max_steps = -1  # stop here, 0 = after one epoch, -1 = never; the learning rate keeps to epochs
# the machine
device = "auto"  # auto (a GPU where there is one for each process), cpu, cuda
dtype = "auto"  # of the frozen weights and the arithmetic: auto, float32, bfloat16, float16; what learns is float32
compile = False  # torch.compile on each block
activation_checkpointing = False  # recompute the LLM's blocks in the backward pass
cpu_offload = False  # keep the sharded parameters and the optimizer in the CPU's memory
# looking at it
log_every = 20  # steps, 0 = once an epoch, -1 = only where dev is scored
eval_every = 0  # steps between dev losses and dev BLEU, 0 = once an epoch, -1 = never
eval_clips = -1  # dev clips decoded for BLEU, spread over the set, -1 = all, 0 = none: best/ by dev loss
beam = 1  # beam width of that decoding
save_every = 0  # steps between checkpoints, 0 = once an epoch, -1 = at the end only
keep = 1  # checkpoints to keep: last/, and before it last.1/, last.2/, ...
tensorboard = False  # write what log.jsonl holds, and dev sentences, for it too (pip install tensorboard)
max_skips = 10  # steps in a row whose loss or gradient is not finite, then the run stops

# what differs between the stages
align = {
    "epochs": 12,  # (paper: 3)
    "batch_size": 16,  # clips a step, over all processes (paper: 4)
    "lr": 1e-3,  # peak (paper: silent)
    "frame_drop": 0.1,  # share of frames left out at random (paper: 0.1)
    "prompt": "{clip}",  # the frames alone
    "train_ltn": True,  # the local transformer (paper: learns)
    "freeze_llm": True,  # no LoRA
    "train_embeddings": False,  # the LLM's word embeddings
}
sft = {
    "epochs": 5,  # (paper: 2)
    "batch_size": 16,  # (paper: 2)
    "lr": 1e-3,  # peak (paper: silent)
    "frame_drop": 0.1,  # (paper: silent)
    "prompt": "[INST] <sign> {clip} </sign> \n Translate the sign language into {language} text. [/INST]",  # (3.2)
    "train_ltn": False,  # the local transformer (paper: Figure 3, frozen)
    "freeze_llm": False,  # LoRA learns
    "train_embeddings": False,  # the LLM's word embeddings (paper: learn, Table 4's best row)
}

# a stage must agree in these with the one that it starts from
SHAPE = ("merge", "ltn", "ltn_dim", "ltn_layers", "ltn_heads", "window", "adaptor", "backbone")
# and a resumed run with itself in all but these
FREE = {"resume", "run", "out_dir", "data_dir", "init_from", "device", "dtype", "compile", "activation_checkpointing",
        "cpu_offload", "grad_accum", "max_steps", "log_every", "eval_every", "save_every", "keep", "max_skips",
        "tensorboard", "estimate"}
SHARES = ("frame_drop", "dropout", "llm_dropout", "lora_dropout", "label_smoothing", "concat", "beta2")
POSITIVE = ("epochs", "batch_size", "grad_accum", "ltn_layers", "ltn_heads", "beam", "max_skips", "merge")
TOYS = ("toy", "toy_zh", "hard", "hard_zh")

# ---------------------------------------------------------------------------------------------------------------------
# What is trained

def configuration():
    """Page one, config files and command line. Values that no run could make sense of end it with exit code 2."""
    cfg = configure(__file__, stages=("align", "sft"), positive=POSITIVE, shares=SHARES,
                    minus_one=("log_every", "eval_every", "save_every"),
                    choices={"stage": ("align", "sft"), "adaptor": ADAPTORS, "llm_bits": (16, 8, 4)})
    for target in cfg.lora_targets.split(","):
        if target not in TARGETS:
            usage_error(__file__, f"lora_targets: {target!r} is none of {','.join(TARGETS)}")
    if os.path.isabs(cfg.run) or ".." in cfg.run.split("/"):
        usage_error(__file__, f"run={cfg.run}: must be a name inside out_dir")
    if cfg.prompt.count("{clip}") != 1:
        usage_error(__file__, f"prompt={cfg.prompt!r}: must hold {{clip}} once")
    if not cfg.llm and cfg.dataset not in TOYS:
        usage_error(__file__, f"llm: dataset={cfg.dataset} needs one, llm=FOLDER; the toy's own knows nothing but "
                              "the toy's language")
    cfg.llm = cfg.llm or os.path.join(cfg.data_dir, cfg.dataset, "llm")
    cfg.backbone = cfg.backbone or only_backbone(os.path.join(cfg.data_dir, cfg.dataset))
    return cfg


def make_toy(cfg):
    """Build the toy where any of it is absent, in a program of its own: one process does while the others wait."""
    last = ("llm", "toycnn/test.safetensors", "test.jsonl")  # what it writes last
    there = all(os.path.exists(os.path.join(cfg.data_dir, cfg.dataset, f)) for f in last)
    if cfg.dataset in TOYS and not there and rank() == 0:
        run_program("scripts.toy", f"data_dir={os.path.abspath(cfg.data_dir)}", f"name={cfg.dataset}")
    barrier()


def build(cfg, args, dim_in, device, dtype):
    """SLLaMA on the meta device, sharded: structure, what learns, where it will lie. Its load() gives values."""
    with torch.device("meta"):
        model = SLLaMA(args, dim_in, cfg)
    model.requires_grad_(False)
    model.adaptor.requires_grad_(True)
    for part in (model.proj, model.ltn):
        if part is not None:
            part.requires_grad_(cfg.train_ltn)
    model.llm.tok_embeddings.requires_grad_(cfg.train_embeddings)
    if not cfg.freeze_llm and not cfg.lora_rank:
        unfreeze(model.llm)
    elif not cfg.freeze_llm:
        apply_lora(model.llm, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets.split(","), cfg.lora_dropout)
    for p in model.parameters():
        if p.is_floating_point():  # codes of 8 and 4 bits stay what they are
            p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    model.llm.activation_checkpointing = cfg.activation_checkpointing
    shard(model, device, cfg)
    return model


def shard(model, device, cfg):
    """FSDP2: each of the LLM's blocks is a group, the rest (embeddings, output, LTN, adaptor) is the root's."""
    if cfg.compile:
        # instead of 8: the first block, those between and the last, for each number of clips in a micro-batch
        torch._dynamo.config.recompile_limit = 64
        for block in model.llm.layers:
            block.compile(dynamic=True)  # before fully_shard, and in place: names of weights stay what they are
    if world() == 1 and not cfg.cpu_offload:
        return  # nothing to share out or to keep elsewhere: FSDP2 would only copy every weight, twice a step
    from torch.distributed.device_mesh import init_device_mesh  # half a second of imports, for those who need them
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    # the model casts on its own (model.Linear); without a mesh FSDP picks an accelerator on its own
    mesh = init_device_mesh(device.type, (world(),))
    how = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    if cfg.cpu_offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for block in model.llm.layers:
        fully_shard(block, **how)
    fully_shard(model, **how)
    for m in groups(model):  # the plain sum over processes; on every backend and version only both calls mean it
        m.set_gradient_divide_factor(1.0)
        m.set_force_sum_reduction_for_comms(True)


def groups(model):
    """The modules that FSDP2 gathers and scatters as one: blocks and root. None where it has nothing to do."""
    return [m for m in model.modules() if hasattr(m, "unshard")]


@contextlib.contextmanager
def gathered_weights(model):
    """In here every process holds all weights, and a forward needs no other process."""
    for m in groups(model):
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    yield
    for m in groups(model):
        m.reshard()
        m.set_reshard_after_forward(m is not model, recurse=False)  # the root's weights are needed again at once


def describe(model, learning, source):
    """How many parameters there are, and which of them learn: lines for the screen."""
    count = lambda part: sum(p.numel() for name, p in learning.items() if part in name)
    llm = "lora_" if count("lora_") else "llm.layers"
    lines = [f"model: {model.size() / 1e6:.2f}M parameters"
             + (f", those that have learnt before from {source}" if source else "")]
    lines += [f"learns: {part.rstrip('_'):18} {n / 1e6:.2f}M"
              for part in ("proj", "ltn", "adaptor", "llm.tok_embeddings", llm, "llm.output") if (n := count(part))]
    n = count("")
    return "\n".join([*lines, f"learns: {n / 1e6:.2f}M in all; frozen: {(model.size() - n) / 1e6:.2f}M"])

# ---------------------------------------------------------------------------------------------------------------------
# What a step needs

@torch.no_grad()
def evaluate(model, dev, prompt, tokenizer, device, lang, cfg, signals):
    """
    Dev loss a token, and BLEU and ROUGE of real decoding. -> dict of them, {} after a signal; [(sentence, reference)].
    The same on every process.
    """
    model.eval()
    n_decoded = len(dev) if cfg.eval_clips < 0 else min(cfg.eval_clips, len(dev))
    chosen, loss, targets = spread(len(dev), n_decoded), 0.0, 0
    # a process without clips decodes clip 0 for nothing: FSDP2's next backward hangs unless all have computed
    mine = chosen[rank()::world()] or [0]
    longest = max(len(tokenizer.encode(row["text"])) for row in dev.rows)  # who cannot end yet need not babble on
    # compiled blocks would be compiled anew for these numbers of clips, and for every length of the cache
    eager = torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext()
    with eager, gathered_weights(model):
        some = at_once(cfg) * world()
        for start in range(0, len(dev), some):
            if signals:
                break
            part = range(start, min(start + some, len(dev)))
            part_loss, n = model(micro_batch(dev, my_part(part, dev.lengths)[0], prompt, tokenizer, device))
            loss, targets = loss + part_loss.item(), targets + n
        if chosen and not signals:
            answers = translate(model, [dev.features(i) for i in mine], tokenizer, cfg.beam, batch_size=at_once(cfg),
                                max_new_tokens=2 * longest, warn=False, stop=signals)
    model.train()
    loss, targets, asked = summed(device, loss, targets, len(signals))
    if asked:
        return {}, []
    scores, pairs = {"dev_loss": loss / targets}, []
    if chosen:
        hyps = gathered(dict(zip(mine, answers)))
        pairs = [(hyps[i], dev.rows[i]["text"]) for i in chosen]
        said, refs = map(list, zip(*pairs))
        scores |= {"dev_bleu": bleu(said, refs, lang), "dev_rouge": rouge(said, refs, lang)}
    return scores, pairs


def clip_gradients(parameters, most, scale):
    """Undo float16's scale, then scale gradients down to a norm of `most` (0: any). -> the norm before"""
    for p in parameters:
        if scale != 1.0 and p.grad is not None:
            p.grad.div_(scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, most or math.inf)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()  # a DTensor's own is one process's


def learning_rate(step, total, cfg):
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * (step - cfg.warmup) / (total - cfg.warmup)))


def main():
    cfg = configuration()
    lang = language_code(cfg.language, cfg.lang)
    device, device_why = pick_device(cfg.device)
    join(device)
    run = Run(cfg)
    make_toy(cfg)

    # the clips
    tokenizer = Tokenizer(cfg.llm, cfg.bos_id, cfg.eos_id)
    clips = Clips(cfg, "train", cfg.max_clips)
    dev = clips.beside("dev") if cfg.eval_every >= 0 else None
    print0(clips.describe())
    print0(dev.describe() if dev else "data: no dev score: best/ is not written, eval.py takes last/")
    start = run.start(clips, SHAPE, FREE)
    at = start.at  # all that the loop keeps beside weights and moments: step, scored, best, skipped

    # the model: its structure on the meta device, sharded, then filled tensor by tensor
    raw = open_llm(cfg.llm)
    dtype, dtype_why = pick_dtype(cfg.dtype, device, raw.args.size())
    print0(raw.describe(dtype, cfg.llm_bits))
    model = build(cfg, raw.args, clips.width, device, dtype)
    prompt = prompt_ids(model.prompt, tokenizer.fit(raw.args.vocab_size))
    if cfg.estimate:
        steps = range(math.ceil(len(clips) / cfg.batch_size))
        parts = [part for step in steps for part in deal(clips_of_step(len(clips), step, cfg.batch_size, cfg.seed)[1],
                                                         clips.lengths, world() * cfg.grad_accum)]
        print_estimate(cfg, model, clips, parts, prompt, tokenizer, dtype, device, dev)
        return leave()
    model.load(raw, "cpu" if cfg.cpu_offload else device, cfg.seed, start.tensors)
    del raw  # its files need not stay mapped
    if not start.folder:
        for buffer, value in zip((model.mean, model.std), clips.statistics()):
            buffer.copy_(value)
    for name, buffer in model.named_buffers():
        setattr(model, name, buffer.to(device))  # with cpu_offload only the parameters stay behind
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    print0(describe(model, learning, start.folder))
    print0(f"dtype {str(dtype).removeprefix('torch.')} ({dtype_why}), what learns in float32; on {device.type} "
           f"({device_why})")

    # the optimizer and its schedule
    matrices, vectors = ([p for p in learning.values() if (p.dim() > 1) == many] for many in (True, False))
    kinds = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(kinds, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)
    if start.resuming:
        load_moments(start.folder, model, optimizer, at.step - at.skipped)
    per_epoch = math.ceil(len(clips) / cfg.batch_size)
    total = cfg.epochs * per_epoch
    stop = total if cfg.max_steps < 0 else min(total, cfg.max_steps or per_epoch)

    def due(every):
        """0: once an epoch, -1: never."""
        return every >= 0 and at.step % (every or per_epoch) == 0

    def dev_due():
        return dev is not None and (due(cfg.eval_every) or at.step == total)

    # the loop: a step is a function of its number and the seed, so a resumed run takes the very same ones
    run.begin(start, total, stop)
    signals, pace, in_a_row, began = Signals(), Pace(), 0, time.time()
    print0(f"{cfg.stage}: {total} steps of {cfg.batch_size} clips in {cfg.epochs} epochs"
           + (f", going on at step {at.step}" if start.resuming else ""))
    model.train()
    while True:
        # after a step, once in a while: score the dev clips, write a checkpoint. (At step 0 there is nothing to do)
        if at.step > at.scored and dev_due():
            scores, sentences = evaluate(model, dev, prompt, tokenizer, device, lang, cfg, signals)
            if not scores:
                break  # a signal came first: the resumed run scores this step
            run.log({"step": at.step} | scores, sentences)
            at.scored = at.step
            score = scores["dev_bleu"][3] if "dev_bleu" in scores else -scores["dev_loss"]
            if (at.best is None or score > at.best) and run.save("best", model, None, at, best=score):
                at.best = score
        if run.lacks(at) and (due(cfg.save_every) or at.step == stop):
            run.save("last", model, optimizer, at, cfg.keep, final=at.step == stop)
        if at.step >= stop:
            break

        # this process's clips of the step, in micro-batches; one sum tells every process what all of them hold
        signals.check_torchrun()
        step_began = time.time()
        epoch, chosen = clips_of_step(len(clips), at.step, cfg.batch_size, cfg.seed)
        batches = [micro_batch(clips, part, prompt, tokenizer, device, cfg.frame_drop, (cfg.seed, "drop", epoch),
                               cfg.concat) for part in my_part(chosen, clips.lengths, cfg.grad_accum)]
        n_targets, n_tokens, asked = summed(device, sum(len(b.targets) for b in batches),
                                            sum(len(b.tokens) for b in batches), len(signals))
        if asked:
            break  # a signal has reached one of the processes: all stop here, with the same steps behind them

        # forward and backward: the mean over the target tokens of the whole step, so that the gradient is the same
        # however many processes and micro-batches share it; it travels once, with the last of them
        torch.manual_seed(int(stateless(cfg.seed, "dropout", at.step, rank()).integers(2**62)))  # no state to save
        # against float16's underflow; each step that overflows is skipped, and halves it
        scale = 2.0 ** max(0, 10 - at.skipped) if dtype == torch.float16 else 1.0
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(batches):
            for m in groups(model):
                m.set_requires_gradient_sync(i == len(batches) - 1, recurse=False)
            with step_explained(at.step, batch):
                part_loss, _ = model(batch)
                (part_loss * (scale / n_targets)).backward()
            loss += part_loss.detach() / n_targets
        dist.all_reduce(loss)
        loss = loss.item()

        # the update
        norm = clip_gradients(learning.values(), cfg.grad_clip, scale)
        rate = learning_rate(at.step, total, cfg)
        if math.isfinite(loss) and math.isfinite(norm):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            in_a_row = 0
        else:
            print0(f"step {at.step + 1}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite, "
                   f"the step is skipped; its clips: {clips.names(chosen)}")
            at.skipped, in_a_row = at.skipped + 1, in_a_row + 1
            if in_a_row == cfg.max_skips:
                raise BadInput(f"max_skips={in_a_row} steps in a row were not finite, the last with clips "
                               f"{clips.names(chosen)}; {run.kept()}")
        optimizer.zero_grad(set_to_none=True)
        at.step += 1

        # the log (the gradients are gone: what looks at them stands before clip_gradients)
        pace.append((time.time() - step_began, n_tokens))
        if due(cfg.log_every) or dev_due() or (at.step == stop and cfg.log_every >= 0):
            run.log({"step": at.step, "epoch": round(at.step / per_epoch, 3), "loss": loss, "grad_norm": norm,
                     "lr": rate} | pace.so_far())

    # the end, or a stop before it
    if run.lacks(at):
        run.save("last", model, optimizer, at, cfg.keep, final=True)
    leave()
    if at.step < stop or (at.step > at.scored and dev_due()):
        signals.leave(at.step, run.last, cfg.resume)
    signals.forget()
    print0(f"{cfg.stage}: done in {time.time() - began:.0f} s, {run.folder}")


if __name__ == "__main__":
    launch(main)

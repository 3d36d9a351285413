"""
The full-size stand-in: PHOENIX-2014T's real sentences and, in the place of its videos, features made from
the states of an HMM (neccam's base annotations, 2 MB).
It shows whether the recipe holds on real language. Its scores are not PHOENIX-2014T's: nobody has looked at a video.

    python data.py dataset=standin reader=slt root=FOLDER features=states backbone=standin
    python -m scripts.small_llm dataset=standin to=weights/standin
    torchrun --nproc_per_node=2 train.py config/standin.py stage=align
    torchrun --nproc_per_node=2 train.py config/standin.py stage=sft
    python eval.py ckpt=out/standin/sft control=all
"""
dataset = "standin"
backbone = "standin"
llm = "weights/standin"  # small, trained on the training sentences alone; or weights/smollm2-135m
language = "German"
max_clips = 1500  # of 7,096: what two cores can do in nine minutes; 0 on a GPU
eval_clips = 60  # of 519
log_every = 50
align = {"epochs": 8, "batch_size": 16, "lr": 1e-3}
sft = {"epochs": 4, "batch_size": 16, "lr": 1e-3}

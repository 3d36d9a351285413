"""
The full-size stand-in: PHOENIX-2014T's real sentences and, in the place of its videos, features made from
the states of an HMM (neccam's base annotations, 2 MB). Its scores are not the data set's: nobody has looked at a video.
Not the paper's recipe, whose method page one has, but what did better here: frames are merged, there is dropout, clips
follow one another in pairs, and all of a small LLM learns from nothing. docs/results.md has both, and what each part
brings.

    python data.py dataset=standin reader=slt root=FOLDER features=states backbone=standin
    python -m scripts.small_llm dataset=standin to=weights/standin steps=0 layers=8
    python train.py config/standin.py stage=align        # five minutes on a GPU, an hour on a core
    python train.py config/standin.py stage=sft
    python eval.py ckpt=out/standin/sft control=all
"""
dataset = "standin"
backbone = "standin"
llm = "weights/standin"  # eight layers of width 256
language = "German"
merge = 3  # frames whose mean is one token (paper: 1)
ltn_dim = 256  # (paper: 1024, the features')
ltn_heads = 8
ltn_layers = 3
dropout = 0.2  # of local transformer and adaptor
llm_dropout = 0.2
lora_rank = 0  # the LLM itself learns (paper: LoRA of rank 8 beside it)
label_smoothing = 0.1
concat = 0.3  # of the clips are followed by another one and its sentence (paper: none)
beta2 = 0.998  # (paper: silent)
weight_decay = 1.0  # a hundred times page one's: all that learns begins from nothing (paper: silent)
log_every = 100
align = {"epochs": 12, "batch_size": 32, "lr": 1e-3, "warmup": 200, "freeze_llm": False, "train_embeddings": True}
sft = {"epochs": 3, "batch_size": 32, "lr": 3e-4, "warmup": 50, "train_embeddings": True, "train_ltn": True}

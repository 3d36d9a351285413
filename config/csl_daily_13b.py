"""
CSL-Daily, LLaMA-2 13B: the setting of the paper's section 4.1, Table 2 and the best rows of Tables 3, 4, 8 and 9.
Two GPUs of 80 GB in the paper.

    torchrun --nproc_per_node=2 train.py config/csl_daily_13b.py stage=align llm=FOLDER_OF_LLAMA_2_13B
    torchrun --nproc_per_node=2 train.py config/csl_daily_13b.py stage=sft llm=FOLDER_OF_LLAMA_2_13B
"""
dataset = "csl_daily"
backbone = "googlenet"  # the paper's "pre-trained Inception", 1024-d
llm = "weights/llama-2-13b"  # Meta's folder as downloaded, or Hugging Face's
language = "Chinese"
# the paper's values
ltn_dim = 1024
window = 8
adaptor = "mlp"
lora_rank = 8
lora_targets = "wq,wk,wv,wo"
# ours, where the paper is silent: see docs/paper.md
ltn_layers = 2
ltn_heads = 8
lora_alpha = 16.0
lora_dropout = 0.05
max_frames = 512
warmup = 200
activation_checkpointing = True  # the activations of 40 layers would not fit beside the weights

align = {
    "epochs": 3,
    "batch_size": 4,
    "frame_drop": 0.1,
    "lr": 1e-4,  # ours
    "train_ltn": True,
    "freeze_llm": True,
    "train_embeddings": False,
}
sft = {
    "epochs": 2,
    "batch_size": 2,
    "frame_drop": 0.0,  # the paper names frame drop in the align stage alone
    "lr": 1e-4,  # ours
    "train_ltn": False,
    "freeze_llm": False,
    "train_embeddings": True,  # Table 4's best row
}

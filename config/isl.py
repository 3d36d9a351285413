"""
Ten clips of your own learnt by heart, on a real pre-trained LLaMA of 260 thousand parameters.
It shows that every part from gif to sentence is connected.

    python data.py dataset=isl root=FOLDER_WITH_CLIPS_TSV backbone=toycnn
    python train.py config/isl.py stage=align llm=FOLDER_OF_STORIES260K
    python train.py config/isl.py stage=sft llm=FOLDER_OF_STORIES260K
    python eval.py ckpt=out/isl/sft split=train
"""
dataset = "isl"
language = "English"
eos_id = 1  # stories260K ends a text with BOS; its EOS was never trained
log_every = 40
align = {"epochs": 60, "batch_size": 5}
sft = {"epochs": 60, "batch_size": 5}

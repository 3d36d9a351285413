"""
Own clips, ten to a few thousand, on a real LLM.

    python data.py dataset=mine root=FOLDER
    python train.py config/clips.py dataset=mine llm=LLAMA stage=align
    python train.py config/clips.py dataset=mine llm=LLAMA stage=sft
    python eval.py ckpt=out/mine/sft control=all         # split=train, if all of fewer than 20 clips are learnt from
"""
dataset = "mine"
backbone = ""  # the features that data.py has made, whichever it chose
language = "English"  # of the sentences; it stands in the prompt: language=Turkish lang=tr
max_frames = 512  # 20 s at 25 frames a second; a long clip from a phone is thinned out, so that it fits beside the LLM
lora_dropout = 0.05  # few clips are soon known by heart
label_smoothing = 0.1  # for the same reason
warmup = 10  # steps; with ten clips a stage has 120, and page one's 30 would be a quarter of them
eval_clips = 100  # of dev, decoded once an epoch to choose best/

align = {
    "epochs": 40,  # of ten clips that is 120 steps, of a hundred 1,000; of thousands ten epochs will do
    "batch_size": 4,  # (paper: 4)
    "lr": 1e-3,  # what learns here is new and small, and the LLM is frozen (LLaVA takes as much for its adaptor)
}
sft = {
    "epochs": 40,  # of thousands five
    "batch_size": 4,  # (paper: 2)
    "lr": 2e-4,  # LoRA's usual one for 7B and 13B
}

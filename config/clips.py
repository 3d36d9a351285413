"""
Own clips, a few dozen to a few thousand, on a real LLM.

    python data.py dataset=mine root=FOLDER
    python train.py config/clips.py dataset=mine llm=LLAMA stage=align
    python train.py config/clips.py dataset=mine llm=LLAMA stage=sft
    python eval.py ckpt=out/mine/sft control=all
"""
dataset = "mine"
backbone = ""  # the one that data.py has chosen
language = "English"  # of your sentences, its name goes into the prompt: language=Turkish

"""
docs/model.svg: it is whole, loads nothing from elsewhere, and the files that it names are there. docs/files.md: its
lines on folders of LLMs are those of the code.

    python -m pytest tests/test_docs.py
"""
import re
import xml.etree.ElementTree as ET

from conftest import ROOT

import train


def test_model_svg():
    source = (ROOT / "docs" / "model.svg").read_text(encoding="utf-8")
    texts = [t.text for t in ET.fromstring(source).iter("{http://www.w3.org/2000/svg}text")]
    files = {t for t in texts if t.endswith(".py")}
    assert files == {"lib/cnn.py", "lib/extract.py", "model.py", "data.py", "lora.py"}
    assert all((ROOT / f).is_file() for f in files)
    for words in ("[INST]", "<sign>", "</sign>", "[/INST]"):
        assert words in texts and words in train.sft["prompt"]
    assert not re.search(r"(href|src|url|@import|@font-face)\b", source) and "prefers-color-scheme: dark" in source


def test_lines_on_llm_folders():
    """What each line says beside its file or folder stands so in the code."""
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").split("## LLM folders")[1].split("\n## ")[0]
    files = [ROOT / "lib" / f"{name}.py" for name in ("weights", "tokenizer", "tensors")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    rows = [row.split("|", 2)[2] for row in page.split("its line**")[1].splitlines() if row.startswith("| ")][1:]
    for said in (
            "is no folder; one from the hub comes with: hf download NAME --local-dir FOLDER",
            "is the hub's cache; the LLM's folder is ",
            "is an adapter (LoRA); llm= takes the folder of the LLM beneath it",
            "is GGUF; take its Hugging Face folder, or make one: python -m scripts.gguf_to_hf file=MODEL.gguf ",
            "to=FOLDER, which reads SmolLM's",
            "it is a git-lfs pointer, not the file: git lfs pull brings it",
            "it is tiktoken's, as Llama 3 has it: take the Hugging Face folder's tokenizer.json",
            "holds neither tokenizer.json nor tokenizer.model; of other files transformers",
            "has no model.safetensors, no pytorch_model.bin, and no *.index.json of their shards",
            "has no consolidated.00.pth; of a Mistral take the folder with its config.json",
            "but lm_head.weight differs from the embedding: ", "is none of ", "is not implemented",
            "tokens is longer, which is not implemented", "needs token "):
        assert said in source and any(said in row for row in rows), said
    assert len(rows) == 14

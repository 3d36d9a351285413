"""
docs/model.svg: it is whole, loads nothing from elsewhere, and the files that it names are there.

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
    assert "the ±4 around it" in texts and train.window == 8
    assert not re.search(r"(href|src|url|@import|@font-face)\b", source) and "prefers-color-scheme: dark" in source

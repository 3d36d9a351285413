"""
The tokenizer in an LLM's folder, whichever form it has: its ids, BOS and EOS are those of transformers.
"""
import glob
import math
import os
import re

from lib.files import kind_of, load_json
from lib.program import BadInput
from lib.tensors import INSTEAD


def json_in(path, name):
    """What a JSON file in a folder says; nothing where it is not there."""
    file = f"{path}/{name}"
    return load_json(file) if os.path.exists(file) else {}


def nothing_in(path, wanted):
    """The error for a path without the files of an LLM that are wanted: what it is, and what to do."""
    cached = [f for depth in ("", "*/") for f in glob.glob(depth + "snapshots/*", root_dir=path)]
    if path.endswith(".gguf") or glob.glob("*.gguf", root_dir=path):
        wanted = ("is GGUF; take its Hugging Face folder, or make one: python -m scripts.gguf_to_hf file=MODEL.gguf "
                  "to=FOLDER, which reads SmolLM's")
    elif not os.path.isdir(path):
        wanted = "is no folder; one from the hub comes with: hf download NAME --local-dir FOLDER"
    elif os.path.exists(f"{path}/adapter_config.json"):
        wanted = "is an adapter (LoRA); llm= takes the folder of the LLM beneath it"
    elif cached:
        wanted = f"is the hub's cache; the LLM's folder is {path}/{cached[0]}"
    return BadInput(f"llm={path}: {wanted}")


def tokenizer_file(path):
    """The file of the tokenizer in an LLM's folder, by transformers' order; None where there is none."""
    files = [f"{path}/tokenizer.json", f"{path}/tokenizer.model"]
    if os.path.exists(f"{path}/params.json"):  # Meta's download.sh puts it one folder above
        files.append(f"{os.path.dirname(os.path.abspath(path))}/tokenizer.model")
    return next(filter(os.path.exists, files), None)


class Tokenizer:
    """The tokenizer in an LLM's folder: tokenizer.json (package tokenizers), else tokenizer.model (SentencePiece)."""

    def __init__(self, path, bos_id=-1, eos_id=-1):
        """bos_id, eos_id: -1 takes the folder's own. .eos_ids all stop the decoding; the first, .eos_id, is learnt."""
        self.path, self.rows = path, math.inf
        # the map is for folders from before tokenizer_config.json listed what is added
        said, older = (json_in(path, f"{f}.json") for f in ("tokenizer_config", "special_tokens_map"))
        self.said = said = older | said if "added_tokens_decoder" in said else said | older
        own, front = self.open()
        for f in ("config.json", "generation_config.json"):  # the later knows better
            own |= {key: value for key, value in json_in(path, f).items() if value is not None}
        if front:  # and what tokenizer.json does best
            own["bos_token_id"] = front
        # -1: this LLM begins without one. Qwen2's config.json names a BOS, but no text begins with it
        adds = said.get("add_bos_token")
        begins = (front != [] if adds is None else adds) and said.get("bos_token", "") is not None
        self.bos_id = bos_id if bos_id >= 0 or not begins else (self.ids("bos", own) or [-1])[0]
        self.eos_ids = [eos_id] if eos_id >= 0 else self.ids("eos", own)
        if not self.eos_ids:
            raise BadInput(f"{path}: says no EOS token; give eos_id=")
        self.eos_id = self.eos_ids[0]

    def open(self):
        """
        Each of the three forms sets _encode, _decode, vocab_size and id_of (piece -> its id or None). -> the ids of BOS
        and EOS that the file itself knows, as config.json names them; and the list of the id that it puts in front of a
        text, None where the file does not say.
        """
        if self.path.startswith("random:"):
            # random weights have none: one token a byte, under LLaMA's ids for bytes
            self._encode = lambda text: [3 + b for b in text.encode()]
            self._decode = lambda ids: bytes(i - 3 for i in ids if i > 2).decode(errors="replace")
            self.vocab_size = 259
            return {"bos_token_id": 1, "eos_token_id": 2}, None
        file = tokenizer_file(self.path)
        if not file:
            raise nothing_in(self.path, "holds neither tokenizer.json nor tokenizer.model; of other files transformers "
                                        "makes one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        try:
            return self.open_json(file) if file.endswith(".json") else self.open_sentencepiece(file)
        except BadInput:
            raise
        except Exception as e:
            raise BadInput(f"{file}: cannot be read as a tokenizer ({kind_of(file, INSTEAD) or e})") from None

    def added(self):
        """(id, {"content": token, ...}) of what the folder adds to its tokenizer, in the order of their ids."""
        listed = {int(i): t for i, t in (self.said.get("added_tokens_decoder") or {}).items()}
        older = {i: {"content": t} for t, i in json_in(self.path, "added_tokens.json").items()}
        return sorted((listed or older).items())

    def open_sentencepiece(self, file):
        """tokenizer.model"""
        from sentencepiece import SentencePieceProcessor
        sp = SentencePieceProcessor(model_file=file)
        pieces = {sp.id_to_piece(i): i for i in range(len(sp))}
        # SentencePiece never finds these in a text
        added = {piece: i for piece, i in pieces.items() if sp.is_control(i) or sp.is_unknown(i)}
        added |= {t["content"]: i for i, t in self.added()}
        split = re.compile(f"({'|'.join(re.escape(t) for t in sorted(added, key=len, reverse=True))})").split
        line = len(sp.encode("\n"))

        def encode(text):
            """A text begins with a space, its own or SentencePiece's; what follows a token only in "legacy" folders."""
            ids = []
            for i, part in enumerate(split(text)):
                if part in added:
                    ids.append(added[part])
                elif part.startswith((" ", "▁")) or i and not self.said.get("legacy"):
                    ids += sp.encode("\n" + part)[line:]  # no piece goes over the end of a line
                else:
                    ids += sp.encode(part)
            return ids

        self._encode = encode
        self._decode = sp.decode
        self.vocab_size = len(sp)
        self.pieces = pieces | added
        self.id_of = self.pieces.get
        return {"bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id()}, None

    def open_json(self, file):
        """tokenizer.json"""
        try:
            import tokenizers
        except ImportError:
            raise BadInput(f"{file}: needs the package tokenizers (pip install tokenizers)") from None
        tok = tokenizers.Tokenizer.from_file(file)
        tok.no_truncation()  # what a call of somebody's has left there
        tok.no_padding()
        config = json_in(self.path, "config.json")
        kind = str(self.said.get("tokenizer_class") or config.get("tokenizer_class"))
        if kind.startswith("LlamaTokenizer") and config.get("model_type") != "mistral" and not isinstance(
                tok.decoder, tokenizers.decoders.ByteLevel):
            # transformers makes this kind anew: only what it says of spaces is not believed
            tok.normalizer = None
            tok.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                prepend_scheme="always" if self.said.get("legacy") else "first", split=False)
        tok.add_tokens([tokenizers.AddedToken(**t) for _, t in self.added()])
        self._encode = lambda text: tok.encode(text, add_special_tokens=False).ids
        self._decode = tok.decode
        self.vocab_size = tok.get_vocab_size()
        self.id_of = tok.token_to_id
        front = tok.encode("a").ids[:1]
        return {}, front if front != self._encode("a")[:1] else []

    def ids(self, kind, own):
        """The ids of BOS or EOS, by what the folder says of them; own: what it says in numbers."""
        found = own.get(kind + "_token_id", [])
        if not isinstance(found, list):
            found = [found]
        if not all(type(i) is int for i in found):
            raise BadInput(f"{self.path}: {kind}_token_id={str(found)[:50]} is no number of a token")
        if token := self.said.get(kind + "_token"):
            if isinstance(token, dict):
                token = token.get("content")
            first = self.id_of(token) if isinstance(token, str) else None
            if first is None:
                raise BadInput(f"{self.path}/tokenizer_config.json or special_tokens_map.json: "
                               f"{kind}_token={token!r} is no piece of the tokenizer; give {kind}_id=")
            found = [first] + [i for i in found if i != first]  # chat models list further tokens that end an answer
        return [i for i in found if i >= 0]

    def as_llama(self):
        """A tokenizer_config.json for a tokenizer.model, by which transformers reads our BOS and EOS."""
        piece = {i: piece for piece, i in self.pieces.items()}
        return {"tokenizer_class": "LlamaTokenizer", "add_bos_token": self.bos_id >= 0,
                "bos_token": piece.get(self.bos_id), "eos_token": piece[self.eos_id]}

    def fit(self, rows):
        """How many rows the embedding has: one for BOS and each EOS, and for each piece of a text. -> self"""
        if max(self.bos_id, *self.eos_ids) >= rows:
            raise BadInput(f"bos_id={self.bos_id}, eos_id={self.eos_id}: the embedding of {self.path} has {rows} rows")
        self.rows = rows
        return self

    def encode(self, text):
        """text -> ids, without BOS and EOS."""
        ids = self._encode(text)
        if max(ids, default=0) >= self.rows:
            raise BadInput(f"{text[:50]!r} needs token {max(ids)} of {self.path}, its embedding has {self.rows} rows")
        return ids

    def decode(self, ids):
        """ids -> text; a padded embedding has ids that mean nothing."""
        return self._decode([i for i in ids if 0 <= i < self.vocab_size])

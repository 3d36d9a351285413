"""
The tokenizer in an LLM's folder, whichever form it has, with its BOS and EOS as the folder says them.
"""
import os

from lib.files import load_json
from lib.program import BadInput


class Tokenizer:
    """The tokenizer in an LLM's folder: tokenizer.model (SentencePiece) or tokenizer.json (package tokenizers)."""

    def __init__(self, path, bos_id=-1, eos_id=-1):
        """bos_id, eos_id: -1 takes the folder's own. .eos_ids all stop the decoding; the first, .eos_id, is learnt."""
        self.path = path
        special = self.open()
        for f in ("config.json", "generation_config.json"):  # the later knows better
            file = os.path.join(path, f)
            if os.path.exists(file):
                special |= {key: value for key, value in load_json(file).items() if value is not None}
        self.words = os.path.join(path, "tokenizer_config.json")
        said = load_json(self.words) if os.path.exists(self.words) else {}  # and this one best
        self.bos_id = (self.ids("bos", bos_id, special, said) or [-1])[0]  # -1: this LLM begins without one
        self.eos_ids = self.ids("eos", eos_id, special, said)
        if not self.eos_ids:
            raise BadInput(f"{path}: says no EOS token; give eos_id=")
        self.eos_id = self.eos_ids[0]

    def open(self):
        """
        Each of the three forms sets encode, _decode, vocab_size and id_of (piece -> its id or None).
        Returns the ids of BOS and EOS that the file itself knows, under the names that config.json has for them.
        """
        if self.path.startswith("random:"):
            # random weights have none: one token a byte, under LLaMA's ids for bytes
            self.encode = lambda text: [3 + b for b in text.encode()]
            self._decode = lambda ids: bytes(i - 3 for i in ids if i > 2).decode(errors="replace")
            self.vocab_size = 259
            return {"bos_token_id": 1, "eos_token_id": 2}
        for name, form in (("tokenizer.model", self.open_sentencepiece), ("tokenizer.json", self.open_json)):
            file = os.path.join(self.path, name)
            if os.path.exists(file):
                try:
                    return form(file)
                except BadInput:
                    raise
                except Exception as e:
                    raise BadInput(f"{file}: cannot be read as a tokenizer ({e})") from None
        raise BadInput(f"{self.path}: holds neither tokenizer.model nor tokenizer.json")

    def open_sentencepiece(self, file):
        """tokenizer.model"""
        from sentencepiece import SentencePieceProcessor
        sp = SentencePieceProcessor(model_file=file)
        self.encode = sp.encode
        self._decode = sp.decode
        self.vocab_size = sp.vocab_size()
        # it gives <unk> for what is no piece
        self.id_of = lambda piece: sp.piece_to_id(piece) if sp.id_to_piece(sp.piece_to_id(piece)) == piece else None
        return {"bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id()}

    def open_json(self, file):
        """tokenizer.json"""
        try:
            import tokenizers
        except ImportError:
            raise BadInput(f"{file}: needs the package tokenizers (pip install tokenizers)") from None
        tok = tokenizers.Tokenizer.from_file(file)
        self.encode = lambda text: tok.encode(text, add_special_tokens=False).ids
        self._decode = tok.decode
        self.vocab_size = tok.get_vocab_size()
        self.id_of = tok.token_to_id
        return {}

    def ids(self, kind, given, special, said):
        """The ids of BOS or EOS, from what config.json (special) and tokenizer_config.json (said) say of them."""
        if given >= 0:
            return [given]
        if kind == "bos" and (said.get("bos_token", "") is None or said.get("add_bos_token") is False):
            return []  # Qwen2: config.json names a BOS, but no text begins with it
        found = special.get(kind + "_token_id", [])
        if not isinstance(found, list):
            found = [found]
        if not all(type(i) is int for i in found):
            raise BadInput(f"{self.path}: {kind}_token_id={str(found)[:50]} is no number of a token")
        if token := said.get(kind + "_token"):
            if isinstance(token, dict):
                token = token.get("content")
            own = self.id_of(token) if isinstance(token, str) else None
            if own is None:
                raise BadInput(f"{self.words}: {kind}_token={token!r} is no piece of the tokenizer; give {kind}_id=")
            found = [own] + [i for i in found if i != own]  # chat models list further tokens that end an answer
        return [i for i in found if i >= 0]

    def fit(self, rows):
        """An embedding needs a row for each piece; one with more (padded to a round number) is fine. -> self"""
        if self.vocab_size > rows:
            raise BadInput(f"llm={self.path}: its tokenizer has {self.vocab_size} pieces, its embedding {rows} rows")
        if max(self.bos_id, *self.eos_ids) >= rows:
            raise BadInput(f"bos_id={self.bos_id}, eos_id={self.eos_id}: the embedding of {self.path} has {rows} rows")
        return self

    def decode(self, ids):
        """ids -> text; a padded embedding has ids that mean nothing."""
        return self._decode([i for i in ids if 0 <= i < self.vocab_size])

"""A folder's tokenizer in a GGUF file: tokens, merges, and the name by which llama.cpp knows how text is split.

llama.cpp has each pre-tokenizer built in under a name. Here the name is found by what tokenizer.json itself says; a
tokenizer that says anything else is refused, for it would give other ids.
"""

import json
import logging
from pathlib import Path
from typing import Any

import gguf

SMALL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES_ONLY = {"type": "ByteLevel", "use_regex": False}
BYTES = {"type": "ByteLevel", "use_regex": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# The steps of tokenizer.json's pre-tokenizer, and whether whole words skip the merges.
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([BYTES], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES], False),
    "qwen2": ([_split(SMALL + r"\p{N}" + REST), BYTES_ONLY], False),
    "llama-bpe": ([_split(SMALL + r"\p{N}{1,3}" + REST), BYTES_ONLY], True),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Vocabulary:
    """The tokenizer of a folder, read and found to be one that llama.cpp has.

    Args:
        folder: of a checkpoint.
        size: of its embedding; ids without a token are filled up.

    Raises:
        ValueError: a tokenizer that llama.cpp cannot have, or tokens beyond the embedding.
    """

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        self.path = folder / "tokenizer.json"
        self.size = size
        self.table = json.loads(self.path.read_bytes())
        self.model = self.table.get("model") or {}
        if self.model.get("type") != "BPE":
            self._refuse(f"its model is {self.model.get('type')!r}, and a GGUF file is written with BPE only")
        self.is_byte_level = not self.model.get("byte_fallback")
        self.pre = self._pre_tokenizer() if self.is_byte_level else None
        self.tokens, self.types = self._tokens()

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Writes the keys `tokenizer.*`."""
        writer.add_tokenizer_model("gpt2" if self.is_byte_level else "llama")
        if self.pre:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if not self.is_byte_level:
            writer.add_token_scores(self._scores())
            writer.add_add_space_prefix(self._has_space_prefix())
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of keys that every tokenizer here lacks
        special = gguf.SpecialVocab(self.folder, load_merges=self.is_byte_level, n_vocab=self.size)
        special.add_special_token = {"bos": False, "eos": False, **special.add_special_token}
        special.add_to_gguf(writer, quiet=True)

    def _pre_tokenizer(self) -> str:
        normalizer = self.table.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            self._refuse(f"its normalizer is {normalizer.get('type')!r}, which llama.cpp has with no byte-level BPE")
        steps = self.table.get("pre_tokenizer") or {}
        steps = steps.get("pretokenizers", [steps])
        if any(step.get("add_prefix_space") for step in steps):
            self._refuse("it puts a space before the text, which llama.cpp does with no byte-level BPE")
        ignored = {"add_prefix_space", "trim_offsets"}
        plain = [{key: value for key, value in step.items() if key not in ignored} for step in steps]
        for step in plain:
            if step.get("type") == "ByteLevel":
                step.setdefault("use_regex", True)
        for name, (known, ignores_merges) in PRE_TOKENIZERS.items():
            if plain == known and bool(self.model.get("ignore_merges")) == ignores_merges:
                return name
        self._refuse(f"it splits text like none of {list(PRE_TOKENIZERS)}")

    def _tokens(self) -> tuple[list[str], list[int]]:
        vocabulary = {index: token for token, index in self.model["vocab"].items()}
        added = {entry["id"]: entry for entry in self.table.get("added_tokens") or []}
        vocabulary |= {index: entry["content"] for index, entry in added.items()}
        if max(vocabulary) >= self.size:
            self._refuse(f"it has token {max(vocabulary)}, and the embedding {self.size} rows")
        tokens = [vocabulary.get(index, f"[PAD{index}]") for index in range(self.size)]
        return tokens, [self._type(index, token, index in vocabulary, added) for index, token in enumerate(tokens)]

    def _type(self, index: int, token: str, there: bool, added: dict[int, dict[str, Any]]) -> int:
        if not there:
            return UNUSED
        if not self.is_byte_level and token == self.model.get("unk_token"):
            return UNKNOWN
        if index in added:
            return CONTROL if added[index].get("special") else USER_DEFINED
        is_byte = not self.is_byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        return BYTE if is_byte else NORMAL

    def _scores(self) -> list[float]:
        """Of a SentencePiece BPE: what is merged earlier scores higher, and pieces of one character least."""
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(self.model["merges"]):
            ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
        last = len(self.model["merges"])
        return [-float(ranks.get(token, last)) if kind == NORMAL else 0.0 for token, kind in self._pairs()]

    def _pairs(self):
        return zip(self.tokens, self.types, strict=True)

    def _has_space_prefix(self) -> bool:
        normalizer, steps = self.table.get("normalizer") or {}, self.table.get("pre_tokenizer") or {}
        prepended = [step.get("type") == "Prepend" for step in normalizer.get("normalizers", [normalizer])]
        return any(prepended) or steps.get("prepend_scheme") in ("always", "first")

    def _refuse(self, reason: str):
        raise ValueError(
            f"to=gguf: {self.path}: {reason}; export from a folder without this file for a GGUF without a tokenizer."
        )

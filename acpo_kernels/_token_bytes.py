"""The bytes that each token id stands for, read from any Hugging Face fast tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space
KEPT_SPECIAL = ("<think>", "</think>")  # special tokens that are part of the text; all others only steer the model
NO_ACCESS = "tokenizer must be a fast tokenizer whose tokens have bytes (byte-level, SentencePiece, WordPiece or plain text)"


def _byte_level_table() -> dict[int, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, every other byte for a character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: b for b in printable} | {0x100 + i: b for i, b in enumerate(others)}


BYTE_LEVEL = _byte_level_table()


def token_bytes(tokenizer: Any) -> list[bytes]:
    """One entry per id of the tokenizer; control tokens and ids without a token are empty.

    tokenizer: an object of `tokenizers` or `transformers` (anything with `backend_tokenizer`), a tokenizer.json, or a folder
    that holds one. ValueError where its tokens have no bytes.
    """
    backend = _backend(tokenizer)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [""] * (1 + max(vocabulary.values(), default=-1))
    for text, index in vocabulary.items():
        tokens[index] = text
    added = backend.get_added_tokens_decoder()
    for index in added:
        tokens[index] = ""
    out = _decode(tokens, _parts(backend.decoder), _parts(backend.pre_tokenizer))
    for index, token in added.items():
        out[index] = b"" if token.special and token.content not in KEPT_SPECIAL else token.content.encode()
    return out


def _backend(tokenizer: Any) -> Any:
    if isinstance(tokenizer, (str, Path)):
        from tokenizers import Tokenizer

        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"tokenizer must be a tokenizer.json or a folder that holds one, got {str(tokenizer)!r}: no file {path}")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer: cannot read {path}: {' '.join(str(error).split())[:300]}") from None
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not all(hasattr(backend, name) for name in ("get_vocab", "get_added_tokens_decoder", "decoder", "pre_tokenizer")):
        raise ValueError(f"{NO_ACCESS}, got {type(tokenizer).__name__}, which has no backend_tokenizer")
    return backend


def _parts(component: Any) -> list[dict]:
    """The steps of a decoder or pre-tokenizer, a sequence laid flat."""
    if component is None:
        return []
    try:
        description = json.loads(component.__getstate__())
    except Exception as error:  # a component written in Python cannot be read
        raise ValueError(f"{NO_ACCESS}, got a custom {type(component).__name__}") from error
    parts, waiting = [], [description]
    while waiting:
        part = waiting.pop(0)
        inner = part.get("decoders") or part.get("pretokenizers")
        waiting[:0] = inner or []
        parts += [] if inner else [part]
    return parts


def _decode(tokens: list[str], decoder: list[dict], pre_tokenizer: list[dict]) -> list[bytes]:
    kinds = {part["type"]: part for part in decoder}
    known = {"ByteLevel", "Metaspace", "WordPiece", "BPEDecoder", "ByteFallback", "Replace", "Fuse", "Strip"}
    if unknown := sorted(set(kinds) - known):
        raise ValueError(f"{NO_ACCESS}, got a decoder of type {unknown[0]}")
    if "ByteLevel" in kinds or (not kinds and any(part["type"] == "ByteLevel" for part in pre_tokenizer)):
        return _byte_level(tokens)
    if "WordPiece" in kinds:
        prefix = kinds["WordPiece"]["prefix"]
        return [(t.removeprefix(prefix) if t.startswith(prefix) else " " + t).encode() if t else b"" for t in tokens]
    if "BPEDecoder" in kinds:
        suffix = kinds["BPEDecoder"]["suffix"]
        return [(t.removesuffix(suffix) + " " if suffix and t.endswith(suffix) else t).encode() for t in tokens]
    if patterns := [p["pattern"]["Regex"] for p in decoder if p["type"] == "Replace" and "Regex" in p["pattern"]]:
        raise ValueError(f"{NO_ACCESS}, got a decoder that replaces by the pattern {patterns[0]!r}")
    replaced = [(p["pattern"]["String"], p["content"]) for p in decoder if p["type"] == "Replace"]
    if "Metaspace" in kinds:
        replaced.append((kinds["Metaspace"].get("replacement", WORD_MARK), " "))
    for old, new in replaced:
        tokens = [t.replace(old, new) for t in tokens]
    if "ByteFallback" not in kinds:
        return [t.encode("utf-8", "surrogatepass") for t in tokens]
    byte = re.compile(r"<0x([0-9A-Fa-f]{2})>")
    found = [byte.fullmatch(t) if t.startswith("<0x") else None for t in tokens]
    return [bytes([int(m[1], 16)]) if m else t.encode("utf-8", "surrogatepass") for t, m in zip(tokens, found, strict=True)]


def _byte_level(tokens: list[str]) -> list[bytes]:
    # One translation of all tokens at once: a character is a byte, so their lengths stay.
    text = "".join(tokens).translate(BYTE_LEVEL)
    try:
        joined = text.encode("latin-1")
    except UnicodeEncodeError as error:
        raise ValueError(f"{NO_ACCESS}, got a byte-level vocabulary with the character {text[error.start]!r}, which is no byte") from error
    out: list[bytes] = []
    at = 0
    for token in tokens:
        out.append(joined[at : at + len(token)])
        at += len(token)
    return out

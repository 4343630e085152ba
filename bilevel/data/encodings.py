"""In which encoding a text file is read."""

from __future__ import annotations

import codecs

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by the byte-order marks that files begin with; the second begins with the fourth."""


def is_encoding(name: str) -> bool:
    """Whether Python knows a text encoding of this name."""
    try:
        "a".encode(name)
    except (LookupError, UnicodeError):
        return False
    return True


def decoded(source: str, content: bytes, encoding: str | None, sure: bool = True) -> tuple[str, list[str]]:
    """Return the text of a file, and in words what is remarkable about its encoding.

    A byte-order mark decides, then `encoding`, UTF-8 by default; where that is not `sure`, UTF-8 if the bytes can be.

    Raises:
        ValueError: in one sentence, where it is in another one.
    """
    marked = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
    if not sure and b"\0" not in content and _is_utf8(content):
        encoding = None
    used = marked or encoding or "utf-8"
    wide = f"{source!r} holds NUL characters, as UTF-16 does: name its `encoding`, such as utf-16-le."
    if used == "utf-8" and b"\0" in content:
        raise ValueError(wide)
    try:
        text = content.decode(used)
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        line = content[:start].count(b"\n") + 1
        if encoding is not None and not marked:
            why = f"cannot be read in the `encoding` {encoding!r} (line {line}): name another, or leave it out"
        else:
            why = f"is not in {used.upper()} (line {line}): name its `encoding`, such as cp1252, latin-1 or utf-16"
        raise ValueError(f"{source!r} {why}.") from error
    if "\0" in text:
        raise ValueError(wide)
    if marked == "utf-8-sig" or used == "utf-8":
        return text, []
    if marked is None and not content.isascii() and _is_utf8(content):
        return text, [f"it is read in {used.upper()}, but its bytes are UTF-8, too: see `encoding` if words look odd"]
    return text, [f"it is read in {used.upper()}"]


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True

"""Values that programs stumble over: numbers, texts, names and paths."""

from __future__ import annotations

import random

NUMBERS = [
    *("0", "-1", "1", "2", "3", "1e3", "1e38", "1e400", "-1e400", "nan", "NaN", "inf", "-inf", "0.0", "-0.0", "1.5"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "1" + "0" * 30),
    *("0x10", "1_000", "١٢", "½", "1e-320", "+5", " 7 ", "07", "1,5", "1.0.0"),
]
TEXTS = [
    *("", " ", "\t", "a", "null", "true", "~", "all", "none", "-", "--", "-1", "a,b", ",", ",,", "a b", "'", '"', "{}"),
    *("[]", "[1", "{a: 1}", "!!python/object/apply:os.system [touch pwned]", "&a [*a]", "%s%n%d", "$(touch pwned)"),
    *("; touch pwned", "<script>alert(1)</script>", "\x1b[31mred\x1b[0m", "\x07", "\r\n", "a\nb", "\ud800", "\ufffe"),
    *("é", "e\u0301", "日本語", "العربية", "हिन्दी", "ไทย", "🎬", "ﬀ", "İ", "ß", "\u202egnp.4pm", "\u200b", "x" * 300),
    *("0-", "-0", "3-1", "0-1-2", "1,,2", "0-99999999999", "1-1000000000000", "²", "٣"),
]
PATHS = [
    # Relative ones only: a command that may write anywhere must not reach beyond the sandbox.
    *("", ".", "..", "../../../..", "in/../../evil", "../evil", "in/null", "in/pipe", "in/link-out", "in/./a"),
    *("in", "in/missing", "in/file.txt", "in/file.txt/below", "in/loop", "~", "~/x", "x" * 300),
    *("in/" + "d/" * 500, "http://127.0.0.1:9/x", "file:in/file.txt", "a\nb", "日本", "\udcff", "-x", "CON", "a:b"),
]
NAMES = [
    *("video", "ein Video mit Leerzeichen", "a,b", "a;b", "a:b", "a#b", "a%20b", "a%d", "a%05d", "-leading", "~tilde"),
    *("$HOME", "`id`", "'quoted'", '"quoted"', "back\\slash", "new\nline", "tab\tname", "esc\x1b[31m", "trailing ."),
    *(
        "e\u0301te\u0301",
        "été",
        "日本語の動画",
        "видео",
        "فيديو",
        "वीडियो",
        "วิดีโอ",
        "동영상",
        "βίντεο",
        "🎬🎞️",
        "İstanbul",
        "straße",
    ),
    *(
        "\u202egnp.4pm",
        "zero\u200bwidth",
        "x" * 200,
        "..a",
        "...",
        "[a]",
        "*",
        "?",
        "{a}",
        "<b>",
        "a=b",
        "@x",
        "0",
        "1",
    ),
    *("NaN", "None", "true", "con", "nul", ".mp4", "a.mp4", "http:x", "concat:a|b", "file,subfile", "\udcff\udcfe"),
]


def number(rng: random.Random) -> str:
    """A number, or what looks like one."""
    return rng.choice(NUMBERS) if rng.random() < 0.9 else str(rng.randint(-(2**64), 2**64))


def text(rng: random.Random) -> str:
    """A text; sometimes random characters of all planes."""
    if rng.random() < 0.85:
        return rng.choice(TEXTS)
    return "".join(
        chr(rng.choice([rng.randrange(1, 128), rng.randrange(128, 0xD800)])) for _ in range(rng.randint(1, 40))
    )


def anything(rng: random.Random) -> str:
    """A number, a text or a path."""
    return rng.choice([number, text, lambda r: r.choice(PATHS)])(rng).replace("\0", "")


def file_name(rng: random.Random, suffix: str) -> str:
    """The name of a file with a suffix, which the file system takes."""
    name = rng.choice(NAMES).replace("/", "_")
    encoded = name.encode("utf-8", "surrogateescape")[: 250 - len(suffix)]
    return encoded.decode("utf-8", "ignore" if len(encoded) > 200 else "surrogateescape") + suffix


def claimed_integer(rng: random.Random, size: int) -> bytes:
    """An extreme integer of some bytes, in either order."""
    top = 2 ** (8 * size)
    values = [0, 1, 2, top // 2 - 1, top // 2, top - 1, 65535, 100_000, 2**31 - 1, 2**31]
    return (rng.choice(values) % top).to_bytes(size, rng.choice(["big", "little"]))

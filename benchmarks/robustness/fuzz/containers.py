"""Boxes of containers: where they begin, and files whose headers claim impossible sizes."""

from __future__ import annotations

import random
import struct
import zlib

from benchmarks.robustness.fuzz.values import claimed_integer

HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta", b"mvex"}
MASTERS = {0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675, 0xA0, 0x1C53BB6B, 0x114D9B74}


def boxes(data: bytes, suffix: str) -> list[int]:
    """Offsets at which a box, chunk, element or packet of a file begins; those of nested boxes, too."""
    if suffix in (".mp4", ".mov", ".m4v"):
        return _mp4(data, 0, len(data))
    if suffix in (".mkv", ".webm"):
        return _ebml(data, 0, len(data))
    if suffix in (".avi", ".webp"):
        return _riff(data, 12, len(data))
    if suffix in (".png", ".apng"):
        return _png(data)
    if suffix in (".jpg", ".mjpeg"):
        return [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] not in (0, 0xFF)]
    if suffix == ".gif":
        return [6, 13, *(at for at in range(13, len(data)) if data[at] in b"\x21\x2c\x3b")]
    if suffix in (".h264", ".mpg"):
        return [at for at in range(len(data) - 3) if data[at : at + 3] == b"\0\0\1"]
    size = {".ts": 188, ".y4m": 6 + 480}.get(suffix, 64)
    return list(range(size, len(data), size))


def _mp4(data: bytes, at: int, end: int) -> list[int]:
    found = []
    while at + 8 <= end:
        size = int.from_bytes(data[at : at + 4], "big")
        found += [at, at + 8]
        if size < 8:
            break
        if data[at + 4 : at + 8] in HOLDERS:
            found += _mp4(data, at + 8, min(end, at + size))
        at += size
    return found


def _ebml(data: bytes, at: int, end: int) -> list[int]:
    found = []
    while at < end:
        found.append(at)
        id_length = 9 - data[at].bit_length() if data[at] else 8
        name = int.from_bytes(data[at : at + id_length], "big")
        at += id_length
        if at >= end or not data[at]:
            break
        length = 9 - data[at].bit_length()
        size = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
        at += length
        if name in MASTERS:
            found += _ebml(data, at, min(end, at + size))
        at += size
    return found


def _riff(data: bytes, at: int, end: int) -> list[int]:
    found = []
    while at + 8 <= end:
        found.append(at)
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"LIST":
            found += _riff(data, at + 12, min(end, at + 8 + size))
        at += 8 + size + size % 2
    return found


def _png(data: bytes) -> list[int]:
    at, found = 8, []
    while at + 8 <= len(data):
        found.append(at)
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return found


def claim_sizes(rng: random.Random, data: bytes, suffix: str) -> tuple[bytes, str]:
    """Changes a header so that it claims an impossible size, length or number; checksums are kept right."""
    changed = bytearray(data)
    if suffix in (".png", ".apng") and rng.random() < 0.7:
        width, height = rng.choice([(100_000, 100_000), (2**31 - 1, 1), (30_000, 30_000), (1, 2**31 - 1), (0, 0)])
        changed[16:24] = struct.pack(">II", width, height)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
        return bytes(changed), f"claims {width} x {height} pixels"
    if suffix == ".gif" and rng.random() < 0.7:
        changed[6:10] = b"\xff\xff\xff\xff"
        return bytes(changed), "claims 65535 x 65535 pixels"
    if suffix in (".mp4", ".mov", ".m4v"):
        tables = [name for name in (b"stsz", b"stts", b"stsc", b"stco", b"ctts", b"stss", b"elst") if name in data]
        name = rng.choice(tables)
        at = data.index(name) + 8  # behind the name, version and flags
        if name == b"stsz":
            changed[at : at + 8] = struct.pack(">II", rng.choice([0, 1, 1]), rng.choice([2**31 - 1, 2**31, 2**26]))
        elif rng.random() < 0.5:
            changed[at : at + 4] = claimed_integer(rng, 4)
        else:
            changed[at + 4 : at + 12] = claimed_integer(rng, 4) + claimed_integer(rng, 4)
        return bytes(changed), f"{name.decode()} claims extreme numbers"
    if suffix == ".y4m":
        size = rng.choice([b"W100000 H100000", b"W2147483647 H1", b"W0 H0", b"W16000 H16000"])
        return data.replace(b"W20 H16", size, 1), f"claims {size.decode()}"
    begin = rng.choice([at for at in boxes(data, suffix) if at < min(len(data), 1500)] or [0])
    at = min(len(data) - 1, begin + rng.randrange(24))
    length = rng.choice([2, 4, 4, 8])
    changed[at : at + length] = claimed_integer(rng, length)
    return bytes(changed), f"an extreme integer of {length} bytes at {at}"


def png_bomb(width: int, height: int, compressed: bool = True) -> bytes:
    """A valid PNG of one colour: small as a file, large in memory."""
    compressor = zlib.compressobj(9)
    row, parts = b"\0" * (1 + width * 3), []
    for _ in range(height if compressed else 0):
        parts.append(compressor.compress(row))
    parts.append(compressor.flush())
    content = b""
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", b"".join(parts)),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + content


def png_text_bomb(image: bytes) -> bytes:
    """A PNG with a compressed text of 100 MB."""
    body = b"comment\0\0" + zlib.compress(b"\0" * 100_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return image[:33] + chunk + image[33:]

"""What the header of a video file claims: how long the file is, and that its frames have a place in it.

FFmpeg takes a missing end for the end of the video, and makes room for every frame that a header claims.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

_HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
_GIF_BLOCKS = {b"\x21": 1, b"\x2c": 9}
"""First byte of a block: length of what is between it and the sub-blocks, for an image without its colours."""


def needed_size(path: str) -> int:
    """Size in bytes that a file must have by its own header, at least.

    Known for Matroska, AVI and GIF, which declare their length, and for MP4 with samples of one size, whose number is
    declared; 0 for other files. GIF has no length, but a mark at its end: without it, more than the file has.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        if head[:3] == b"GIF":
            return _gif_size(file, size)
        if head[:4] == b"RIFF":
            declared = int.from_bytes(head[4:8], "little")
            return declared + 8 if declared < 0xFFFFFFFF else 0
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _matroska_size(head)
        return max(_mp4_samples(file, 0, size), default=0) if head[4:8].isalpha() else 0


def _matroska_size(head: bytes) -> int:
    at = head.find(b"\x18\x53\x80\x67") + 4  # the segment, then its size in a run of 7-bit groups
    if at < 8 or not head[at : at + 1].strip(b"\0"):
        return 0
    length = 9 - head[at].bit_length()
    unknown = (1 << 7 * length) - 1
    size = int.from_bytes(head[at : at + length], "big") & unknown
    return at + length + size if size < unknown else 0


def _gif_size(file: BinaryIO, size: int) -> int:
    """The size up to the mark at the end of a GIF; one byte more than there is if it has none."""
    file.seek(6)
    screen = file.read(7)
    if len(screen) == 7:
        file.seek(_color_bytes(screen[4]), os.SEEK_CUR)
    while (kind := file.read(1)) in _GIF_BLOCKS or kind == b"\0":
        if kind == b"\0":  # some writers pad
            continue
        fields = file.read(_GIF_BLOCKS[kind])
        if kind == b"\x2c" and len(fields) == 9:
            file.seek(_color_bytes(fields[8]) + 1, os.SEEK_CUR)  # then the smallest code of the compression
        while length := file.read(1).strip(b"\0"):
            file.seek(length[0], os.SEEK_CUR)
    return file.tell() if kind == b"\x3b" else size + 1


def _color_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _mp4_samples(file: BinaryIO, at: int, end: int) -> Iterator[int]:
    """Bytes that the samples of each track need at least: those of one size, or else the table of their sizes."""
    while at + 8 <= end:
        file.seek(at)
        box = file.read(16)
        size, name, begin = int.from_bytes(box[:4], "big"), box[4:8], at + 8
        if size == 1:
            size, begin = int.from_bytes(box[8:16], "big"), at + 16
        elif size == 0:
            size = end - at
        if size < begin - at:
            return
        if name in _HOLDERS:
            yield from _mp4_samples(file, begin, min(end, at + size))
        elif name == b"stsz":
            file.seek(begin + 4)
            each, count = (int.from_bytes(file.read(4), "big") for _ in range(2))
            # Audio codecs of QuickTime count samples of one byte before compression, many to a byte of the file.
            yield count * each // 64 if each else 4 * count
        at += size

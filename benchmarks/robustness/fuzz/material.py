"""Valid inputs, made once: videos in every container, images, a pipeline, a run, a latent cache, a Latte file."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

NUM_FRAMES, HEIGHT, WIDTH = 10, 16, 20
# Suffix, container, codec, pixel format.
VIDEOS = [
    (".mp4", "mp4", "libx264", "yuv420p"),
    (".mov", "mov", "mpeg4", "yuv420p"),
    (".m4v", "mp4", "libx265", "yuv420p"),
    (".mkv", "matroska", "ffv1", "bgr0"),
    (".webm", "webm", "libvpx-vp9", "yuv420p"),
    (".avi", "avi", "mjpeg", "yuvj420p"),
    (".gif", "gif", "gif", "rgb8"),
    (".ts", "mpegts", "mpeg2video", "yuv420p"),
    (".mpg", "mpeg", "mpeg2video", "yuv420p"),
    (".flv", "flv", "flv", "yuv420p"),
    (".wmv", "asf", "wmv2", "yuv420p"),
    (".nut", "nut", "ffv1", "bgr0"),
    (".ivf", "ivf", "libvpx", "yuv420p"),
    (".y4m", "yuv4mpegpipe", "rawvideo", "yuv420p"),
    (".apng", "apng", "apng", "rgb24"),
    (".mjpeg", "mjpeg", "mjpeg", "yuvj420p"),
    (".h264", "h264", "libx264", "yuv420p"),
]
IMAGE_SUFFIXES = (".png", ".jpg", ".bmp", ".webp")
CLASS_NAMES = ["boxing", "enduro", "pong"]


@dataclass(frozen=True)
class Material:
    """Valid inputs below a folder; cases copy from it and never change it."""

    folder: Path

    @cached_property
    def videos(self) -> dict[str, bytes]:
        """A video of 10 frames by suffix, in the order of `VIDEOS`; 16 x 20 pixels."""
        found = {suffix: self.folder / f"video{suffix}" for suffix, *_ in VIDEOS}
        return {suffix: file.read_bytes() for suffix, file in found.items() if file.exists()}

    @cached_property
    def images(self) -> dict[str, bytes]:
        """An image by suffix."""
        return {suffix: (self.folder / f"image{suffix}").read_bytes() for suffix in IMAGE_SUFFIXES}

    def copy(self, name: str, to: Path) -> Path:
        """Copies `vae`, `pipeline`, `run`, `autoencoder-run`, `latents`, `classes` (videos) or `latte.pt`."""
        source = self.folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to)
        else:
            shutil.copyfile(source, to)
        return to

    def write_video(self, file: Path, suffix: str | None = None) -> None:
        """Writes a valid video; `suffix` says what is inside if the name does not."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.videos[suffix or file.suffix.lower()])


def make_material(folder: Path) -> None:
    """Writes all of it; runs in a process of its own, whose threads the fuzzer must not have.

    Its last file, `modules.json`, lists the modules that the commands needed.
    """
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    texture = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    frames = np.stack([np.roll(np.asarray(texture), (i, 2 * i), (0, 1)) for i in range(NUM_FRAMES)])
    for suffix, container, codec, pixel_format in VIDEOS:
        try:
            _write_video(folder / f"video{suffix}", frames, container, codec, pixel_format)
        except Exception as error:  # an FFmpeg without this encoder
            print(f"no {suffix} videos are tried: {error}", file=sys.stderr)
            (folder / f"video{suffix}").unlink(missing_ok=True)
    for suffix in IMAGE_SUFFIXES:
        Image.fromarray(frames[0]).save(folder / f"image{suffix}")
    for number, name in enumerate(CLASS_NAMES):
        (folder / "classes" / name).mkdir(parents=True)
        for index in range(2):
            video = np.roll(frames, (number, index), (0, 3))
            _write_video(folder / "classes" / name / f"{index}.mp4", video, "mp4", "libx264", "yuv420p")
    _make_models(folder)
    (folder / "modules.json").write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")


def _write_video(file: Path, frames: Any, container_name: str, codec: str, pixel_format: str) -> None:
    import av

    with av.open(str(file), "w", format=container_name) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixel_format
        stream.codec_context.thread_count = 1
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        for pixels in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pixel_format))
            )
        container.mux(stream.encode())


def _make_models(folder: Path) -> None:
    """Trains for two steps, which gives a run and its pipeline, and runs the commands that the cases run."""
    import torch

    from lavita.models.autoencoder import AutoencoderKL

    torch.set_num_threads(1)
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
        sample_size=16,
    ).save_pretrained(folder / "vae")
    here = str(folder)
    tiny = ["--autoencoder", f"{here}/vae", "--resolution", "16"]
    run = [*("data.class_folders=true", "data.num_frames=2", "data.frame_interval=2", "data.resolution=16")]
    run += [f"autoencoder={here}/vae", "model.preset=tiny/4", "train.batch_size=2", "train.log_every=1"]
    run += ["train.steps=2", "train.checkpoint_every=1", "train.sample_every=2", "train.num_samples=2"]
    videos, pipeline = f"{here}/classes", f"{here}/pipeline"
    commands = [
        ["train", "--data", videos, "--run-dir", f"{here}/run", *run],
        ["encode", "--data", videos, "--out", f"{here}/latents", *tiny],
        ["data", "inspect", videos, "--out", f"{here}/look"],
        ["sample", f"{here}/run/pipeline", "--out", f"{here}/samples", "--seeds", "0", "--steps", "1"],
        ["convert", f"{here}/run/pipeline", f"{here}/latte.pt"],
        ["report", f"{here}/run", "--out", f"{here}/page"],
        ["config", "demo"],
        ["evaluate", "--real", videos, "--generated", videos, "--metrics", "motion", "--out", f"{here}/scores.json"],
    ]
    for command in commands:
        code, output = _run(command)
        if code:
            raise RuntimeError(f"lavita {' '.join(command)} failed, so there is nothing to fuzz: {output}")
    shutil.copytree(f"{here}/run/pipeline", pipeline)


def _run(command: list[str]) -> tuple[int, str]:
    from lavita.cli import main

    sys.argv = ["lavita", *command]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0), output.getvalue()
    return 0, ""


def corrupt(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Damages some bytes anywhere; returns the result and what was done."""
    if not data:
        return rng.randbytes(10), "random bytes"
    kind = rng.choice(["flip", "zero", "cut", "insert", "empty", "noise"])
    at = rng.randrange(len(data))
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 32])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), "flipped bits"
    if kind == "zero":
        length = rng.choice([1, 16, 512])
        return data[:at] + b"\0" * length + data[at + length :], f"{length} zeros at {at}"
    if kind == "cut":
        return data[:at], f"cut off at {at} of {len(data)}"
    if kind == "insert":
        return data[:at] + rng.randbytes(rng.choice([1, 7, 100])) + data[at:], f"bytes inserted at {at}"
    if kind == "empty":
        return b"", "an empty file"
    return rng.randbytes(rng.choice([1, 100, 3000])), "random bytes"


def free_of_surrogates(text: str) -> str:
    """A text that UTF-8 can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def touch_code() -> bytes:
    """A pickle that would create the file `pwned` if it were loaded without care."""
    import pickle

    class Touch:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, ("touch pwned",)

    return pickle.dumps({"model": Touch(), "ema": Touch()})

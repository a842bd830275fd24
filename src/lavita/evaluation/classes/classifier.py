"""A small network that tells which class a clip shows, if any, by structure and not by colour.

It is trained on real frames whose colours are mixed, inverted and greyed at random, differently for every frame, so
that colour does not tell the class; and which are moved, scaled, blurred and made noisy a little, so that neither
single pixels nor the traces of an autoencoder do. It may also answer that a frame shows none of the classes, and learns
this on frames whose parts are exchanged or washed out: the right background alone is not enough.

Legend: N frames, F frames of a clip, R resolution, K classes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavita.core.files import replacing
from lavita.core.progress import Progress
from lavita.core.seeds import DRAWS, generator
from lavita.core.text import normal_name
from lavita.data.catalog import Catalog
from lavita.data.clips import center_crop_resize
from lavita.data.content_hash import file_hash
from lavita.evaluation.classes.clips import spread_videos
from lavita.video.reading import iter_frames

Frames = npt.NDArray[np.uint8]

VERSION = DRAWS
"""Version of the network and its training; cached classifiers of another version are not used. So far only what is
drawn from a seed has changed."""
MAX_FRAMES = 20_000
"""Training frames held in memory, 250 MB at 64 pixels."""
FRAME_STEP = 4
"""Every fourth frame of a video is kept, as successive ones hardly differ; fewer of many or of long videos."""
NUM_STEPS = 400
"""Optimizer steps."""
NONE = "(none)"
"""Class that `Classifier.recognise` gives a clip that shows none of the classes."""

_WIDTHS = (32, 64, 96, 128)
_GRID = 4
_BATCH_SIZE = 64
# Frames of a batch that are also shown ruined. Only a quarter is shuffled, so that a class which is only texture, and
# so looks the same when it is shuffled, is still recognised.
_NUM_SHUFFLED, _NUM_WASHED_OUT = 16, 4
_PEAK_LR = 4e-3


class Classifier(nn.Module):
    """Convolutions down to a coarse grid, and a linear layer that sees where on the grid things are.

    Attributes:
        class_names: the K classes, in the order of the logits; the last of the K + 1 logits means none of them.
        resolution: side R of the frames.
    """

    def __init__(self, class_names: tuple[str, ...], resolution: int) -> None:
        """Makes a network with random weights.

        Raises:
            ValueError: for fewer than two classes, or frames below 16 pixels.
        """
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"class_names is {class_names}; a classifier needs at least two classes")
        if resolution < 16:
            raise ValueError(f"resolution is {resolution}; a classifier needs at least 16 pixels")
        self.class_names, self.resolution = class_names, resolution
        layers: list[nn.Module] = []
        channels = 3
        for width in _WIDTHS:
            kernel = 5 if channels == 3 else 3
            layers += [nn.Conv2d(channels, width, kernel, stride=2, padding=kernel // 2, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(_GRID), nn.Flatten())
        self.head = nn.Linear(channels * _GRID**2, len(class_names) + 1)
        # A third faster on a CPU than channels first.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> Tensor:
        """Computes the logits of frames.

        Args:
            pixels: float32 `(N, 3, R, R)`, about 0 to 1; the mean colour of each frame is subtracted.

        Returns:
            Logits `(N, K + 1)`.
        """
        pixels = pixels - pixels.mean((2, 3), keepdim=True)  # (N, 3, R, R)
        logits: Tensor = self.head(self.features(pixels.contiguous(memory_format=torch.channels_last)))  # (N, K + 1)
        return logits

    @torch.no_grad()
    def log_probabilities(self, frames: Frames) -> npt.NDArray[np.float32]:
        """Averages the log-probabilities of the classes over the frames of a clip.

        Args:
            frames: uint8 `(F, H, W, 3)`; cropped and resized to R.

        Returns:
            float32 `(K + 1,)`.
        """
        frames = center_crop_resize(frames, self.resolution)
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 255  # (F, 3, R, R)
        return F.log_softmax(self(pixels), dim=1).mean(0).numpy()

    def recognise(self, frames: Frames) -> str:
        """The class of a clip, uint8 `(F, H, W, 3)`, or `NONE`."""
        return (*self.class_names, NONE)[int(self.log_probabilities(frames).argmax())]

    def save(self, folder: Path) -> None:
        """Writes a folder with `config.json` and `model.safetensors`; an existing one is replaced."""
        with replacing(folder) as partial:
            partial.mkdir()
            config = {"version": VERSION, "class_names": self.class_names, "resolution": self.resolution}
            (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
            weights = {key: value.contiguous() for key, value in self.state_dict().items()}
            save_file(weights, partial / "model.safetensors")
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Reads a folder that `save` wrote.

        Returns:
            The classifier, in evaluation mode.

        Raises:
            ValueError: if the classifier is missing, damaged, or of another version.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder}: does not hold a readable classifier ({error})") from error
        if config.get("version") != VERSION:
            raise ValueError(f"{folder}: is a classifier of version {config.get('version')}, not {VERSION}")
        classifier = cls(tuple(normal_name(name) for name in config["class_names"]), config["resolution"])
        try:
            classifier.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights do not fit config.json") from error
        return classifier.eval()


def train_classifier(catalog: Catalog, resolution: int, seed: int = 0, num_steps: int = NUM_STEPS) -> Classifier:
    """Trains a classifier on real videos: half a minute on 2 cores for 64-pixel frames.

    Args:
        catalog: videos in class folders.
        resolution: side of the frames, >= 16.
        seed: decides initial weights, batches and augmentation; the same seed gives the same classifier on the same
            machine.
        num_steps: optimizer steps of 64 frames, >= 1.

    Returns:
        The classifier, in evaluation mode.

    Raises:
        ValueError: for fewer than two classes, or a number out of its range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    # Initial weights come from torch's global generator, whose state must stay as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(catalog.class_names, resolution)
    frames, labels = _load_frames(catalog, resolution)
    # All classes have the same weight, however many frames they have.
    weights = 1.0 / torch.bincount(labels).float()[labels]
    rng = generator(seed, "classifier")
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_PEAK_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LR, total_steps=num_steps + 1, pct_start=0.2)
    progress = Progress("classifier: step", num_steps)
    for step in range(num_steps):
        batch = torch.multinomial(weights, _BATCH_SIZE, replacement=True, generator=rng)
        intact = frames[batch].permute(0, 3, 1, 2).float() / 255
        ruined = ruin(intact[: _NUM_SHUFFLED + _NUM_WASHED_OUT], rng)
        pixels = augment(torch.cat([intact, ruined]), rng)
        targets = torch.cat([labels[batch], torch.full((len(ruined),), len(classifier.class_names))])
        loss = F.cross_entropy(classifier(pixels), targets, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(step + 1, f"loss {loss.item():.3f}")
    return classifier.eval()


def cached_classifier(catalog: Catalog, resolution: int, seed: int, cache_dir: Path | None) -> Classifier:
    """Trains a classifier, once for the same videos, resolution, seed and version.

    Args:
        catalog: videos in class folders.
        resolution: side of the frames, >= 16.
        seed: as for `train_classifier`.
        cache_dir: folder of trained classifiers; None keeps none. A damaged one is trained again.
    """
    if cache_dir is None:
        return train_classifier(catalog, resolution, seed)
    folder = cache_dir / _content_key(catalog, resolution, seed)
    if folder.is_dir():
        try:
            return Classifier.load(folder)
        except ValueError as error:
            print(f"{error}; training another", file=sys.stderr)
    classifier = train_classifier(catalog, resolution, seed)
    classifier.save(folder)
    return classifier


def _content_key(catalog: Catalog, resolution: int, seed: int) -> str:
    digest = hashlib.sha256(repr((VERSION, resolution, seed)).encode())
    for video in catalog.videos:
        path = video.info.path
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():
                digest.update(repr((video.name, file.name, file.stat().st_size, file_hash(file))).encode())
    return digest.hexdigest()[:20]


def _load_frames(catalog: Catalog, resolution: int) -> tuple[Tensor, Tensor]:
    """Reads some frames of some videos of each class: uint8 `(N, R, R, 3)`, and their labels, int64 `(N,)`."""
    videos = spread_videos(catalog)
    most = max(1, MAX_FRAMES // len(videos))
    progress = Progress("classifier: videos read", len(videos))
    frames, labels = [], []
    for number, video in enumerate(videos, start=1):
        step = max(FRAME_STEP, -(-video.info.num_frames // most))
        kept = [frame for index, frame in enumerate(iter_frames(video.info.path)) if index % step == 0]
        frames.append(torch.from_numpy(np.ascontiguousarray(center_crop_resize(np.stack(kept), resolution))))
        labels += [video.label] * len(kept)
        progress.update(number)
    return torch.cat(frames), torch.tensor(labels)


def ruin(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Turns frames into ones that show none of the classes, though their colours are right.

    Args:
        pixels: float32 `(N, 3, R, R)`.
        rng: draws the sizes once per batch and the order of the parts once per frame.

    Returns:
        float32 `(N, 3, R, R)`: the last four frames are blurred beyond recognition; the square parts of all others are
        exchanged. Parts are a sixteenth, a quarter or a half of the side, so that a check with eighths is fair.
    """

    def one_of(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    shuffled, washed_out = pixels.split((len(pixels) - _NUM_WASHED_OUT, _NUM_WASHED_OUT))
    num, channels, side, _ = shuffled.shape
    count = one_of(2, 4, 16)
    part = side // count
    whole = part * count
    parts = shuffled[:, :, :whole, :whole].reshape(num, channels, count, part, count, part)
    parts = parts.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (N, parts, 3, part, part)
    order = torch.rand(num, count**2, generator=rng).argsort(1)
    parts = parts[torch.arange(num)[:, None], order].unflatten(1, (count, count))
    shuffled = shuffled.clone()
    shuffled[:, :, :whole, :whole] = parts.permute(0, 3, 1, 4, 2, 5).reshape(num, channels, whole, whole)
    small = F.adaptive_avg_pool2d(washed_out, one_of(1, 2, 4))
    return torch.cat([shuffled, F.interpolate(small, size=(side, side), mode="bilinear")])


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Changes what must not tell a class: colours above all, then position, size, sharpness and noise.

    Args:
        pixels: float32 `(N, 3, R, R)`, 0 to 1.
        rng: draws for each frame separately.

    Returns:
        float32 `(N, 3, R, R)`, not limited to a range.
    """
    num = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=rng)

    # Move by up to an eighth of the frame, and scale by up to 15%, each axis on its own.
    placement = torch.zeros(num, 2, 3)
    placement[:, (0, 1), (0, 1)] = uniform(0.85, 1.15, 2)
    placement[:, :, 2] = uniform(-0.25, 0.25, 2)
    grid = F.affine_grid(placement, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)

    # Rotate the colours of half of the frames about grey in any direction, which mixes hue, saturation and brightness;
    # exchange and invert the channels of the others; then turn some of both grey.
    turned, triangular = torch.linalg.qr(torch.randn(num, 3, 3, generator=rng))
    # Without this the signs of a QR decomposition favour some directions, so that colours tell (Mezzadri 2007).
    turned = turned * triangular.diagonal(dim1=1, dim2=2).sign()[:, None]
    exchanged = torch.eye(3)[torch.rand(num, 3, generator=rng).argsort(1)]
    exchanged = exchanged * torch.where(torch.rand(num, 3, 1, generator=rng) < 0.5, -1.0, 1.0)
    mix = torch.where(torch.rand(num, 1, 1, generator=rng) < 0.5, turned, exchanged)
    grey = mix.mean(1, keepdim=True).expand(-1, 3, -1) * 1.5
    mix = torch.where(torch.rand(num, 1, 1, generator=rng) < 0.2, grey, mix)
    mix = mix * uniform(0.5, 1.5, 3, 1)
    center = pixels.mean((2, 3), keepdim=True)
    pixels = torch.einsum("nij,njhw->nihw", mix, pixels - center)

    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    blurred = F.pad(pixels, (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(blurred, kernel.view(1, 1, 1, 5).expand(3, 1, 1, 5), groups=3)
    blurred = F.conv2d(blurred, kernel.view(1, 1, 5, 1).expand(3, 1, 5, 1), groups=3)
    pixels = torch.lerp(pixels, blurred, uniform(0.0, 1.0, 1, 1, 1))
    return pixels + torch.randn(pixels.shape, generator=rng) * uniform(0.0, 0.08, 1, 1, 1)


def recolour(frames: Frames, rng: np.random.Generator) -> Frames:
    """Gives a clip other colours, in another way than the training does.

    Channels become random weighted sums, stretched to the whole range, with a random gamma, inverted or not.

    Args:
        frames: uint8 `(F, H, W, 3)`.
        rng: draws once for the whole clip.

    Returns:
        uint8 `(F, H, W, 3)`.
    """
    mixed = frames.reshape(-1, 3) / 255 @ rng.normal(size=(3, 3))
    low, high = mixed.min(0), mixed.max(0)
    # The range of a clip of one colour is 0.
    mixed = ((mixed - low) / np.maximum(high - low, 1e-6)) ** np.exp(rng.uniform(-0.7, 0.7, size=3))
    mixed = np.where(rng.random(3) < 0.5, 1 - mixed, mixed)
    return (mixed * 255).round().astype(np.uint8).reshape(frames.shape)


def shuffle_patches(frames: Frames, rng: np.random.Generator, patch: int = 8) -> Frames:
    """Exchanges the patches of each frame at random, which keeps colours and fine texture and destroys structure.

    Args:
        frames: uint8 `(F, H, W, 3)`; pixels at the edges that do not fill a patch stay in place.
        rng: draws for each frame separately.
        patch: side of the patches in pixels.

    Returns:
        uint8 `(F, H, W, 3)`.
    """
    rows, columns = frames.shape[1] // patch, frames.shape[2] // patch
    shuffled = frames.copy()
    for frame, target in zip(frames, shuffled, strict=True):
        inner = frame[: rows * patch, : columns * patch]
        patches = inner.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(-1, patch, patch, 3)
        patches = patches[rng.permutation(len(patches))]
        target[: rows * patch, : columns * patch] = (
            patches.reshape(rows, columns, patch, patch, 3).swapaxes(1, 2).reshape(inner.shape)
        )
    return shuffled

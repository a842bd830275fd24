"""Small random TorchScript modules with the interfaces of I3D, Inception and C3D."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class I3D(nn.Module):
    def __init__(self, width: int = 400) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 4 * 4 * 4, width)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features and x.size(2) >= 10
        assert x.max() > 1
        pooled = F.adaptive_avg_pool3d(x / 127.5 - 1, 4).flatten(1)
        return F.relu(self.head(pooled))


class InceptionLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 4 * 4, 2048)

    def forward(self, x: Tensor) -> Tensor:
        assert x.size(2) == 299 and x.size(3) == 299 and x.min() >= -1 and x.max() < 1
        return F.relu(self.head(F.adaptive_avg_pool2d(x, 4).flatten(1)))[:, :, None, None]


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = InceptionLayers()

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert return_features and img.dtype == torch.uint8
        x = F.interpolate(img.float(), size=[299, 299], mode="bilinear")
        return self.layers((x - 128) / 128).flatten(1)


class C3D(nn.Module):
    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 4 * 4 * 4, 101)
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(F.adaptive_avg_pool3d(x / 50, 4).flatten(1))
        return logits.softmax(1) if self.softmax else logits


def save_script(module: nn.Module, file: Path, seed: int = 0) -> Path:
    """Saves a module with random weights of a seed as TorchScript."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.save(torch.jit.script(module.eval()), str(file))
    return file


def save_all(folder: Path) -> Path:
    """The three files under their published names."""
    save_script(I3D(), folder / "i3d_torchscript.pt")
    save_script(Inception(), folder / "inception-2015-12-05.pt")
    save_script(C3D(), folder / "c3d_ucf101.pt")
    return folder

"""What does each term of an autoencoder's loss bring?

The same training, from the same start and with equally many steps, under L1 alone and with further terms added one by
one; each autoencoder is then scored on held-out videos.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lavita.core.config import load_config
from lavita.core.files import check_outside, write_json, write_text
from lavita.core.precision import pick_device
from lavita.evaluation.distances.frechet import frechet_distance
from lavita.evaluation.features.compute import BATCH_SIZE
from lavita.evaluation.features.extractors import EXTRACTORS
from lavita.evaluation.features.networks import NETWORKS, Network, load_network
from lavita.evaluation.features.perceptual import FeatureDistance
from lavita.evaluation.reconstruction import NUM_FRAMES, reconstructions, score_reconstructions
from lavita.models.autoencoder import load_autoencoder
from lavita.models.packaged import autoencoder_source
from lavita.training.autoencoder.config import AutoencoderConfig
from lavita.training.autoencoder.train import train_autoencoder
from lavita.training.checkpoint import list_checkpoints

Frames = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]
ADDED: dict[str, tuple[str, ...]] = {
    "L1": (),
    "+ edges and motion": ("edge_weight", "motion_weight"),
    "+ perceptual": ("perceptual_weight",),
    "+ adversarial": ("adversarial_weight", "adversarial_start", "adversarial_adaptive", "discriminator_learning_rate"),
}
"""The arms in their order, and the fields that each of them adds to the one before it."""
SETTINGS: dict[str, Any] = {"steps": 500, "perceptual_weight": 0.05, "adversarial_weight": 0.1}
"""Settings of the last arm unless others are given."""
START = "start"
EXTRACTOR = EXTRACTORS["efficientnet_lite0_video"]


def arm_settings(settings: dict[str, Any], arm: str) -> dict[str, Any]:
    """The settings of an arm: those of the last one, without the terms that are added later."""
    names = list(ADDED)
    later = {field for name in names[names.index(arm) + 1 :] for field in ADDED[name]}
    kept = {key: value for key, value in settings.items() if key not in later}
    return kept | {field: 0 for field in later if field in ("edge_weight", "motion_weight")}


def compare_losses(
    data: Sequence[Path], held_out: Sequence[Path], out: Path, resolutions: Sequence[int], overrides: Sequence[str]
) -> None:
    """Trains and scores all arms; writes `losses.json` and `losses.md` (a table), and each run to `out/<number>`.

    A stopped study resumes if it is started again.

    Args:
        data: folders of training videos.
        held_out: folders of videos to score on.
        out: folder to write to.
        resolutions: sides of the scored frames in pixels.
        overrides: settings of `lavita autoencoder train`, as `a=b`; those of the terms are for the arms that have them.
    """
    check_outside("out", out, *data, *held_out)
    full = load_config(
        AutoencoderConfig, SETTINGS | {"data": [str(path) for path in data], "run_dir": str(out)}, overrides
    )
    settings = full.model_dump(mode="json", exclude_unset=True)
    device = pick_device(full.device)
    network = load_network(NETWORKS["efficientnet_lite0"], device=device)
    distance = FeatureDistance.load(device)
    rows: list[dict[str, Any]] = []
    real: dict[tuple[Path, int], Features] = {}

    def score(arm: str, folder: str, seconds: float | None) -> None:
        vae = load_autoencoder(folder, device)
        for root in held_out:
            for side in resolutions:
                pairs = list(reconstructions(vae, root, side))
                row = {"arm": arm, "folder": str(root), "resolution": side, "seconds": seconds}
                row |= score_reconstructions(pairs, distance)["all"]
                clips = [(before, after) for _, before, after in pairs if len(before) == NUM_FRAMES]
                if (root, side) not in real:
                    real[root, side] = _features(network, [before for before, _ in clips])
                row |= _frechet(real[root, side], _features(network, [after for _, after in clips]))
                rows.append(row)
                write_json(out / "losses.json", {"settings": settings, "rows": rows})
                write_text(out / "losses.md", table(rows))

    if full.init_from is not None:
        score(START, autoencoder_source(full.init_from, full.resolution), None)
    for number, arm in enumerate(ADDED):
        values = arm_settings(settings, arm) | {"run_dir": str(out / str(number))}
        resumed = bool(list_checkpoints(out / str(number) / "checkpoints"))
        started = time.perf_counter()
        folder = train_autoencoder(load_config(AutoencoderConfig, values, []))
        score(arm, str(folder), None if resumed else round(time.perf_counter() - started, 1))
    print(table(rows))


def table(rows: Iterable[dict[str, Any]]) -> str:
    """One line per arm, folder and resolution."""
    heads = {
        "arm": "loss",
        "folder": "held out",
        "resolution": "pixels",
        "psnr": "PSNR, dB",
        "moving_psnr": "moving PSNR, dB",
        "feature_distance": "feature distance",
        "frechet": f"frechet-video[{EXTRACTOR.name}] of decoded clips",
        "floor": "of real halves",
        "seconds": "seconds",
    }
    lines = ["| " + " | ".join(heads.values()) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append("| " + " | ".join("-" if row[key] is None else str(row[key]) for key in heads) + " |")
    return "\n".join(lines) + "\n"


def _frechet(real: Features, made: Features) -> dict[str, float | None]:
    """The Frechet distance of decoded clips to the same clips, and that of two halves of these."""
    if len(real) < 4:
        return {"frechet": None, "floor": None}
    first, second = np.array_split(real[np.random.default_rng(0).permutation(len(real))], 2)
    return {"frechet": round(frechet_distance(real, made), 1), "floor": round(frechet_distance(first, second), 1)}


def _features(network: Network, clips: Sequence[Frames]) -> Features:
    if not clips:
        return np.zeros((0, EXTRACTOR.num_features), np.float32)
    with torch.inference_mode():
        outputs = [network.run(part).cpu() for part in torch.from_numpy(np.stack(clips)).split(BATCH_SIZE)]
    return EXTRACTOR.read(torch.cat(outputs).numpy())

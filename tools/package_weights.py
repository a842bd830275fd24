"""Copies trained weights into the package, in half precision: the autoencoder, or the arcade model.

python tools/package_weights.py autoencoder runs/autoencoder/autoencoder
python tools/package_weights.py arcade runs/arcade

The package has one autoencoder, in the folder of the arcade model: after packaging another autoencoder, train and
package the arcade model again.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from lavita.core.config import read_yaml
from lavita.core.files import write_json
from lavita.models.autoencoder import load_autoencoder
from lavita.models.fingerprint import fingerprint
from lavita.sampling.pipeline import load_pipeline

ARCADE = Path(__file__).parents[1] / "src" / "lavita" / "weights" / "arcade"


def package_autoencoder(source: Path) -> None:
    """Packages the autoencoder in a folder."""
    load_autoencoder(str(source)).half().save_pretrained(ARCADE / "vae")
    remove_paths(ARCADE / "vae")


def package_arcade(run: Path) -> None:
    """Packages the pipeline in a run's folder, and the record of its training.

    Raises:
        ValueError: if the run's autoencoder is not the packaged one.
    """
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = read_yaml(run / "config.yaml")["train"]
    seconds = sum(
        (after["step"] - before["step"]) * settings["batch_size"] / after["clips_per_second"]
        for before, after in pairwise(records)
    )
    pipeline = load_pipeline(run / "pipeline")
    if fingerprint(pipeline.vae) != fingerprint(load_autoencoder(str(ARCADE / "vae"))):
        raise ValueError(f"{run}: its autoencoder is not the packaged one; train with autoencoder=builtin")
    pipeline.to(torch.float16)
    this_run = {
        "steps": records[-1]["step"],
        "minutes": round(seconds / 60, 1),
        "loss": round(sum(row["loss"] for row in records[-20:]) / len(records[-20:]), 4),
        "date": datetime.now(UTC).date().isoformat(),
    }
    training = ARCADE / "training.json"
    # A run that started from the packaged model continues its training.
    earlier = json.loads(training.read_text(encoding="utf-8")) if settings["init_from"] == "builtin" else []
    pipeline.save_pretrained(ARCADE)
    remove_paths(ARCADE)
    write_json(training, [*earlier, this_run])


def remove_paths(folder: Path) -> None:
    """Removes the paths of this machine that diffusers records in configurations."""
    for file in folder.rglob("*.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        if "_name_or_path" in fields:
            del fields["_name_or_path"]
            file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    commands = {"autoencoder": package_autoencoder, "arcade": package_arcade}
    if len(sys.argv) != 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](Path(sys.argv[2]))

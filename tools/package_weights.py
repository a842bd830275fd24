"""Copies trained weights into the package in half precision: the autoencoder or the arcade model.

python tools/package_weights.py autoencoder runs/autoencoder/autoencoder
python tools/package_weights.py arcade runs/arcade
"""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from lavita.core.config import read_yaml
from lavita.core.files import write_json, write_text
from lavita.models.autoencoder import load_autoencoder
from lavita.sampling.pipeline import load_pipeline

WEIGHTS = Path(__file__).parents[1] / "src" / "lavita" / "weights"


def replace_weights(name: str) -> Path:
    """Empties the folder of a packaged model, except for its model card, and returns it."""
    folder = WEIGHTS / name
    for old in folder.glob("*"):
        if old.name != "README.md":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(name: str, source: Path) -> None:
    """Packages an autoencoder from its folder, or the pipeline and the training record of a run folder."""
    if name == "autoencoder":
        load_autoencoder(str(source)).half().save_pretrained(replace_weights(name))
        return
    records = [json.loads(line) for line in (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = read_yaml(source / "config.yaml")["train"]
    seconds = sum(
        (after["step"] - before["step"]) * settings["batch_size"] / after["clips_per_second"]
        for before, after in pairwise(records)
    )
    pipeline = load_pipeline(source / "pipeline")
    pipeline.to(torch.float16)
    run = {
        "steps": records[-1]["step"],
        "minutes": round(seconds / 60, 1),
        "loss": round(sum(row["loss"] for row in records[-20:]) / len(records[-20:]), 4),
        "date": datetime.now(UTC).date().isoformat(),
    }
    # A run that started from the packaged model is added to the record of that model.
    record = WEIGHTS / name / "training.json"
    runs = json.loads(record.read_text(encoding="utf-8")) if settings["init_from"] == "builtin" else []
    folder = replace_weights(name)
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.json"):
        fields = json.loads(file.read_text(encoding="utf-8"))
        fields.pop("_name_or_path", None)  # a path on the machine of the run
        write_text(file, json.dumps(fields, indent=2, sort_keys=True) + "\n")
    write_json(record, [*runs, run])


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("autoencoder", "arcade"):
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))

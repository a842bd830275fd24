"""What the index of a pipeline's folder may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavita.models.autoencoder import AUTOENCODERS
from lavita.models.transformer import LavitaTransformer3DModel
from lavita.sampling.schedulers import SCHEDULER_CLASSES

PIPELINE_CLASS = "LavitaPipeline"
PART_FILES = ("transformer/*", "vae/*", "scheduler/*", "lora/*")
PIPELINE_FILES = ("model_index.json", "README.md", "card.json", "samples.png", *PART_FILES)
"""Files of a pipeline's folder that LAVITA reads: no code is among them."""
DIFFUSERS_CODE = """# For `DiffusionPipeline.from_pretrained(..., custom_pipeline=..., trust_remote_code=True)`.
from lavita.sampling.pipeline import LavitaPipeline  # noqa: F401
"""
"""The file `pipeline.py` of a pipeline's folder, by which plain diffusers finds the class. LAVITA never runs it."""


def check_parts(folder: Path, config: dict[str, Any]) -> None:
    """Checks the classes in a `model_index.json`, and sets the modules that they are imported from."""
    allowed = {"transformer": ("LavitaTransformer3DModel",), "vae": tuple(AUTOENCODERS), "scheduler": SCHEDULER_CLASSES}
    own = (LavitaTransformer3DModel, *AUTOENCODERS.values())
    modules = {kind.__name__: kind.__module__ for kind in own if kind.__module__.startswith("lavita.")}
    if code := [file for part in allowed for file in sorted((folder / part).glob("*.py"))]:
        raise ValueError(f"{code[0]}: is code, which no part of a pipeline needs and which is never run; remove it")
    name = config.get("_class_name")
    if name != PIPELINE_CLASS:
        raise ValueError(f"model_index.json names the class {name!r}; allowed: {PIPELINE_CLASS}")
    for part, value in config.items():
        if part not in allowed:
            if isinstance(value, (list, tuple)):
                raise ValueError(f"model_index.json names the part {part!r}; allowed: {', '.join(allowed)}")
            continue
        if not isinstance(value, (list, tuple)) or len(value) != 2 or value[1] not in allowed[part]:
            raise ValueError(f"model_index.json: {part} is {value!r}; allowed: {', '.join(allowed[part])}")
        config[part] = [modules.get(value[1], "diffusers"), value[1]]

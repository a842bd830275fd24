"""Writing the folder of a pipeline: weights in diffusers' layout, adapters, and the model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from lavita.core.files import replacing, write_text
from lavita.models.adapters import Adapters
from lavita.sampling.model_card import SHEET, CardFacts, read_facts, title_of, write_card
from lavita.sampling.pipeline import LavitaPipeline
from lavita.sampling.pipeline_parts import DIFFUSERS_CODE


def save_pipeline(
    pipeline: LavitaPipeline,
    folder: Path,
    adapters: Adapters | None = None,
    facts: CardFacts | None = None,
    sheet: Path | None = None,
) -> None:
    """Saves a pipeline in diffusers' layout with a model card, and adapters in its folder `lora`.

    An older pipeline in the folder is replaced as a whole, and kept if saving fails. What was stated by hand in its
    card is kept, too: title, licence and what stands below.

    Args:
        pipeline: the pipeline.
        folder: folder to write.
        adapters: adapters that were trained, if any.
        facts: facts for the card.
        sheet: picture of samples for the card, if there is one.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    old = folder.with_name(f"{folder.name}.old")
    with replacing(folder) as partial:
        try:
            pipeline.save_pretrained(partial)
            if adapters is not None:
                adapters.save(partial / "lora")
            if sheet is not None:
                shutil.copyfile(sheet, partial / SHEET)
            before = read_facts(folder)
            stated = (CardFacts() if facts is None else facts).changed(license=before.license, title=before.title)
            write_card(partial, stated, folder, title_of(folder))
            write_text(partial / "pipeline.py", DIFFUSERS_CODE)
        except SafetensorError as error:  # its writer's error for a full disk
            raise OSError(f"{partial}: {error}") from error
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)

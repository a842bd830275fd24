"""The model card of a pipeline: a README.md of facts, with the fields that the Hugging Face hub reads.

Everything in a card is read from the model and the run that made it. What a person writes below the last line of a card
is kept when the card is written again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lavita.core.files import write_text
from lavita.core.text import read_text

CARD = "README.md"
SHEET = "samples.png"
FACTS = "card.json"
"""The facts of a card, from which it can be written again."""
KEPT_BELOW = "<!-- What you write below this line is kept. -->"
NO_LICENSE = "unknown"
MOST_CLASSES = 30
"""Names of classes that a card lists."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says that the model's configuration does not."""

    training: Mapping[str, str] = field(default_factory=dict)
    """Facts about the training, by what they are."""
    scores: Sequence[Mapping[str, str]] = ()
    """Scores: `metric`, `value`, `interval`, `floor` and `protocol`."""
    license: str = NO_LICENSE
    """Licence of the weights, as the hub abbreviates it, such as `apache-2.0`."""
    title: str | None = None
    """Heading; by default the name of the folder."""

    def changed(self, **values: Any) -> CardFacts:
        """The same facts with other values, except for None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})


def read_facts(pipeline: Path) -> CardFacts:
    """The facts of the card in a pipeline's folder; none if it has no card.

    Raises:
        ValueError: if the file is damaged.
    """
    file = pipeline / FACTS
    if not file.exists():
        return CardFacts()
    try:
        values = json.loads(read_text(file))
        facts = CardFacts(**values)
        texts = [*facts.training, *facts.training.values(), *(text for row in facts.scores for text in row.values())]
        if not all(isinstance(text, str) for text in (*texts, facts.license, facts.title or "")):
            raise TypeError("a fact is no text")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as the facts of a card ({error}); delete it") from error
    return facts


def write_card(pipeline: Path, facts: CardFacts, kept_from: Path | None = None, name: str = "") -> None:
    """Writes `README.md` and `card.json` into the folder of a saved pipeline.

    Args:
        pipeline: the folder.
        facts: see `CardFacts`.
        kept_from: folder of the card whose own text is kept; by default `pipeline`.
        name: heading, if the facts have none; by default `title_of(pipeline)`.
    """
    own = _own_text(pipeline if kept_from is None else kept_from)
    title = facts.title or name or title_of(pipeline)
    config = json.loads(read_text(pipeline / "transformer" / "config.json"))
    autoencoder = json.loads(read_text(pipeline / "vae" / "config.json"))
    text = card_text(title, config, autoencoder, facts, (pipeline / SHEET).exists())
    write_text(pipeline / FACTS, json.dumps({**vars(facts), "scores": list(facts.scores)}, indent=2) + "\n")
    write_text(pipeline / CARD, f"{text}\n{KEPT_BELOW}\n{own}")


def title_of(pipeline: Path) -> str:
    """The name of a pipeline's folder; that of the run around it, if it is called `pipeline`."""
    folder = pipeline.absolute()
    return folder.parent.name if folder.name == "pipeline" else folder.name


def _own_text(pipeline: Path) -> str:
    """What a person has written below a card."""
    file = pipeline / CARD
    return read_text(file).partition(f"{KEPT_BELOW}\n")[2] if file.exists() else ""


def card_text(
    title: str, config: Mapping[str, Any], autoencoder: Mapping[str, Any], facts: CardFacts, has_sheet: bool
) -> str:
    """The text of a card, in Markdown after a block of YAML.

    Args:
        title: heading.
        config: configuration of the transformer.
        autoencoder: configuration of the autoencoder.
        facts: see `CardFacts`.
        has_sheet: whether `samples.png` lies beside the card.
    """
    head = {
        "library_name": "lavita",
        "license": facts.license,
        "tags": ["lavita", "video-generation", "latent-diffusion", "diffusion-transformer"],
        **({"pipeline_tag": "text-to-video"} if config.get("text_dim") else {}),
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title}",
        f"A latent video diffusion transformer, trained with LAVITA. {_what_it_makes(config)}",
        *([f"![Frames of samples]({SHEET})"] if has_sheet else []),
        "## Use",
        _usage(config),
        "## Model",
        _table(_model_rows(config, autoencoder)),
    ]
    if facts.training:
        sections += ["## Training", _table(facts.training)]
    if facts.scores:
        columns = list(dict.fromkeys(name for row in facts.scores for name in row))
        lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in facts.scores)]
        sections += ["## Scores", "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)]
    sections += ["## Licence", _licence(facts.license)]
    return "\n\n".join(sections) + "\n"


def _what_it_makes(config: Mapping[str, Any]) -> str:
    start = f"It makes videos of {config['num_frames']} latent frames at {config['fps']:g} frames per second"
    names = config.get("class_names")
    if config.get("text_dim"):
        return f"{start} from a text, which `{config['text_encoder']}` embeds."
    if names:
        listed = ", ".join(names[:MOST_CLASSES]) + (f" and {len(names) - MOST_CLASSES} more" * (len(names) > 30))
        return f"{start} of one of {len(names)} classes: {listed}."
    return f"{start}, without a label." if not config["num_classes"] else f"{start} of {config['num_classes']} classes."


def _usage(config: Mapping[str, Any]) -> str:
    option, argument = "", "num_videos=1"
    if config.get("text_dim"):
        option, argument = ' --prompt "..."', 'prompt="..."'
    elif config.get("class_names"):
        name = config["class_names"][0]
        option, argument = f" --classes {json.dumps(name)}", f"class_labels=[{json.dumps(name)}]"
    elif config["num_classes"]:
        option, argument = " --classes 0", "class_labels=[0]"
    return f"""```sh
lavita sample FOLDER_OR_HUB_ID --out samples{option}
```

```python
from lavita import LavitaPipeline

frames = LavitaPipeline.from_pretrained("FOLDER_OR_HUB_ID")({argument}).frames
```"""


def _model_rows(config: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> dict[str, str]:
    given = config.get("given_frames")
    size = f"{config['sample_size']} x {config['sample_size']}"
    if isinstance(config["sample_size"], list):
        size = " x ".join(map(str, config["sample_size"]))
    return {
        "Transformer": f"Variant {config['variant']}, {config['num_blocks']} blocks, width {config['hidden_size']}, "
        f"{config['num_heads']} heads, patches of {config['patch_size']}",
        "Latents": f"{config['num_frames']} x {config['in_channels']} x {size}",
        "Patch embedding, positions in time": f"{config['patch_embedding']}, {config['temporal_position']}",
        "Conditioning": config["conditioning"],
        "Predicts": config["prediction_type"] + (" and the variance" if config["learn_sigma"] else ""),
        "Frames that may be given": ", ".join(given) if given else "none",
        "Frame interval of the training clips": str(config["frame_interval"]),
        "Autoencoder": str(autoencoder.get("_class_name", "unknown")),
    }


def _licence(name: str) -> str:
    if name == NO_LICENSE:
        return "Nobody has stated the licence of these weights yet: `lavita push --license` does."
    return f"The weights are under `{name}`. The videos that they were trained on may have terms of their own."


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(text)} |" for name, text in rows.items())])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")

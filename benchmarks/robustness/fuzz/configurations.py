"""Kind `configurations`: YAML files and `a.b=c` words for `train`, `autoencoder train`, `evaluate` and `config`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.robustness.fuzz.cases import Case
from benchmarks.robustness.fuzz.material import Material, corrupt, free_of_surrogates
from benchmarks.robustness.fuzz.values import anything, number, text

RAW = [
    *(
        "",
        "~",
        "1",
        "- a\n- b",
        "a",
        "%YAML 9.9\n---\n",
        "---\n---\n",
        "? [a]\n: b",
        "? {a: 1}\n: b",
        "1: 2",
        "null: 1",
    ),
    *("true: 1", "train: {steps: 1, steps: 2}", "a: &a [*a]", "a: &a {b: *a}", "<<: {train: {steps: 3}}", "<<: 1"),
    *(
        "train: !!python/object/apply:os.system ['touch pwned']",
        "train: !unknown {steps: 1}",
        "train: !!binary aGVsbG8=",
    ),
    *(
        "train: !!set {a, b}",
        "train: !!timestamp 2001-01-01",
        "run_dir: 2001-01-01",
        "a: b: c",
        "\ttrain: 1",
        "train: {",
    ),
    *("{" * 3000, "[" * 20000, "- " * 5000, "a: 'unfinished", "train:\n  steps: 0o17\n  seed: 1:30", "a" * 100_000),
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(8)),
]


def build(rng: random.Random, folder: Path, material: Material) -> Case:
    """A configuration with a few bad fields, or text that is no configuration."""
    from lavita.evaluation.protocol import Protocol
    from lavita.training.autoencoder.config import AutoencoderConfig
    from lavita.training.config import RunConfig

    command = rng.choice(["train", "train", "config", "config", "autoencoder", "evaluate"])
    cls: Any = {"autoencoder": AutoencoderConfig, "evaluate": Protocol}.get(command, RunConfig)
    fields = list(_fields(cls))
    words = [_word(rng, fields) for _ in range(rng.choice([0, 1, 1, 2]))]
    what = f"words {words}"
    file: tuple[str, ...] = ()
    if command != "evaluate" and rng.random() < 0.75:
        content, kind = _yaml(rng, fields)
        (folder / "file.yaml").write_bytes(content)
        what, file = f"{kind} and {what}", ("--config", "file.yaml")
    for name in ("a/0.mp4", "b/1.mp4"):
        material.write_video(folder / "in" / name)
    if command == "config":
        source = file[1:] or rng.choice([("demo",), ("autoencoder-small",), (), (anything(rng),)])
        return Case(("config", *source, *words), what)
    if command == "evaluate":
        return Case(("evaluate", "--real", "in", "--generated", "in", "--metrics", "motion", *words), what)
    if command == "autoencoder":
        # Only what is refused at once ends in time; a few steps are allowed.
        small = ("steps=1", "resolution=16", "batch_size=2", "memory_gib=0.01")
        arguments = ("autoencoder", "train", *file, "--data", "in", "--run-dir", "out", *small, *words)
        return Case(arguments, what, writable=("out", "runs"), seconds=60)
    material.copy("vae", folder / "vae")
    tiny = ("autoencoder=vae", "data.num_frames=2", "data.resolution=16", "model.preset=tiny/4", "train.batch_size=2")
    chosen = tuple(word for word in tiny if rng.random() < 0.95)
    return Case(("train", *file, "--data", "in", "--dry-run", "--run-dir", "out", *chosen, *words), what, writable=())


def _fields(cls: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields."""
    names = []
    for name, field in cls.model_fields.items():
        names.append(prefix + name)
        if hasattr(field.annotation, "model_fields"):
            names += _fields(field.annotation, f"{prefix}{name}.")
    return names


def _word(rng: random.Random, fields: list[str]) -> str:
    """An `a.b=c` word; sometimes the key is wrong as well."""
    key = rng.choice(fields)
    if rng.random() < 0.15:
        key = rng.choice(
            [
                f"{key}.x",
                key.upper(),
                key[:-1],
                f"{key}.",
                f".{key}",
                "",
                "train",
                "data",
                f"{key} ",
                key.replace(".", ".."),
            ]
        )
    return rng.choice([f"{key}={_value(rng)}"] * 9 + [key, f"{key}={{", f"{key}=="]).replace("\0", "")


def _value(rng: random.Random) -> str:
    value = rng.choice([number, number, text, anything])(rng)
    return rng.choice([value] * 4 + [f"[{value}]", f"{{a: {value}}}", f"'{value}'"])


def _yaml(rng: random.Random, fields: list[str]) -> tuple[bytes, str]:
    if rng.random() < 0.3:
        raw = rng.choice(RAW)
        return raw.encode(), f"the file {raw[:40]!r}"
    lines: dict[str, list[str]] = {}
    for key in rng.sample(fields, rng.randint(1, 3)):
        section, _, name = key.rpartition(".")
        lines.setdefault(section, []).append(f"{name}: {_value(rng)}")
    written = "\n".join(
        "\n".join(own) if not section else f"{section}:\n" + "\n".join(f"  {line}" for line in own)
        for section, own in lines.items()
    )
    data = free_of_surrogates(written).encode(rng.choice(["utf-8"] * 5 + ["utf-16", "latin-1"]), "replace")
    if rng.random() < 0.1:
        data, damage = corrupt(rng, data)
        return data, f"the file {written[:60]!r}, {damage}"
    return data, f"the file {written[:60]!r}"

"""`lavita info`, `study` and `report`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lavita.cli.options import Overrides, app, find_config


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A preset (S/2 to XL/8; tiny, mini, small); the folder of a transformer, pipeline or run; or builtin.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[int | None, typer.Option(help="1 to 4. Default: 2.", show_default=False)] = None,
    patch_embedding: Annotated[
        str | None, typer.Option(help="uniform or compression. Default: uniform.", show_default=False)
    ] = None,
    conditioning: Annotated[
        str | None, typer.Option(help="s_adaln or all_tokens. Default: s_adaln.", show_default=False)
    ] = None,
    temporal_position: Annotated[
        str | None, typer.Option(help="absolute, absolute_input or rope. Default: absolute.", show_default=False)
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Default: 0.", show_default=False)] = None,
    text_dim: Annotated[
        int | None, typer.Option(min=0, help="Width of text embeddings. Default: 0.", show_default=False)
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a text that blocks attend to; needs --text-dim. Default: none.", show_default=False
        ),
    ] = None,
    sample_size: Annotated[
        str | None,
        typer.Option(help="Height and width of the latents: 32, or 12x20. Default: 32.", show_default=False),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**16, help="Frames per clip. Default: 16, or what the folder says.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=2**16, help="Clips per batch. Default: 1.", show_default=False)
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=0, max=2**16, help="Images after each clip. Default: 0.", show_default=False)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Optimizer of the training: adamw or muon. Default: adamw.", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[
        Literal["true", "cheap"] | None,
        typer.Option(help="Gradient checkpointing of the training. Default: none.", show_default=False),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: fp32 and bf16.", show_default=False)
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Batches of a training step. Default: 1.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Training processes, each with this batch. Default: 1.", show_default=False),
    ] = None,
    sharded: Annotated[bool, typer.Option("--sharded", help="FSDP2 instead of DDP for several processes.")] = False,
    sequence_parallel: Annotated[
        int | None,
        typer.Option(help="Processes that share this batch (train.sequence_parallel). Default: 1.", show_default=False),
    ] = None,
    table: Annotated[
        int | None,
        typer.Option(help="Print a table of the paper instead. 3: next to our count; 4: quoted.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count a model's parameters and multiply-accumulates, and predict the memory of training and sampling.

    The options from --variant to --sample-size are for presets; a folder has its own values. Of a model that was
    trained on clips of several shapes, the largest is measured.
    """
    from lavita.models.shapes import largest_shape, parse_latent_size

    fields: dict[str, Any] = {
        "variant": variant,
        "patch_embedding": patch_embedding,
        "conditioning": conditioning,
        "temporal_position": temporal_position,
        "num_classes": num_classes,
        "text_dim": text_dim,
        "text_tokens": text_tokens,
        "sample_size": None if sample_size is None else parse_latent_size(sample_size),
    }
    batch: dict[str, Any] = {"batch_size": batch_size, "num_frames": num_frames, "num_images": num_images}
    training: dict[str, Any] = {
        "optimizer": optimizer,
        "gradient_checkpointing": {None: None, "true": True, "cheap": "cheap"}[gradient_checkpointing],
        "precision": precision,
        "accumulation": accumulation,
        "processes": processes,
        "sharded": sharded or None,
        "sequence_parallel": sequence_parallel,
    }
    fields, batch, training = (
        {key: value for key, value in given.items() if value is not None} for given in (fields, batch, training)
    )
    if table not in (None, 3, 4):
        raise ValueError(f"table is {table}; allowed: 3, 4")
    if (table is None) == (model is None) or (table is not None and (fields or batch or training)):
        raise ValueError("give either a model, with options, or --table alone")
    if table == 4:
        from lavita.studies.table4 import print_table4

        if as_json:
            raise ValueError("json is set, but has no effect with --table 4")
        print_table4()
        return
    from lavita.models.autoencoder import latent_frames, pixel_frames, temporal_downsampling
    from lavita.studies import complexity, memory, table3

    if model is None:
        rows = table3.table3()
        if as_json:
            print(json.dumps(table3.table3_to_json(rows), indent=1))
        else:
            table3.print_table3(rows)
        return
    config = largest_shape(complexity.model_config(model, fields, num_frames))
    setting = memory.Setting(**training)
    autoencoder = memory.autoencoder_config(model, config.get("in_channels", 4))
    if num_frames is not None:
        batch["num_frames"] = latent_frames(autoencoder, num_frames)
    cost = complexity.measure(config, **batch)
    settings = [setting] if precision else [replace(setting, precision=name) for name in ("fp32", "bf16")]
    peaks = {f"training, {each.precision}": memory.training_memory(config, **batch, setting=each) for each in settings}
    sampled = {key: value for key, value in batch.items() if key != "num_images"}
    guidance = bool(cost.config["num_classes"] or cost.config["text_dim"])
    peaks[f"sampling, {setting.precision}"] = memory.sampling_memory(
        config,
        **sampled,
        guidance=guidance,
        precision=setting.precision,
        autoencoder=autoencoder,
        sequence_parallel=setting.sequence_parallel,
    )
    if as_json:
        predicted = {name: peak.to_json() for name, peak in peaks.items()}
        print(json.dumps({"model": model, **cost.to_json(), "memory_bytes": predicted}, indent=1))
    else:
        complexity.print_complexity(model, cost)
        if (factor := temporal_downsampling(autoencoder)) > 1:
            length = pixel_frames(autoencoder, cost.num_frames)
            print(f"The autoencoder merges groups of {factor} frames: {cost.num_frames} latents are {length} frames.")
        memory.print_memory(peaks, setting)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("runs/report"),
) -> None:
    """Write a page about training runs: configuration, curves, samples over time. Works while they run, too."""
    from lavita.studies.run_report.page import write_report

    print(write_report(runs, out))


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="frame-interval, temporal-position, variant, patch-embedding, conditioning (Fig. 5; variant has "
            "Variant 4 at twice the patch size, too, as the paper's Table 3 has it), joint-training, pretraining, "
            "recipe: the paper's objective and optimizer against the modern ones; combinations: every variant with "
            "every embedding, conditioning and position; words: attention to a caption's tokens against its pooled "
            "embedding, on clips that the study renders; or emulator: a model that is told a player's actions against "
            "the game itself."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    config: Annotated[
        str | None,
        typer.Option(
            help="Configuration of all arms: a YAML file, or the name of a packaged one. Default for words: words; "
            "emulator has its own.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Training steps of each arm; several increasing numbers: sample and score at each. Default: 1000; for "
            "words those of its configuration.",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Class folders of real videos to score against.", show_default=False)
    ] = None,
    metrics: Annotated[str, typer.Option(help="Metrics of `lavita evaluate`; needs --real.")] = "accuracy,motion",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Field of the evaluation protocol, as num_real_clips=256; may be given several times."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the samples: one sample per seed and class.")] = "0-3",
    train_seeds: Annotated[
        str | None,
        typer.Option(
            help="Train each arm once per seed, such as 0-2. Default: once, with train.seed; for words 0-2.",
            show_default=False,
        ),
    ] = None,
    sample_steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 20,
    weights: Annotated[
        str | None, typer.Option(help="Weights of the image model, for pretraining.", show_default=False)
    ] = None,
) -> None:
    """Compare configurations that differ in one field. Run the same command again to continue an interrupted study."""
    from lavita.core.commands import CommandFailed
    from lavita.core.config import load_config, read_yaml
    from lavita.sampling.jobs import parse_seeds
    from lavita.studies import ablation
    from lavita.studies.ablation import STUDIES, StudyPlan, pretraining_arms, run_study
    from lavita.studies.words.study import run_words
    from lavita.training.config import RunConfig

    if name in ("words", "emulator"):
        for option, value, default in (
            *(("real", real, None), ("protocol", protocol, None), ("weights", weights, None), ("seeds", seeds, "0-3")),
            ("metrics", metrics, "accuracy,motion"),
            ("config", config if name == "emulator" else None, None),
        ):
            if value != default:
                raise ValueError(f"{option} is {value}, but has no effect on the study {name}")
    if name == "emulator":
        _emulator(out, overrides or [], steps, train_seeds, sample_steps)
        return
    by_config = {"frame-interval": ablation.frame_interval_arms, "variant": ablation.variant_arms}
    names = sorted({*by_config, *STUDIES, "pretraining", "words", "emulator"})
    if name not in names:
        raise ValueError(f"name is {name!r}; allowed: {', '.join(names)}")
    if (weights is None) == (name == "pretraining"):
        raise ValueError("the study pretraining needs --weights, and only that one takes it")
    if protocol and real is None:
        raise ValueError(f"protocol is {protocol}, but has no effect without --real")
    if config is None and name != "words":
        raise ValueError(f"config is missing, but the study {name} needs one, such as --config demo")
    source = find_config(config or "words")
    if steps is None:
        steps = str(load_config(RunConfig, read_yaml(source)).train.steps) if name == "words" else "1000"
    if not all(part.strip().isdecimal() for part in steps.split(",")):
        raise ValueError(f"steps is {steps!r}; allowed: numbers such as 1000 or 500,1000")
    arms: ablation.Arms = {}
    if weights is not None:
        arms = pretraining_arms(weights)
    elif name in by_config:
        if name == "variant" and any(override.startswith("model=") for override in overrides or ()):
            raise ValueError("the study variant changes model.preset in an arm: set fields as model.preset=S/2")
        arms = by_config[name](load_config(RunConfig, read_yaml(source), overrides or (), source=str(source)))
    elif name != "words":
        arms = STUDIES[name]
    points = tuple(int(part) for part in steps.split(","))
    if train_seeds is None and name == "words":
        train_seeds = "0-2"
    plan = StudyPlan(
        out,
        config or "words",
        tuple(overrides or ()),
        points,
        seeds,
        sample_steps,
        real,
        metrics,
        tuple(protocol or ()),
        () if train_seeds is None else tuple(parse_seeds(train_seeds)),
    )
    try:
        if name == "words":
            run_words(plan)
        else:
            run_study(arms, plan)
    except CommandFailed as failed:
        raise typer.Exit(failed.code) from failed


def _emulator(
    out: Path,
    overrides: list[str],
    steps: str | None,
    train_seeds: str | None,
    sample_steps: int,
) -> None:
    """Runs the study `emulator`, whose fields are those of `EmulatorPlan`."""
    from lavita.core.commands import CommandFailed
    from lavita.demo.emulator.study import EmulatorPlan, run_emulator_study
    from lavita.sampling.jobs import parse_seeds

    if steps is not None and not steps.isdecimal():
        raise ValueError(f"steps is {steps!r}, but the study emulator takes one number")
    fields: dict[str, Any] = {"sample_steps": sample_steps}
    if steps is not None:
        fields["steps"] = int(steps)
    if train_seeds is not None:
        fields["train_seeds"] = tuple(parse_seeds(train_seeds))
    numbers = ("episodes", "length", "clips", "horizon")
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "games":
            fields[key] = tuple(value.split(","))
        elif key == "preset":
            fields[key] = value
        elif key in numbers and value.isdecimal():
            fields[key] = int(value)
        else:
            raise ValueError(
                f"{override!r} is no field of the study; allowed: games=A,B preset=X {'=N '.join(numbers)}=N"
            )
    try:
        run_emulator_study(EmulatorPlan(out, **fields))
    except CommandFailed as failed:
        raise typer.Exit(failed.code) from failed
    print(out / "index.html")

"""The commands: parse, call, print. Heavy libraries load inside a command, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from lavita.config import AutoencoderConfig, RunConfig

app = typer.Typer(
    name="lavita",
    help="Train, sample and evaluate latent video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data sets, and make one.", no_args_is_help=True)
autoencoder_app = typer.Typer(help="Train and score autoencoders.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(autoencoder_app, name="autoencoder")


class SamplerName(StrEnum):
    """The names of `pipeline.SAMPLERS`, here because that module takes seconds to load."""

    unipc = "unipc"
    dpmpp = "dpm++"
    ddim = "ddim"
    ddpm = "ddpm"


class DataSetOption(StrEnum):
    """The names of `config.SPLITS`, here for the help."""

    folder = "folder"
    faceforensics = "faceforensics"
    sky_timelapse = "sky_timelapse"
    ucf101 = "ucf101"
    taichi_hd = "taichi_hd"


class VideoFormat(StrEnum):
    """What generated videos are written as."""

    mp4 = "mp4"
    gif = "gif"
    mkv = "mkv"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Fields of the configuration, as a.b=c: train.steps=1000", show_default=False),
]
DataSet = Annotated[DataSetOption, typer.Option(help="What the folder holds: any videos, or a data set of the paper.")]
SplitOption = Annotated[
    str | None,
    typer.Option("--split", help="Of a named data set: train, test, all ... default: the paper's", show_default=False),
]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", help="YAML file, or the name of a packaged one: demo", show_default=False),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo's data, model, samples and page.")] = Path("runs/demo"),
    minutes: Annotated[
        float, typer.Option(min=0.1, help="About how long to train; the rest takes twice as long on two cores.")
    ] = 6.0,
) -> None:
    """Render arcade videos, train a small model on them, generate more, and show it all on a page."""
    from lavita.commands import CommandFailed
    from lavita.demo import run_demo

    try:
        run_demo(out, minutes)
    except CommandFailed as failed:
        raise typer.Exit(failed.code) from failed


@data_app.command("arcade")
def data_arcade(
    out: Annotated[Path, typer.Argument(help="Folder to write train/<game>/ and heldout/<game>/ into.")],
    train_episodes: Annotated[int, typer.Option(min=0, help="Training videos a game.")] = 24,
    heldout_episodes: Annotated[int, typer.Option(min=0, help="Held-out videos a game.")] = 6,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of a video, at 15 a second.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the players.")] = 0,
) -> None:
    """Render the arcade data set: 8 games, 64x64 pixels, H.264, with captions. Needs the extra `demo`."""
    from lavita.data.demo import render_dataset
    from lavita.data.demo_captions import write_captions
    from lavita.runtime import Progress

    progress = Progress("rendering video", 8 * (train_episodes + heldout_episodes))
    render_dataset(out, train_episodes, heldout_episodes, num_frames, seed, lambda done, total: progress.update(done))
    write_captions(out)
    print(out)


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of videos.")],
    dataset: Annotated[
        DataSetOption | None,
        typer.Option(help="What it holds. default: any videos, with a guess", show_default=False),
    ] = None,
    split: SplitOption = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Of a clip.")] = 16,
    frame_interval: Annotated[int, typer.Option(min=1, help="Of a clip: every how many frames one is taken.")] = 3,
    captions: Annotated[
        Path | None, typer.Option(help="Table of captions to compare with the videos.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write contact_sheet.png and inspection.json into.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a folder of videos holds: classes, splits, sizes, rates, lengths, clips, what is broken."""
    from lavita.data.inspect import inspect_dataset, print_inspection

    sheet = None if out is None else out / "contact_sheet.png"
    found = inspect_dataset(
        folder, None if dataset is None else dataset.value, split, num_frames, frame_interval, captions, sheet
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "inspection.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_inspection(found)
        if out is not None:
            print(out)


@autoencoder_app.command("train")
def autoencoder_train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of videos; may be given several times.", show_default=False),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
) -> None:
    """Train an autoencoder on frames of videos. Run the same command again to resume; Ctrl-C saves a checkpoint."""
    from lavita.config import AutoencoderConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = [str(path) for path in data]
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    settings: AutoencoderConfig = _load(AutoencoderConfig, config, overrides, chosen)
    from lavita.train_autoencoder import train_autoencoder

    _train(train_autoencoder, settings)


@autoencoder_app.command("evaluate")
def autoencoder_evaluate(
    data: Annotated[list[Path], typer.Option(help="Folder of videos; may be given several times.")],
    autoencoder: Annotated[str, typer.Argument(help="Folder, hub id, or builtin.")] = "builtin",
    resolution: Annotated[int, typer.Option(min=8, help="Side of the frames in pixels.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Write the numbers as JSON, too.", show_default=False)] = None,
) -> None:
    """PSNR of reconstructed frames: the whole picture, and the pixels that move."""
    from lavita.autoencoder import autoencoder_source, load_autoencoder
    from lavita.evaluation.reconstruction import reconstruction_quality, show_quality

    vae = load_autoencoder(autoencoder_source(autoencoder, resolution))
    show_quality({str(root): reconstruction_quality(vae, root, resolution) for root in data}, out)


@app.command()
def encode(
    data: Annotated[Path, typer.Option(help="Folder of videos.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    autoencoder: Annotated[
        str, typer.Option(help="Folder, hub id, builtin, or auto: builtin up to 128 pixels.")
    ] = "auto",
    resolution: Annotated[int, typer.Option(min=8, help="Side of the frames in pixels.")] = 256,
    flip: Annotated[bool, typer.Option(help="Encode mirrored frames, too.")] = True,
    images: Annotated[
        bool, typer.Option("--images", help="Encode the image files below the folder instead, for joint training.")
    ] = False,
    dataset: DataSet = DataSetOption.folder,
    split: SplitOption = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a file, which holds many videos.")] = 256,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read finished files back; damaged ones are made again.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Encode every frame of every video once, so that training reads latents.

    Run it again to go on where it stopped, or after the videos have changed. Under torchrun, several processes share
    the work.
    """
    from lavita.autoencoder import autoencoder_source, load_autoencoder
    from lavita.data.datasets import open_dataset
    from lavita.data.encode import encode_dataset
    from lavita.distributed import processes
    from lavita.runtime import pick_device

    with processes() as team:
        catalog = team.first_says(open_dataset(data, dataset.value, split, images=images) if team.is_first else None)
        vae = load_autoencoder(autoencoder_source(autoencoder, resolution), pick_device(device))
        manifest = encode_dataset(
            catalog, out, vae, resolution, flip, team=team, shard_bytes=shard_mb * 10**6, verify=verify
        )
    if team.is_first:
        print(f"{out}: {len(manifest['videos'])} videos, {len(manifest['broken'])} broken")


@app.command()
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    data: Annotated[Path | None, typer.Option(help="Folder of videos.", show_default=False)] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The run's folder.", show_default=False)] = None,
) -> None:
    """Train a model. Run the same command again to resume; Ctrl-C saves a checkpoint first.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m lavita train ... (docs/training.md).
    """
    from lavita.config import RunConfig

    chosen: dict[str, Any] = {}
    if data:
        chosen["data"] = {"path": str(data)}
    if run_dir:
        chosen["run_dir"] = str(run_dir)
    settings: RunConfig = _load(RunConfig, config, overrides, chosen)
    from lavita.train import train as run

    _train(run, settings)


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to write the videos into.")],
    model: Annotated[
        str, typer.Argument(help="Pipeline folder or hub id; builtin is the arcade model of the package.")
    ] = "builtin",
    classes: Annotated[
        str, typer.Option(help="Names or numbers, comma separated, or all. Unused without classes.")
    ] = "all",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="For a model with texts; may be given several times.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Table of prompts: CSV, JSONL or Parquet with `file` and `caption`.", show_default=False),
    ] = None,
    seeds: Annotated[str, typer.Option(help="One video a class or prompt for each seed: 0-7 or 1,5,9.")] = "0-3",
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Network evaluations; 250 for ddpm.")] = 25,
    sampler: Annotated[SamplerName, typer.Option(help="ddpm is the paper's.")] = SamplerName.unipc,
    guidance_scale: Annotated[
        float | None, typer.Option(help="1 for no guidance. default: 1.5 with classes or texts", show_default=False)
    ] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="default: the model's", show_default=False)] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Single images (.png) from the model without its temporal modules.")
    ] = False,
    lora: Annotated[
        Path | None,
        typer.Option(help="Adapters trained on this model: RUN/pipeline/lora, or peft's.", show_default=False),
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="How much of the adapters. default: 1", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos at once; does not change them.")] = 8,
    video_format: Annotated[VideoFormat, typer.Option("--format", help="mkv is lossless.")] = VideoFormat.mp4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Generate videos: OUT/<class or prompt>/<seed>.mp4. Finished files are left alone.

    Several processes of torchrun share them: torchrun --nproc-per-node 8 -m lavita sample ...
    """
    from lavita.distributed import processes
    from lavita.generate import generate

    if lora is None and lora_scale is not None:
        raise ValueError(f"--lora-scale is {lora_scale:g}, but has no effect without --lora")
    with processes() as team:
        written = generate(
            model,
            out,
            classes=classes,
            prompts=prompt or (),
            prompt_table=prompts,
            seeds=seeds,
            steps=steps,
            sampler=sampler.value,
            guidance_scale=guidance_scale,
            num_frames=num_frames,
            images=images,
            adapter=lora,
            adapter_scale=1.0 if lora_scale is None else lora_scale,
            batch_size=batch_size,
            suffix=f".{video_format.value}",
            device=device,
            team=team,
        )
        if team.is_first:
            print(f"{out}: {len(written)} {'images' if images else 'videos'}")


@app.command()
def evaluate(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Fields of the protocol, as a=b: num_real_clips=512 frame_interval=1. docs/evaluation.md lists them.",
            show_default=False,
        ),
    ] = None,
    real: Annotated[
        Path | None, typer.Option(help="Folder of real training videos; any tree of them.", show_default=False)
    ] = None,
    generated: Annotated[
        str | None,
        typer.Option(
            help="Folder of generated videos; or a model to sample: pipeline folder, or builtin.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Real videos to check the classifier on, and to score for comparison.", show_default=False),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma separated: accuracy, motion, for class folders; fvd, kvd, fid, kid, is, on the networks that "
            "bear these names; frechet-video, kernel-video, prdc, frechet-image, kernel-image, prdc-image, "
            "inception-score, on any."
        ),
    ] = "accuracy,motion",
    preset: Annotated[
        str | None, typer.Option(help="Protocol: paper, stylegan-v, latte, or offline.", show_default=False)
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="Of networks: a folder, or NAME=FILE; may be given several times.", show_default=False),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="JSON of the chosen clips: used where it exists, else written. default: beside --out",
            show_default=False,
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Go on without videos that are broken or too short.")
    ] = False,
    samples: Annotated[
        Path | None,
        typer.Option(help="Of a model: folder for its samples. default: runs/evaluate/samples", show_default=False),
    ] = None,
    sampler: Annotated[SamplerName | None, typer.Option(help="Of a model. default: unipc", show_default=False)] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Of a model. default: 25; ddpm: 250", show_default=False)
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Of a model. default: 1.5 with classes", show_default=False)
    ] = None,
    first_seed: Annotated[
        int | None, typer.Option(min=0, help="Of a model's samples. default: 0", show_default=False)
    ] = None,
    model_weights: Annotated[
        Literal["ema", "raw"] | None,
        typer.Option(help="Which weights were sampled, for the report, where it is not recorded.", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps classifier and features.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON, too.", show_default=False)] = None,
    page: Annotated[
        Path | None, typer.Option(help="Folder to write a page with clips into.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Instead, compare two reports of one protocol.", show_default=False),
    ] = None,
) -> None:
    """Score generated videos against real ones. Runs on several processes under torchrun, with the same numbers."""
    if compare is not None:
        if real or generated or overrides:
            raise ValueError("compare is set: it takes two reports and nothing else")
        from lavita.evaluation.report import compare_reports

        compare_reports(*compare)
        return
    if real is None or generated is None:
        raise ValueError("give --real and --generated, or --compare with two reports")
    from lavita.evaluation.command import EvaluateOptions, run_evaluation

    run_evaluation(
        EvaluateOptions(
            real=real,
            generated=generated,
            held_out=held_out,
            metrics=metrics.split(","),
            preset=preset,
            overrides=overrides or [],
            weights=weights or [],
            manifest=manifest,
            skip_broken=skip_broken,
            samples=samples,
            sampler=None if sampler is None else sampler.value,
            steps=steps,
            guidance_scale=guidance_scale,
            first_seed=first_seed,
            model_weights=model_weights,
            cache=cache,
            out=out,
            page=page,
            device=device,
        )
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are shown side by side.")],
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("runs/report"),
) -> None:
    """Write a page of training runs: configuration, curves, samples over time. Works while they run."""
    from lavita.report.page import write_report

    print(write_report(runs, out))


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Preset, S/2 to XL/8, tiny, mini, small; or folder of a transformer, pipeline or run; or builtin.",
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
        str | None, typer.Option(help="absolute or rope. Default: absolute.", show_default=False)
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=0, help="Default: 0.", show_default=False)] = None,
    text_dim: Annotated[
        int | None, typer.Option(min=0, help="Width of text embeddings. Default: 0.", show_default=False)
    ] = None,
    sample_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the latents. Default: 32.", show_default=False)
    ] = None,
    num_frames: Annotated[
        int | None, typer.Option(min=1, help="Of a clip. Default: 16, or the folder's.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Clips. Default: 1.", show_default=False)] = None,
    num_images: Annotated[
        int | None, typer.Option(min=0, help="Images after a clip. Default: 0.", show_default=False)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Of training: adamw or muon. Default: adamw.", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Of training.")] = False,
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16. Default: fp32 and bf16.", show_default=False)
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Batches of a training step. Default: 1.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(help="Of training, each with the batch. Default: 1.", show_default=False),
    ] = None,
    sharded: Annotated[bool, typer.Option("--sharded", help="FSDP2 over the processes instead of DDP.")] = False,
    table: Annotated[
        int | None, typer.Option(help="3: instead, the paper's Table 3 beside our count.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count a model's parameters and multiply-accumulates, and predict the memory of training and sampling.

    Options from --variant to --sample-size are for presets: a folder has its own.
    """
    fields: dict[str, Any] = {
        "variant": variant,
        "patch_embedding": patch_embedding,
        "conditioning": conditioning,
        "temporal_position": temporal_position,
        "num_classes": num_classes,
        "text_dim": text_dim,
        "sample_size": sample_size,
    }
    batch: dict[str, Any] = {"batch_size": batch_size, "num_frames": num_frames, "num_images": num_images}
    training: dict[str, Any] = {
        "optimizer": optimizer,
        "gradient_checkpointing": gradient_checkpointing or None,
        "precision": precision,
        "accumulation": accumulation,
        "processes": processes,
        "sharded": sharded or None,
    }
    fields, batch, training = (
        {key: value for key, value in given.items() if value is not None} for given in (fields, batch, training)
    )
    if table not in (None, 3):
        raise ValueError(f"table is {table}; allowed: 3")
    if (table is None) == (model is None) or (table is not None and (fields or batch or training)):
        raise ValueError("give either a model, with options, or --table 3 alone")
    from lavita.studies import complexity, memory

    if model is None:
        rows = complexity.table3()
        if as_json:
            print(json.dumps(complexity.table3_to_json(rows), indent=1))
        else:
            complexity.print_table3(rows)
        return
    config = complexity.model_config(model, fields, num_frames)
    setting = memory.Setting(**training)
    cost = complexity.measure(config, **batch)
    settings = [setting] if precision else [replace(setting, precision=name) for name in ("fp32", "bf16")]
    peaks = {f"training, {each.precision}": memory.training_memory(config, **batch, setting=each) for each in settings}
    sampled = {key: value for key, value in batch.items() if key != "num_images"}
    guidance = bool(cost.config["num_classes"] or cost.config["text_dim"])
    autoencoder = memory.autoencoder_config(model, cost.config["in_channels"])
    peaks[f"sampling, {setting.precision}"] = memory.sampling_memory(
        config, **sampled, guidance=guidance, precision=setting.precision, autoencoder=autoencoder
    )
    if as_json:
        predicted = {name: peak.to_json() for name, peak in peaks.items()}
        print(json.dumps({"model": model, **cost.to_json(), "memory_bytes": predicted}, indent=1))
    else:
        complexity.print_complexity(model, cost)
        memory.print_memory(peaks, setting)


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="frame-interval, temporal-position, variant, patch-embedding, conditioning (Fig. 5), joint-training, "
            "pretraining, or combinations: every variant with every embedding, conditioning and position."
        ),
    ],
    config: Annotated[str, typer.Option(help="Of all arms: YAML file, or the name of a packaged one.")],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    overrides: Overrides = None,
    steps: Annotated[
        str, typer.Option(help="Length of each arm; several, rising: it is sampled and scored at each.")
    ] = "1000",
    real: Annotated[
        Path | None, typer.Option(help="Class folders of real videos to score against.", show_default=False)
    ] = None,
    metrics: Annotated[str, typer.Option(help="Of `lavita evaluate`; with --real.")] = "accuracy,motion",
    protocol: Annotated[
        list[str] | None,
        typer.Option(help="Field of its protocol, as num_real_clips=256; may be given several times."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Of the samples, one a class for each seed.")] = "0-3",
    sample_steps: Annotated[int, typer.Option(min=1, max=1000, help="Network evaluations of a sample.")] = 20,
    weights: Annotated[
        str | None, typer.Option(help="Of the image model, for pretraining.", show_default=False)
    ] = None,
) -> None:
    """Train configurations that differ in one field alike, and compare them. Run it again to go on."""
    from lavita.commands import CommandFailed
    from lavita.studies.ablation import STUDIES, StudyPlan, pretraining_arms, run_study

    if name not in (*STUDIES, "pretraining"):
        raise ValueError(f"name is {name!r}; allowed: {', '.join((*STUDIES, 'pretraining'))}")
    if (weights is None) == (name == "pretraining"):
        raise ValueError("--weights goes with the study pretraining, which needs it")
    if protocol and real is None:
        raise ValueError(f"protocol is {protocol}, but has no effect without --real")
    if not all(part.strip().isdigit() for part in steps.split(",")):
        raise ValueError(f"steps is {steps!r}; allowed: numbers such as 1000 or 500,1000")
    arms = STUDIES[name] if weights is None else pretraining_arms(weights)
    points = tuple(int(part) for part in steps.split(","))
    plan = StudyPlan(
        out, config, tuple(overrides or ()), points, seeds, sample_steps, real, metrics, tuple(protocol or ())
    )
    try:
        run_study(arms, plan)
    except CommandFailed as failed:
        raise typer.Exit(failed.code) from failed


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A Latte file (.pt); or a pipeline folder, to export it.")],
    out: Annotated[Path, typer.Argument(help="Pipeline folder to write; or a file that ends in .pt, to export.")],
    weights: Annotated[
        Literal["ema", "model"] | None,
        typer.Option(help="Needed where the file holds both; ema is the average.", show_default=False),
    ] = None,
    autoencoder: Annotated[
        str,
        typer.Option(help="Of its latents: folder, hub id, builtin, or auto: Stable Diffusion's. Unused to export."),
    ] = "auto",
    num_heads: Annotated[
        int | None, typer.Option(min=1, help="[default: that of the size of its width]", show_default=False)
    ] = None,
    frame_interval: Annotated[int, typer.Option(min=1, help="That of its training clips. Unused to export.")] = 3,
    fps: Annotated[float, typer.Option(min=0.1, help="Frames a second of generated videos. Unused to export.")] = 8.0,
) -> None:
    """Make a pipeline of a Latte file, or a Latte file of a pipeline, and say what became of each tensor."""
    from lavita.convert import convert_latte, export_latte

    if out.suffix == ".pt":
        print(export_latte(source, out))
    else:
        print(convert_latte(source, out, weights, autoencoder, num_heads, frame_interval=frame_interval, fps=fps))


def main() -> None:
    """Runs a command; bad input, as any `ValueError`, is one line on stderr and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)


def _train(run: Callable[[Any], Path], settings: Any) -> None:
    from lavita.runtime import Stopped

    try:
        result = run(settings)
        if os.environ.get("RANK", "0") == "0":
            print(result)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from stopped


def _load(cls: Any, config: str | None, overrides: list[str] | None, chosen: dict[str, Any]) -> Any:
    """The options of a command win over its configuration file, `a.b=c` over both."""
    from lavita.config import ConfigError, load_config, read_yaml

    words = overrides or []
    if config is None and not chosen and not words:
        raise ConfigError("nothing to train on: give --config FILE or --data DIR")
    values: dict[str, Any] = {}
    file = None
    if config is not None:
        packaged = Path(str(files("lavita") / "configs" / f"{config}.yaml"))
        file = packaged if "/" not in config and packaged.exists() else Path(config)
        values = read_yaml(file)
    for key, value in chosen.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    return load_config(cls, values, words, source=str(file) if file else "")

"""The entry point of all benchmarks: `python -m benchmarks COMMAND`, or `make bench ARGS="COMMAND ..."`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="benchmarks",
    help="Measure the speed, memory, scores and robustness of LAVITA on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

SECTIONS = {
    "forward": "One evaluation of the model, by all implementations.",
    "training": "An optimizer step, plain, compiled and checkpointed.",
    "sampling": "The sampling loop: guidance, caches, 8 bits.",
    "autoencoder": "Encoding and decoding frames.",
    "data": "Reading clips, compared with a training step.",
    "extractor": "The offline feature extractor of the evaluation.",
    "scaling": "How cost grows with frames, tokens, batch, width.",
}
"""Sections of the speed benchmark: modules of `benchmarks.speed`."""

Arcade = Annotated[Path, typer.Option(help="Folder with train/ and heldout/, each with one folder per class.")]
JsonFile = Annotated[Path | None, typer.Option(help="JSON file to write all rows to.", show_default=False)]
OutFolder = Annotated[Path, typer.Option(help="Folder to write to.")]


def add_speed_command(name: str, sections: tuple[str, ...], description: str) -> None:
    """Adds a command that measures sections of the speed benchmark."""

    def run(
        preset: Annotated[str, typer.Option(help="Model: S/2 to XL/8, tiny, mini, small.")] = "S/2",
        num_frames: Annotated[int, typer.Option(min=1, help="Frames per clip.")] = 16,
        sample_size: Annotated[int, typer.Option(min=1, help="Height and width of the latents.")] = 32,
        batch_size: Annotated[int, typer.Option(min=1, help="Clips per batch.")] = 1,
        precision: Annotated[
            str, typer.Option(help="auto, fp32 or bf16; auto is bf16 if the device is fast at it.")
        ] = "auto",
        repeats: Annotated[int, typer.Option(min=1, help="Rounds in which the candidates take turns.")] = 5,
        steps: Annotated[int, typer.Option(min=2, max=1000, help="Sampling steps.")] = 10,
        compiled: Annotated[
            bool, typer.Option("--compile/--no-compile", help="Include compiled models; they take a minute each.")
        ] = True,
        memory: Annotated[
            bool,
            typer.Option(
                "--memory/--no-memory", help="Measure peak memory as well, each candidate in its own process."
            ),
        ] = True,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
        out: Annotated[
            Path | None,
            typer.Option(help="Folder to write result.json, table.md and plots into.", show_default=False),
        ] = None,
    ) -> None:
        from benchmarks.speed.command import run_sections
        from benchmarks.speed.setup import Setup, resolve_precision
        from lavita.core.precision import pick_device

        chosen = pick_device(device)
        setup = Setup(
            preset=preset,
            num_frames=num_frames,
            sample_size=sample_size,
            batch_size=batch_size,
            precision=resolve_precision(precision, chosen),
            repeats=repeats,
            steps=steps,
            compiled=compiled,
            memory=memory,
            device=str(chosen),
        )
        run_sections(setup, sections, out)

    app.command(name, help=description)(run)


for section, work in SECTIONS.items():
    add_speed_command(section, (section,), work)
add_speed_command("speed", tuple(SECTIONS), "All of the above, in one report.")


@app.command()
def memory(
    only: Annotated[str, typer.Option(help="Only configurations whose title contains this.")] = "",
    out: JsonFile = None,
) -> None:
    """Compare predicted and measured peak memory.

    Training and sampling on a CPU, each configuration in its own process.
    """
    from benchmarks.speed.memory import compare

    compare(only, out)


@app.command()
def sequence_parallel(
    preset: Annotated[str, typer.Option(help="Model: S/2 to XL/8, tiny, mini, small.")] = "mini/2",
    variant: Annotated[int, typer.Option(min=1, max=4, help="Variant of the model.")] = 2,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of the clip.")] = 128,
    sample_size: Annotated[int, typer.Option(min=1, help="Height and width of the latents.")] = 16,
    steps: Annotated[int, typer.Option(min=2, help="Training steps.")] = 4,
    processes: Annotated[str, typer.Option(help="Numbers of processes, comma-separated.")] = "1,2,4",
    sharded: Annotated[bool, typer.Option("--sharded", help="FSDP2 instead of DDP.")] = False,
    out: JsonFile = None,
) -> None:
    """Train by processes that share each clip.

    Losses beside those of one process, memory per process, measured and predicted, and time per step, on the CPU.
    """
    from benchmarks.speed.sequence_parallel import Work, compare_processes

    if not all(part.isdecimal() for part in processes.split(",")):
        raise ValueError(f"processes is {processes!r}; allowed: numbers such as 1,2,4")
    work = Work(preset, variant, num_frames, sample_size, steps, sharded)
    compare_processes(work, [int(part) for part in processes.split(",")], out)


@app.command()
def startup(
    preset: Annotated[str, typer.Option(help="Transformer that is loaded.")] = "L/2",
    repeats: Annotated[int, typer.Option(min=1, help="Processes per command.")] = 7,
    out: JsonFile = None,
) -> None:
    """Time --help and the loading of models.

    Also measures the memory that loading takes.
    """
    from benchmarks.speed.startup import measure_startup

    measure_startup(preset, repeats, out)


@app.command()
def coverage(
    repeats: Annotated[int, typer.Option(min=1, help="Repeats per line.")] = 400,
    max_dim: Annotated[int, typer.Option(help="Leave out cases with more features.")] = 400,
    out: Annotated[Path | None, typer.Option(help="Markdown file to write the table to.", show_default=False)] = None,
) -> None:
    """Check what the 95% intervals of scores cover.

    Counts how often they cover the true value, on Gaussians of known distance.
    """
    from benchmarks.evaluation.coverage import study_coverage

    study_coverage(repeats, max_dim, out)


@app.command()
def monotone(
    data: Arcade,
    out: OutFolder,
    num_clips: Annotated[int, typer.Option(help="Clips per side; Frechet distances need more than 384.")] = 512,
    resolution: Annotated[int, typer.Option(help="Height and width of the frames.")] = 64,
    classifier: Annotated[
        Path | None,
        typer.Option(help="Cache folder of trained classifiers, as in lavita evaluate --cache.", show_default=False),
    ] = None,
) -> None:
    """Check that scores worsen on degraded clips.

    Real clips are degraded more and more in six ways; says which score is blind to what.
    """
    from benchmarks.evaluation.monotone import study_degradations

    study_degradations(data, out, num_clips, resolution, classifier)


@app.command()
def evaluation_speed(
    data: Arcade,
    out: OutFolder,
    num_clips: Annotated[int, typer.Option(help="Clips per side.")] = 2048,
    resolution: Annotated[int, typer.Option(help="Height and width of the frames.")] = 64,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics, comma-separated. Default: all.", show_default=False)
    ] = None,
    floor: Annotated[bool, typer.Option("--floor/--no-floor", help="Also score real clips against real ones.")] = True,
) -> None:
    """Time a full evaluation stage by stage.

    Uses the offline extractor, without and with cached features. Processes share the work under
    `torchrun --nproc-per-node 2 -m benchmarks evaluation-speed ...`.
    """
    from benchmarks.evaluation.evaluation_speed import time_evaluation

    time_evaluation(data, out, num_clips, resolution, metrics.split(",") if metrics else None, floor)


@app.command()
def recipes(
    out: OutFolder,
    model: Annotated[str, typer.Option(help="Pipeline folder, or builtin.")] = "builtin",
    data: Annotated[
        Path | None, typer.Option(help="Folder with train/; needed for quality.", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds per class.")] = "0-19",
    num_real_clips: Annotated[int, typer.Option(help="Real clips to score against.")] = 2048,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of cached features. Default: OUT/cache.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of timing in which the recipes take turns.")] = 3,
    names: Annotated[
        str | None, typer.Option("--recipes", help="Recipes, comma-separated. Default: all.", show_default=False)
    ] = None,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Sample and score.")] = True,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Time the sampling loops.")] = True,
) -> None:
    """Compare sampling recipes in quality and time.

    The reference is the paper's 250 DDPM steps. Videos and scores of an earlier run in the same folder are kept, so
    that a stopped run resumes.
    """
    from benchmarks.evaluation.recipes import compare_recipes

    compare_recipes(
        out, model, data, seeds, num_real_clips, cache, rounds, names.split(",") if names else None, quality, time
    )


@app.command()
def autoencoder_losses(
    data: Annotated[list[Path], typer.Option(help="Folder of training videos; may be given several times.")],
    held_out: Annotated[list[Path], typer.Option(help="Folder of videos to score on; may be given several times.")],
    out: OutFolder,
    resolution: Annotated[
        list[int] | None,
        typer.Option(
            min=8, help="Side of the scored frames; may be given several times. Default: 64.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of lavita autoencoder train: init_from=builtin steps=1000.", show_default=False),
    ] = None,
) -> None:
    """Compare the terms of an autoencoder's loss.

    L1, edges and motion, the perceptual and the adversarial term are added one by one, each from the same start. A
    stopped run resumes in the same folder.
    """
    from benchmarks.evaluation.autoencoder_losses import compare_losses

    compare_losses(data, held_out, out, resolution or [64], settings or [])


@app.command()
def sprites(
    real: Annotated[Path, typer.Option(help="Arcade videos, one folder per game: DATA/train.")],
    generated: Annotated[Path, typer.Option(help="Samples, one folder per game.")],
    out: JsonFile = None,
) -> None:
    """Count players and cars in generated arcade clips.

    Objects of each game are found by their colours, in real and in generated frames.
    """
    from benchmarks.evaluation.sprites import study_sprites

    study_sprites(real, generated, out)


@app.command()
def continuation(
    real: Annotated[Path, typer.Option(help="Videos whose first frames were given.")],
    generated: Annotated[Path, typer.Option(help="Folder of lavita sample --video REAL.")],
    keep_frames: Annotated[int, typer.Option(min=1, help="Number of given frames.")] = 1,
    out: JsonFile = None,
) -> None:
    """Compare continuations with what came next.

    PSNR by horizon, beside a repeated frame and a linear extrapolation.
    """
    from benchmarks.evaluation.continuation import study_continuation

    study_continuation(real, generated, keep_frames, out)


@app.command()
def drift(
    real: Annotated[Path, typer.Option(help="Real videos, one folder per class.")],
    generated: Annotated[
        list[Path], typer.Option(help="Long samples, one folder per class; may be given several times.")
    ],
    num_frames: Annotated[int, typer.Option(min=2, help="Frames of a stretch.")] = 16,
    num_real_clips: Annotated[int, typer.Option(min=3, help="Real clips to compare with.")] = 256,
    resolution: Annotated[int, typer.Option(min=8, help="Height and width of the frames.")] = 64,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache folder of trained classifiers, as in lavita evaluate --cache.", show_default=False),
    ] = None,
    out: JsonFile = None,
) -> None:
    """Score long videos stretch by stretch.

    Kernel distance from real clips, right class and motion over time, with intervals: does a video drift?
    """
    from benchmarks.evaluation.drift import study_drift

    study_drift(real, generated, num_frames, num_real_clips, resolution, cache, out)


@app.command()
def crash(
    data: Annotated[Path, typer.Option(help="Videos, one folder per class.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; an existing one is replaced.")] = Path("runs/crash"),
    kills: Annotated[int, typer.Option(min=1, help="How often a command is killed.")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the moments at which it is killed.")] = 0,
    autoencoder: Annotated[str, typer.Option(help="Autoencoder folder, or builtin.")] = "builtin",
    resolution: Annotated[int, typer.Option(help="Height and width of the frames.")] = 64,
) -> None:
    """Kill and restart commands and compare the end.

    Kills `lavita encode` and `lavita train` at random moments; the end must equal that of uninterrupted runs.
    """
    from benchmarks.robustness.crash import run_crashes

    sys.exit(run_crashes(data, out, kills, steps, seed, autoencoder, resolution))


@app.command()
def fuzz(
    kinds: Annotated[
        str, typer.Option(help="Kinds of inputs, comma-separated. Default: all.", show_default=False)
    ] = "",
    count: Annotated[int, typer.Option(min=1, help="Inputs of each kind.")] = 100,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first input of each kind.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Inputs that run at a time.")] = 2,
    folder: Annotated[Path, typer.Option(help="Folder for material, cases and the log.")] = Path("runs/fuzz"),
    out: Annotated[
        Path | None, typer.Option(help="Markdown file to write the result to, with a JSON file.", show_default=False)
    ] = None,
    only: Annotated[
        str,
        typer.Option(help="Run one input, as KIND:SEED, print everything, and keep its folder.", show_default=False),
    ] = "",
) -> None:
    """Try bad inputs on every command.

    Damaged files, odd folders, tables, configurations, options, pipelines and checkpoints, each from a seed. A stopped
    campaign goes on where it was; the exit code is 1 if a property is violated.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # threads do not survive a fork
        os.environ[name] = "1"
    from benchmarks.robustness.fuzz.campaign import KINDS, open_fuzzer, replay, run_campaign
    from benchmarks.robustness.fuzz.report import print_summary, write_report

    chosen = kinds.split(",") if kinds else list(KINDS)
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise ValueError(f"kinds has {unknown[0]!r}; allowed: {', '.join(KINDS)}")
    fuzzer = open_fuzzer(folder)
    if only:
        sys.exit(replay(fuzzer, only))
    results = run_campaign(fuzzer, dict.fromkeys(chosen, count), first_seed, workers)
    if out is not None:
        write_report(results, out, " ".join(["python -m benchmarks", *sys.argv[1:]]))
    print_summary(results)
    sys.exit(int(any(result.faults for result in results)))


@app.command()
def mutants(
    out: OutFolder = Path("runs/mutants"),
    only: Annotated[str, typer.Option(help="Only faults whose name or file contains this.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Seconds after which the tests of a fault are stopped.")] = 300,
) -> None:
    """Plant faults and see whether tests notice.

    Each fault is one changed line in a copy of the sources; its tests then run against the copy. A stopped run resumes
    in the same folder. The exit code is 0 if every fault is caught.
    """
    from benchmarks.robustness.mutants import run_mutants

    sys.exit(run_mutants(out, only, limit))


def main() -> None:
    """Runs a command; bad input is one line on stderr and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

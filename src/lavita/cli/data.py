"""Commands for data sets: `data inspect`, `data photos` and `encode`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lavita.cli.options import DataSet, SplitOption, app, data_app
from lavita.core.names import DataSetName


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="Folder of videos.")],
    dataset: Annotated[
        DataSetName | None,
        typer.Option(
            help="Layout of the folder. default: any videos, with a guess at the data set", show_default=False
        ),
    ] = None,
    split: SplitOption = None,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 16,
    frame_interval: Annotated[
        int, typer.Option(min=1, help="Step between the frames of a clip; 1 takes every frame.")
    ] = 3,
    captions: Annotated[
        Path | None, typer.Option(help="Table of captions to compare with the videos.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder outside of FOLDER to write contact_sheet.png and inspection.json into.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what a folder of videos holds: classes, splits, sizes, rates, lengths, clips, broken videos."""
    from lavita.core.files import write_json
    from lavita.data.inspect import inspect_dataset, print_inspection

    sheet = None if out is None else out / "contact_sheet.png"
    found = inspect_dataset(folder, dataset, split, num_frames, frame_interval, captions, sheet)
    if out is not None:
        write_json(out / "inspection.json", found.to_json())
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_inspection(found)
        if out is not None:
            print(out)


@data_app.command("photos")
def data_photos(
    photos: Annotated[Path, typer.Argument(help="Folder of photographs, with any folders below it.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the videos into, outside of PHOTOS.")],
    videos_per_photo: Annotated[int, typer.Option(min=1, help="Videos of each photograph.")] = 4,
    num_frames: Annotated[int, typer.Option(min=1, help="Frames per video, at 25 frames per second.")] = 16,
    resolution: Annotated[int, typer.Option(min=16, help="Side of the frames in pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the movements.")] = 0,
) -> None:
    """Render videos of photographs under a moving camera, to train an autoencoder on.

    A piece of another photograph passes in front.
    """
    from lavita.data.moving_photos import render_moving_photos

    count = render_moving_photos(photos, out, videos_per_photo, num_frames, resolution, seed)
    print(f"{out}: {count} videos")


@app.command()
def encode(
    data: Annotated[Path, typer.Option(help="Folder of videos.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache, outside of that of the videos.")],
    autoencoder: Annotated[
        str,
        typer.Option(
            help="Folder, hub id, builtin, arcade, or auto: builtin up to 128 pixels, Stable Diffusion's above."
        ),
    ] = "auto",
    resolution: Annotated[
        str | None,
        typer.Option(
            help="Size of the frames in pixels: 64, or height x width: 96x160. default: 256", show_default=False
        ),
    ] = None,
    fit: Annotated[
        Literal["crop", "pad", "bucket"],
        typer.Option(
            help="How videos of other sizes get it. crop: the middle is cut out; pad: black bars; bucket: each gets "
            "the size of the nearest --bucket."
        ),
    ] = "crop",
    bucket: Annotated[
        list[str] | None,
        typer.Option(
            help="With --fit bucket, instead of --resolution: a shape of clips, frames x height x width, such as "
            "16x64x64; given several times, for the shapes in data.buckets.",
            show_default=False,
        ),
    ] = None,
    frame_interval: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --fit bucket, data.frame_interval, for a video goes to a bucket whose clips it is long enough "
            "for. default: 3",
            show_default=False,
        ),
    ] = None,
    flip: Annotated[bool, typer.Option(help="Also encode the mirrored frames, for data.horizontal_flip=true.")] = True,
    images: Annotated[
        bool,
        typer.Option("--images", help="Encode the image files below the folder instead of videos, for joint training."),
    ] = False,
    dataset: DataSet = "folder",
    split: SplitOption = None,
    shard_mb: Annotated[
        int, typer.Option(min=1, help="Size of the cache's files in megabytes; each holds many videos.")
    ] = 256,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read finished files back, and write damaged ones again.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Encode every frame of every video once, so that training can read latents.

    Run the same command again to resume, or to update the cache after the videos have changed. Under torchrun, several
    processes share the work.
    """
    from lavita.core.config import load_config
    from lavita.core.precision import pick_device
    from lavita.core.processes import processes
    from lavita.core.sizes import Bucket, parse_size
    from lavita.data.buckets import assign_buckets
    from lavita.data.catalog import Catalog
    from lavita.data.config import DataConfig
    from lavita.data.datasets import open_dataset
    from lavita.data.latent_cache.encode import check_target, encode_dataset
    from lavita.models.autoencoder import load_autoencoder
    from lavita.models.packaged import autoencoder_source

    if (fit == "bucket") != bool(bucket) or (bucket and (resolution is not None or images)):
        raise ValueError("--fit bucket takes --bucket, once or more, instead of --resolution, and is not for --images")
    if frame_interval is not None and not bucket:
        raise ValueError(f"frame_interval is {frame_interval}, but has no effect without --fit bucket")
    fields: dict[str, Any] = {"fit": fit, "frame_interval": frame_interval or 3}
    if bucket:
        fields["buckets"] = [Bucket.parse(text) for text in bucket]
    else:
        fields["resolution"] = parse_size("256" if resolution is None else resolution)
    shapes = load_config(DataConfig, fields)
    check_target(out, data)
    with processes() as team:

        def open_catalog() -> Catalog:
            found = open_dataset(data, dataset, split, min_frames=shapes.clip_span if bucket else 1, images=images)
            return assign_buckets(found, shapes.buckets, shapes.frame_interval)

        catalog = team.first_says(open_catalog() if team.is_first else None)
        vae = load_autoencoder(autoencoder_source(autoencoder, shapes.longest_side), pick_device(device))
        manifest = encode_dataset(
            catalog,
            out,
            vae,
            shapes.resolution,
            flip,
            team=team,
            shard_bytes=shard_mb * 10**6,
            verify=verify,
            fit=fit,
            buckets=shapes.buckets,
            frame_interval=shapes.frame_interval if bucket else None,
        )
    if team.is_first:
        print(f"{out}: {len(manifest['videos'])} videos, {len(manifest['broken'])} broken")

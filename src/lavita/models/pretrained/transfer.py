"""Initialises a model with pretrained weights, tensor by tensor, and reports which ones it took.

In this file `here` is the model, `there` the source of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from lavita.core.text import normal_name
from lavita.models.embeddings import spatial_positions, temporal_positions
from lavita.models.presets import block_plan
from lavita.models.pretrained.actions import transfer_actions
from lavita.models.pretrained.load_report import LoadReport, listed
from lavita.models.pretrained.reading import BLOCK_LAYERS, LABEL_TABLE, Source, Weights, open_source
from lavita.models.pretrained.words import transfer_words
from lavita.models.shapes import stored_grid
from lavita.models.transformer import LavitaTransformer3DModel


def initialize(
    model: LavitaTransformer3DModel, source: str, weights: Weights | None = None, closed: bool = True
) -> LoadReport:
    """Initialises a model with pretrained weights, as far as they fit.

    With an image model's weights, the attention in time of a video model is closed, by a zero gate or a zero
    projection, and opens in training: at first no frame sees another. What a frame then passes through depends on the
    variant. In Variant 3 it is the whole image model. In Variants 1 and 2 the blocks that attend in time keep their
    MLPs only, so that half of the image model's attentions are missing. In Variant 4, which has half as many heads, two
    of the image model's become one. Positions in time, unless they are rotary, are added to what the image model knows,
    and distinguish the frames at first. So only Variant 3 with `rope` starts as the image model applied to every frame.

    Without `closed`, only positions and labels are adapted (Sec. 3.6): blocks that attend in time start as the image
    model's blocks, and the attentions in time of Variants 3 and 4 as they are.

    Tensors that the source does not have keep their initial values or become zero: the embedding of another kind of
    condition, the decoder if something else is predicted, and both decoder and patch embedding if the latents have
    another number of channels, so come from another autoencoder. Unknown classes start as the source's "no label".

    Args:
        model: a freshly built model.
        source: `builtin`, the package's arcade model; a folder or hub id of a LAVITA or DiT pipeline in diffusers'
            layout, or of its transformer; the folder of a run, for its pipeline; or a `.pt` file of
            facebookresearch/DiT or of Latte.
        weights: which set of weights of a file to read: the averaged ones (`ema`) or the others (`model`). Required if
            it has both. A run has averaged ones only.
        closed: whether attention in time adds nothing at first; only for an image model.

    Returns:
        Which tensors were taken. Weights of diffusers' `DiTTransformer2DModel` are used with the timestep frequencies
        that DiT was trained with, 10000^(-i/128); diffusers' class computes 10000^(-i/127).

    Raises:
        ValueError: for a source that is missing, damaged, of another kind or size, or holds more than tensors, or if
            `closed` is false and has no effect. The model is then unchanged.
    """
    return transfer_weights(model, open_source(source, weights), closed)


def transfer_weights(model: LavitaTransformer3DModel, source: Source, closed: bool = True) -> LoadReport:
    """Gives a model the weights of a source that was read; arguments and errors as in `initialize`."""
    _check_fields(model, source)
    transfer = _Transfer(model, source)
    transfer_words(transfer.targets, source.tensors, transfer.take, transfer.new, transfer.drop)
    if source.kind == "image":
        _transfer_image(transfer, closed)
    elif not closed:
        raise ValueError(f"{source.name}: is a video model, whose attention in time init_closed=false would not change")
    else:
        _transfer_video(transfer)
    return transfer.finish()


def _check_fields(model: LavitaTransformer3DModel, source: Source) -> None:
    """Checks that the sizes of model and source agree, and for a video model its structure, too."""
    here, there = dict(model.config), dict(source.config)
    for fields in (here, there):
        fields["width of the MLPs"] = int(fields["hidden_size"] * fields["mlp_ratio"])
    keys = ["hidden_size", "num_heads", "patch_size", "width of the MLPs"]
    if source.kind == "video":
        keys += ["variant", "num_blocks", "patch_embedding", "conditioning"]
        if here["patch_embedding"] == "compression":
            keys += ["tube_size", "learn_sigma"]
    for key in keys:
        if key in there and there[key] != here[key]:
            raise ValueError(f"{source.name}: {key} is {there[key]}, but this model's is {here[key]}; they must agree")


class _Transfer:
    """Collects new values for a model's tensors, with the report; the model is written to only at the end."""

    def __init__(self, model: LavitaTransformer3DModel, source: Source) -> None:
        self.model, self.source = model, source
        self.targets: dict[str, torch.Tensor] = model.state_dict()
        self.values: dict[str, torch.Tensor] = {}
        self.report = LoadReport(source.name)
        self.used: set[str] = set()
        self.useless: dict[str, str] = {}

    def take(
        self,
        name: str,
        how: str = "",
        value: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
        origin: str | None = None,
        partly_new: bool = False,
    ) -> None:
        """Takes the model's tensor `name` from the source.

        Args:
            name: name of the model's tensor.
            how: how its value is made from the source's, for the report; empty if it is equal.
            value: the new value, or a function from the source's to it; by default the source's.
            origin: name of the source's tensor; by default `name`.
            partly_new: whether a part of the value does not come from the source.

        Raises:
            ValueError: if the new value does not have the shape of the model's tensor.
        """
        origin = origin or name
        tensor = self.source.tensors[origin]
        result = tensor if value is None else value if isinstance(value, torch.Tensor) else value(tensor)
        if result.shape != self.targets[name].shape:
            shapes = f"{tuple(tensor.shape)}, but {name} of this model {tuple(self.targets[name].shape)}"
            raise ValueError(f"{self.source.name}: {origin} has the shape {shapes}")
        self.values[name] = result
        self.used.add(origin)
        how = "; ".join(filter(None, (how, self.source.notes.get(origin))))
        if how:
            self.report.adapted[name] = how
        else:
            self.report.loaded.append(name)
        if partly_new:
            self.report.partly_new.append(name)

    def new(self, name: str, why: str, zero: bool = False) -> None:
        """Leaves the model's tensor `name` at its initial value, or sets it to zero."""
        self.report.new[name] = why
        if zero:
            self.values[name] = torch.zeros_like(self.targets[name])

    def new_condition(self, why: str) -> None:
        """Leaves the embedding of labels or texts new, but sets its last layer to zero, so that it adds nothing."""
        last = (LABEL_TABLE, "y_embedder.mlp.2.weight", "y_embedder.mlp.2.bias")
        for name in self.targets:
            if name.startswith("y_embedder."):
                self.new(name, f"{why}; it adds nothing at first", zero=name in last)

    def drop(self, prefix: str, why: str) -> None:
        """Records why the source's tensors with this prefix, except those taken already, are not used."""
        for name in self.source.tensors:
            if name.startswith(prefix) and name not in self.used:
                self.useless.setdefault(name, why)

    def pending(self) -> list[str]:
        """Names of the model's tensors that are neither taken nor new yet."""
        report = self.report
        done = {*report.loaded, *report.adapted, *report.new}
        return [name for name in self.targets if name not in done]

    @torch.no_grad()
    def finish(self) -> LoadReport:
        """Writes the collected values to the model and completes the report."""
        assert not self.pending()
        for name, value in self.values.items():
            self.targets[name].copy_(value)
        for name in self.source.tensors:
            own = self.source.origins.get(name, [name])
            if name in self.used:
                self.report.used += own
            else:
                self.report.dropped |= dict.fromkeys(own, self.useless[name])
        self.report.dropped |= self.source.useless
        return self.report


def _transfer_video(transfer: _Transfer) -> None:
    """Takes a video model's tensors, by name: source and model have the same structure."""
    _transfer_condition(transfer)
    transfer_actions(transfer.model.config, transfer.source.config, transfer.take)
    _transfer_positions(transfer)
    _transfer_patch_embedding(transfer)
    _transfer_decoder(transfer)
    for name in transfer.pending():
        if name in transfer.source.tensors:
            transfer.take(name)
        else:
            transfer.new(name, "the source has none")
    transfer.drop("temp_embed", f"positions in time are {transfer.model.config['temporal_position']} here")
    transfer.drop("", "this model has no such part")


def _transfer_condition(transfer: _Transfer) -> None:
    """Takes the embedding of labels or texts if source and model have the same kind of condition."""
    here, there = transfer.model.config, transfer.source.config
    names = [name for name in transfer.targets if name.startswith("y_embedder.")]
    given = [name for name in transfer.source.tensors if name.startswith("y_embedder.")]
    if LABEL_TABLE in given and LABEL_TABLE not in names and here["conditioning"] == "s_adaln":
        # S-AdaLN adds the vectors of timestep and label: with this sum, the model equals the source without a label.
        null = transfer.source.tensors[LABEL_TABLE][-1]
        transfer.take("t_embedder.mlp.2.bias", "the source's vector of `no label` is added", lambda bias: bias + null)
    if not names:
        transfer.drop("y_embedder.", "this model has neither labels nor texts")
        return
    why = ""
    if sorted(names) != sorted(given):
        why = "the source has " + ("another kind of condition" if given else "neither labels nor texts")
    elif LABEL_TABLE in names:
        _transfer_classes(transfer)
        return
    elif any(transfer.source.tensors[name].shape != transfer.targets[name].shape for name in names):
        sizes = [transfer.source.tensors[names[0]].shape, transfer.targets[names[0]].shape]
        why = f"texts have {sizes[0][1]} numbers there, {sizes[1][1]} here"
    if why:
        transfer.new_condition(why)
        transfer.drop("y_embedder.", why)
        return
    encoders = there.get("text_encoder"), here["text_encoder"]
    note = "" if encoders[0] == encoders[1] else "unchanged, though the text encoder is {} there, {} here"
    for name in names:
        transfer.take(name, note.format(*encoders))


def _transfer_classes(transfer: _Transfer) -> None:
    """Takes the table of classes: rows by name, and for classes unknown to the source its row of `no label`."""
    here, there = (
        [normal_name(name) for name in config.get("class_names") or ()]
        for config in (transfer.model.config, transfer.source.config)
    )
    num_classes, table = transfer.model.config["num_classes"], transfer.source.tensors[LABEL_TABLE]
    if table.shape[0] == num_classes + 1 and (not here or not there or here == there):
        transfer.take(LABEL_TABLE)
        return
    null = table.shape[0] - 1
    names = here or [str(label) for label in range(num_classes)]
    # Without names, equal labels do not mean equal classes.
    rows = [there.index(name) if here and name in there else null for name in names]
    same = [name for name, row in zip(names, rows, strict=True) if row != null]
    new = [name for name, row in zip(names, rows, strict=True) if row == null]
    parts = [f"{null} classes there, {num_classes} here"]
    if same:
        parts.append(f"by name: {listed(same)}")
    if new:
        parts.append(f"new, starting as the source's `no label`: {listed(new)}")
    transfer.take(LABEL_TABLE, "; ".join(parts), table[[*rows, null]], partly_new=bool(new))


def _transfer_positions(transfer: _Transfer) -> None:
    """Takes the fixed spatial and temporal positions, or recomputes them if their number differs."""
    tensors, width = transfer.source.tensors, transfer.model.config["hidden_size"]
    num_tokens = transfer.model.config["num_frames"] // transfer.model.tube_size
    for name in ("pos_embed", "temp_embed"):
        here, there = transfer.targets.get(name), tensors.get(name)
        if here is None:
            continue
        grid = (0, 0) if there is None else stored_grid(transfer.source.config, there.shape[1])
        if there is None:
            transfer.new(name, "fixed sin-cos, computed; the source stores no positions")
        elif here.shape == there.shape and (name == "temp_embed" or grid == transfer.model.grid):
            is_image = transfer.source.kind == "image"
            transfer.take(name, f"replicated over {num_tokens} frames" if is_image else "")
        else:
            length, is_space = there.shape[1], name == "pos_embed"
            rows, columns, steps = (np.arange(count, dtype=np.float64) for count in (*grid, length))
            table = spatial_positions(rows, columns, width) if is_space else temporal_positions(steps, width)
            # The tolerance is for tables stored in half precision.
            if there.shape != table.shape or not torch.allclose(there.float(), table, rtol=0, atol=1e-2):
                raise ValueError(
                    f"{transfer.source.name}: {name} is not fixed sin-cos, so its {length} places cannot be "
                    f"recomputed for the {here.shape[1]} of this model"
                )
            what = "places of a frame" if is_space else "frames"
            transfer.take(name, f"recomputed: {here.shape[1]} {what} here, {length} there", here)


def _other_latents(transfer: _Transfer) -> str:
    """Why nothing of the source can read or write this model's latents; empty if their channels are as many."""
    here, there = transfer.model.config["in_channels"], transfer.source.config["in_channels"]
    return "" if here == there else f"latents of another autoencoder: {there} channels there, {here} here"


def _transfer_patch_embedding(transfer: _Transfer) -> None:
    """Takes the layer that turns patches into tokens; an image model's is repeated for a tube's frames."""
    if why := _other_latents(transfer):
        for part in ("weight", "bias"):
            transfer.new(f"x_embedder.proj.{part}", why)
        transfer.drop("x_embedder.", why)
        return
    tube = transfer.model.tube_size
    if transfer.source.kind == "image" and transfer.model.config["patch_embedding"] == "compression":
        how = f"repeated over the {tube} frames of a tube, divided by {tube}"
        transfer.take("x_embedder.proj.weight", how, lambda value: value[:, :, None].repeat(1, 1, tube, 1, 1) / tube)
    for name in transfer.pending():
        if name.startswith("x_embedder."):
            transfer.take(name)


def _transfer_decoder(transfer: _Transfer) -> None:
    """Takes the final linear layer, without or with new channels of the variance, repeated for a tube's frames."""
    config, known = transfer.model.config, transfer.source.config
    is_image = transfer.source.kind == "image"
    why = _other_latents(transfer)
    if not why and config["prediction_type"] != known["prediction_type"]:
        why = f"the source predicts {known['prediction_type']}, this model {config['prediction_type']}"
    elif not why and is_image and config["conditioning"] == "all_tokens":
        why = "its norm is not the source's"
    why += "; it starts at zero" if why else ""
    tube = transfer.model.tube_size if is_image else 1
    there = config["in_channels"] * (1 + known["learn_sigma"])
    here = transfer.model.out_channels
    changes = []
    if here < there:
        changes.append("without the channels of the variance")
    if here > there:
        changes.append("the variance, which the source does not predict, starts at zero")
    if tube > 1:
        changes.append(f"repeated for the {tube} frames of a tube")

    def adapt(value: torch.Tensor) -> torch.Tensor:
        rows = value.reshape(config["patch_size"] ** 2, there, -1)[:, :here]  # (P P, C, D); a bias (P P, C, 1)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, here - rows.shape[1]))
        return rows.repeat(1, tube, 1).reshape(-1, *value.shape[1:])  # channel c of frame s is number s C + c

    for part in ("weight", "bias"):
        name = f"final_layer.linear.{part}"
        if why:
            transfer.new(name, why, zero=True)
            transfer.drop(name, why)
        else:
            transfer.take(name, "; ".join(changes), adapt if changes else None, partly_new=here > there)
    if why:
        for name in transfer.pending():
            if name.startswith("temporal_upsample."):
                transfer.new(name, "follows the final layer, which is new")
        transfer.drop("temporal_upsample.", why)


def _transfer_image(transfer: _Transfer, closed: bool) -> None:
    """Takes an image model's tensors; with `closed` such that no frame sees another."""
    tensors, config = transfer.source.tensors, transfer.model.config
    transfer.new_condition("the source's are classes of images (Sec. 3.6)")
    _transfer_decoder(transfer)
    _transfer_positions(transfer)
    _transfer_patch_embedding(transfer)
    for name in transfer.pending():
        if name.startswith(("t_embedder.", "final_layer.adaLN_modulation.")):
            transfer.take(name)
    _transfer_image_blocks(transfer, closed)
    starts = {
        **({".temporal_attn.proj.": ("zero: attention in time adds nothing at first", True)} if closed else {}),
        ".temporal_attn.": ("attention in time, which an image model does not have", False),
        "norm": ("a norm of all_tokens, which the source does not have", False),
        "temporal_upsample.": ("gives each frame of a tube its own channels", False),
    }
    for name in transfer.pending():
        why, zero = next(start for part, start in starts.items() if part in name)
        transfer.new(name, why, zero)
    transfer.drop("y_embedder.", "the classes of images (Sec. 3.6)")
    for name in tensors:
        if config["conditioning"] == "all_tokens" and ".adaLN_modulation." in name:
            transfer.drop(name, "all_tokens has no modulation")
    transfer.drop("blocks.", "this model has no such block, or no such part in it")


def _transfer_image_blocks(transfer: _Transfer, closed: bool) -> None:
    """Takes an image model's blocks, evenly spaced if the numbers differ; `closed` closes attention in time."""
    config = transfer.model.config
    width, here, there = config["hidden_size"], config["num_blocks"], transfer.source.config["num_blocks"]
    plain = config["conditioning"] == "all_tokens"
    picks = [round(index * (there - 1) / max(here - 1, 1)) for index in range(here)]
    spaced = "" if here == there else f"from blocks {' '.join(map(str, picks))} of the source's {there}"

    def close_gate(value: torch.Tensor) -> torch.Tensor:
        closed = value.clone()
        closed[2 * width : 3 * width] = 0  # the gate follows shift and scale
        return closed

    for index, mixing in enumerate(block_plan(config["variant"], here)):
        for layer in BLOCK_LAYERS:
            for part in ("weight", "bias"):
                name, origin = f"blocks.{index}.{layer}.{part}", f"blocks.{picks[index]}.{layer}.{part}"
                if name not in transfer.targets:
                    continue
                if closed and mixing == "time" and layer == "adaLN_modulation.1":
                    how, change = "the gate of attention in time is zero at first", close_gate
                elif closed and mixing == "time" and layer == "attn.proj" and plain:
                    transfer.new(name, "zero: attention in time adds nothing at first", zero=True)
                    continue
                elif mixing == "space_and_time" and layer == "attn.qkv":
                    how, change = "two heads of the source are one, twice as wide", None
                else:
                    how, change = "", None
                how = "; ".join(filter(None, (how, spaced)))
                transfer.take(name, how, change, origin, partly_new=change is not None)

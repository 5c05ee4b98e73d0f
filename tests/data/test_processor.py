"""Image preprocessing as published files ask for it, against transformers' own processors."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmscale.data.images import MODES, decode_image, preprocess
from vlmscale.data.processor import CONFIG, NESTED, ImageProcessor, processor_config, read_processor
from vlmscale.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
CLIP: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}}
CLIP["crop_size"] = {"height": 56, "width": 56}
SIGLIP: dict[str, Any] = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}}
LLAVA: dict[str, Any] = {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
OLD_CLIP: dict[str, Any] = {
    "crop_size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
    "size": 56,
}
SHAPES = [(1, 1), (7, 5), (337, 335), (427, 640), (3, 1000), (1000, 3), (336, 336), (56, 56), (57, 113)]


def photo(height: int, width: int) -> np.ndarray:
    """Gradients and noise through JPEG, as a camera's file is decoded."""
    rng = np.random.default_rng(height * 7919 + width)
    down, across = np.mgrid[0:height, 0:width]
    ramps = np.stack(
        [down * 255 / height, across * 255 / width, (down + across) * 255 / (height + width)], -1
    )
    pixels = np.clip(ramps + rng.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return decode_image(buffer.getvalue())


def write(directory: Path, data: object, name: str = CONFIG) -> Path:
    (directory / name).write_text(json.dumps(data))
    return directory


def reference(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")


def apply_reference(theirs: Any, image: np.ndarray) -> np.ndarray:
    # A Pillow image, because an array of 3 rows would be taken for one of 3 channels.
    pixels = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    return np.moveaxis(pixels, 0, -1)


def check_equal(directory: Path, shapes: list[tuple[int, int]] = SHAPES) -> None:
    ours, theirs = read_processor(directory), reference(directory)
    for shape in shapes:
        image = photo(*shape)
        result = ours(image)
        assert result.dtype == np.float32
        assert result.shape == (*ours.shape, 3)
        np.testing.assert_allclose(result, apply_reference(theirs, image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [56, 336])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "Llava pad"])
def test_equal_to_transformers(kind: str, side: int, tmp_path: Path) -> None:
    config = {"CLIP": CLIP, "Siglip": SIGLIP, "Llava pad": LLAVA}[kind]
    resized = dict.fromkeys(config["size"], side)
    check_equal(write(tmp_path, {**config, "size": resized, "crop_size": side}))


SPELLINGS: dict[str, dict[str, Any]] = {
    "old hub file": OLD_CLIP,
    "both types": {**CLIP, "feature_extractor_type": "SomethingElse"},
    "defaults": {"image_processor_type": "CLIPImageProcessor"},
    "siglip defaults": {"image_processor_type": "SiglipImageProcessor"},
    "llava defaults": {"image_processor_type": "LlavaImageProcessor"},
    "null is false": {**SIGLIP, "do_normalize": None, "do_rescale": None, "do_center_crop": None},
    "null where not used": {
        **SIGLIP,
        "do_normalize": None,
        "image_mean": None,
        "crop_size": None,
        "do_pad": None,
    },
    "size is a list": {**SIGLIP, "size": [40, 56]},
    "both sides and a crop": {**CLIP, "size": {"height": 70, "width": 60}},
    "default_to_square": {**SIGLIP, "size": 56, "default_to_square": True},
    "crop is a list": {**CLIP, "crop_size": [40, 56]},
    "crop is larger": {**CLIP, "crop_size": {"height": 75, "width": 60}},
    "crop is odd and smaller": {**CLIP, "crop_size": {"height": 31, "width": 50}},
    "siglip with a crop": {**SIGLIP, "do_center_crop": True, "crop_size": 48},
    "pad, oblong": {**LLAVA, "size": {"height": 40, "width": 56}, "do_center_crop": False},
    "pad, no crop": {**LLAVA, "do_center_crop": False},
    "pad, half": {**LLAVA, "image_mean": list(HALF), "image_std": list(HALF)},
    "no pad": {**LLAVA, "do_pad": False},
    "no resize": {**CLIP, "do_resize": False},
    "no rescale": {**CLIP, "do_rescale": False},
    "no rescale, pixels' own mean": {**CLIP, "do_rescale": False, "image_mean": [120, 110, 100.5]},
    "no normalisation": {**CLIP, "do_normalize": False},
    "neither": {**CLIP, "do_normalize": False, "do_rescale": False},
    "pad, no normalisation": {**LLAVA, "do_normalize": False},
    "no rgb conversion": {**CLIP, "do_convert_rgb": False},
    "rescale factor": {
        **SIGLIP,
        "rescale_factor": 1 / 127.5,
        "image_mean": [1, 1, 1],
        "image_std": [1, 1, 1],
    },
    "one mean for all": {**SIGLIP, "image_mean": 0.4, "image_std": 0.2},
    "inert keys": {**SIGLIP, "processor_class": "X", "data_format": "channels_first", "device": None},
    **{f"resample {number}": {**CLIP, "resample": number} for number in range(6)},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_and_flag_equals_transformers(name: str, tmp_path: Path) -> None:
    check_equal(write(tmp_path, SPELLINGS[name]), [(7, 5), (97, 140), (140, 60), (224, 224), (9, 300)])


def test_fast_and_pil_names_are_the_same_processor(tmp_path: Path) -> None:
    plain = read_processor(write(tmp_path, SIGLIP))
    for suffix in ("Fast", "Pil"):
        named = {**SIGLIP, "image_processor_type": "SiglipImageProcessor" + suffix}
        assert read_processor(write(tmp_path, named)) == plain


def test_llava_name_of_the_padding(tmp_path: Path) -> None:
    pad = read_processor(write(tmp_path, LLAVA))
    assert read_processor(write(tmp_path, {**CLIP, "image_aspect_ratio": "pad", "do_pad": None})) == pad
    assert not read_processor(write(tmp_path, {**CLIP, "image_aspect_ratio": "square"})).pad


def test_the_modes_of_training_are_the_same_processors() -> None:
    for shape in SHAPES:
        image = photo(*shape)
        for mode in MODES:
            processor = ImageProcessor.of(56, CLIP_MEAN, CLIP_STD, mode)
            assert processor.shape == (56, 56)
            np.testing.assert_array_equal(processor(image), preprocess(image, 56, CLIP_MEAN, CLIP_STD, mode))


def test_no_such_mode() -> None:
    with pytest.raises(UserError, match="image mode 'stretch' is unknown: use one of resize, pad, crop"):
        ImageProcessor.of(56, HALF, HALF, "stretch")


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"])
def test_what_transformers_saves_is_read(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = {"C": "clip", "S": "siglip", "L": "llava"}[kind[0]]
    models = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    getattr(models, f"{kind}Pil")(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    processor = read_processor(tmp_path)
    assert processor.mean == (0.1, 0.2, 0.3)
    assert processor.shape == (224, 224)
    check_equal(tmp_path, [(97, 140)])


def test_processor_config_comes_first_and_must_agree(tmp_path: Path) -> None:
    write(tmp_path, {"processor_class": "LlavaProcessor", "patch_size": 14, "image_processor": LLAVA}, NESTED)
    nested = read_processor(tmp_path)
    assert nested.pad
    assert read_processor(write(tmp_path, LLAVA)) == nested
    with pytest.raises(UserError, match="prepare pictures differently: remove the one"):
        read_processor(write(tmp_path, CLIP))
    write(
        tmp_path, {"processor_class": "LlavaProcessor", "patch_size": 14}, NESTED
    )  # as transformers 4 wrote
    assert read_processor(tmp_path) == read_processor(write(tmp_path, CLIP))


PROCESSORS = [
    ImageProcessor(56, (56, 56), CLIP_MEAN, CLIP_STD),
    ImageProcessor(64, (56, 40), CLIP_MEAN, CLIP_STD, resample=2, scale=1 / 127.5),
    ImageProcessor((56, 70), None, HALF, HALF),
    ImageProcessor((56, 70), (40, 40), HALF, HALF, scale=None),
    ImageProcessor(56, None, CLIP_MEAN, CLIP_STD, pad=True),
    ImageProcessor((56, 56), (56, 56), CLIP_MEAN, (1.0, 1.0, 1.0), pad=True, normalise=False),
    ImageProcessor(None, (56, 56), HALF, HALF),
    *(ImageProcessor.of(56, CLIP_MEAN, CLIP_STD, mode) for mode in MODES),
]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_what_is_written_is_read_back_and_loads_in_transformers(
    processor: ImageProcessor, tmp_path: Path
) -> None:
    config = processor_config(processor)
    assert read_processor(write(tmp_path, config)) == processor
    check_equal(tmp_path, [(97, 140), (30, 20)])
    height, width = processor.shape  # LlavaProcessor counts visual tokens by it
    assert dict(reference(tmp_path).crop_size) == {"height": height, "width": width}
    (tmp_path / CONFIG).unlink()
    write(tmp_path, {"processor_class": "LlavaProcessor", "image_processor": config}, NESTED)
    assert read_processor(tmp_path) == processor
    check_equal(tmp_path, [(97, 140)])


def test_target_keeps_enough_of_a_large_jpeg() -> None:
    assert [processor.target for processor in PROCESSORS] == [56, 64, 70, 70, 56, 56, None, 56, 56, 56]
    buffer = io.BytesIO()
    Image.fromarray(photo(512, 512)).save(buffer, "JPEG", quality=95)
    for processor in [*PROCESSORS[:6], *PROCESSORS[7:]]:
        small = decode_image(buffer.getvalue(), max_pixels=200_000, target=processor.target)
        assert small.shape == ((256, 256, 3) if processor.target == 70 else (128, 128, 3))
        difference = processor(small) - processor(decode_image(buffer.getvalue()))
        assert np.abs(difference).mean() < 0.1 * np.abs(processor(small)).mean()


def test_thin_pictures_with_a_crop_larger_than_the_short_side() -> None:
    processor = ImageProcessor(336, (340, 340), HALF, HALF)
    result = processor(np.full((1, 65_535, 3), 255, np.uint8))
    assert np.all(result[2:-2] == 1)
    assert np.all(result[:2] == -1)
    assert np.all(result[-2:] == -1)


@pytest.mark.parametrize("size, pad", [(None, False), (56, False), (None, True)])
def test_shapes_that_would_differ_are_refused(size: int | None, pad: bool) -> None:
    with pytest.raises(ValueError, match="set a"):
        ImageProcessor(size, (8, 8) if pad else None, HALF, HALF, pad=pad)


KIND = "image_processor_type"
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"size": 56}, "key image_processor_type is missing: add one of CLIPImageProcessor, Siglip"),
    (
        {KIND: "Qwen2VLImageProcessor"},
        'key image_processor_type is "Qwen2VLImageProcessor", it must be one of',
    ),
    ({KIND: 3}, "key image_processor_type is 3, it must be one of"),
    ({"feature_extractor_type": "ViTFeatureExtractor"}, "key feature_extractor_type is"),
    ({**CLIP, "image_grid_pinpoints": [[336, 672]]}, "key image_grid_pinpoints is not supported: remove it"),
    ({**CLIP, "auto_map": {}}, "key auto_map is not supported"),
    ({**CLIP, "do_resize": "yes"}, 'key do_resize is "yes", it must be true or false'),
    ({**CLIP, "do_center_crop": 1}, "key do_center_crop is 1, it must be true or false"),
    ({**CLIP, "do_convert_rgb": 1}, "key do_convert_rgb is 1, it must be true or false"),
    ({**CLIP, "size": {"shortest_edge": 56, "longest_edge": 99}}, "key size is {"),
    ({**CLIP, "size": {"longest_edge": 99}}, "key size is {"),
    ({**CLIP, "size": 56.0}, "key size is 56.0"),
    ({**CLIP, "size": True}, "key size is true"),
    ({**CLIP, "size": None}, "key size is null, it must be"),
    ({**CLIP, "resample": None}, "key resample is null, it must be"),
    ({**CLIP, "image_mean": None}, "key image_mean is null, it must be three numbers"),
    ({**CLIP, "rescale_factor": None}, "key rescale_factor is null, it must be a number"),
    ({**CLIP, "size": 0}, "in pixels from 1 to 4096"),
    ({**CLIP, "size": {"shortest_edge": 9000}}, "in pixels from 1 to 4096"),
    ({**CLIP, "size": [56]}, "key size is [56]"),
    ({**CLIP, "crop_size": {"shortest_edge": 56}}, "key crop_size is {"),
    ({**SIGLIP, "do_center_crop": True}, "key crop_size is null"),
    ({**CLIP, "use_square_size": True}, "key use_square_size is true, it must be false"),
    ({**CLIP, "do_center_crop": False}, "key size is {"),
    ({**SIGLIP, "size": 56}, "key size is 56, it must be"),
    (
        {**CLIP, "do_center_crop": False, "do_resize": False},
        "key do_resize is false, it must be true where do_c",
    ),
    ({**LLAVA, "do_resize": False}, "key do_resize is false, it must be true where pictures are padded"),
    ({**CLIP, "do_pad": True}, "key do_pad is true, it must be false for a CLIPImageProcessor"),
    ({**LLAVA, "image_aspect_ratio": "square"}, "it must be the same as do_pad"),
    ({**LLAVA, "image_aspect_ratio": "anyres"}, 'key image_aspect_ratio is "anyres"'),
    (
        {**LLAVA, "image_mean": [127.5] * 3},
        "key image_mean is [127.5, 127.5, 127.5], it must be numbers in 0..1",
    ),
    ({**CLIP, "image_mean": [0.5]}, "key image_mean is [0.5], it must be three numbers"),
    ({**CLIP, "image_mean": ["a"] * 3}, "it must be three numbers"),
    ({**CLIP, "image_std": [0.5, 0.5, 0]}, "key image_std is [0.5, 0.5, 0], it must be numbers above 0"),
    ({**CLIP, "image_std": [float("nan")] * 3}, "it must be three numbers"),
    ({**CLIP, "image_std": 10**400}, "it must be three numbers"),
    ({**CLIP, "rescale_factor": "1/255"}, 'key rescale_factor is "1/255", it must be a number'),
    ({**CLIP, "rescale_factor": 0}, "key rescale_factor is 0, it must be a number other than 0"),
    ({**CLIP, "resample": "bicubic"}, 'key resample is "bicubic", it must be 0 nearest'),
    ({**CLIP, "resample": 6}, "key resample is 6"),
]


@pytest.mark.parametrize("data, message", ERRORS)
def test_what_is_not_supported_names_the_file_and_the_key(
    data: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read_processor(write(tmp_path, data))
    assert str(caught.value).startswith(f"{tmp_path / CONFIG}: key ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(UserError) as caught:
        read_processor(write(tmp_path, {"image_processor": data}, NESTED))
    assert str(caught.value).startswith(f"{tmp_path / NESTED} (image_processor): key ")


@pytest.mark.parametrize(
    "text, message",
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[" * 99_999, "is not JSON"), (b"[]", "obj")],
)
def test_damaged_files(text: bytes, message: str, tmp_path: Path) -> None:
    for name in (CONFIG, NESTED):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(UserError, match=message) as caught:
            read_processor(tmp_path)
        assert str(tmp_path / name) in str(caught.value)
        (tmp_path / name).unlink()


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no preprocessor_config.json, and no processor_config.json"):
        read_processor(tmp_path)
    with pytest.raises(UserError, match="key image_processor must be an object"):
        read_processor(write(tmp_path, {"image_processor": 3}, NESTED))
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_processor(tmp_path)

"""A published checkpoint's own image preprocessing: `preprocessor_config.json` read, and written back.

Equal to transformers' reference processors `CLIPImageProcessor`, `SiglipImageProcessor` and
`LlavaImageProcessor` in their Pillow variants (5.23: image_processing_backends.py, models/clip, models/siglip
and models/llava); the `Fast` and torchvision variants of the same files differ from those by an 8-bit level.
How a picture is resized, cropped and normalised is the business of `images.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmscale.data.images import geometry, normalise, pad_colour, resize
from vlmscale.errors import UserError
from vlmscale.records import read_object

CONFIG, NESTED = "preprocessor_config.json", "processor_config.json"
MAX_SIZE = 4096  # pixels a side: far above any tower's, and it bounds the memory of a result
_LARGE = 1e30  # numbers beyond it do not survive in float32
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_CLIP = {
    **_STEPS,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
_HALF = [0.5, 0.5, 0.5]
_SIGLIP = {**_STEPS, "size": {"height": 224, "width": 224}, "image_mean": _HALF, "image_std": _HALF}
# What transformers takes for a key that is absent, by `image_processor_type`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP,
    "SiglipImageProcessor": _SIGLIP,
    "LlavaImageProcessor": _CLIP,
}
_READ = {
    *(*_CLIP, "do_pad", "image_aspect_ratio", "do_convert_rgb", "default_to_square", "use_square_size"),
    *("image_processor_type", "feature_extractor_type"),
}
# Keys of real files that leave the pixels as they are: names, and how transformers hands arrays in and out.
_INERT = {
    *("processor_class", "_valid_processor_keys", "transformers_version", "_name_or_path", "_commit_hash"),
    *("data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "backend"),
    *("image_seq_length", "num_additional_image_tokens"),
    "pad_size",  # of another padding, which is refused
}


@dataclass(frozen=True)
class ImageProcessor:
    """How a checkpoint wants its pictures.

    Attributes:
      size: (height, width) in pixels that a picture is resized to, its aspect ratio lost; or the length of
        the shorter side, the longer becomes int(size * long / short); or None, nothing is resized.
      crop: (height, width) in pixels of the centre that is kept, black where the picture is smaller; or None.
      mean, std: one number a channel, red first, for values that `scale` was applied to.
      pad: whether a picture is padded to a square first, with the colour int(255 * mean) (LLaVA's
        `image_aspect_ratio: pad`).
      resample: Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
      scale: what the 8-bit values are multiplied with; None leaves them at 0..255.
      normalise: whether `mean` and `std` are applied.

    Raises:
      ValueError: the result would not have the same shape for all pictures, or `pad` comes without `size`.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: bool = False
    resample: int = 3
    scale: float | None = 1 / 255
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.pad and self.size is None:
            raise ValueError("pictures that are padded must be resized too: set a size")
        if self.crop is None and not self.pad and not isinstance(self.size, tuple):
            raise ValueError("pictures of different shapes would stay different: set a crop, or both sides")

    @classmethod
    def of(
        cls, image_size: int, mean: tuple[float, float, float], std: tuple[float, float, float], mode: str
    ) -> ImageProcessor:
        """The processor that does what `images.preprocess` does in a mode of `images.MODES`.

        Raises:
          UserError: there is no such mode.
        """
        size, crop, fill = geometry(image_size, mean, mode)
        return cls(size, crop, mean, std, pad=fill is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the result, in pixels."""
        if self.crop is not None:
            return self.crop
        if isinstance(self.size, tuple):
            return self.size
        assert self.size is not None
        return self.size, self.size

    @property
    def target(self) -> int | None:
        """The side in pixels to give to `decode_image`, or None where pixels of the file must stay whole.

        No side of a picture that is decoded at reduced size is then below twice what it is resized to. (With
        padding it is the longer side that becomes `size`, so that more is kept than is needed.)
        """
        return max(self.size) if isinstance(self.size, tuple) else self.size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """A picture, uint8 [H, W, 3], as float32 [h, w, 3] with (h, w) = `shape`.

        The picture must be RGB already, as `decode_image` gives it, so that do_convert_rgb has no effect. For
        files with transparency that is LLaVA's way, and transformers 4's (the alpha channel is dropped);
        transformers 5 lays such pictures on white.

        Raises:
          ValueError: as `images.resize`.
        """
        fill = pad_colour(self.mean) if self.pad else None
        pixels = resize(image, size=self.size, crop=self.crop, fill=fill, resample=self.resample)
        return normalise(
            pixels,
            scale=1.0 if self.scale is None else self.scale,
            mean=self.mean if self.normalise else (0.0, 0.0, 0.0),
            std=self.std if self.normalise else (1.0, 1.0, 1.0),
        )


def read_processor(directory: Path) -> ImageProcessor:
    """Image preprocessing of a Hugging Face directory.

    Read from the "image_processor" entry of processor_config.json (transformers 5 writes and prefers it) or
    from preprocessor_config.json, in today's and in earlier spellings: `feature_extractor_type`, sizes as a
    number or a list. An absent key has transformers' default for that type; null is false for what is done
    (do_...), and refused where a value is needed.

    Raises:
      UserError: neither file is there, they contradict each other, or one has a value or a key that is not
        supported; it names the file and the key.
    """
    nested = read_object(directory / NESTED)
    entry = nested.get("image_processor") if nested is not None else None
    plain = read_object(directory / CONFIG)
    if entry is not None and not isinstance(entry, dict):
        raise UserError(f"{directory / NESTED}: key image_processor must be an object: save the file again")
    found = [
        _Reader(f"{directory / name}{where}", data).processor()
        for name, where, data in ((NESTED, " (image_processor)", entry), (CONFIG, "", plain))
        if data is not None
    ]
    if not found:
        raise UserError(
            f"{directory} has no {CONFIG}, and no {NESTED} with the key image_processor: "
            "copy it from where the weights come from"
        )
    if len(found) == 2 and found[0] != found[1]:
        raise UserError(
            f"{directory}: {CONFIG} and the image_processor of {NESTED} prepare pictures differently: "
            "remove the one that the weights were not made with"
        )
    return found[0]


def processor_config(processor: ImageProcessor) -> dict[str, Any]:
    """The content of preprocessor_config.json with which transformers' AutoImageProcessor does the same.

    The type follows from what is done: LlavaImageProcessor pads, SiglipImageProcessor resizes both sides
    without a crop, all others are a CLIPImageProcessor. `crop_size` is written even where nothing is cropped:
    `LlavaProcessor` counts visual tokens by it.
    """
    size, height_width = processor.size, {"height": processor.shape[0], "width": processor.shape[1]}
    kind = "CLIPImageProcessor"
    if isinstance(size, tuple):
        edges = {"height": size[0], "width": size[1]}
        kind = "SiglipImageProcessor" if processor.crop is None else kind
    else:
        edges = {"shortest_edge": min(processor.shape) if size is None else size}  # not used if None
    return {
        "image_processor_type": "LlavaImageProcessor" if processor.pad else kind,
        "do_convert_rgb": True,
        **({"do_pad": True} if processor.pad else {}),
        "do_resize": size is not None,
        "size": edges,
        "resample": processor.resample,
        "do_center_crop": processor.crop is not None,
        "crop_size": height_width,
        "do_rescale": processor.scale is not None,
        "rescale_factor": 1 / 255 if processor.scale is None else processor.scale,
        "do_normalize": processor.normalise,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }


class _Reader:
    """One file's keys, each checked as it is read; `name` says in errors where they stand."""

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self.name = name
        self.data = data
        self.defaults: dict[str, Any] = {}
        self.kind = self._kind()
        self.defaults = _DEFAULTS[self.kind]
        unknown = sorted(key for key in data.keys() - _READ - _INERT if data[key] is not None)
        if unknown:
            raise UserError(
                f"{name}: key {unknown[0]} is not supported: remove it if it does not change the pixels"
            )

    def processor(self) -> ImageProcessor:
        """The processor that the keys describe."""
        pad, normalise = self._pad(), self._flag("do_normalize")
        mean = self._channels("image_mean") if normalise or pad else (0.0, 0.0, 0.0)
        std = self._channels("image_std") if normalise else (1.0, 1.0, 1.0)
        if min(std) < 1 / _LARGE:
            raise self._wrong("image_std", "numbers above 0")
        if pad and not all(0 <= m <= 1 for m in mean):
            raise self._wrong("image_mean", "numbers in 0..1, as the padding has their colour")
        self._flag("do_convert_rgb")  # pictures are RGB already, but a wrong value is a mistake all the same
        size = self._size() if self._flag("do_resize") else None
        crop = self._crop() if self._flag("do_center_crop") else None
        if pad and size is None:
            raise self._wrong("do_resize", "true where pictures are padded")
        if crop is None and size is None:
            raise self._wrong("do_resize", "true where do_center_crop is not: pictures must get one shape")
        if crop is None and isinstance(size, int) and not pad:
            raise self._wrong("size", '{"height": ..., "width": ...} where do_center_crop is not true')
        return ImageProcessor(
            size=size,
            crop=crop,
            mean=mean,
            std=std,
            pad=pad,
            resample=3 if size is None else self._resample(),
            scale=self._scale() if self._flag("do_rescale") else None,
            normalise=normalise,
        )

    def _wrong(self, key: str, wanted: str) -> UserError:
        value = json.dumps(self._get(key))[:80]
        return UserError(f"{self.name}: key {key} is {value}, it must be {wanted}")

    def _get(self, key: str) -> Any:
        return self.data.get(key, self.defaults.get(key))

    def _kind(self) -> str:
        """The type as a key of `_DEFAULTS`; "Fast" and "Pil" are the same processor on another library."""
        key = (
            "image_processor_type"
            if self.data.get("image_processor_type") is not None
            else "feature_extractor_type"
        )
        value = self.data.get(key)
        if value is None:
            raise UserError(
                f"{self.name}: key image_processor_type is missing: add one of {', '.join(_DEFAULTS)}"
            )
        kind = str(value).replace("FeatureExtractor", "ImageProcessor")
        kind = kind.removesuffix("Fast").removesuffix("Pil")
        if kind not in _DEFAULTS:
            raise self._wrong(key, f"one of {', '.join(_DEFAULTS)}; others are not supported")
        return kind

    def _flag(self, key: str) -> bool:
        value = self._get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return bool(value)

    def _scale(self) -> float:
        value = self._get("rescale_factor")
        if not _is_number(value) or value == 0:
            raise self._wrong("rescale_factor", "a number other than 0")
        return float(value)

    def _channels(self, key: str) -> tuple[float, float, float]:
        """A list of three numbers, or one number for all three."""
        value = self._get(key)
        values = [value] * 3 if _is_number(value) else value
        if not isinstance(values, list) or len(values) != 3 or not all(_is_number(v) for v in values):
            raise self._wrong(key, "three numbers")
        return float(values[0]), float(values[1]), float(values[2])

    def _resample(self) -> int:
        value = self._get("resample")
        if type(value) is not int or not 0 <= value <= 5:
            raise self._wrong("resample", "0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box or 5 Hamming")
        return value

    def _pad(self) -> bool:
        """do_pad of LlavaImageProcessor, or LLaVA's name of it; other types' do_pad is another padding."""
        flag, aspect = self._flag("do_pad"), self.data.get("image_aspect_ratio")
        if flag and self.kind != "LlavaImageProcessor":
            raise self._wrong("do_pad", f"false for a {self.kind}; LlavaImageProcessor pads to a square")
        if aspect not in (None, "pad", "square"):
            raise self._wrong("image_aspect_ratio", '"pad" or "square"; others are not supported')
        if None not in (aspect, self.data.get("do_pad")) and flag != (aspect == "pad"):
            raise self._wrong("image_aspect_ratio", "the same as do_pad: remove one of the two")
        return flag or aspect == "pad"

    def _size(self) -> int | tuple[int, int]:
        if self._flag("use_square_size"):
            raise self._wrong("use_square_size", 'false: write size as {"height": ..., "width": ...}')
        square = self._flag("default_to_square")
        value = self._get("size")
        if isinstance(value, dict) and value.keys() == {"shortest_edge"}:
            value, square = value["shortest_edge"], False
        if _is_side(value):
            return (value, value) if square else value
        return self._sides("size", value, '{"shortest_edge": ...} or {"height": ..., "width": ...}')

    def _crop(self) -> tuple[int, int]:
        value = self._get("crop_size")
        value = [value, value] if _is_side(value) else value
        return self._sides("crop_size", value, '{"height": ..., "width": ...}')

    def _sides(self, key: str, value: Any, form: str) -> tuple[int, int]:
        if isinstance(value, dict) and value.keys() == {"height", "width"}:
            value = [value["height"], value["width"]]
        if not isinstance(value, list) or len(value) != 2 or not all(_is_side(side) for side in value):
            raise self._wrong(key, f"{form}, in pixels from 1 to {MAX_SIZE}")
        return value[0], value[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGE


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE

"""From a picture's bytes to the normalised array that a vision tower reads.

Owns decoding (with every way in which a file may be bad turned into one reason), the one way in which
pictures are padded, resized and cropped (`resize`) and normalised (`normalise`), and the three preprocessing
modes. What a published checkpoint says about its preprocessing is `processor.py`'s business; where the files
lie, and which record they belong to, is `records.py`'s.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vlmscale.errors import UserError

MODES = ("resize", "pad", "crop")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses; decoding takes about 10 bytes a pixel at its peak
MAX_SIDE = 65_535  # the longest side of a JPEG; bounds the memory of `resize` for thin pictures
DRAFT_PIXELS = (
    2**25
)  # only a larger JPEG is decoded at reduced size, so that usual ones match LLaVA's exactly
_WHOLE_PIXELS = 2**26  # the largest picture that `resize` builds on the way to its small one
_BLOCK_PIXELS = 2**22

# By their first bytes. Pillow's own registry is passed by: it also holds formats that start another program
# (EPS), and it refuses a large JPEG before it could be decoded at reduced size.
_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\x00", TiffImagePlugin.TiffImageFile),
    (b"MM\x00*", TiffImagePlugin.TiffImageFile),
    *((b"P%d" % kind, PpmImagePlugin.PpmImageFile) for kind in range(1, 7)),
)


class ImageError(ValueError):
    """A picture that cannot be used. Its text is one line, fit to be shown as a reason."""


def decode_image(
    source: Path | bytes, *, max_pixels: int = MAX_PIXELS, target: int | None = None
) -> np.ndarray:
    """The first frame of a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM as read-only uint8 [H, W, 3].

    Colours follow LLaVA (llava/train/train.py), which opens a file and calls `convert("RGB")`: alpha and
    palette transparency are dropped, not composited, CMYK is converted without a profile, and the
    EXIF orientation of a JPEG is ignored. One thing differs: Pillow clips 16-bit gray to 255, so that
    most such pictures turn white; here 0..65535 is scaled to 0..255 (and floating point gray is refused).

    The size is read from the header and checked before any pixel is decoded: at most `max_pixels`, with no
    side above `MAX_SIDE`, so 20000 x 20000 is refused. The exception is a JPEG where `target`, the side
    in pixels that it will be resized to, is given: above `DRAFT_PIXELS` (or `max_pixels`, if smaller) it is
    decoded at 1/2, 1/4 or 1/8 of its size, with no side below 2 x `target`, and H and W are the reduced
    ones. A progressive JPEG above `max_pixels` is still refused: its coefficients are held at full size.

    Raises:
        ImageError: the file is absent, has zero bytes, is of another format, too large, truncated or damaged.
    """
    return np.asarray(open_image(source, max_pixels=max_pixels, target=target))


def open_image(
    source: Path | bytes, *, max_pixels: int = MAX_PIXELS, target: int | None = None
) -> Image.Image:
    """As `decode_image`, but left in Pillow's memory: an array, and back again, would be two copies.

    Raises:
        ImageError: as `decode_image`.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), max_pixels, target)
    try:
        with source.open("rb") as file:
            return _decode(file, max_pixels, target)
    except OSError as error:
        raise ImageError(f"cannot be opened ({error.strerror or error})") from None


def preprocess(
    image: np.ndarray, image_size: int, mean: Sequence[float], std: Sequence[float], mode: str
) -> np.ndarray:
    """A picture, uint8 [H, W, 3], as the tower's input, float32 [S, S, 3] with S = `image_size`.

    `mean` and `std` hold one number a channel for values in 0..1. All modes use Pillow's antialiased bicubic
    filter on 8-bit values, then value / 255, minus mean, over std.

    - "resize": straight to S x S, the aspect ratio is lost (Hugging Face's SiglipImageProcessor).
    - "pad": to a square first, centred at (long - short) // 2, filled with int(255 * mean) (LLaVA's
      expand2square in stage 2 and evaluation), then to S x S.
    - "crop": shorter side to S, longer to int(S * long / short), then the centre S x S (Hugging Face's
      CLIPImageProcessor, LLaVA's stage 1).

    Memory, and what it costs in exactness for huge pictures: see `resize`.

    Raises:
        UserError: `mode`, `image_size`, `mean` or `std` is not one that can be used.
        ValueError: `image` is not uint8 [H, W, 3], is empty, or has a side above `MAX_SIDE`.
    """
    return normalise(tower_pixels(image, image_size, mean, std, mode), 1 / 255, mean, std)


def tower_pixels(
    image: np.ndarray | Image.Image, image_size: int, mean: Sequence[float], std: Sequence[float], mode: str
) -> np.ndarray:
    """The 8-bit half of `preprocess`: uint8 [H, W, 3] to uint8 [S, S, 3], before anything is normalised.

    The picture may also be what `open_image` returns.

    `normalise(pixels, 1 / 255, mean, std)` is the other half.

    Raises:
        UserError, ValueError: as `preprocess`.
    """
    if image_size < 1:
        raise UserError(f"image size {image_size} is too small: use 1 pixel or more")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(
            f"image mean {tuple(mean)} and std {tuple(std)} must have three numbers each, with std above 0"
        )
    size, crop, fill = geometry(image_size, mean, mode)
    return resize(image, size=size, crop=crop, fill=fill, resample=Image.Resampling.BICUBIC)


def geometry(
    image_size: int, mean: Sequence[float], mode: str
) -> tuple[int | tuple[int, int], tuple[int, int] | None, tuple[int, int, int] | None]:
    """`size`, `crop` and `fill` of `resize` for a mode of `preprocess`.

    Raises:
        UserError: there is no such mode.
    """
    if mode not in MODES:
        raise UserError(f"image mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    square = (image_size, image_size)
    if mode == "crop":
        return image_size, square, None
    return square, None, pad_colour(mean) if mode == "pad" else None


def pad_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """The 8-bit colour that LLaVA pads with, from the channels' `mean` (values in 0..1): int(255 * mean)."""
    red, green, blue = (int(255 * m) for m in mean)
    return red, green, blue


def resize(
    image: np.ndarray | Image.Image,
    *,
    size: int | tuple[int, int] | None,
    crop: tuple[int, int] | None,
    fill: tuple[int, int, int] | None,
    resample: int,
) -> np.ndarray:
    """A picture padded, resized, then cropped; uint8 [h, w, 3].

    The steps, their order and their rounding are those of transformers' image processors on Pillow
    (`PilBackend` in image_processing_backends.py; `LlavaImageProcessorPil` for the padding).

    Args:
      image: the picture, uint8 [H, W, 3], or what `open_image` returns.
      size: (height, width) in pixels, the aspect ratio is lost; or the length of the shorter side, the longer
        becomes int(size * long / short); or None, nothing is resized.
      crop: (height, width) in pixels of the centre that is kept, black where the picture is smaller; or None.
      fill: the 8-bit colour that a picture is padded with to a square, centred at (long - short) // 2, before
        it is resized (`size` must be given); or None.
      resample: Pillow's number of the filter, 0 to 5.

    Returns:
      [h, w, 3]: `crop`'s sides, else those of the resized picture.

    Memory: about 300 MB beyond two copies of the image and the result, whatever the aspect ratio. Where the
    padded square or the resized picture before the crop would have more than 2**26 pixels, it is not built:
    the long side is resized before the padding, and the centre alone is computed. That differs by one 8-bit
    level of rounding, and by more where the filter overshoots black or white.

    Raises:
      ValueError: `image` is not uint8 [H, W, 3], is empty, or has a side above `MAX_SIDE`; `fill` without
        `size`.
    """
    picture = image if isinstance(image, Image.Image) else _from_array(image)
    filter_ = Image.Resampling(resample)
    if fill is not None:
        if size is None:
            raise ValueError("a picture that is padded must be resized too")
        height, width = (size, size) if isinstance(size, int) else size
        picture = _pad(picture, width, height, fill, filter_)
    width, height = _resized(picture, size)
    return np.asarray(_resize_and_crop(picture, width, height, crop, filter_))


def normalise(pixels: np.ndarray, scale: float, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """8-bit values [..., 3] times `scale`, minus `mean`, over `std`, one number a channel; float32.

    As transformers does it on Pillow: the product in float64, rounded to float32, the rest in float32.
    """
    scaled = (pixels * float(scale)).astype(np.float32)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def _from_array(image: np.ndarray) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if min(image.shape) < 1 or max(image.shape) > MAX_SIDE:
        raise ValueError(f"image sides must be 1 to {MAX_SIDE}, not {list(image.shape[:2])}")
    return Image.fromarray(image)


def _decode(file: BinaryIO, max_pixels: int, target: int | None) -> Image.Image:
    """`open_image` on an open file."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise ImageError("has zero bytes")
    reader = next((reader for magic, reader in _READERS if head.startswith(magic)), None)
    if reader is None or (head.startswith(b"RIFF") and head[8:12] != b"WEBP"):
        raise ImageError("not a picture that can be read (JPEG, PNG, WebP, GIF, BMP, TIFF or PPM)")
    try:
        with reader(file) as image:
            _fit(image, max_pixels, target)
            image.load()
            return _to_rgb(image)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("does not fit into memory") from None
    except Exception as error:  # Pillow's readers raise a dozen different types on hostile bytes
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise ImageError(f"truncated or damaged ({text})") from None


def _fit(image: ImageFile.ImageFile, max_pixels: int, target: int | None) -> None:
    """Refuses a picture that is too large, by its header; sets a large JPEG to be decoded at reduced size."""
    width, height = image.size
    pixels = width * height
    if pixels < 1:
        raise ImageError(f"has no pixels ({width}x{height})")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"too large: {width}x{height}, and a side may be {MAX_SIDE} pixels at most")
    if target is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        whole = pixels > max_pixels and "progressive" in image.info  # the decoder would hold all of it
        if pixels > min(DRAFT_PIXELS, max_pixels) and not whole:
            image.draft(None, (2 * target, 2 * target))
    if image.size[0] * image.size[1] > max_pixels:
        raise ImageError(
            f"too large: {width}x{height} is {pixels} pixels, more than the limit of {max_pixels}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any Pillow mode with 8-bit red, green and blue."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_gray16_to_rgb(np.asarray(image)))
    if image.mode == "F":
        raise ImageError("has floating point pixels, whose range is not known: save it with 8 bits")
    image.info.pop("transparency", None)  # dropped by convert("RGB") too, but with a warning
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray16_to_rgb(gray: np.ndarray) -> np.ndarray:
    """Gray [H, W] of 0..65535 as uint8 [H, W, 3], rounded to the nearest; by rows, to bound the memory."""
    out = np.empty((*gray.shape, 3), np.uint8)
    rows = max(1, _BLOCK_PIXELS // gray.shape[1])
    for start in range(0, len(gray), rows):
        block = gray[start : start + rows].astype(np.int64)
        if block.min() < 0 or block.max() > 65_535:
            raise ImageError("has 32-bit pixels outside 0..65535: save it with 8 or 16 bits")
        out[start : start + rows] = ((block + 128) // 257)[:, :, None]
    return out


def _resized(picture: Image.Image, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(width, height) that `size` of `resize` asks for."""
    if isinstance(size, tuple):
        return size[1], size[0]
    width, height = picture.size
    if size is None:
        return width, height
    new_long = int(size * max(width, height) / min(width, height))  # transformers truncates
    return (new_long, size) if width >= height else (size, new_long)


def _pad(
    picture: Image.Image, width: int, height: int, fill: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    """Pads to a square, then resizes; where the long side is resized before the padding, this is cheaper.

    Of a wide picture that is exact, for Pillow resizes rows before columns, and padding's rows stay as they
    are. Of a tall one it is done only beyond `_WHOLE_PIXELS`.
    """
    side, wide = max(picture.size), picture.width >= picture.height
    across, down = (width, side) if wide else (side, side)
    if not wide and side * side > _WHOLE_PIXELS:
        down = height
    if (across, down) != (side, side):
        picture = picture.resize((across, picture.height) if wide else (picture.width, down), resample)
    square = Image.new("RGB", (across, down), fill)
    square.paste(picture, (0, (side - picture.height) // 2) if wide else ((side - picture.width) // 2, 0))
    return square.resize((width, height), resample)


def _resize_and_crop(
    picture: Image.Image, width: int, height: int, crop: tuple[int, int] | None, resample: Image.Resampling
) -> Image.Image:
    """Resizes to width x height, then keeps the centre; beyond `_WHOLE_PIXELS` that alone is computed."""
    crop_height, crop_width = (height, width) if crop is None else crop
    left, top = (width - crop_width) // 2, (height - crop_height) // 2  # below 0 where the picture is smaller
    if (width, height) == picture.size or width * height <= _WHOLE_PIXELS:
        resized = picture.resize((width, height), resample)
        return resized.crop((left, top, left + crop_width, top + crop_height))
    first, last = max(0, left), min(width, left + crop_width)
    upper, lower = max(0, top), min(height, top + crop_height)
    across, down = picture.size
    box = (first * across / width, upper * down / height, last * across / width, lower * down / height)
    centre = Image.new("RGB", (crop_width, crop_height))
    centre.paste(picture.resize((last - first, lower - upper), resample, box), (first - left, upper - top))
    return centre

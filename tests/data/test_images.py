"""Pictures good and hostile, each made on the spot."""

from __future__ import annotations

import io
import resource
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlmscale.data import images
from vlmscale.data.images import ImageError, decode_image, normalise, preprocess, resize, tower_pixels
from vlmscale.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def jpeg(height: int = 64, width: int = 64) -> bytes:
    return encode(Image.fromarray(noise(height, width)), "JPEG", quality=90)


def png(width: int, height: int, *, bits: int = 1, colour: int = 0, palette: bytes = b"") -> bytes:
    """A black PNG of any size, made row by row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    row = bytes(1 + (width * bits + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] * bool(palette)
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def gray_jpeg(width: int, height: int, **options: object) -> bytes:
    """A JPEG of mid-gray, of any size: an 8 x 8 one with another header and its scan repeated."""
    small = encode(Image.new("L", (8, 8), 128), "JPEG", **options)
    frame = small.index(b"\xff\xc2" if options else b"\xff\xc0")
    head = small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :]
    scan = head.index(b"\xff\xda")
    scan += 2 + struct.unpack(">H", head[scan + 2 : scan + 4])[0]
    blocks = ((width + 7) // 8) * ((height + 7) // 8)
    # A block is 00 (same mean as the last) and 1010 (end of block); four of them are three bytes.
    return head[:scan] + b"\x28\xa2\x8a" * (blocks // 4 + 1) + b"\xff\xd9"


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def two_frames(kind: str) -> bytes:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def transparent_palette(transparency: int | bytes) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return encode(image, "PNG", transparency=transparency)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.new("RGB", (6, 4), "red"), "JPEG", exif=exif, quality=95)


RGB_1x2 = [[[10, 20, 30], [200, 100, 50]]]
PIXELS: dict[str, tuple[Callable[[], bytes], object]] = {
    "rgb": (lambda: encode(Image.fromarray(np.array(RGB_1x2, np.uint8)), "PNG"), RGB_1x2),
    "1x1": (lambda: encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), [[[1, 2, 3]]]),
    "one bit": (lambda: png(2, 1), [[[0] * 3] * 2]),
    "gray": (lambda: encode(Image.new("L", (2, 1), 7), "PNG"), [[[7] * 3] * 2]),
    "rgba drops alpha": (lambda: encode(Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG"), [[[9, 8, 7]]]),
    "la drops alpha": (lambda: encode(Image.new("LA", (1, 1), (9, 0)), "PNG"), [[[9, 9, 9]]]),
    "palette": (lambda: transparent_palette(0), RGB_1x2),
    "palette, alpha bytes": (lambda: transparent_palette(b"\x00\x80"), RGB_1x2),
    "cmyk": (lambda: encode(Image.new("CMYK", (1, 1), (255, 0, 0, 0)), "TIFF"), [[[0, 255, 255]]]),
    "gif, first frame": (lambda: two_frames("GIF"), [[[255, 0, 0]] * 6] * 4),
    "webp, first frame": (lambda: two_frames("WEBP"), [[[255, 0, 0]] * 6] * 4),
    "bmp": (lambda: encode(Image.new("RGB", (1, 1), (1, 2, 3)), "BMP"), [[[1, 2, 3]]]),
}


@pytest.mark.parametrize("name", PIXELS)
def test_every_mode_becomes_rgb(name: str, tmp_path: Path) -> None:
    make, expected = PIXELS[name]
    path = tmp_path / "picture.jpg"  # the name is not what decides
    path.write_bytes(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_path, from_bytes = decode_image(path), decode_image(make())
    assert from_path.dtype == np.uint8
    np.testing.assert_array_equal(from_path, expected)
    np.testing.assert_array_equal(from_bytes, expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 256, 257, 32768, 65406, 65407, 65535]], np.uint16)
    gray = decode_image(encode(Image.fromarray(values), kind))
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(gray, np.repeat(expected[:, :, None], 3, axis=2))
    assert len(np.unique(gray)) > 4, "Pillow's own conversion would give 255 nearly everywhere"


def test_16_bit_big_endian_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_BLOCK_PIXELS", 4)
    values = np.arange(7 * 3, dtype=np.uint16).reshape(7, 3) * 3000
    picture = Image.frombytes("I;16B", (3, 7), values.astype(">u2").tobytes())
    gray = decode_image(encode(picture, "TIFF"))
    np.testing.assert_array_equal(gray[:, :, 0], np.rint(values / 257))


def test_cmyk_jpeg_has_rgb_colours() -> None:
    picture = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(picture.astype(int) - [255, 0, 0]).max() < 6


def test_exif_orientation_is_ignored_as_in_llava() -> None:
    assert decode_image(rotated()).shape == (4, 6, 3)


def drop_tail(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero bytes": (lambda: b"", "has zero bytes"),
    "text": (lambda: b"<html>404</html>", "not a picture that can be read"),
    "wave file": (lambda: b"RIFF\x00\x00\x00\x00WAVEfmt ", "not a picture that can be read"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture that can be read"),
    "half a jpeg": (lambda: drop_tail(jpeg(), 0.5), "truncated or damaged (image file is truncated"),
    "jpeg header": (lambda: jpeg()[:30], "truncated or damaged ("),
    "half a png": (
        lambda: drop_tail(encode(Image.fromarray(noise(64, 64)), "PNG"), 0.5),
        "truncated or damaged (",
    ),
    "half a gif": (
        lambda: drop_tail(encode(Image.fromarray(noise(64, 64)), "GIF"), 0.5),
        "truncated or damaged (",
    ),
    "half a webp": (
        lambda: drop_tail(encode(Image.fromarray(noise(64, 64)), "WEBP"), 0.5),
        "truncated or damaged (",
    ),
    "half a bmp": (
        lambda: drop_tail(encode(Image.fromarray(noise(64, 64)), "BMP"), 0.5),
        "truncated or damaged (",
    ),
    "half a tiff": (
        lambda: drop_tail(encode(Image.fromarray(noise(64, 64)), "TIFF"), 0.5),
        "truncated or damaged (",
    ),
    "signature alone": (lambda: b"\x89PNG\r\n\x1a\n", "truncated or damaged ("),
    "float": (lambda: encode(Image.new("F", (2, 2)), "TIFF"), "has floating point pixels"),
    "32 bits": (lambda: encode(Image.new("I", (2, 2), 70_000), "TIFF"), "has 32-bit pixels outside 0..65535"),
    "no pixels": (lambda: gray_jpeg(0, 8), "truncated or damaged ("),
    "long": (lambda: png(70_000, 1), "too large: 70000x1, and a side may be 65535 pixels at most"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_has_one_reason(name: str, tmp_path: Path) -> None:
    make, reason = HOSTILE[name]
    path = tmp_path / "picture.jpg"
    path.write_bytes(make())
    for source in (path, make()):
        with pytest.raises(ImageError) as caught:
            decode_image(source)
        assert str(caught.value).startswith(reason)
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)


def test_absent_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^cannot be opened \(No such file or directory\)$"):
        decode_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=r"^cannot be opened \(Is a directory\)$"):
        decode_image(tmp_path)


def test_every_cut_of_a_file_is_an_image_error_or_the_whole_picture() -> None:
    for data in (jpeg(16, 16), encode(Image.fromarray(noise(16, 16)), "PNG"), two_frames("GIF")):
        whole = decode_image(data)
        for length in range(0, len(data), 7):
            try:
                np.testing.assert_array_equal(decode_image(data[:length]), whole)
            except ImageError:
                continue


@pytest.mark.parametrize("target", [None, 336])
@pytest.mark.parametrize("colour, palette", [(0, b""), (3, b"\x00\x00\x00\xff\xff\xff")])
def test_20000_x_20000_is_refused_before_it_is_decoded(
    target: int | None, colour: int, palette: bytes
) -> None:
    data = png(20_000, 20_000, colour=colour, palette=palette)
    before = peak_mib()
    with pytest.raises(ImageError) as caught:
        decode_image(data, target=target)
    assert str(caught.value) == (
        "too large: 20000x20000 is 400000000 pixels, more than the limit of 178956970"
    )
    assert peak_mib() - before < 50


def test_20000_x_20000_jpeg_is_decoded_at_reduced_size_for_a_target() -> None:
    data = gray_jpeg(20_000, 20_000)
    before = peak_mib()
    with pytest.raises(ImageError, match="too large: 20000x20000"):
        decode_image(data)
    picture = decode_image(data, target=336)
    assert picture.shape == (2500, 2500, 3)
    assert np.all(picture == 128)
    assert peak_mib() - before < 200
    with pytest.raises(ImageError, match="too large: 20000x20000"):
        decode_image(data, target=8000)  # reduced to no less than 2 x target
    with pytest.raises(ImageError, match="too large: 20000x20000"):
        decode_image(gray_jpeg(20_000, 20_000, progressive=True), target=336)


def test_a_usual_jpeg_is_not_reduced_and_max_pixels_holds() -> None:
    data = jpeg(256, 256)
    np.testing.assert_array_equal(decode_image(data, target=16), decode_image(data))
    with pytest.raises(ImageError, match="65536 pixels, more than the limit of 65535"):
        decode_image(data, max_pixels=65_535)
    assert decode_image(data, max_pixels=65_535, target=16).shape == (32, 32, 3)


def test_a_reduced_jpeg_looks_the_same() -> None:
    picture = Image.new("RGB", (512, 512), "navy")
    ImageDraw.Draw(picture).ellipse((100, 60, 400, 450), fill="orange")
    data = encode(picture, "JPEG", quality=95)
    whole = preprocess(decode_image(data), 32, HALF, HALF, "resize")
    reduced = preprocess(decode_image(data, max_pixels=200_000, target=32), 32, HALF, HALF, "resize")
    assert np.abs(whole - reduced).mean() < 0.02


def normalised(picture: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    return (np.asarray(picture) / 255 - np.array(mean)) / np.array(std)


def llava_pad(image: np.ndarray, size: int, mean: tuple[float, ...]) -> Image.Image:
    """expand2square as LLaVA writes it, then the resize to a square."""
    picture, (height, width) = Image.fromarray(image), image.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in mean))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def clip_crop(image: np.ndarray, size: int) -> Image.Image:
    """Shortest edge and centre crop as Hugging Face's CLIPImageProcessor does them."""
    picture, (height, width) = Image.fromarray(image), image.shape[:2]
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


SHAPES = [(48, 48), (48, 97), (97, 48), (31, 64), (1, 1), (1, 7), (7, 1), (333, 250), (5, 640), (640, 5)]


def recipes(image: np.ndarray) -> dict[str, Image.Image]:
    return {
        "resize": Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC),
        "pad": llava_pad(image, 48, CLIP_MEAN),
        "crop": clip_crop(image, 48),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_preprocess_matches_the_plain_recipes(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    for mode, picture in recipes(image).items():
        result = preprocess(image, 48, CLIP_MEAN, CLIP_STD, mode)
        assert result.dtype == np.float32
        assert result.shape == (48, 48, 3)
        np.testing.assert_allclose(result, normalised(picture, CLIP_MEAN, CLIP_STD), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_done_to_save_memory_only_rounds_otherwise(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_WHOLE_PIXELS", 0)
    image = noise(*shape) // 4 + 90  # no value so far out that a filter's overshoot would be clipped
    for mode, picture in recipes(image).items():
        result = preprocess(image, 48, (0, 0, 0), (1, 1, 1), mode) * 255
        if mode == "pad":
            result = preprocess(image, 48, CLIP_MEAN, (1, 1, 1), mode) * 255 + np.array(CLIP_MEAN) * 255
        assert np.abs(result - np.asarray(picture)).max() < 1.5


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("crop", [(20, 30), (48, 48), (75, 31), (61, 70), None])
@pytest.mark.parametrize("size", [48, (40, 56)])
def test_the_centre_alone_is_the_centre_of_the_whole(
    size: int | tuple[int, int],
    crop: tuple[int, int] | None,
    resample: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for shape in ((64, 97), (97, 64), (60, 60)):
        image = np.linspace(90, 150, shape[0] * shape[1] * 3).reshape(*shape, 3).astype(np.uint8)
        results = []
        for limit in (2**26, 0):
            monkeypatch.setattr(images, "_WHOLE_PIXELS", limit)
            results.append(resize(image, size=size, crop=crop, fill=None, resample=resample).astype(int))
        assert results[0].shape == results[1].shape
        assert np.abs(results[0] - results[1]).max() <= (1 if resample else 2)


def test_only_what_is_resized_is_padded() -> None:
    with pytest.raises(ValueError, match="must be resized too"):
        resize(noise(4, 4), size=None, crop=(2, 2), fill=(0, 0, 0), resample=3)


@pytest.mark.parametrize("mode", images.MODES)
def test_8_bit_pixels_normalised_are_what_preprocess_gives(mode: str) -> None:
    """Bit for bit, and from a table of the 256 levels too, as a device looks them up."""
    image = noise(31, 64)
    pixels = tower_pixels(image, 48, CLIP_MEAN, CLIP_STD, mode)
    whole = preprocess(image, 48, CLIP_MEAN, CLIP_STD, mode)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(normalise(pixels, 1 / 255, CLIP_MEAN, CLIP_STD), whole)
    levels = normalise(np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1), 1 / 255, CLIP_MEAN, CLIP_STD)
    np.testing.assert_array_equal(levels[pixels, np.arange(3)], whole)


def test_pad_colours() -> None:
    image = np.full((2, 40, 3), 255, np.uint8)
    clip = preprocess(image, 20, CLIP_MEAN, (1, 1, 1), "pad") + np.array(CLIP_MEAN)
    np.testing.assert_allclose(clip[0, 0] * 255, [122, 116, 104], atol=1e-3)
    siglip = preprocess(image, 20, HALF, HALF, "pad")
    np.testing.assert_allclose(siglip[-1, -1], 127 / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("mode", images.MODES)
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 65_535), (65_535, 1)])
def test_thin_pictures_stay_small(mode: str, shape: tuple[int, int]) -> None:
    before = peak_mib()
    image = np.full((*shape, 3), 255, np.uint8)
    result = preprocess(image, 336, HALF, HALF, mode)
    assert peak_mib() - before < 400
    assert result.shape == (336, 336, 3)
    assert np.abs(result).max() <= 1
    if mode != "pad":
        assert np.all(result == 1)


@pytest.mark.parametrize(
    "size, mean, std, mode, message",
    [
        (8, HALF, HALF, "stretch", "image mode 'stretch' is unknown: use one of resize, pad, crop"),
        (0, HALF, HALF, "pad", "image size 0 is too small"),
        (8, (0.5,), HALF, "pad", "image mean (0.5,) and std (0.5, 0.5, 0.5) must have three numbers each"),
        (8, HALF, (0.5, 0.5, 0.0), "pad", "with std above 0"),
    ],
)
def test_bad_settings(
    size: int, mean: tuple[float, ...], std: tuple[float, ...], mode: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        preprocess(noise(4, 4), size, mean, std, mode)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((70_000, 1, 3), np.uint8),
    ],
)
def test_bad_arrays(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image"):
        preprocess(image, 8, HALF, HALF, "pad")

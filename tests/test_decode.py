"""Decoding: every kind of picture comes out right, and whatever does not is one line."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from visgraft.data import decode
from visgraft.data.dataset import Example
from visgraft.data.decode import image_extensions, open_image
from visgraft.errors import DataError

WHITE = (255, 255, 255)
RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)  # grey levels of 16 bit


def refused(source: str | Path | Example, *parts: object) -> None:
    with pytest.raises(DataError) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert str(part) in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def unreadable(path: Path, *parts: str) -> None:
    refused(path, f"{path} is not a readable image (", "); remove it or replace it", *parts)


def grey(path: Path) -> np.ndarray:
    """The picture's grey levels, after a check that it is grey."""
    pixels = np.asarray(open_image(path))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def write_png16(path: Path, colour_type: int, levels: np.ndarray, extra: bytes = b"") -> Path:
    """Write uint16 [H, W, channels] as a PNG, which Pillow itself does in grey only."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    body = chunk(b"IHDR", head) + (chunk(b"tRNS", extra) if extra else b"") + chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b""))
    return path


# Modes


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tif"
    Image.new(mode, (3, 2)).save(path)
    assert (open_image(path).mode, open_image(path).size) == ("RGB", (3, 2))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
def test_grey_levels_of_16_bit_are_divided_by_257(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(RAMP).save(path)
    assert np.array_equal(grey(path), np.rint(RAMP / 257))


def test_a_dim_picture_of_16_bit_is_not_stretched(tmp_path: Path) -> None:
    Image.fromarray(RAMP // 16).save(tmp_path / "x.png")
    assert grey(tmp_path / "x.png").max() == round(4095 / 257)


def test_16_bit_of_other_byte_orders_and_white_is_zero(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(">u2")).save(tmp_path / "big.tif")
    assert np.array_equal(grey(tmp_path / "big.tif"), np.rint(RAMP / 257))
    Image.fromarray(RAMP).save(tmp_path / "inverted.tif", tiffinfo={decode.PHOTOMETRIC: decode.WHITE_IS_ZERO})
    assert np.array_equal(grey(tmp_path / "inverted.tif"), np.rint((65535 - RAMP) / 257))


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_of_several_channels(tmp_path: Path, colour_type: int, channels: int) -> None:
    levels = np.repeat(RAMP[..., None], channels, axis=-1)
    if colour_type in (4, 6):
        levels[..., -1] = 65535  # opaque
    path = write_png16(tmp_path / "x.png", colour_type, levels)
    assert np.abs(grey(path).astype(int) - RAMP / 257).max() <= 1


def test_16_bit_with_a_transparent_level(tmp_path: Path) -> None:
    path = write_png16(tmp_path / "x.png", 0, np.array([[[0], [257 * 9]]], dtype=np.uint16), extra=b"\0\0")
    assert grey(path).tolist() == [[255, 9]]


def test_whole_numbers_of_32_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(RAMP.astype(np.int32)).save(path)
    assert np.array_equal(grey(path), np.rint(RAMP / 257))
    for levels, text in ((RAMP.astype(np.int32) * 2, "0 to 131040"), (RAMP.astype(np.int32) - 1, "-1 to 65519")):
        Image.fromarray(levels).save(path)
        refused(path, path, "whole-number grey levels from", text, "scale them to 0 to 65535")


def test_floating_point_levels(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32)).save(path)
    assert grey(path).tolist() == [[0, 51, 255]]
    for high in (1.01, float("nan")):
        Image.fromarray(np.array([[0.0, high]], dtype=np.float32)).save(path)
        refused(path, path, "floating-point grey levels from", "scale them to 0 to 1, or save it with 8 bit")


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_including_adobes_inverted_jpeg(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
    if suffix == "jpg":
        assert b"Adobe" in path.read_bytes()[:200]
    assert np.abs(np.array(open_image(path).getpixel((4, 4))) - (255, 0, 0)).max() <= 3


# Transparency


def transparent(folder: Path) -> list[Path]:
    """A picture of each kind whose left pixel is clear and whose right one is red, or dark."""
    rgba = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    rgba.putpixel((1, 0), (200, 0, 0, 255))
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 90, 0, 0])
    palette.putpixel((1, 0), 1)
    grey_alpha = Image.new("LA", (2, 1), (50, 0))
    grey_alpha.putpixel((1, 0), (50, 255))
    rgba.save(folder / "rgba.png")
    rgba.save(folder / "rgba.webp", lossless=True)
    palette.save(folder / "palette.png", transparency=0)
    palette.save(folder / "palette.gif", transparency=0)
    palette.save(folder / "levels.png", transparency=b"\0\xff")
    grey_alpha.save(folder / "grey.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    ("background", "colour"), [("white", WHITE), ("black", (0, 0, 0)), ("#102030", (16, 32, 48)), ("#fff", WHITE)]
)
def test_transparent_places_show_the_background(tmp_path: Path, background: str, colour: tuple[int, int, int]) -> None:
    paths = transparent(tmp_path)
    assert len(paths) == 6
    for path in paths:
        image = open_image(path, background)
        assert image.getpixel((0, 0)) == colour, path.name
        assert image.getpixel((1, 0)) in ((200, 0, 0), (90, 0, 0), (50, 50, 50)), path.name


def test_half_transparent_is_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 128)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (127, 127, 127)


def test_a_palette_without_transparency_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (200, 10, 20)).quantize(4).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png").getpixel((0, 0)) == (200, 10, 20)


def test_unknown_background() -> None:
    with pytest.raises(DataError, match=r"background is 'whit', which is no colour; use a name such as white, or #rr"):
        open_image("never opened.png", background="whit")


# Orientation, several pictures, other sources


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_orientation_is_honoured(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6  # the camera was turned: the left side of the stored picture is the top
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    upright = open_image(tmp_path / f"x.{suffix}")
    assert upright.size == (8, 16)
    assert min(upright.getpixel((4, 1))) > 240  # type: ignore[arg-type]
    assert max(upright.getpixel((4, 14))) < 15  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_cost_the_picture(tmp_path: Path) -> None:
    for number, damage in enumerate((b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0")):
        path = tmp_path / f"{number}.jpg"
        Image.new("RGB", (8, 4), "red").save(path, exif=damage)
        assert open_image(path).size == (8, 4)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_first_picture_of_several(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(path, save_all=True, append_images=[blue])
    with Image.open(path) as file:
        assert getattr(file, "n_frames", 1) == 2
    assert np.abs(np.array(open_image(path).getpixel((4, 4))) - (255, 0, 0)).max() <= 3


def test_bytes_from_inside_a_data_set(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(buffer, "PNG")
    example = Example(Path("pets/train/000012"), 0, content=buffer.getvalue)
    assert open_image(example).getpixel((0, 0)) == (1, 2, 3)
    refused(example._replace(content=lambda: b"nothing"), "pets/train/000012 is not a readable image (its content")
    Image.new("RGB", (2, 2), (4, 5, 6)).save(tmp_path / "x.png")
    assert open_image(Example(tmp_path / "x.png", 0)).getpixel((0, 0)) == (4, 5, 6)


# HEIC and AVIF


def test_heic_is_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 32), "black")
    image.paste("white", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    image.info["exif"] = exif.tobytes()  # as cameras do, the package stores the turn in the container too
    image.save(tmp_path / "x.heic")
    upright = open_image(tmp_path / "x.heic")
    assert upright.size == (32, 64)
    assert min(upright.getpixel((16, 8))) > 230  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["x.heic", "x.jpg"])
def test_heic_without_its_package(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    refused(tmp_path / name, tmp_path / name, "HEIC", "pip install 'visgraft[heic]'")


def test_avif(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    if "AVIF" in Image.SAVE:
        Image.new("RGB", (16, 16), "red").save(tmp_path / "x.avif")
        assert np.abs(np.array(open_image(tmp_path / "x.avif").getpixel((4, 4))) - (255, 0, 0)).max() <= 5
    (tmp_path / "y.avif").write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(64))
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in ("HEIF", "AVIF")])
    refused(tmp_path / "y.avif", "AVIF", "pip install --upgrade pillow")


def test_known_extensions() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".mpo"} <= image_extensions()
    assert {".heic", ".heif", ".avif"} <= image_extensions()
    assert image_extensions().isdisjoint({".pdf", ".txt", ".csv", ".h5", ".mpg", ".db", ""})


# Files that do not decode


def test_files_that_do_not_decode(tmp_path: Path) -> None:
    empty, text, missing = tmp_path / "empty.png", tmp_path / "text.jpg", tmp_path / "missing.png"
    empty.write_bytes(b"")
    text.write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    unreadable(empty, "of no known image format")
    unreadable(text, "of no known image format")
    unreadable(missing, "No such file")
    unreadable(tmp_path / "folder.png", "directory")
    (tmp_path / "x.tif").write_bytes(b"II*\0" + bytes(20))
    refused(tmp_path / "x.tif", "a kind of TIFF that Pillow does not read")


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "x.png")

    monkeypatch.setattr("builtins.open", refuse)
    unreadable(tmp_path / "x.png", "(Permission denied)")


FORMATS = {"jpg": {}, "png": {}, "gif": {}, "webp": {}, "tif": {"compression": "tiff_lzw"}, "bmp": {}, "jp2": {}}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
def test_a_file_cut_short_never_gives_half_a_picture(tmp_path: Path, suffix: str, share: float) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    path = tmp_path / f"x.{suffix}"
    Image.effect_noise((96, 96), 80).convert("RGB").save(path, **FORMATS[suffix])  # type: ignore[arg-type]
    open_image(path)
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, f"{path} is not a readable image (")


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: Any) -> None:
        raise AssertionError("it was decoded")

    path = tmp_path / "x.png"
    Image.new("RGB", (20, 20)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    refused(path, f"{path} has 400 pixels, more than the 200 that are decoded; scale it down")


def test_between_warning_and_refusal_there_is_no_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    Image.new("RGB", (15, 10)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert open_image(tmp_path / "x.png").size == (15, 10)

"""Decoding: every kind of file gives upright 8-bit RGB, or a clear refusal."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from locfast.data.crop import Plan
from locfast.data.decode import UnreadableImage
from locfast.data.decode.cpu import CpuDecoder, decode_label_map

decoder = CpuDecoder()


def whole(data: bytes) -> np.ndarray:
    """The image in its own size."""
    picture = decoder.open(data)
    height, width = picture.size
    plan = Plan((height, width), (0, 0, width, height), (0, 0, width, height), False, "bicubic")
    return picture.render([plan])[0]


def test_a_jpeg_gives_the_pixels_that_pil_gives(jpeg):
    data = jpeg(61, 47)
    assert np.array_equal(whole(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF"])
def test_a_grey_image_has_three_equal_channels(picture, encode, kind):
    pixels = whole(encode(picture().convert("L"), kind))
    assert pixels.shape == (48, 64, 3)
    assert (np.ptp(pixels, axis=-1) == 0).all()


def test_a_black_and_white_image_is_black_and_white(picture, encode):
    assert set(np.unique(whole(encode(picture().convert("1"), "PNG")))) == {0, 255}


def test_a_palette_image_shows_its_colours(picture, encode):
    few = picture().quantize(16)
    assert np.array_equal(whole(encode(few, "PNG")), np.asarray(few.convert("RGB")))


def test_an_adobe_cmyk_jpeg_is_not_inverted(encode):
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    data = encode(red, quality=95)
    assert b"Adobe" in data
    assert np.abs(whole(data).astype(int) - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_cut_off(encode, kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    pixels = whole(encode(Image.fromarray(np.tile(ramp, (4, 1))), kind))
    assert np.array_equal(pixels[0, :, 0], np.arange(256))


def test_16_bit_rgb_png_is_scaled():
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 0, 257) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    assert whole(data)[0].tolist() == [[0, 128, 255], [255, 0, 1]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(encode, mode):
    image = Image.new(mode, (8, 8), (10, 10, 10, 0) if mode == "RGBA" else (10, 0))
    image.paste((10, 10, 10, 255) if mode == "RGBA" else (10, 255), (0, 0, 4, 8))
    pixels = whole(encode(image, "PNG"))
    assert (pixels[:, :4] == 10).all()
    assert (pixels[:, 4:] == 255).all()


def test_a_transparent_palette_entry_is_white(encode):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert (whole(encode(image, "PNG", transparency=1)) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(picture, encode, orientation, kind):
    upright = picture(48, 32)
    # How a camera that was held so stores the picture: PIL's own transposition, inverted.
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(upright.transpose(stored) if stored is not None else upright, kind, exif=exif)
    assert decoder.open(data).size == (32, 48)
    difference = np.abs(whole(data).astype(int) - np.asarray(upright)).mean()
    assert difference < (8 if kind in ("JPEG", "WEBP") else 1e-9)


def test_a_crop_of_a_rotated_image_is_cut_from_the_upright_one(picture, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(48, 32)
    data = encode(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    plan = Plan((10, 20), (5, 3, 25, 13), (0, 0, 20, 10), False, "bilinear")
    assert np.array_equal(decoder.open(data).render([plan])[0], np.asarray(upright)[3:13, 5:25])


def test_one_pixel_fills_a_view(encode):
    data = encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")
    plan = Plan((6, 6), (0, 0, 1, 1), (2, 2, 4, 4), True, "bicubic")
    assert (decoder.open(data).render([plan])[0] == (1, 2, 3)).all()


@pytest.mark.parametrize("size", [(1000, 800), (1007, 793)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_huge_jpeg_decoded_at_a_fraction_lies_where_it_lay(picture, encode, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(*size)
    jpeg, png = encode(image, quality=95, exif=exif), encode(image, "PNG", compress_level=1, exif=exif)
    height, width = decoder.open(jpeg).size
    plan = Plan((32, 32), (width * 0.1, height * 0.2, width * 0.93, height), (0, 0, 32, 32), False, "bicubic")
    reduced, full = (decoder.open(data).render([plan])[0].astype(int) for data in (jpeg, png))
    assert decoder.open(jpeg)._draft(plan.shrink) == 8
    # Slopes are 0.5 levels a source pixel, so a shift by one decoded pixel, which covers eight, would be 4 levels.
    assert np.abs(reduced - full).mean() < 1


def test_a_jpeg_is_not_reduced_where_the_view_needs_its_pixels(jpeg):
    assert decoder.open(jpeg(300, 300))._draft(300 / 224) == 1


def test_damaged_files_are_refused_and_not_filled_with_grey(folder, damage):
    root = folder(100)
    for name in damage(root)[:9]:
        with pytest.raises(UnreadableImage):
            whole(Path(name).read_bytes())


def test_a_truncated_png_is_refused(picture, encode):
    data = encode(picture(200, 200), "PNG")
    with pytest.raises(UnreadableImage):
        whole(data[: len(data) // 2])


def test_a_reason_names_no_memory_address():
    with pytest.raises(UnreadableImage, match=r"^not an image of a known format$"):
        decoder.open(b"hello")


def test_a_decompression_bomb_is_refused_by_name():
    """A PNG header of 50000 x 50000 pixels."""
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    data += struct.pack(">I", zlib.crc32(b"IHDR" + header)) + struct.pack(">I", 0) + b"IDAT"
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        decoder.open(data)


def test_floating_point_pixels_are_refused(encode):
    with pytest.raises(UnreadableImage, match="no agreed range"):
        whole(encode(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_a_label_map_keeps_its_ids(encode):
    ids = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(decode_label_map(encode(Image.fromarray(ids), "PNG")), ids)
    palette = Image.fromarray(ids, "P")
    palette.putpalette([7] * 48)
    assert np.array_equal(decode_label_map(encode(palette, "PNG")), ids)


def test_a_colour_image_is_no_label_map(picture, encode):
    with pytest.raises(UnreadableImage, match="one 8-bit channel"):
        decode_label_map(encode(picture(), "PNG"))

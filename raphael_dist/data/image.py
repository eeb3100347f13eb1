"""Decodes image files, which are not trusted, to RGB images with 8 bits per channel.

Images are rotated as their EXIF data states, and transparent pixels become white (or another colour on request). An image
with too many pixels is rejected before it is decoded.
"""

import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from raphael_dist.errors import UserError

IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")  # of files in these formats
MAX_PIXELS = 64 << 20
_USER_FORMATS = (*IMAGE_FORMATS, "AVIF", "BMP", "GIF", "TIFF")  # for files that the user names
_EXT_OF = {"WEBP": "webp", "PNG": "png", "JPEG": "jpg"}
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L", "I;16N"}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# Other formats that occur under the names of images: (offset, bytes, format).
_MAGIC = (
    (0, b"GIF8", "GIF"), (0, b"BM", "BMP"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"), (4, b"ftyphev", "HEIC"), (4, b"ftypmif1", "HEIF"), (4, b"ftypmsf1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"), (4, b"JXL ", "JPEG XL"), (4, b"jP  ", "JPEG 2000"), (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "PSD"), (0, b"%PDF", "PDF"), (0, b"\0\0\1\0", "ICO"), (0, b"<svg", "SVG"), (0, b"<?xml", "XML"),
    (0, b"<html", "HTML"), (0, b"<!doctype html", "HTML"),
)  # fmt: skip
_ADDRESS = re.compile(r"<([\w.]+) object at 0x[0-9a-fA-F]+>| at 0x[0-9a-fA-F]+")

# Training on half an image is worse than skipping it. Some libraries turn this on.
ImageFile.LOAD_TRUNCATED_IMAGES = False


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = IMAGE_FORMATS, background: str = "white"
) -> Image.Image:
    """Decode the bytes of an image file to an RGB image, rotated as its EXIF data states.

    Args:
        data: Content of the image file.
        max_pixels: Largest number of pixels (width times height) that the file's header may state.
        formats: Allowed formats, by Pillow's names.
        background: Colour for transparent pixels.

    Raises:
        ValueError: The format or the image mode is not allowed, or the header is damaged or states too many pixels. In these
            cases no pixel is decoded.
        Exception: Decoders raise exceptions of many types for damaged images.
    """
    image = _open(data, formats)
    if image.width * image.height > max_pixels:
        raise ValueError(f"image has {image.width} x {image.height} pixels, but at most {max_pixels} are allowed")
    return to_rgb(image, background)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert a Pillow image to RGB, rotated as its EXIF orientation states. Transparent pixels get the colour `background`.

    Raises ValueError for an image mode that is not supported.
    """
    if image.mode not in _MODES:
        raise ValueError(f"image mode is {image.mode}, but it must be one of {', '.join(sorted(_MODES))}")
    image.load()  # a PNG may have its orientation after its pixels
    orientation = _orientation(image)
    if image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    image = image.convert("RGB")
    image.info = {}  # the orientation is applied
    return image


def read_image(path: Path, option: str, background: str = "white") -> Image.Image:
    """Read an image file as RGB, rotated as its EXIF data states. Raises UserError if it cannot be read.

    `option`: name of the command line option that gave the path, for the error message. `background`: colour for
    transparent pixels.
    """
    Image.init()
    try:
        formats = tuple(name for name in _USER_FORMATS if name in Image.OPEN)
        return decode_image(path.read_bytes(), formats=formats, background=background)
    except Exception as error:  # decoders raise nearly anything
        raise UserError(f"{option}={path} cannot be read as an image: {reason_of(error)}. Use another image.") from None


def upright_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels of an image file's content, after the rotation that its EXIF data states.

    Usually only the header is read. Pixels are decoded only if the header does not state the size and the orientation.

    Raises:
        ValueError: The bytes are not a WEBP, PNG or JPEG image; the message names the format if it is known.
        Exception: Decoders raise exceptions of many types for damaged images.
    """
    image = _open(data, IMAGE_FORMATS)
    if data.startswith(_PNG) and image.width * image.height <= MAX_PIXELS and _has_late_metadata(data):
        image.load()
    size = (image.height, image.width) if _orientation(image) in _SIDEWAYS else (image.width, image.height)
    if min(size) < 1:
        raise ValueError("image has no pixels")
    return size


def image_ext(data: bytes) -> str:
    """Return the file extension for an image file's content: "webp", "png" or "jpg". ValueError: another format."""
    return _EXT_OF[str(_open(data, IMAGE_FORMATS).format)]


def reason_of(error: BaseException) -> str:
    """Return a short text with the cause of an exception, for a message.

    Object addresses (0x7f...) are left out, so that equal errors have equal texts and can be counted.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return _ADDRESS.sub(lambda match: match[1] or "", text)


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open an image and read only its header. ValueError: the format is not in `formats`, or the header is damaged."""
    try:
        if data.startswith(_JPEG):  # not by Image.open, which treats further images of an MPO as part of it
            return JpegImageFile(io.BytesIO(data))
        return Image.open(io.BytesIO(_without_damaged_chunks(data)), formats=formats)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile headers
        if not data:
            raise ValueError("image file is empty") from None
        start = data[:64].lower()
        for offset, magic, name in _MAGIC:
            if start[offset:].startswith(magic.lower()) and name not in formats:
                raise ValueError(f"image has the format {name}, but it must be one of {', '.join(formats)}") from None
        raise ValueError(f"image header cannot be read ({type(error).__name__})") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) where it is missing or damaged."""
    try:
        # A PNG's own `getexif` would decode its pixels first.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return int(value) if value in _TURNS else 1
    except MemoryError:
        raise
    except Exception:  # Pillow raises nearly anything on damaged EXIF
        return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert a 16-bit grey image to 8 bits: keep the high byte of each pixel, as Pillow does for 16-bit colours.

    If the image states a transparent grey level, the result has an alpha channel.
    """
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, offset of the first byte, offset after the last byte) of each complete chunk in the bytes of a PNG."""
    start = len(_PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if end > len(data):
            return
        yield data[start + 4 : start + 8], start, end
        start = end


def _without_damaged_chunks(data: bytes) -> bytes:
    """Return the bytes of an image file. Of a PNG, leave out chunks with a wrong checksum that its pixels do not need.

    Such chunks contain EXIF data, texts or colour profiles.
    """
    if not data.startswith(_PNG):
        return data
    kept, kept_end = [], 0
    for kind, start, end in _png_chunks(data):
        if kind[:1].islower() and zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            kept.append(data[kept_end:start])
            kept_end = end
    return b"".join([*kept, data[kept_end:]]) if kept else data


def _has_late_metadata(data: bytes) -> bool:
    kinds = [kind for kind, _, _ in _png_chunks(data)]
    behind = kinds[kinds.index(b"IDAT") :] if b"IDAT" in kinds else []
    return bool({b"eXIf", b"iTXt", b"zTXt", b"tEXt"} & set(behind))

"""The one preprocessing: training, calibration, evaluation, export, bench and serving all come here.

Images become uint8 [S, S, 3] with Pillow (the same calls open_clip's torchvision pipeline ends in), are augmented as
such, and are normalised at the end. Nothing here needs torch.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from clipress.errors import DataError, RecipeError
from clipress.recipe import Section

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 128_000_000  # larger images are refused before decoding
MAX_ASPECT = 100  # thinner images would become huge when their short side is resized
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # none of them starts another program
if importlib.util.find_spec("PIL._avif"):  # since Pillow 11.3, where it was built with libavif
    FORMATS += ("AVIF",)
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
Library = Literal["pillow", "torch"]
"""Resizing library: pillow gives open_clip's pixels; torch is nearly twice as fast, within one level."""
Positive = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(gt=0, le=1)]
Zoom = Annotated[float, Field(gt=0, le=8)]
IGNORED = 255  # the label of pixels that do not count
NUMBER = r"[0-9]+(\.[0-9]+)?"
BLIP_POLICY = "blip"
PHOTOMETRIC = "photometric"
POLICY = re.compile(
    rf"rand(-(m|n|p|mstd|mmax|inc){NUMBER})*|augmix(-(m|w|d|a|b|mstd){NUMBER})*|(original|originalr|v0|v0r|3a)(-mstd{NUMBER})?"
)
"""timm's names of random operations."""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Preprocess(Section):
    """Preprocessing of images to tensors; the keys are open_clip's."""

    size: int = Field(ge=1, le=1 << 13)
    """Height and width in pixels."""
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[Positive, Positive, Positive] = OPENAI_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"
    """shortest: resize the short side and crop the centre; squash: ignore the aspect; longest: fit and pad."""
    fill_color: int = Field(0, ge=0, le=255)
    crop_pct: Part = 1.0
    """shortest: the part of the resized short side that the crop keeps, as in timm; 0.875 is 224 of 256 pixels."""

    @property
    def short_side(self) -> int:
        """The short side of an image before it is cropped, in pixels; timm rounds it down."""
        return math.floor(self.size / self.crop_pct + 1e-6)


class Augment(Section):
    """Training augmentation, drawn per image from (seed, source, epoch, index)."""

    shift: int = Field(0, ge=0, le=1 << 10)
    """Shift by up to this many pixels each way; the border is repeated."""
    crop_scale: tuple[Part, Part] | None = None
    """Crop a random region before resizing: range of its area, as a fraction; its aspect is 3/4 to 4/3."""
    zoom: tuple[Zoom, Zoom] | None = None
    """Scale the short side to this range of the model's size, and show a window of that size anywhere in the image; what is
    outside has the mean color and no label. As Segmenter is trained, with (0.5, 2.0)."""
    flip: bool = False
    """Mirror half of the images. Unsuitable for captions that mention left and right."""
    exchange: bool = False
    """Pairs of images: exchange both of half of the statements, and the words left and right in these, as BLIP does."""
    auto_augment: str | None = None
    """Random operations by one of timm's policies, such as rand-m9-mstd0.5-inc1 (RandAugment); BLIP's, blip; or mmseg's distortion of
    brightness, contrast, saturation and hue, photometric."""
    random_erase: float = Field(0.0, ge=0, le=1)
    """Probability that a box of an image becomes noise."""
    mixup: float = Field(0.0, ge=0)
    """Classifiers: mix images and labels in pairs; the parameter of the Beta distribution of their shares. 0: never."""
    cutmix: float = Field(0.0, ge=0)
    """Classifiers: put a box of one image into another; likewise. With mixup, every batch draws one of the two."""

    def model_post_init(self, _: Any) -> None:
        if self.zoom is not None and self.crop_scale is not None:
            raise RecipeError(
                "augment: expected crop_scale or zoom, which both choose a region, found both. Remove one."
            )
        if self.auto_augment not in (None, BLIP_POLICY, PHOTOMETRIC) and not POLICY.fullmatch(self.auto_augment):
            raise RecipeError(
                "augment.auto_augment: expected a policy in timm's words, such as rand-m9-mstd0.5-inc1, augmix-m3 or original, blip, or photometric, found "
                f"'{self.auto_augment:.60}'."
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def is_view(self) -> bool:
        """Whether all that is done is a `View`, which a teacher's cache can repeat."""
        return self.auto_augment is None and not self.random_erase and not self.mixes


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open an image from a path or bytes as upright RGB. Raises DataError if it cannot be decoded."""
    with _opened(source) as image:
        return as_rgb(ImageOps.exif_transpose(image))


def size_from_header(source: str | Path | bytes) -> tuple[int, int]:
    """Return (width, height) of the image that `open_image` returns. Raises DataError as it does.

    Pixels are not decoded, except those of a PNG without EXIF data in front of them, which may have some behind.
    """
    with _opened(source) as image:
        return image.size[::-1] if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS else image.size


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Yield an image of which the header has been read and checked. Raises DataError if that or what the caller does with it fails."""
    name = "the input" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{name}: expected at most {MAX_PIXELS:,} pixels, found {image.width} x {image.height} pixels."
                )
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(
                    f"{name}: expected an aspect of at most {MAX_ASPECT} to 1, found {image.width} x {image.height} pixels."
                )
            check_range(image, name)
            yield image
    except Image.DecompressionBombError as error:  # Pillow's own limit comes first
        raise DataError(f"{name}: expected at most {MAX_PIXELS:,} pixels. {error}") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file.") from None
    except DataError:
        raise
    except Exception as error:  # arbitrary bytes can fail anywhere in a decoder
        why = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name} is not a readable image: {why}. Use JPEG, PNG or WebP files.") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data say, and convert it to RGB. Raises DataError as `check_range` does."""
    check_range(image, "the image")
    return as_rgb(ImageOps.exif_transpose(image))


def check_range(image: Image.Image, name: str) -> None:
    """Raise DataError for pixels whose range is not known: floating-point ones, and those of a 32-bit TIFF file."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed integer"
        raise DataError(
            f"{name}: expected pixels of 8 or 16 bits without a sign, found {kind} ones, whose range is not known. "
            "Convert the image."
        )


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Of 16-bit grey the high byte is kept: Pillow would clip it at 255, that is, to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def as_image(image: Image.Image | np.ndarray) -> Image.Image:
    """Return an image, or pixels uint8 [H, W, 3], as an image."""
    return image if isinstance(image, Image.Image) else Image.fromarray(image)


def resized(image: Image.Image, preprocess: Preprocess, library: Library = "pillow") -> np.ndarray:
    """Resize and crop for evaluation: uint8 [S, S, 3]."""
    size = preprocess.size
    width, height = image.size
    if preprocess.resize_mode == "squash":
        image = _scaled(image, (size, size), preprocess, library)
    elif (width, height) != (size, size) or preprocess.crop_pct < 1:
        # torchvision truncates the long side; open_clip rounds when it pads
        is_padded = preprocess.resize_mode == "longest"
        fit, rounded, wanted = (max, round, size) if is_padded else (min, int, preprocess.short_side)
        scaled = [wanted * side / fit(width, height) for side in (width, height)]
        image = _scaled(image, (max(rounded(scaled[0]), 1), max(rounded(scaled[1]), 1)), preprocess, library)
        image = _centred(image, size, preprocess.fill_color)
    return np.asarray(image, np.uint8)


def _scaled(
    image: Image.Image,
    size: tuple[int, int],
    preprocess: Preprocess,
    library: Library,
    box: tuple[int, int, int, int] | None = None,
) -> Image.Image:
    """Resize an image, or a region of it, to (width, height); pixels outside the region are not used, as in torchvision."""
    image = image if box is None else _region(image, box, preprocess)
    if library == "pillow":
        return image.resize(size, _FILTERS[preprocess.interpolation])
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    planes = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)
    mode = InterpolationMode(preprocess.interpolation)
    done = resize(planes, [size[1], size[0]], interpolation=mode, antialias=True)
    return Image.fromarray(done.permute(1, 2, 0).contiguous().numpy())


def _region(image: Image.Image, box: tuple[int, int, int, int], preprocess: Preprocess) -> Image.Image:
    """Return a region of an image; what is outside of the image has the mean color, which is normalized to 0."""
    left, top, right, bottom = box
    if left >= 0 and top >= 0 and right <= image.width and bottom <= image.height:
        return image.crop(box)
    page = Image.new("RGB", (right - left, bottom - top), tuple(round(255 * value) for value in preprocess.mean))
    page.paste(image, (-left, -top))
    return page


def _centred(image: Image.Image, size: int, fill: int) -> Image.Image:
    """Crop or pad each side to `size` around the centre, rounding as torchvision does."""
    left, top = (max(round((side - size) / 2.0), 0) for side in image.size)
    cut = image.crop((left, top, left + min(size, image.width), top + min(size, image.height)))
    if cut.size == (size, size):
        return cut
    canvas = Image.new("RGB", (size, size), (fill,) * 3)
    canvas.paste(cut, ((size - cut.width) // 2, (size - cut.height) // 2))
    return canvas


@dataclass(frozen=True)
class View:
    """One augmented view of a training image in plain numbers, since random generators differ between versions."""

    box: tuple[int, int, int, int] | None = None
    """left, top, right, bottom of the region, in pixels of the source; None: the evaluation crop."""
    shift: tuple[int, int] = (0, 0)
    """(down, right): shift of the window after resizing, in pixels; the border is repeated."""
    flip: bool = False
    """Whether the result is mirrored."""


def drawn_view(size: tuple[int, int], augment: Augment, rng: np.random.Generator) -> View:
    """Draw a random view for an image of `size` (width, height)."""
    if augment.zoom is not None:
        box = _random_window(size, augment.zoom, rng)
    else:
        box = None if augment.crop_scale is None else _random_box(size, augment.crop_scale, rng)
    shift = (0, 0)
    if augment.shift:
        shift = tuple((rng.integers(0, 2 * augment.shift + 1, size=2) - augment.shift).tolist())
    return View(box, shift, augment.flip and bool(rng.integers(2)))


def viewed(
    image: Image.Image | np.ndarray, preprocess: Preprocess, view: View, library: Library = "pillow"
) -> np.ndarray:
    """Return an image in a given view: uint8 [S, S, 3]."""
    if view.box is not None:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = _scaled(image, (preprocess.size, preprocess.size), preprocess, library, view.box)
        pixels = np.asarray(image, np.uint8)
    else:
        pixels = fitted(image, preprocess, library)
    reach = max(map(abs, view.shift))
    if reach:
        down, right = (reach + moved for moved in view.shift)
        padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        pixels = padded[down : down + preprocess.size, right : right + preprocess.size]
    return pixels[:, ::-1] if view.flip else pixels


def viewed_mask(mask: np.ndarray, preprocess: Preprocess, view: View | None) -> np.ndarray:
    """Return the labels of an image in a view, uint8 [S, S], or without one in the evaluation crop; 255 outside of the image."""
    size = preprocess.size
    shown = Image.fromarray(mask + np.uint8(1))  # so that what is outside, 0, becomes 255
    nearest, box = Image.Resampling.NEAREST, None if view is None else view.box
    if box is not None:
        shown = shown.crop(box).resize((size, size), nearest)
    elif shown.size != (size, size) or preprocess.crop_pct < 1:
        scale = preprocess.short_side / min(shown.size)
        shown = shown.resize(tuple(max(int(side * scale), 1) for side in shown.size), nearest)
        left, top = (round((side - size) / 2.0) for side in shown.size)
        shown = shown.crop((left, top, left + size, top + size))
    labels = np.asarray(shown, np.uint8)
    if view is not None and (reach := max(map(abs, view.shift))):
        down, right = (reach + moved for moved in view.shift)
        labels = np.pad(labels, reach, mode="edge")[down : down + size, right : right + size]
    return (labels[:, ::-1] if view is not None and view.flip else labels) - np.uint8(1)


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return (width, height) of an image."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _random_window(
    size: tuple[int, int], zoom: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Return a square of the short side over a random zoom, inside of an image as far as it fits."""
    side = max(round(min(size) / rng.uniform(*zoom)), 1)
    left, top = (int(rng.integers(max(whole - side, 0) + 1)) for whole in size)
    return left, top, left + side, top + side


def _random_box(
    size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(10):  # As in torchvision's RandomResizedCrop.
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return left, top, left + short, top + short


def fitted(image: Image.Image | np.ndarray, preprocess: Preprocess, library: Library = "pillow") -> np.ndarray:
    """Return the evaluation view, uint8 [S, S, 3]; an array of the right size is returned as it is."""
    if isinstance(image, np.ndarray):
        if image.shape == (preprocess.size, preprocess.size, 3):
            return image
        image = Image.fromarray(image)
    return resized(image, preprocess, library)


def normalised(pixels: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Turn uint8 [..., S, S, 3] into the model's input, float32 [..., 3, S, S]."""
    mean, std = np.asarray(preprocess.mean, np.float32), np.asarray(preprocess.std, np.float32)
    values = np.empty((*pixels.shape[:-3], 3, *pixels.shape[-3:-1]), np.float32)
    for channel in range(3):  # channel by channel is four times as fast as all at once, with the same bits
        plane = values[..., channel, :, :]
        np.divide(pixels[..., channel], np.float32(255), out=plane, dtype=np.float32)
        plane -= mean[channel]
        plane /= std[channel]
    return values


def preprocess_from_open_clip(cfg: dict[str, Any]) -> Preprocess:
    """Read open_clip's preprocess_cfg, whose size is one number or (height, width)."""
    size = cfg["size"]
    if not isinstance(size, int):
        if len(set(size)) != 1:
            raise DataError(
                f"preprocess: expected a square image size, found {tuple(size)} pixels. clipress supports square images only."
            )
        size = size[0]
    known = {key: cfg[key] for key in Preprocess.model_fields.keys() & cfg.keys()}
    return Preprocess(**{**known, "size": int(size)})

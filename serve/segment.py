"""Overlays of masks: every class in a color of its own over the image, with a legend of those that are in it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TURN = 0.618034  # of the color circle, between neighbouring classes: the golden ratio keeps all of them apart
SHARE = 0.6  # of the color over the image
ROW, MARGIN = 18, 4  # of the legend, pixels
MOST = 12  # classes in the legend


def color_of(number: int) -> tuple[int, int, int]:
    """Return the color of a class, RGB; the same in every image."""
    red, green, blue = colorsys.hsv_to_rgb(number * TURN % 1, 0.85, 0.95 if number % 2 else 0.7)
    return round(red * 255), round(green * 255), round(blue * 255)


def shares_of(mask: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Return the share of the pixels of every class that a mask [H, W] has, largest first."""
    counts = np.bincount(mask.ravel(), minlength=len(labels))
    return {
        labels[place]: float(counts[place] / mask.size) for place in np.argsort(-counts, kind="stable") if counts[place]
    }


def drawn_mask(image: Image.Image, mask: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """Return an image [H, W] in the colors of its classes, and below it a legend of the largest ones."""
    palette = np.asarray([color_of(number) for number in range(len(labels))], np.float32)
    pixels = np.asarray(image.convert("RGB"), np.float32)
    mixed = Image.fromarray((SHARE * palette[mask] + (1 - SHARE) * pixels).round().astype(np.uint8))
    shown = list(shares_of(mask, labels).items())[:MOST]
    lines = [f"{label} {share:.1%}" for label, share in shown]
    font = ImageFont.load_default(12)
    width = max(image.width, *(ROW + 2 * MARGIN + int(font.getlength(line)) for line in lines))
    page = Image.new("RGB", (width, image.height + MARGIN + ROW * len(lines)), "white")
    page.paste(mixed)
    draw = ImageDraw.Draw(page)
    for number, (line, (label, _)) in enumerate(zip(lines, shown, strict=True)):
        top = image.height + MARGIN + ROW * number
        draw.rectangle((MARGIN, top + 2, MARGIN + ROW - 6, top + ROW - 4), fill=color_of(labels.index(label)))
        draw.text((MARGIN + ROW, top), line, fill="black", font=font)
    return page

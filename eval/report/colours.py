"""The colours of the rows in the plots, light and dark: as many as there are rows, and no two of them alike.

Colour 0 is a grey, for the baseline. The first eight were chosen by hand; each further one is that of a fixed grid of
hues which is farthest from all before it. Every colour is read easily on its paper (WCAG 2, contrast of at least 4.5).
"""

from __future__ import annotations

import colorsys
import functools

LIGHT_PAPER, DARK_PAPER = "#fdfcf9", "#16171a"
_LIGHT = ("#3d3a35", "#0b66a8", "#b04a00", "#17754a", "#7a3fa0", "#9c1c4e", "#6b6100", "#007a80")
_DARK = ("#d6d2c9", "#6fb6ee", "#f09a5b", "#5fc895", "#c79be6", "#f084ab", "#cfc45a", "#5cc9cf")
_HUES, _SATURATIONS, _CONTRASTS = 60, (0.35, 0.6, 0.95), (4.7, 6.5, 9.0)

Pair = tuple[str, str]  # #rrggbb on light paper, and on dark


@functools.cache
def palette(count: int) -> tuple[Pair, ...]:
    """`count` pairs (colour on light paper, colour on dark paper). All differ up to 500; from there on they repeat."""
    chosen = list(zip(_LIGHT, _DARK, strict=True))
    rest = {pair: min(_distance(pair, other) for other in chosen) for pair in (_grid() if count > len(chosen) else [])}
    while len(chosen) < count and rest:
        best = max(rest, key=rest.__getitem__)
        del rest[best]
        chosen.append(best)
        rest = {pair: min(away, _distance(pair, best)) for pair, away in rest.items()}
    return tuple(chosen[index % len(chosen)] for index in range(count))


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, by WCAG 2: 1 to 21."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@functools.cache
def _grid() -> list[Pair]:
    pairs = [
        (_shade(hue / _HUES, saturation, LIGHT_PAPER, wanted), _shade(hue / _HUES, saturation, DARK_PAPER, wanted))
        for wanted in _CONTRASTS
        for saturation in _SATURATIONS
        for hue in range(_HUES)
    ]
    return list(dict.fromkeys(pairs))


def _shade(hue: float, saturation: float, paper: str, wanted: float) -> str:
    """The colour of that hue whose contrast with `paper` is just above `wanted`, found by halving its lightness."""
    dark_text = _luminance(paper) > 0.5
    near, far = (1.0, 0.0) if dark_text else (0.0, 1.0)  # lightness: near the paper's, and far from it
    for _ in range(12):
        middle = (near + far) / 2
        if contrast(_hex(hue, middle, saturation), paper) > wanted:
            far = middle
        else:
            near = middle
    return _hex(hue, far, saturation)


def _hex(hue: float, lightness: float, saturation: float) -> str:
    channels = colorsys.hls_to_rgb(hue, lightness, saturation)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def _linear(colour: str) -> list[float]:
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@functools.cache
def _lab(colour: str) -> tuple[float, float, float]:
    """OKLab, in which equal distances look about equally far (Ottosson 2020)."""
    red, green, blue = _linear(colour)
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    )


def _distance(one: Pair, other: Pair) -> float:
    """How far two pairs are apart in OKLab, on the paper where they are nearer to each other."""
    return min(
        sum((a - b) ** 2 for a, b in zip(_lab(mine), _lab(theirs), strict=True))
        for mine, theirs in zip(one, other, strict=True)
    )

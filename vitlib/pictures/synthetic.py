"""Flower pictures drawn with NumPy: a small classification task that needs no download and no licence.

A class is a row of flowers.csv: a family, which fixes the form, the number of petals and three colours. Everything else
(pose, light, background, occlusion, focus, noise) comes from a generator seeded with (seed, class, split, index).
Positions are complex numbers: a picture spans [-1, 1] on both axes, y points down, a product turns and scales them.
"""

import cmath
import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

CLASSES = Path(__file__).with_name("flowers.csv")
_PALETTE = {
    "white": "f4f2ea", "cream": "f6e8ba", "yellow": "fad026", "lemon": "f8ec62", "orange": "f58c20",
    "apricot": "f8b27a", "coral": "f4705c", "red": "d42228", "crimson": "a00e30", "rose": "f096b0", "pink": "ee70a8",
    "magenta": "ce2c8a", "lilac": "c29cde", "purple": "8c42b4", "violet": "6242c4", "blue": "4262da", "sky": "7eb0f0",
    "brown": "5c3618", "black": "261822", "green": "80a03c", "leaf": "2e5f28",
}  # fmt: skip
_SHAPES = {  # a, b, c and d of half the width of a petal: a · t^b · (1 − t^c)^d, t along it from foot (0) to tip (1)
    "pointed": (1.2, 0.5, 2, 1), "round": (1.95, 1, 2, 0.5), "notched": (1.5, 1, 2, 0.5), "fringed": (1, 0.5, 10, 0.5),
    "strap": (0.9, 0.5, 8, 0.5), "bell": (1.2, 0.5, 60, 0.5), "broad": (0.95, 1, 1, 1), "narrow": (0.3, 1, 1, 1),
    "fern": (0.9, 1, 1, 1),
}  # fmt: skip
_FAMILIES = {  # petal, form, rings of petals, centre, leaf
    "star": ("pointed", "flat", 1, "eye", "narrow"), "lily": ("pointed", "flat", 1, "stamens", "narrow"),
    "campion": ("notched", "flat", 1, "eye", "broad"), "pink": ("fringed", "flat", 1, "eye", "narrow"),
    "daisy": ("strap", "flat", 1, "disc", "fern"), "double": ("strap", "flat", 2, "disc", "fern"),
    "poppy": ("round", "flat", 1, "stamens", "fern"), "trumpet": ("round", "flat", 1, "corona", "narrow"),
    "rose": ("round", "flat", 6, "bud", "broad"), "tulip": ("pointed", "cup", 1, "bud", "broad"),
    "goblet": ("strap", "cup", 1, "bud", "broad"), "bell": ("bell", "bells", 1, "bud", "narrow"),
    "spire": ("round", "spike", 1, "eye", "narrow"), "globe": ("pointed", "globe", 1, "eye", "narrow"),
}  # fmt: skip
_CENTRES = {"bud": 0.04, "eye": 0.13, "disc": 0.3, "corona": 0.4, "stamens": 0.12}  # radius, that of the flower being 1
_GROUNDS = (  # dark and light colour, cells (rows, columns) of the texture: grass, soil, sky, stone, shade
    ("1c4216", "7ea848", (5, 44)), ("322218", "846246", (40, 40)), ("70a0d6", "e2ecf4", (5, 4)),
    ("545456", "b0aca4", (24, 18)), ("0e2618", "527a3a", (12, 12)),
)  # fmt: skip
Array = np.ndarray


class FlowerClass(NamedTuple):
    """A class; `petals` counts one ring, `base` is the petals' colour at the centre and `colour` at the tips."""

    key: str
    name: str
    family: str
    petals: int
    colour: str
    base: str
    centre: str


def classes(taught: str) -> list[FlowerClass]:
    """The classes of `flowers.csv` that are taught "in the study", or "before it", to the base of the demo.

    Neighbours differ only in number of petals, hue or doubling: those are the pairs to confuse.
    """
    with CLASSES.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.pop("taught") == taught]
    return [FlowerClass(**row | {"petals": int(row["petals"])}) for row in rows]


def render(flower: FlowerClass, *, index: int, split: str, seed: int, size: int) -> Array:
    """Draw picture `index` of a class in a split: uint8 (size, size, 3) RGB, a function of the arguments alone.

    ValueError for an unknown split, a negative index or seed, or a size under 16 pixels (petals of under a pixel).
    """
    if split not in ("train", "valid", "test") or index < 0 or seed < 0 or size < 16:
        raise ValueError(f"cannot draw a picture with split {split!r}, index {index}, seed {seed}, size {size}")
    rng = np.random.Generator(np.random.PCG64([seed, int.from_bytes(f"{flower.key}/{split}/{index}".encode())]))
    line = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    plane, (dark, light, cells) = (line + 1j * line[:, None]).ravel(), _GROUNDS[rng.integers(len(_GROUNDS))]
    grids = [Image.fromarray(rng.random(shape, dtype=np.float32)) for shape in ((5, 6), cells)]
    texture = sum(np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)).ravel() for grid in grids)
    canvas = _rgb(dark) + (0.75 * texture - rng.uniform(0.1, 0.4)).clip(0, 1) * (_rgb(light) - _rgb(dark))
    if rng.random() < 0.2:  # a smaller flower of the same class, behind
        _plant(canvas, plane, flower, rng, rng.uniform(0.2, 0.32), reach=0.75)
    _plant(canvas, plane, flower, rng, rng.uniform(0.64, 0.86), reach=0.12)
    if rng.random() < 0.2:  # a leaf in front, from one edge
        side, length, leaf = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 1.3), ("narrow", "broad")[rng.integers(2)]
        frame = (plane - cmath.rect(1.15, side)) * cmath.rect(1 / length, math.pi - side + rng.uniform(-0.4, 0.4))
        _petal(canvas, leaf, frame, 2 / size / length, _rgb("leaf"), _rgb("leaf"), bright=rng.uniform(0.9, 1.7))
    # the camera: direction and colour of the light, darker corners, focus and grain
    light = 1 + 0.16 * (plane * cmath.rect(1, rng.uniform(-math.pi, math.pi))).real - 0.09 * np.abs(plane) ** 2
    balance = rng.uniform(0.72, 1.12) * (1 + rng.uniform(-1, 1) * np.array([[0.08], [0], [-0.1]], np.float32))
    lit = (255 * canvas * light * balance).clip(0, 255).astype(np.uint8).T.reshape(size, size, 3)
    picture = Image.fromarray(lit).filter(ImageFilter.BoxBlur(rng.uniform(0, 0.9) * size / 64))
    grain = rng.normal(0, rng.uniform(1, 7), (size, size, 1)).astype(np.float32)
    return (np.asarray(picture, np.float32) + grain).clip(0, 255).astype(np.uint8)


def _rgb(colour: str) -> Array:
    return np.array([*bytes.fromhex(_PALETTE.get(colour, colour))], np.float32)[:, None] / 255


def _petal(canvas: Array, shape: str, frame: Array, pixel, tip: Array, base: Array, width=1.0, bright=1.0) -> None:
    """Draw a petal or leaf and its shadow on the canvas (3, n); it goes from 0 to 1 in its frame, complex (n,)."""
    near = np.flatnonzero((frame.real > -0.25) & (frame.real < 1) & (np.abs(frame.imag) < 0.65))
    pixel, bright = (value[near] if isinstance(value, Array) else value for value in (pixel, bright))
    (a, b, c, d), u, v, paint = _SHAPES[shape], frame[near].real, frame[near].imag, canvas.take(near, 1)
    if shape == "notched":
        u = u + 0.24 * np.exp(-((v / 0.075) ** 2))
    elif shape in ("fringed", "bell"):
        u = u + 0.09 * np.abs(np.sin(20 * v))
    t, across = u.clip(0, 1), np.abs(v)
    half = a * width * t**b * (1 - t**c) ** d
    if shape == "fern":
        half *= 0.45 + 0.55 * np.abs(np.sin(22 * t - 9 * across))
    inside = np.minimum(half - across, 5 * u * (1 - u))  # distance from the edge
    shade = bright * (0.72 + 0.34 * (inside / 0.16).clip(0, 1)) - 0.3 * v  # darker at the edge and on one side
    shade -= np.float32(0.1) * ((across < 0.022) & (u < 0.8))  # a vein
    paint *= 1 - 0.26 * (inside / 0.12 + 0.8).clip(0, 1)
    colour = shade * (base + (1.35 * t - 0.25).clip(0, 1) * (tip - base))
    canvas[:, near] = paint + (inside / pixel + 0.5).clip(0, 1) * (colour - paint)


def _florets(form: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """Position and radius of each flower of a plant."""
    if form == "globe":  # golden-angle order on a sphere
        order = np.arange(rng.integers(22, 30)) + 0.5
        out = 0.86 * np.sqrt(order / len(order))
        return out * np.exp(2.4j * order), 0.27 - 0.07 * out**2
    if form == "spike":  # smaller towards the top
        height = np.linspace(1, -1.15, 3 * rng.integers(7, 10))
        return np.resize([-0.3, 0.3, 0], len(height)) * (0.75 + 0.25 * height) + 1j * height, 0.2 + 0.07 * height
    if form == "bells":  # along an arch
        along = np.linspace(0, 1, rng.integers(3, 6))
        return 1.5 * along - 0.72 + 0.42j * along**2, 0.52 - 0.17 * along
    return np.zeros(1), np.ones(1)


def _plant(canvas: Array, plane: Array, flower: FlowerClass, rng: np.random.Generator, radius: float, reach: float):
    """Draw stem, leaves and flowers; `reach` bounds the distance from the middle on each axis."""
    shape, form, _, _, leaf = _FAMILIES[flower.family]
    pixel, green, bend = 2 / len(plane) ** 0.5, _rgb("leaf") * rng.uniform(0.9, 1.7), rng.uniform(-0.25, 0.25)
    z = plane - complex(rng.uniform(-reach, reach), rng.uniform(-reach, reach))
    canvas[:, (z.imag > 0) & (np.abs(z.real - bend * z.imag**2) < 0.06 * radius)] = 0.85 * green  # stem
    for side in (-1, 1):
        foot, angle = radius * rng.uniform(1, 1.5), side * rng.uniform(0.5, 1.3) - math.pi / 2
        frame = (z - complex(bend * foot**2, foot)) * cmath.rect(1 / 1.35 / radius, -angle)
        _petal(canvas, leaf, frame, pixel / radius / 1.35, green, green, bright=rng.uniform(0.8, 1.15))
    turn = 0.35 if form in ("cup", "bells", "spike") else math.pi
    z = z * cmath.rect(1 / radius, rng.uniform(-turn, turn))
    z = z.real / math.cos(rng.uniform(0, 0.5)) + 1j * z.imag  # seen at an angle
    bright = 1 + 0.15 * (z * cmath.rect(1, rng.uniform(-math.pi, math.pi))).real
    shift, pale = rng.normal(0, 0.025, (3, 1)).astype(np.float32), rng.uniform(0, 0.18)  # plants of a class differ
    tip, base, middle = (((1 - pale) * (_rgb(name) + shift) + pale).clip(0, 1) for name in flower[-3:])
    places, radii = (array.astype(np.complex64) for array in _florets(form, rng))
    turns = {"cup": 1, "bells": -1}.get(form, np.exp(2j * math.pi * rng.random(len(radii))))
    nearest = (np.abs(z - places[:, None]) / radii[:, None].real).argmin(0)  # each pixel's nearest floret
    z, pixel = (z - places[nearest]) * np.complex64(turns / radii)[nearest], pixel / radius / radii.real[nearest]
    if form not in ("cup", "bells"):
        return _head(canvas, flower, z, pixel, (tip, base, middle), bright)
    leans = np.linspace(-0.4, 0.4, flower.petals).tolist() if form == "cup" else [0.0]
    for lean in sorted(leans, key=abs, reverse=True):
        frame = (z - 0.85j) * cmath.rect(1 / 1.75, math.pi / 2 - 0.9 * lean)
        frame = frame - 0.38j * lean * (frame.real * (1 - frame.real)).clip(0, 1)
        _petal(canvas, shape, frame, pixel / 1.75, tip, (tip + base) / 2, 0.43, bright - 0.5 * abs(lean))


def _head(canvas: Array, flower: FlowerClass, z: Array, pixel: Array, colours: tuple, bright: Array) -> None:
    """Draw flowers from above: rings of petals, each pixel in the frame of its nearest petal, then the centre."""
    shape, _, rings, centre, _ = _FAMILIES[flower.family]
    near = np.flatnonzero(np.abs(z) < 1.1)
    z, pixel, bright, paint = z[near], pixel[near], bright[near], canvas.take(near, 1)
    angle, sector, (tip, base, middle) = np.angle(z), 2 * math.pi / flower.petals, colours
    for ring in range(rings):
        size, turn, width = 1 - ring / (rings + 1), 0.4 * ring, min(0.5, 1.08 * math.tan(sector / 2))
        spokes = np.exp(1j * sector * (turn - np.arange(flower.petals))).astype(np.complex64) / size
        frame = z * spokes[np.rint(angle / sector + turn).astype(np.intp) % flower.petals]
        _petal(paint, shape, frame, pixel / size, tip, base, width, bright - 0.07 * ring)
    size, out = _CENTRES[centre], np.abs(z)
    if centre == "stamens":
        knobs = 0.06 - np.hypot(out - 0.33, 0.1 * np.sin(4.5 * angle))
        paint += (knobs / pixel + 0.5).clip(0, 1) * (middle - paint)
        middle = _rgb("green")
    elif centre == "corona":  # a frill, dark inside
        middle, size = middle * (0.6 + 0.5 * out / size), size * (1 + 0.07 * np.sin(11 * angle))
    elif centre == "disc":
        middle = middle * (1 + 0.15 * np.sin(44 * z.real) * np.sin(44 * z.imag))
    paint *= 1 - 0.3 * (4 - 3 * out / size).clip(0, 1)  # shadow
    canvas[:, near] = paint + ((size - out) / pixel + 0.5).clip(0, 1) * (middle - paint)

"""Embedded flower pictures: a small, fine-grained classification task that needs no download.

A flower class is a botanical description (`FlowerClass`); `render` paints one picture of it with NumPy.
Petals are implicit functions in polar coordinates: the plane is folded into one sector a petal, so a whole
ring, or a whole umbel of florets, costs one evaluation. Edges are softened over one pixel instead of
supersampled. Everything that is not the class (pose, light, ground, occlusion, blur, noise) is drawn from a
generator seeded by (seed, class, split, index), so a picture never depends on which were drawn before it.

Coordinates: the picture spans [-1, 1] on both axes, y downwards; a head's own frame has radius 1.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

SPLITS = ("train", "valid", "test")
SHAPES = ("round", "pointed", "notched", "strap", "fringed")
ARRANGEMENTS = ("single", "double", "spiral", "cup", "bells", "spike", "globe")
CENTRES = ("none", "eye", "disc", "stamens", "corona")
LEAVES = ("broad", "narrow", "fern")
MIN_SIZE = 16  # pixels; below it a petal is thinner than a pixel

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "white": (244, 242, 234), "cream": (246, 232, 186), "yellow": (250, 208, 38), "lemon": (248, 236, 98),
    "orange": (245, 140, 32), "apricot": (248, 178, 122), "coral": (244, 112, 92), "red": (212, 34, 40),
    "crimson": (160, 14, 48), "rose": (240, 150, 176), "pink": (238, 112, 168), "magenta": (206, 44, 138),
    "lilac": (194, 156, 222), "purple": (140, 66, 180), "violet": (98, 66, 196), "blue": (66, 98, 218),
    "sky": (126, 176, 240), "brown": (92, 54, 24), "black": (38, 24, 34), "green": (128, 160, 60),
}  # fmt: skip


@dataclass(frozen=True)
class FlowerClass:
    """What makes a kind of flower recognisable; colours are names in `PALETTE`.

    `petals` counts one ring of a head, the petals of each floret of a spike or globe, or the lobes of a bell.
    `base` colours the petals at the centre, `colour` at the tips. Raises ValueError on an unknown word.
    """

    key: str
    name: str
    petals: int
    colour: str
    base: str
    centre_colour: str
    shape: str
    arrangement: str
    centre: str
    leaf: str

    def __post_init__(self) -> None:
        _require("petals", self.petals, range(3, 25))
        _require("shape", self.shape, SHAPES)
        _require("arrangement", self.arrangement, ARRANGEMENTS)
        _require("centre", self.centre, CENTRES)
        _require("leaf", self.leaf, LEAVES)
        for colour in (self.colour, self.base, self.centre_colour):
            _require("colour", colour, PALETTE)

    @property
    def combination(self) -> tuple[int, str, str, str]:
        """Petal number, petal shape, arrangement and colour: no two classes share all four."""
        return self.petals, self.shape, self.arrangement, self.colour


def _require(what: str, value: object, allowed: Sequence | Mapping) -> None:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(str, allowed))}; got {value!r}")


# What a family of classes shares; its members differ in petal number and colours.
_STAR = {"shape": "pointed", "arrangement": "single", "centre": "eye", "leaf": "narrow"}
_LILY = {"shape": "pointed", "arrangement": "single", "centre": "stamens", "leaf": "narrow"}
_CAMPION = {"shape": "notched", "arrangement": "single", "centre": "eye", "leaf": "broad"}
_PINK = {"shape": "fringed", "arrangement": "single", "centre": "eye", "leaf": "narrow"}
_DAISY = {"shape": "strap", "arrangement": "single", "centre": "disc", "leaf": "fern"}
_DOUBLE = {"shape": "strap", "arrangement": "double", "centre": "disc", "leaf": "fern"}
_POPPY = {"shape": "round", "arrangement": "single", "centre": "stamens", "leaf": "fern"}
_TRUMPET = {"shape": "round", "arrangement": "single", "centre": "corona", "leaf": "narrow"}
_ROSE = {"shape": "round", "arrangement": "spiral", "centre": "none", "leaf": "broad"}
_TULIP = {"shape": "pointed", "arrangement": "cup", "centre": "none", "leaf": "broad"}
_BELL = {"shape": "pointed", "arrangement": "bells", "centre": "none", "leaf": "narrow"}
_SPIRE = {"shape": "round", "arrangement": "spike", "centre": "eye", "leaf": "narrow"}
_GLOBE = {"shape": "pointed", "arrangement": "globe", "centre": "eye", "leaf": "narrow"}
_GOBLET = {"shape": "round", "arrangement": "cup", "centre": "none", "leaf": "broad"}

# Neighbours share most traits and differ in number, hue or doubling: those are the pairs to confuse.
TARGET_CLASSES: tuple[FlowerClass, ...] = (
    FlowerClass("blue-star-5", "five-petalled blue star", 5, "blue", "sky", "yellow", **_STAR),
    FlowerClass("blue-star-8", "eight-petalled blue star", 8, "blue", "white", "white", **_STAR),
    FlowerClass("white-star-6", "six-petalled white star", 6, "white", "cream", "orange", **_LILY),
    FlowerClass("pink-campion", "notched pink campion", 5, "pink", "white", "cream", **_CAMPION),
    FlowerClass("magenta-campion", "notched magenta campion", 5, "magenta", "pink", "cream", **_CAMPION),
    FlowerClass("fringed-pink", "fringed rose pink", 5, "rose", "magenta", "white", **_PINK),
    FlowerClass("oxeye", "white ox-eye daisy", 16, "white", "white", "yellow", **_DAISY),
    FlowerClass("yellow-coneflower", "yellow coneflower", 12, "yellow", "orange", "brown", **_DAISY),
    FlowerClass("double-coneflower", "double yellow coneflower", 12, "yellow", "lemon", "green", **_DOUBLE),
    FlowerClass("red-poppy", "red field poppy", 4, "red", "brown", "black", **_POPPY),
    FlowerClass("lemon-trumpet", "lemon trumpet lily", 6, "lemon", "yellow", "orange", **_TRUMPET),
    FlowerClass("crimson-rose", "crimson spiral rose", 5, "crimson", "red", "yellow", **_ROSE),
    FlowerClass("apricot-rose", "apricot spiral rose", 5, "apricot", "orange", "yellow", **_ROSE),
    FlowerClass("coral-tulip", "coral cup tulip", 3, "coral", "yellow", "yellow", **_TULIP),
    FlowerClass("violet-bell", "violet bellflower", 4, "violet", "lilac", "white", **_BELL),
    FlowerClass("white-bell", "white bellflower", 4, "white", "cream", "yellow", **_BELL),
    FlowerClass("purple-spire", "purple meadow spire", 4, "purple", "pink", "white", **_SPIRE),
    FlowerClass("lilac-globe", "lilac globe leek", 6, "lilac", "white", "green", **_GLOBE),
)

PRETRAIN_CLASSES: tuple[FlowerClass, ...] = (
    FlowerClass("sky-star-5", "five-petalled sky star", 5, "sky", "white", "yellow", **_STAR),
    FlowerClass("sky-star-8", "eight-petalled sky star", 8, "sky", "blue", "white", **_STAR),
    FlowerClass("violet-star-5", "five-petalled violet star", 5, "violet", "blue", "white", **_STAR),
    FlowerClass("violet-star-8", "eight-petalled violet star", 8, "violet", "lilac", "yellow", **_STAR),
    FlowerClass("yellow-star-6", "six-petalled yellow star", 6, "yellow", "lemon", "orange", **_LILY),
    FlowerClass("coral-star-6", "six-petalled coral star", 6, "coral", "orange", "black", **_LILY),
    FlowerClass("white-campion", "notched white campion", 5, "white", "rose", "green", **_CAMPION),
    FlowerClass("red-campion", "notched red campion", 5, "red", "coral", "cream", **_CAMPION),
    FlowerClass("lilac-campion", "notched lilac campion", 5, "lilac", "white", "yellow", **_CAMPION),
    FlowerClass("fringed-white", "fringed white pink", 5, "white", "crimson", "white", **_PINK),
    FlowerClass("fringed-crimson", "fringed crimson pink", 5, "crimson", "magenta", "white", **_PINK),
    FlowerClass("pink-daisy", "pink garden daisy", 16, "pink", "rose", "yellow", **_DAISY),
    FlowerClass("violet-aster", "violet aster", 16, "violet", "purple", "yellow", **_DAISY),
    FlowerClass("orange-coneflower", "orange coneflower", 12, "orange", "red", "brown", **_DAISY),
    FlowerClass("double-orange-coneflower", "double orange coneflower", 12, "orange", "red", "yellow", **_DOUBLE),
    FlowerClass("double-aster", "double lilac aster", 16, "lilac", "purple", "yellow", **_DOUBLE),
    FlowerClass("yellow-poppy", "yellow mountain poppy", 4, "yellow", "orange", "orange", **_POPPY),
    FlowerClass("apricot-poppy", "apricot field poppy", 4, "apricot", "coral", "black", **_POPPY),
    FlowerClass("white-trumpet", "white trumpet lily", 6, "white", "cream", "yellow", **_TRUMPET),
    FlowerClass("rose-trumpet", "rose trumpet lily", 6, "rose", "white", "magenta", **_TRUMPET),
    FlowerClass("pink-rose", "pink spiral rose", 5, "pink", "magenta", "yellow", **_ROSE),
    FlowerClass("cream-rose", "cream spiral rose", 5, "cream", "yellow", "yellow", **_ROSE),
    FlowerClass("red-tulip", "red cup tulip", 3, "red", "yellow", "yellow", **_TULIP),
    FlowerClass("purple-tulip", "purple goblet tulip", 3, "purple", "violet", "yellow", **_GOBLET),
    FlowerClass("sky-bell", "sky-blue bellflower", 4, "sky", "white", "white", **_BELL),
    FlowerClass("rose-bell", "rose bellflower", 4, "rose", "cream", "white", **_BELL),
    FlowerClass("blue-spire", "blue meadow spire", 4, "blue", "violet", "white", **_SPIRE),
    FlowerClass("rose-spire", "rose meadow spire", 4, "rose", "pink", "white", **_SPIRE),
    FlowerClass("white-globe", "white globe leek", 6, "white", "green", "green", **_GLOBE),
    FlowerClass("magenta-globe", "magenta globe leek", 6, "magenta", "purple", "white", **_GLOBE),
)


@dataclass(frozen=True)
class _Ground:
    """A background: dark and light RGB, and the cells (rows, columns) of its coarse and fine texture."""

    dark: tuple[int, int, int]
    light: tuple[int, int, int]
    coarse: tuple[int, int]
    fine: tuple[int, int]
    fine_weight: float


_GROUNDS = (
    _Ground((28, 66, 22), (126, 168, 72), (5, 7), (5, 44), 0.55),  # grass: upright streaks
    _Ground((50, 34, 24), (132, 98, 70), (6, 6), (40, 40), 0.5),  # soil: crumbs
    _Ground((112, 160, 214), (226, 236, 244), (4, 3), (9, 7), 0.25),  # sky: wide clouds
    _Ground((84, 84, 86), (176, 172, 164), (7, 5), (30, 22), 0.35),  # stone: mottled
    _Ground((14, 38, 24), (82, 122, 58), (8, 8), (15, 15), 0.35),  # shade: leaves out of focus
)
_LEAF_DARK, _LEAF_LIGHT = (36, 84, 34), (112, 160, 70)
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
_RINGS = {  # arrangement -> (length, turn in sectors) of each ring of petals, outermost first
    "single": ((1.0, 0.0),),
    "double": ((1.0, 0.0), (0.66, 0.5)),
    "spiral": ((1.0, 0.0), (0.84, 0.38), (0.66, 0.76), (0.49, 1.14), (0.33, 1.52), (0.19, 1.9)),
}


@dataclass(frozen=True)
class _Head:
    """A head's own frame, each an array (H, W) or a number; `pixel` is one pixel's width in that frame."""

    x: np.ndarray
    y: np.ndarray
    pixel: np.ndarray | float
    light: float  # direction the light comes from, radians in the frame
    spread: np.ndarray  # (24,) brightness of each petal around 1


def render(flower: FlowerClass, *, index: int, split: str, seed: int, size: int) -> np.ndarray:
    """Paint picture `index` of a class: uint8 (size, size, 3) RGB.

    A function of its arguments alone: same picture in any order and process. Raises ValueError for an
    unknown split, a negative index or seed, or a size under `MIN_SIZE` pixels.
    """
    _require("split", split, SPLITS)
    for what, value, least in (("index", index, 0), ("seed", seed, 0), ("size", size, MIN_SIZE)):
        if value < least:
            raise ValueError(f"{what} must be at least {least}; got {value}")
    rng = _generator(seed, flower.key, split, index)
    canvas = _background(rng, size=size)
    if rng.random() < 0.2:  # a smaller neighbour of the same kind, behind
        _plant(canvas, flower, rng, radius=rng.uniform(0.2, 0.32), reach=0.75)
    _plant(canvas, flower, rng, radius=rng.uniform(0.64, 0.86), reach=0.12)
    if rng.random() < 0.2:
        _occlude(canvas, rng)
    return _photograph(canvas, rng)


def _generator(seed: int, key: str, split: str, index: int) -> np.random.Generator:
    # hash() differs between processes; a digest does not
    digest = hashlib.blake2b(f"{key}/{split}/{index}".encode(), digest_size=8).digest()
    return np.random.Generator(np.random.PCG64([seed, int.from_bytes(digest, "little")]))


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x and y, float32 (1, size) and (size, 1), read-only and broadcast when used."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    line.setflags(write=False)
    return line[None, :], line[:, None]


def _rgb(colour: str | tuple[int, int, int]) -> np.ndarray:
    """A palette name or 0..255 triple as float32 (3, 1, 1) in [0, 1], ready to broadcast over a plane."""
    triple = PALETTE[colour] if isinstance(colour, str) else colour
    return np.asarray(triple, np.float32)[:, None, None] / 255


def _blend(canvas: np.ndarray, cover: np.ndarray, colour: np.ndarray) -> None:
    """Lay a colour, (3, 1, 1) or (3, H, W), over the canvas (3, H, W) in place; cover (H, W) is in [0, 1]."""
    canvas += cover * (colour - canvas)


def _soft(distance: np.ndarray, pixel: np.ndarray | float) -> np.ndarray:
    """Coverage of a pixel whose centre lies `distance` inside an edge."""
    return np.clip(distance / pixel + 0.5, 0, 1)


def _noise(rng: np.random.Generator, *, cells: tuple[int, int], size: int) -> np.ndarray:
    """Smooth noise in about [0, 1], float32 (size, size), from a grid of random cells."""
    grid = Image.fromarray(rng.random(cells, dtype=np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, *, size: int) -> np.ndarray:
    ground = _GROUNDS[rng.integers(len(_GROUNDS))]
    texture = (1 - ground.fine_weight) * _noise(rng, cells=ground.coarse, size=size)
    texture = texture + ground.fine_weight * _noise(rng, cells=ground.fine, size=size)
    texture = np.clip(1.5 * texture - 0.25 + rng.uniform(-0.15, 0.15), 0, 1)
    dark, light = _rgb(ground.dark), _rgb(ground.light)
    return dark + texture * (light - dark)


def _plant(canvas: np.ndarray, flower: FlowerClass, rng: np.random.Generator, *, radius: float, reach: float) -> None:
    """Paint stem, leaves and head; `reach` bounds the head's distance from the middle on each axis."""
    x, y = _grid(canvas.shape[-1])
    cx, cy = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
    upright = flower.arrangement in ("cup", "bells", "spike")
    turn = rng.uniform(-0.35, 0.35) if upright else rng.uniform(-math.pi, math.pi)
    # seen from the side, a flat head shortens by the cosine of its tilt
    tilt, axis = (0.0, 0.0) if upright else (rng.uniform(0, 0.5), rng.uniform(0, math.pi))
    _stem_and_leaves(canvas, flower, rng, cx=cx, cy=cy, radius=radius)
    px, py = _rotate((x - cx) / radius, (y - cy) / radius, axis)
    hx, hy = _rotate(px / math.cos(tilt), py, turn - axis)
    spread = rng.normal(1, 0.05, size=24).astype(np.float32)
    head = _Head(hx, hy, 2 / canvas.shape[-1] / radius, rng.uniform(-math.pi, math.pi), spread)
    colours = _shift_hues(flower, rng)
    _PAINTERS.get(flower.arrangement, _paint_rings)(canvas, flower, head, colours, rng)


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _shift_hues(flower: FlowerClass, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tip, base and centre RGB of one plant: individuals of a kind differ a little in hue and paleness."""
    shift = rng.normal(0, 0.025, size=(3, 1, 1)).astype(np.float32)
    pale = rng.uniform(0, 0.18)
    tip, base, centre = (_rgb(name) + shift for name in (flower.colour, flower.base, flower.centre_colour))
    return tuple(np.clip(c + pale * (1 - c), 0, 1) for c in (tip, base, centre))


def _stem_and_leaves(
    canvas: np.ndarray, flower: FlowerClass, rng: np.random.Generator, *, cx: float, cy: float, radius: float
) -> None:
    x, y = _grid(canvas.shape[-1])
    bend = rng.uniform(-0.25, 0.25)
    below = np.clip(y - cy, 0, None)
    middle = cx + bend * below * below
    green = _rgb(_LEAF_DARK) + rng.uniform(0.2, 0.7) * (_rgb(_LEAF_LIGHT) - _rgb(_LEAF_DARK))
    pixel = 2 / canvas.shape[-1]
    stem = _soft(0.06 * radius - np.abs(x - middle), pixel) * (y > cy)
    _blend(canvas, stem, 0.85 * green)
    for side in (-1, 1):
        foot = cy + radius * rng.uniform(1.0, 1.5)
        angle = -math.pi / 2 + side * rng.uniform(0.5, 1.3)
        bx = cx + bend * (foot - cy) ** 2
        _leaf(canvas, flower.leaf, green * rng.uniform(0.8, 1.15), (bx, foot), angle, radius * 1.35)


def _leaf(
    canvas: np.ndarray, kind: str, green: np.ndarray, foot: tuple[float, float], angle: float, length: float
) -> None:
    """Paint one leaf from its foot, `length` long, pointing along `angle` (radians, clockwise from +x)."""
    x, y = _grid(canvas.shape[-1])
    u, v = _rotate((x - foot[0]) / length, (y - foot[1]) / length, angle)
    inside = np.clip(u, 0, 1)
    half = {"broad": 0.95, "narrow": 0.3, "fern": 0.9}[kind] * inside * (1 - inside)
    if kind == "fern":
        half = half * (0.45 + 0.55 * np.abs(np.sin(22 * inside - 9 * np.abs(v))))
    shade = 1.05 - 1.2 * np.abs(v) + np.float32(0.12) * (v > 0)  # the two halves catch the light differently
    _blend(canvas, _soft(half - np.abs(v), 2 / canvas.shape[-1] / length) * (half > 0), shade * green)


def _paint_rings(
    canvas: np.ndarray, flower: FlowerClass, head: _Head, colours: tuple, rng: np.random.Generator
) -> None:
    radius, angle = np.hypot(head.x, head.y), np.arctan2(head.y, head.x)
    tip, base, _ = colours
    rings = _RINGS.get(flower.arrangement, _RINGS["single"])
    for number, (length, turn) in enumerate(rings):
        dim = 1 - 0.07 * number if flower.arrangement == "spiral" else 1 - 0.25 * (len(rings) - 1 - number)
        _ring(canvas, flower, head, radius, angle, length=length, turn=turn, tip=tip * dim, base=base * dim)
    _paint_centre(canvas, flower.centre, head, radius, angle, colours)


def _ring(
    canvas: np.ndarray, flower: FlowerClass, head: _Head, radius: np.ndarray, angle: np.ndarray,
    *, length: float, turn: float, tip: np.ndarray, base: np.ndarray,
) -> None:  # fmt: skip
    """Paint one ring of petals: fold the plane into one sector a petal, then draw that petal."""
    sector = 2 * math.pi / flower.petals
    position = angle / sector + turn
    petal = np.rint(position)
    away = (position - petal) * sector
    reach = radius / length
    u, v = reach * np.cos(away), reach * np.sin(away)
    half = _half_width(flower.shape, u, v, away, petals=flower.petals)
    inside = half - np.abs(v)
    direction = (petal - turn) * sector
    bright = head.spread[petal.astype(np.intp) % flower.petals] + 0.1 * np.cos(direction - head.light)
    # a petal darkens towards its edge, more where its neighbour lies over it
    bright = bright * (0.72 + 0.34 * np.clip(inside / 0.16, 0, 1)) - 0.3 * v
    bright = bright - np.float32(0.1) * (np.abs(v) < 0.022) * (u < 0.8)
    along = np.clip(1.35 * u - 0.25, 0, 1)
    _blend(canvas, 0.4 * np.clip(inside / 0.12 + 0.8, 0, 1), np.float32(0.35) * canvas)  # shadow cast
    _blend(canvas, _soft(inside, head.pixel / length), bright * (base + along * (tip - base)))


def _half_width(shape: str, u: np.ndarray, v: np.ndarray, away: np.ndarray, *, petals: int) -> np.ndarray:
    """Half the petal's width at `u` along it (0 foot, 1 tip); negative beyond both ends."""
    widest = min(0.5, 1.08 * math.tan(math.pi / petals))
    if shape == "notched":
        u = u + 0.24 * np.exp(-((v / 0.075) ** 2))  # a shorter middle: heart-shaped tip
        widest *= 0.78  # light between the petals, or five notched ones read as ten
    elif shape == "fringed":
        u = u + 0.09 * np.abs(np.sin(away * petals * 3.5)) ** 0.7
    t = np.clip(u, 0, 1)
    if shape == "pointed":
        profile = 2.3 * np.sqrt(t) * (1 - t) * (0.55 + 0.45 * t)
    elif shape == "strap":
        profile = 0.86 * np.sqrt(np.clip(1 - t**8, 0, 1)) * np.minimum(1, 0.35 + 1.3 * t)
    elif shape == "fringed":
        profile = np.sqrt(t) * np.sqrt(np.clip(1 - t**10, 0, 1))
    else:
        past = t - 0.62  # two half ellipses that meet where the petal is widest
        profile = np.sqrt(np.clip(1 - np.maximum(past / 0.38, past / -0.75) ** 2, 0, 1))
    return np.where((u > 0) & (u < 1), widest * profile, np.float32(-1))


def _paint_centre(
    canvas: np.ndarray, kind: str, head: _Head, radius: np.ndarray, angle: np.ndarray, colours: tuple
) -> None:
    colour = colours[2]
    if kind == "eye":
        _blend(canvas, 0.6 * np.clip(1.6 - radius / 0.16, 0, 1), colours[1])
        _blend(canvas, _soft(0.13 - radius, head.pixel), colour)
    elif kind == "disc":
        dots = np.sin(44 * head.x) * np.sin(44 * head.y)  # the florets of a daisy's disc
        bright = 1.05 + 0.15 * dots - 1.3 * np.clip(radius - 0.12, 0, 1)
        _blend(canvas, 0.5 * np.clip((0.38 - radius) / 0.1, 0, 1), np.float32(0.4) * canvas)
        _blend(canvas, _soft(0.3 - radius, head.pixel), bright * colour)
    elif kind == "stamens":
        fold = angle * (9 / (2 * math.pi))
        across = (fold - np.rint(fold)) * (2 * math.pi / 9) * radius
        _blend(canvas, 0.7 * _soft(0.022 - np.abs(across), head.pixel) * (radius < 0.32), colour)
        _blend(canvas, _soft(0.06 - np.hypot(across, radius - 0.33), head.pixel), colour)
        _blend(canvas, _soft(0.12 - radius, head.pixel), _rgb("green"))
    elif kind == "corona":
        frill = 0.4 * (1 + 0.07 * np.sin(11 * angle))
        bright = 0.55 + 0.6 * np.clip(radius / 0.36, 0, 1)  # the trumpet is deep: dark inside
        _blend(canvas, 0.45 * np.clip((0.52 - radius) / 0.12, 0, 1), np.float32(0.5) * canvas)
        _blend(canvas, _soft(frill - radius, head.pixel), bright * colour)


def _paint_cup(canvas: np.ndarray, flower: FlowerClass, head: _Head, colours: tuple, rng: np.random.Generator) -> None:
    """Paint a tulip from the side: petals rise from one foot, the middle one in front."""
    tip, base, _ = colours
    fan = np.linspace(-0.42, 0.42, flower.petals)
    for lean in sorted(fan.tolist(), key=abs, reverse=True):
        px, py = _rotate(head.x / 1.75, (head.y - 0.85) / 1.75, lean * 0.9)
        u, t = -py, np.clip(-py, 0, 1)
        v = px - 0.38 * lean * t * (1 - t)  # the outer petals bulge
        taper = (1 - t) if flower.shape == "pointed" else np.sqrt(np.clip(1 - t**5, 0, 1)) * 0.46
        half = np.where((u > 0) & (u < 1), 0.82 * np.sqrt(t) * taper * (0.6 + 0.75 * t), np.float32(-1))
        inside = half - np.abs(v)
        bright = (1.02 - 0.5 * abs(lean)) * (0.7 + 0.33 * np.clip(inside / 0.12, 0, 1)) + 0.35 * v
        along = np.clip(3 * t, 0, 1)
        _blend(canvas, _soft(inside, head.pixel / 1.75), bright * (base + along * (tip - base)))


def _paint_bells(
    canvas: np.ndarray, flower: FlowerClass, head: _Head, colours: tuple, rng: np.random.Generator
) -> None:
    """Paint bells hanging from an arching stalk; every bell is drawn at once in the nearest one's frame."""
    tip, base, _ = colours
    along = np.linspace(0, 1, rng.integers(3, 6))
    arch = 0.42 * along**2 - 0.1
    places = np.stack([1.5 * along - 0.72, arch + 0.08 * (np.arange(len(along)) % 2)], axis=1)
    a = np.clip((head.x + 0.72) / 1.5, 0, 1)
    curve = 0.42 * a * a + 0.11 * a - 0.45  # through the tops of the bells
    stalk = _soft(0.05 - np.abs(head.y - curve), head.pixel) * (a > 0) * (a < 1)
    _blend(canvas, stalk, _rgb(_LEAF_LIGHT) * 0.8)
    which, x, y, scale = _fold(head, places, 0.62 - 0.2 * along)
    t = np.clip((y + 0.55) / 1.5, 0, 1)
    half = 0.18 + 0.36 * np.sqrt(t) + 0.5 * t**5
    rim = 1 - 0.1 * np.abs(np.sin((x / (half + 0.05)) * math.pi * flower.petals / 2))
    inside = np.minimum(half - np.abs(x), np.minimum(y + 0.55, 1.5 * rim - 0.55 - y))
    roundness = x / (half + 0.01)
    bright = head.spread[which % 24] * (1.05 - 0.32 * roundness**2 - 0.18 * roundness)
    bright = bright - np.float32(0.12) * (np.cos(roundness * math.pi * flower.petals / 2) ** 2 > 0.9)  # ribs
    shaded = bright * (base + (t**0.7) * (tip - base))
    _blend(canvas, _soft(inside, head.pixel / scale), shaded)


def _paint_spike(
    canvas: np.ndarray, flower: FlowerClass, head: _Head, colours: tuple, rng: np.random.Generator
) -> None:
    """Paint a spire: whorls of florets, smaller towards the top."""
    rows = rng.integers(7, 10)
    height = np.repeat(np.linspace(1.0, -1.15, rows), 3)
    taper = 1 - 0.55 * (1.0 - height) / 2.15
    sideways = np.tile([-0.3, 0.02, 0.3], rows) + rng.normal(0, 0.035, size=3 * rows)
    height = height + np.tile([0.0, 0.12, 0.0], rows)
    places = np.stack([sideways * taper, height], axis=1)
    _paint_florets(canvas, flower, head, colours, rng, places=places, radii=0.27 * taper)


def _paint_globe(
    canvas: np.ndarray, flower: FlowerClass, head: _Head, colours: tuple, rng: np.random.Generator
) -> None:
    """Paint an umbel: florets on a sphere in golden-angle order, foreshortened towards its rim."""
    count = rng.integers(22, 30)
    order = np.arange(count) + 0.5
    out = 0.86 * np.sqrt(order / count)
    turn = order * _GOLDEN_ANGLE
    places = np.stack([out * np.cos(turn), out * np.sin(turn)], axis=1)
    rim = np.hypot(head.x, head.y)
    _blend(canvas, 0.6 * np.clip((0.92 - rim) / 0.2, 0, 1), _rgb(_LEAF_DARK))
    _paint_florets(canvas, flower, head, colours, rng, places=places, radii=0.27 - 0.07 * out**2)


def _paint_florets(
    canvas: np.ndarray, flower: FlowerClass, head: _Head, colours: tuple, rng: np.random.Generator,
    *, places: np.ndarray, radii: np.ndarray,
) -> None:  # fmt: skip
    which, x, y, scale = _fold(head, places, radii)
    turns = rng.uniform(0, 2 * math.pi, size=len(places)).astype(np.float32)[which]
    cosine, sine = np.cos(turns), np.sin(turns)
    floret = _Head(x * cosine + y * sine, y * cosine - x * sine, head.pixel / scale, head.light, head.spread)
    # the whole cluster is round: its side towards the light is brighter
    bright = 1 + 0.22 * (head.x * math.cos(head.light) + head.y * math.sin(head.light))
    before = canvas.copy()
    _paint_rings(canvas, flower, floret, colours, rng)
    canvas[...] = before + (canvas - before) * np.clip(bright, 0.6, 1.15)


def _fold(head: _Head, places: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, ...]:
    """Nearest floret of each pixel: its number, the pixel's x and y in its frame, its radius; all (H, W)."""
    places, radii = places.astype(np.float32), radii.astype(np.float32)
    x, y = np.broadcast_arrays(head.x, head.y)
    # |p - place|^2 / radius^2 expanded into one product over the terms x^2 + y^2, x, y, 1
    terms = np.stack([x * x + y * y, x, y, np.ones_like(x)]).reshape(4, -1)
    weights = np.stack([np.ones_like(radii), -2 * places[:, 0], -2 * places[:, 1], (places**2).sum(1)])
    which = np.argmin((weights / radii**2).T @ terms, axis=0).reshape(x.shape)
    scale = radii[which]
    return which, (x - places[which, 0]) / scale, (y - places[which, 1]) / scale, scale


def _occlude(canvas: np.ndarray, rng: np.random.Generator) -> None:
    """Lay a blade of grass or a leaf in front, entering from one edge."""
    side = rng.uniform(0, 2 * math.pi)
    foot = (1.15 * math.cos(side), 1.15 * math.sin(side))
    kind = ("narrow", "broad")[rng.integers(2)]
    green = _rgb(_LEAF_DARK) + rng.random() * (_rgb(_LEAF_LIGHT) - _rgb(_LEAF_DARK))
    length = rng.uniform(1.0, 1.7) if kind == "narrow" else rng.uniform(0.6, 1.0)
    _leaf(canvas, kind, green, foot, side + math.pi + rng.uniform(-0.4, 0.4), length)


def _photograph(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, white balance, vignette, focus and sensor noise; float (3, H, W) to uint8 (H, W, 3)."""
    x, y = _grid(canvas.shape[-1])
    direction = rng.uniform(-math.pi, math.pi)
    light = rng.uniform(0.72, 1.12) * (1 + 0.16 * (x * math.cos(direction) + y * math.sin(direction)))
    light = light * (255 - 23 * (x * x + y * y))
    balance = 1 + rng.uniform(-1, 1) * np.array([0.08, 0.0, -0.1], np.float32)  # evening to overcast
    lit = np.clip(canvas * light * balance[:, None, None], 0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(lit.transpose(1, 2, 0)))
    focus = rng.uniform(0, 0.9) * canvas.shape[-1] / 64  # pixels
    if focus > 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(focus))
    grain = rng.normal(0, rng.uniform(1, 7), size=canvas.shape[1:]).astype(np.float32)[..., None]
    return np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8)


_PAINTERS = {"cup": _paint_cup, "bells": _paint_bells, "spike": _paint_spike, "globe": _paint_globe}

"""Labelled synthetic scenes for the demo, in mmsegmentation's file layout.

A class is an outline together with a texture. Every outline comes with two
textures, disks and stars share one, and the textures differ in orientation
or in frequency relative to the size of the shape. Colours are random. The
background carries the same textures, in patches without an outline and in
triangles, which are decoys.
"""
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

PALETTE = [[40, 40, 40], [230, 80, 60], [250, 180, 60], [70, 130, 220],
           [90, 200, 230], [60, 170, 90], [190, 110, 210]]
SPLITS = ('training', 'validation')
# Bump it when the same parameters begin to draw something else.
DRAWING = 3
MIN_SIZE = 32

# A function from coordinates (u, v), in which a shape has a radius of about 1,
# to a mask.
Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Texture(NamedTuple):
    """A two-coloured pattern and its period, in radii of the shape."""
    pattern: Pattern
    period: float


def _fraction(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)  # much faster than x % 1


def _disk(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v < 0.81


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) < 0.8


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    turns = _fraction(np.arctan2(v, u) * (5 / (2 * np.pi)))
    return np.hypot(u, v) < 0.5 + 1.2 * abs(turns - 0.5)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (v > -0.5) & (abs(u) < (1 - v) / np.sqrt(3))


def _stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _fraction(u) < 0.5


def _checks(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _stripes(u, v) ^ _stripes(v, u)


def _bars(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _stripes(v, u)


STRIPES, FINE_STRIPES = Texture(_stripes, 0.6), Texture(_stripes, 0.3)
BARS, FINE_BARS = Texture(_bars, 0.6), Texture(_bars, 0.3)
CHECKS = Texture(_checks, 0.8)

KINDS = {
    'striped disk': (_disk, STRIPES),
    'barred disk': (_disk, BARS),
    'fine square': (_square, FINE_STRIPES),
    'checked square': (_square, CHECKS),
    'striped star': (_star, STRIPES),
    'fine star': (_star, FINE_BARS),
}
CLASSES = ('background', *KINDS)


def write_scenes(root: Path, num_train: int, num_val: int, size: int = 128,
                 seed: int = 0) -> None:
    """Write images and label maps, unless the same ones were written before.

    The files are ``images/{training,validation}/00000.png`` (RGB) and
    ``annotations/{training,validation}/00000.png`` (class ids as uint8).
    ``scenes.json`` is completed last, so an interrupted write is redone.

    Args:
        root: Folder of the dataset. Scenes in it that were written with other
            parameters are replaced.
        num_train: Number of training scenes.
        num_val: Number of validation scenes.
        size: Height and width of a scene in pixels.
        seed: The same seed gives the same files, and a scene does not depend
            on how many others there are.

    Raises:
        ValueError: An argument is out of range.
        FileExistsError: ``root`` holds images or annotations that this
            function did not write.
    """
    for name, value, least in (('num_train', num_train, 1),
                               ('num_val', num_val, 1),
                               ('size', size, MIN_SIZE), ('seed', seed, 0)):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')
    stamp = root / 'scenes.json'
    wanted = json.dumps({'num_train': num_train, 'num_val': num_val,
                         'size': size, 'seed': seed, 'drawing': DRAWING})
    if stamp.exists() and stamp.read_text() == wanted:
        return
    _clear(root, stamp)
    for split, count in enumerate((num_train, num_val)):
        _write_split(root, split, count, size, seed)
    stamp.write_text(wanted)


def draw_scene(size: int, rng: np.random.Generator
               ) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        size: Height and width in pixels, S below.
        rng: Source of all random numbers.

    Returns:
        The RGB image (S, S, 3) and its class ids (S, S), both uint8.
    """
    image = _background(size, rng)
    label = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(3, 9)):
        _add_shape(image, label, rng)
    return _photograph(image, rng), label


def _clear(root: Path, stamp: Path) -> None:
    """Empty the folder of scenes. The stamp file marks it as written by
    :func:`write_scenes` and as incomplete."""
    folders = [root / 'images', root / 'annotations']
    for folder in folders:
        if folder.exists() and not stamp.exists():
            raise FileExistsError(
                f'{folder} was not written by write_scenes and is not '
                'overwritten; write the scenes to a folder of their own')
    root.mkdir(parents=True, exist_ok=True)
    stamp.write_text('{}')
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
        for name in SPLITS:
            (folder / name).mkdir(parents=True)


def _write_split(root: Path, split: int, count: int, size: int,
                 seed: int) -> None:
    for index in range(count):
        rng = np.random.default_rng((seed, split, index))
        image, label = draw_scene(size, rng)
        file = Path(SPLITS[split], f'{index:05d}.png')
        # Noise does not compress, so a higher level would only take longer.
        Image.fromarray(image).save(root / 'images' / file, compress_level=1)
        Image.fromarray(label).save(root / 'annotations' / file)


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Paint a faint texture over the whole image, and patches of other textures
    with soft edges.

    Returns:
        Colours (S, S, 3), float32.
    """
    u, v = _coordinates(size, rng)
    image = _paint(_any_texture(rng), u, v, _colours(rng, 5, 20), rng)
    for _ in range(rng.integers(1, 4)):
        u, v = _coordinates(size, rng)
        patch = _paint(_any_texture(rng), u, v, _colours(rng, 30, 80), rng)
        opacity = np.exp(-2 * (u * u + v * v))[..., None]
        image += opacity * (patch - image)
    return image


def _add_shape(image: np.ndarray, label: np.ndarray,
               rng: np.random.Generator) -> None:
    """Draw a shape over image and label map, in place.

    Args:
        image: Colours (S, S, 3).
        label: Class ids (S, S).
        rng: Source of the class, the pose and the colours.
    """
    class_id = rng.integers(len(CLASSES))
    outline, texture = (KINDS[CLASSES[class_id]] if class_id else
                        (_triangle, _any_texture(rng)))
    u, v = _coordinates(len(label), rng)
    inside = outline(u, v)
    image[inside] = _paint(texture, u[inside], v[inside],
                           _colours(rng, 110, 190), rng)
    label[inside] = class_id


def _photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add uneven light, blur and noise to an image.

    Args:
        image: Colours (S, S, 3), float32.
        rng: Source of their strengths and of the noise.

    Returns:
        The image (S, S, 3), uint8.
    """
    size = len(image)
    across, down = rng.uniform(-0.4, 0.4, 2).astype(np.float32)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + across * line + down * line[:, None]
    lit = Image.fromarray(_to_uint8(image * light[..., None]))
    blur = rng.uniform(0.2, 0.7) * size / 128
    blurred = np.asarray(lit.filter(ImageFilter.GaussianBlur(blur)))
    noise = rng.standard_normal(image.shape, np.float32)
    return _to_uint8(blurred + rng.uniform(3, 8) * noise)


def _coordinates(size: int, rng: np.random.Generator
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates u and v (S, S) of every pixel in a frame with random origin,
    angle and scale."""
    # These are Python floats, because NumPy scalars would turn the coordinates
    # into float64.
    row, column = (rng.uniform(0.08, 0.92, 2) * size).tolist()
    radius = rng.uniform(0.16, 0.3) * size
    pixels = np.arange(size, dtype=np.float32)
    x, y = (pixels - column) / radius, (pixels[:, None] - row) / radius
    # The angles stay small enough to tell stripes from bars.
    angle = rng.uniform(-0.5, 0.5)
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _paint(texture: Texture, u: np.ndarray, v: np.ndarray,
           colours: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The colours (..., 3) a texture has at coordinates u and v (...)."""
    period = texture.period * rng.uniform(0.9, 1.1)
    shift_u, shift_v = rng.random(2).tolist()
    mask = texture.pattern(u / period + shift_u, v / period + shift_v)
    return colours.take(mask, axis=0)


def _any_texture(rng: np.random.Generator) -> Texture:
    return [texture for _, texture in KINDS.values()][rng.integers(len(KINDS))]


def _colours(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A light and a dark colour (2, 3) in any order, ``low`` to ``high`` apart.

    They differ most in lightness, because a small network soon learns to see
    such textures.
    """
    difference = rng.choice((-1, 1)) + rng.standard_normal(3) / 2
    difference *= rng.uniform(low, high) / np.linalg.norm(difference)
    middle = rng.uniform(60, 195, 3)
    return np.stack([middle - difference / 2,
                     middle + difference / 2]).astype(np.float32)


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)

"""Glyphs: letters of several alphabets in the 12 DejaVu faces that matplotlib brings, as few-shot classification.

A letter is a class, its renderings in the faces (sans, mono and serif; regular, bold, slanted and both) are its 12
examples. Tasks of different splits have different letters, so a task that is held out is made of classes never seen.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bilevel.core.options import is_int, require
from bilevel.meta.problem import MetaProblem
from bilevel.meta.tasks import SPLITS, SplitTasks, Task, mlp
from bilevel.oracles.samplers import keyed_generator

SIDE = 28
"""Height and width of an image."""
SIZE = 18
"""Size of the type in pixels: the largest letters then just fit."""
FACES = 12
FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}
"""Of the letters, for each split."""


@dataclass(frozen=True)
class Glyphs:
    """Renderings of letters.

    Attributes:
        images: of shape (letters, faces, 28, 28), uint8 with 0 for paper and 255 for ink.
        letters: a character for each row, in the order of Unicode.
        faces: the names of the faces.
    """

    images: Tensor
    letters: tuple[str, ...]
    faces: tuple[str, ...]


@lru_cache
def glyphs() -> Glyphs:
    """Return the renderings of the letters that all faces have; takes a few seconds, once for each process.

    Left out are letters that cannot be told from another: compatibility forms (such as the Kelvin sign, which is a K,
    and superscripts), and letters whose image equals that of an earlier letter in some face (such as the Greek capital
    Alpha, after the Latin A).

    Raises:
        ValueError: without matplotlib, or where it brings other faces.
    """
    try:
        import matplotlib
        from matplotlib.ft2font import FT2Font
    except ImportError:
        raise ValueError("the glyphs are rendered from the fonts of matplotlib: pip install 'bilevel[plot]'.") from None
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    # The display faces hold few letters.
    paths = sorted(path for path in folder.glob("DejaVu*.ttf") if "Display" not in path.name)
    if len(paths) != FACES:
        raise ValueError(f"the glyphs need the {FACES} DejaVu faces of matplotlib, but {folder} holds {len(paths)}.")
    fonts = [FT2Font(str(path)) for path in paths]
    for font in fonts:
        font.set_size(SIZE, 72)
    codes = sorted(set.intersection(*(set(font.get_charmap()) for font in fonts)))
    seen: list[set[bytes]] = [set() for _ in fonts]
    letters, images = [], []
    for letter in map(chr, codes):
        if not unicodedata.category(letter).startswith("L") or unicodedata.normalize("NFKC", letter) != letter:
            continue
        rendered = [_rendered(font, letter) for font in fonts]
        if any(image.tobytes() in before for image, before in zip(rendered, seen, strict=True)):
            continue
        for image, before in zip(rendered, seen, strict=True):
            before.add(image.tobytes())
        letters.append(letter)
        images.append(np.stack(rendered))
    return Glyphs(torch.from_numpy(np.stack(images)), tuple(letters), tuple(path.stem for path in paths))


def _rendered(font: Any, letter: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    font.set_text(letter)
    font.draw_glyphs_to_bitmap(antialiased=True)
    ink = np.asarray(font.get_image())[:SIDE, :SIDE]
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - ink.shape[0]) // 2, (SIDE - ink.shape[1]) // 2
    image[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return image


class GlyphTasks(SplitTasks):
    """Tell some letters apart from a few examples of each.

    A task draws `ways` letters of its split and, for each of them, faces for the support and the query images, which
    never share an image. Inputs have the shape (ways * shots, 1, 28, 28) with ink 1, targets are ints below `ways`.

    Args:
        ways: letters of a task.
        shots: support images of each letter.
        queries: query images of each letter.
        split: "train" (3/5 of the letters), "val" or "test" (1/5 each); no letter is in two splits.
        seed: of the splits and of the tasks.

    >>> (images, labels), (query, _) = GlyphTasks(ways=3, shots=1, queries=2)(0)
    >>> images.shape, labels, query.shape
    (torch.Size([3, 1, 28, 28]), tensor([0, 1, 2]), torch.Size([6, 1, 28, 28]))
    """

    def __init__(self, ways: int = 5, shots: int = 1, queries: int = 5, split: str = "train", seed: int = 0) -> None:
        super().__init__(split, seed)
        self.ways, self.shots, self.queries = ways, shots, queries
        rows = _rows(split, seed)
        require(
            self,
            "ways",
            f"an int from 2 to the {len(rows)} letters of this split",
            is_int(ways, 2) and ways <= len(rows),
        )
        require(self, "shots", "a positive int", is_int(shots))
        most = f"a positive int, with {shots} shots at most {FACES - shots}, as a letter has {FACES} images"
        require(self, "queries", most, is_int(queries) and shots + queries <= FACES)
        self._images = glyphs().images[rows].float().div(255.0)
        self.letters = tuple(glyphs().letters[row] for row in rows)

    def __call__(self, index: int) -> Task:
        generator = self.generator(index)
        chosen = torch.randperm(len(self.letters), generator=generator)[: self.ways]
        faces = torch.rand(self.ways, FACES, generator=generator).argsort(1)[:, : self.shots + self.queries]
        images = self._images[chosen[:, None], faces]
        labels = torch.arange(self.ways)[:, None].expand(-1, self.shots + self.queries)
        return self._part(images, labels, slice(self.shots)), self._part(images, labels, slice(self.shots, None))

    @staticmethod
    def _part(images: Tensor, labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        return images[:, columns].reshape(-1, 1, SIDE, SIDE), labels[:, columns].reshape(-1)


def _rows(split: str, seed: int) -> list[int]:
    """Return the rows of the letters of a split, in the order of Unicode."""
    count = len(glyphs().letters)
    order = torch.randperm(count, generator=keyed_generator(seed)).tolist()
    ends = [0, round(FRACTIONS["train"] * count), round((FRACTIONS["train"] + FRACTIONS["val"]) * count), count]
    place = SPLITS.index(split)
    return sorted(order[ends[place] : ends[place + 1]])


class GlyphProblem(MetaProblem):
    """Few-shot classification of glyphs with a network of ReLU layers, ready for a config.

    Args:
        ways: letters of a task.
        shots: support images of each letter.
        queries: query images of each letter.
        hidden: units of the hidden layers.
        batch_size: tasks in a meta-batch.
        seed: of the split of the letters, the tasks and the initial weights.
        adapt: as all further options see `MetaProblem`; layers are named "1", "3", "5", ...
        device: where the network and the tasks go.
    """

    # Options that `SineProblem` has, too, are written out: configs read names and defaults off a signature.
    def __init__(
        self,
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        hidden: Sequence[int] = (64, 64),
        batch_size: int = 16,
        seed: int = 0,
        *,
        adapt: Sequence[str] = ("*",),
        proximity: float = 0.0,
        evaluated_tasks: int = 100,
        evaluated_steps: Sequence[int] = (1, 5),
        device: str = "cpu",
    ) -> None:
        super().__init__(
            mlp(SIDE * SIDE, hidden, ways, seed).to(device),
            nn.functional.cross_entropy,
            GlyphTasks(ways, shots, queries, "train", seed),
            batch_size,
            adapt=adapt,
            proximity=proximity,
            held_out=GlyphTasks(ways, shots, queries, "val", seed),
            evaluated_tasks=evaluated_tasks,
            evaluated_steps=evaluated_steps,
        )

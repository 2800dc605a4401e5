"""The built-in pictures: charts, shapes, writing, tables and plots, each with a passage about it.

They are drawn when they are asked for, in integer arithmetic on arrays of our own, so that they are
the same everywhere; a digest of the pixels guards that. Latin letters are those of the bitmap font
inside Pillow. No font with Japanese is sure to be there, so the few characters that are written are
drawn by their strokes. The passages are made from the numbers that are drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from so8tqc.errors import DataError, MissingToolError, ToolError

if TYPE_CHECKING:
    from PIL.Image import Image

PREFIX = "builtin:images/"
WIDTH, HEIGHT = 224, 168

_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (204, 51, 51),
    "green": (51, 153, 68),
    "blue": (51, 85, 204),
    "orange": (230, 140, 30),
    "purple": (130, 60, 160),
    "grey": (128, 128, 128),
    "black": (20, 20, 20),
}
_WHITE = (255, 255, 255)

_STROKES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "一": ((1, 6, 11, 6),),
    "二": ((2, 3, 10, 3), (1, 9, 11, 9)),
    "三": ((2, 2, 10, 2), (3, 6, 9, 6), (1, 10, 11, 10)),
    "十": ((1, 5, 11, 5), (6, 1, 6, 11)),
    "土": ((2, 4, 10, 4), (6, 1, 6, 10), (1, 10, 11, 10)),
    "王": ((2, 2, 10, 2), (2, 6, 10, 6), (6, 2, 6, 10), (1, 10, 11, 10)),
    "口": ((2, 2, 10, 2), (2, 2, 2, 10), (10, 2, 10, 10), (2, 10, 10, 10)),
    "日": ((3, 1, 9, 1), (3, 1, 3, 11), (9, 1, 9, 11), (3, 6, 9, 6), (3, 11, 9, 11)),
    "田": ((1, 2, 11, 2), (1, 2, 1, 10), (11, 2, 11, 10), (1, 6, 11, 6), (6, 2, 6, 10),
           (1, 10, 11, 10)),
    "中": ((2, 3, 10, 3), (2, 3, 2, 8), (10, 3, 10, 8), (2, 8, 10, 8), (6, 0, 6, 12)),
    "山": ((6, 1, 6, 10), (1, 4, 1, 10), (11, 4, 11, 10), (1, 10, 11, 10)),
    "川": ((2, 1, 1, 11), (6, 2, 6, 10), (10, 1, 10, 11)),
    "木": ((1, 4, 11, 4), (6, 1, 6, 11), (6, 4, 1, 9), (6, 4, 11, 9)),
    "本": ((1, 4, 11, 4), (6, 1, 6, 11), (6, 4, 1, 9), (6, 4, 11, 9), (4, 9, 8, 9)),
    "大": ((1, 5, 11, 5), (6, 1, 6, 5), (6, 5, 1, 11), (6, 5, 11, 11)),
    "人": ((6, 1, 1, 11), (6, 3, 11, 11)),
}  # fmt: skip
"""Character → its strokes on a grid of 12 × 12: from x, y to x, y."""


@dataclass(frozen=True)
class Drawing:
    """One picture and its passage.

    Attributes:
        name: of the picture, and of the text.
        draw: draws it.
        prompt: the question that the passage answers; the picture stands in front.
        text: the passage.
        language: of the passage.
        category: which kind of picture.
    """

    name: str
    draw: Callable[[Canvas], None]
    prompt: str
    text: str
    language: str
    category: str


class Canvas:
    """[H, W, 3] uint8 pixels, x to the right, y down; white at first."""

    def __init__(self) -> None:
        self.pixels: npt.NDArray[np.uint8] = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
        self._y, self._x = np.mgrid[:HEIGHT, :WIDTH]

    def box(self, x0: int, y0: int, x1: int, y1: int, colour: str) -> None:
        """Fill a rectangle, the last row and column left out."""
        self.pixels[max(y0, 0) : y1, max(x0, 0) : x1] = _COLOURS[colour]

    def disc(self, x: int, y: int, radius: int, colour: str) -> None:
        """Fill a circle."""
        inside = (self._x - x) ** 2 + (self._y - y) ** 2 <= radius**2
        self.pixels[inside] = _COLOURS[colour]

    def triangle(self, x: int, y: int, size: int, colour: str) -> None:
        """Fill a triangle with its tip at (x, y − size) and a base of 2·size at y + size."""
        inside = (np.abs(self._x - x) * 2 <= self._y - y + size) & (self._y <= y + size)
        self.pixels[inside] = _COLOURS[colour]

    def line(self, x0: int, y0: int, x1: int, y1: int, colour: str, width: int = 2) -> None:
        """A line of square points."""
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(steps + 1):
            x = x0 + (2 * i * (x1 - x0) + steps) // (2 * steps)
            y = y0 + (2 * i * (y1 - y0) + steps) // (2 * steps)
            self.box(x, y, x + width, y + width, colour)

    def write(self, x: int, y: int, text: str, colour: str = "black", scale: int = 1) -> None:
        """Latin letters, 6 × 11 pixels each, enlarged by a whole number."""
        glyphs = _written(text).repeat(scale, axis=0).repeat(scale, axis=1)
        part = self.pixels[y : y + glyphs.shape[0], x : x + glyphs.shape[1]]
        part[glyphs[: part.shape[0], : part.shape[1]]] = _COLOURS[colour]

    def strokes(self, x: int, y: int, text: str, size: int, colour: str = "black") -> None:
        """Japanese characters, ``12 · size`` pixels each."""
        for i, character in enumerate(text):
            left = x + i * 13 * size
            for x0, y0, x1, y1 in _STROKES[character]:
                self.line(
                    left + x0 * size, y + y0 * size, left + x1 * size, y + y1 * size, colour, size
                )


def _written(text: str) -> npt.NDArray[np.bool_]:
    """[h, w] which pixels of the bitmap font are set."""
    from PIL import ImageFont

    mask = ImageFont.load_default_imagefont().getmask(text, mode="1")
    values = np.frombuffer(bytes(mask), np.uint8)
    return values.reshape(mask.size[1], mask.size[0]) > 0


def draw(name: str) -> Image:
    """One of the built-in pictures, in RGB.

    Raises:
        DataError: there is none of this name.
        MissingToolError: Pillow is not installed.
        ToolError: this Pillow's letters are others than those that the digest is of.
    """
    try:
        from PIL import Image as Pillow
    except ImportError:
        raise MissingToolError(
            "the built-in pictures are drawn with Pillow, which is not installed",
            remedy="Run: pip install 'so8tqc[vision]'",
        ) from None
    known = {drawing.name: drawing for drawing in drawings()}
    if name not in known:
        raise DataError(f"no built-in picture {name!r}", remedy=f"There are {', '.join(known)}.")
    pixels = _pixels(known[name])
    if (found := hashlib.sha256(pixels.tobytes()).hexdigest()[:16]) != DIGESTS[name]:
        raise ToolError(
            f"the built-in picture {name} comes out otherwise ({found}) than it should "
            f"({DIGESTS[name]}): Pillow's bitmap font has changed",
            remedy="Use the Pillow of constraints.txt.",
        )
    return Pillow.fromarray(pixels)


def _pixels(drawing: Drawing) -> npt.NDArray[np.uint8]:
    canvas = Canvas()
    drawing.draw(canvas)
    return canvas.pixels


@cache
def drawings() -> tuple[Drawing, ...]:
    """All of them, in order: neighbours are of different kinds."""
    kinds = (_charts(), _shapes(), _english(), _japanese(), _tables(), _plots())
    most = max(len(kind) for kind in kinds)
    return tuple(kind[i] for i in range(most) for kind in kinds if i < len(kind))


_ASKED = "What does the picture show?"
_ASKED_JA = "この画像には何が描かれていますか。"


def _charts() -> list[Drawing]:
    sets = {
        "bars-fruit": ("Fruit sold", {"apples": 40, "pears": 25, "plums": 60, "figs": 15}),
        "bars-rain": ("Rain in mm", {"Jan": 70, "Apr": 35, "Jul": 20, "Oct": 90}),
        "bars-trees": ("Trees planted", {"oak": 12, "ash": 48, "elm": 30}),
    }
    made = [_bars(name, title, values) for name, (title, values) in sets.items()]
    return [*made, _steps("line-visitors", "Visitors", [20, 35, 30, 55, 70, 65, 90])]


def _bars(name: str, title: str, values: Mapping[str, int]) -> Drawing:
    colours = ("red", "blue", "green", "orange")
    room = (WIDTH - 30) // len(values)

    def draw_it(canvas: Canvas) -> None:
        canvas.write(20, 4, title)
        canvas.line(20, 140, WIDTH - 10, 140, "black")
        for i, (label, value) in enumerate(values.items()):
            left = 26 + i * room
            canvas.box(left, 140 - value, left + room - 14, 140, colours[i])
            canvas.write(left, 148, label)
            canvas.write(left, 126 - value, str(value))

    ranked = sorted(values, key=lambda key: -values[key])
    listed = ", ".join(f"{value} for {label}" for label, value in values.items())
    text = (
        f"The picture shows a bar chart with the title “{title}”. It has {len(values)} bars: "
        f"{listed}. The tallest bar is that of {ranked[0]}, with {values[ranked[0]]}, and the "
        f"lowest that of {ranked[-1]}, with {values[ranked[-1]]}. Together the bars come to "
        f"{sum(values.values())}, and the difference between the tallest and the lowest is "
        f"{values[ranked[0]] - values[ranked[-1]]}."
    )
    return Drawing(name, draw_it, _ASKED, text, "en", "chart")


def _steps(name: str, title: str, values: Sequence[int]) -> Drawing:
    def draw_it(canvas: Canvas) -> None:
        canvas.write(20, 4, title)
        canvas.line(20, 140, WIDTH - 10, 140, "black")
        canvas.line(20, 20, 20, 140, "black")
        points = [(30 + 28 * i, 140 - value) for i, value in enumerate(values)]
        for (x0, y0), (x1, y1) in pairwise(points):
            canvas.line(x0, y0, x1, y1, "blue", 3)
        for i, (x, y) in enumerate(points):
            canvas.disc(x, y, 4, "red")
            canvas.write(x - 3, 148, str(i + 1))

    text = (
        f"The picture shows a line chart of {title.lower()} over {len(values)} days. It begins at "
        f"{values[0]} and ends at {values[-1]}. The highest point is on day "
        f"{values.index(max(values)) + 1}, with {max(values)}. Red dots mark the days, and a blue "
        "line joins them. It falls twice, and rises on all other days."
    )
    return Drawing(name, draw_it, _ASKED, text, "en", "chart")


def _shapes() -> list[Drawing]:
    def three(canvas: Canvas) -> None:
        canvas.disc(40, 84, 28, "red")
        canvas.box(86, 56, 142, 112, "blue")
        canvas.triangle(184, 84, 28, "green")

    def nested(canvas: Canvas) -> None:
        canvas.box(42, 14, 182, 154, "grey")
        canvas.disc(112, 84, 60, "orange")
        canvas.box(92, 64, 132, 104, "purple")

    def discs(canvas: Canvas) -> None:
        for i in range(5):
            canvas.disc(28 + 42 * i, 84, 8 + 3 * i, "blue")

    def board(canvas: Canvas) -> None:
        for row in range(4):
            for column in range(4):
                colour = "black" if (row + column) % 2 else "orange"
                canvas.box(40 + 36 * column, 12 + 36 * row, 76 + 36 * column, 48 + 36 * row, colour)

    return [
        Drawing(
            "shapes-three", three, _ASKED,
            "There are three shapes side by side on white ground. On the left is a red circle, in "
            "the middle a blue square, and on the right a green triangle that points upwards. The "
            "three are about as tall as one another, and none touches the next.", "en", "shapes",
        ),
        Drawing(
            "shapes-nested", nested, _ASKED,
            "Three shapes lie inside one another. The outermost is a large grey square. In it is "
            "an orange circle, and in the middle of the circle a small purple square. All have the "
            "same centre, so the picture looks the same when it is turned by a quarter.",
            "en", "shapes",
        ),
        Drawing(
            "shapes-discs", discs, _ASKED_JA,
            "白い背景に、青い円が横に五つ並んでいます。左の円がいちばん小さく、右へ行くほど大きくなります。"
            "円の中心はすべて同じ高さにあり、間隔も同じです。円のほかには何も描かれていません。",
            "ja", "shapes",
        ),
        Drawing(
            "shapes-board", board, _ASKED,
            "The picture shows a board of four rows and four columns. Its sixteen squares are "
            "orange and black in turn, as on a chessboard, and the square in the upper left corner "
            "is orange. There are eight squares of each colour, and no piece stands on the board.",
            "en", "shapes",
        ),
    ]  # fmt: skip


def _english() -> list[Drawing]:
    signs = {
        "text-open": (("OPEN", "9 to 5"), "green"),
        "text-train": (("Train 27", "Platform 4"), "blue"),
        "text-mind": (("Mind the", "step"), "red"),
    }
    return [_sign(name, lines, colour) for name, (lines, colour) in signs.items()]


def _sign(name: str, lines: tuple[str, str], colour: str) -> Drawing:
    def draw_it(canvas: Canvas) -> None:
        canvas.box(12, 24, 212, 144, colour)
        canvas.box(18, 30, 206, 138, "grey")
        for i, line in enumerate(lines):
            canvas.write(30, 44 + 44 * i, line, scale=2)

    text = (
        f"The picture is a sign with a {colour} frame. Two lines are written on it in black "
        f"letters. The first line reads “{lines[0]}”, and the second line reads “{lines[1]}”. "
        "There is nothing else on the sign: no arrow, no symbol, and no further word."
    )
    return Drawing(name, draw_it, "What is written on the sign?", text, "en", "text")


def _japanese() -> list[Drawing]:
    words = {
        "text-ja-nihon": ("日本", "日本の国の名前", "日", "本"),
        "text-ja-yamakawa": ("山川", "山と川", "山", "川"),
        "text-ja-taguchi": ("田口", "名字", "田", "口"),
        "text-ja-sanju": ("三十", "数の 30", "三", "十"),
    }
    return [_word(name, *rest) for name, rest in words.items()]


def _word(name: str, word: str, meaning: str, first: str, second: str) -> Drawing:
    def draw_it(canvas: Canvas) -> None:
        canvas.strokes(32, 48, word, 6)
        canvas.line(24, 140, 200, 140, "red", 3)

    text = (
        f"白い紙に黒い線で「{word}」と書いてあります。一文字目は「{first}」、二文字目は「{second}」です。"
        f"これは{meaning}を表します。文字の下には、赤い線が一本、横に引いてあります。"
    )
    return Drawing(name, draw_it, "この画像には何と書いてありますか。", text, "ja", "text")


def _tables() -> list[Drawing]:
    tables = {
        "table-planets": ("planet", "moons", {"Earth": 1, "Mars": 2, "Venus": 0}),
        "table-prices": ("item", "price", {"tea": 3, "cake": 5, "soup": 7, "bread": 2}),
        "table-goals": ("team", "goals", {"North": 4, "South": 1, "East": 3}),
        "table-rooms": ("room", "chairs", {"A": 12, "B": 8, "C": 20, "D": 6}),
    }
    return [_table(name, *rest) for name, rest in tables.items()]


def _table(name: str, left: str, right: str, rows: Mapping[str, int]) -> Drawing:
    lines = [(left, right), *((key, str(value)) for key, value in rows.items())]

    def draw_it(canvas: Canvas) -> None:
        for i, (a, b) in enumerate(lines):
            top = 10 + 28 * i
            canvas.box(16, top, 208, top + 26, "grey")
            canvas.pixels[top + 2 : top + 24, 18:110] = _WHITE
            canvas.pixels[top + 2 : top + 24, 112:206] = _WHITE
            canvas.write(26, top + 8, a, "blue" if i == 0 else "black")
            canvas.write(120, top + 8, b, "blue" if i == 0 else "black")

    best = max(rows, key=lambda key: rows[key])
    listed = "; ".join(f"{key}, {value}" for key, value in rows.items())
    text = (
        f"The picture shows a table of two columns, headed “{left}” and “{right}” in blue. Below "
        f"the heads are {len(rows)} rows: {listed}. The largest number stands in the row of "
        f"{best}, which has {rows[best]}. The sum of all the numbers in the right column is "
        f"{sum(rows.values())}."
    )
    return Drawing(name, draw_it, _ASKED, text, "en", "table")


def _plots() -> list[Drawing]:
    known: dict[str, tuple[str, Callable[[float], float], str]] = {
        "plot-sine": (
            "y = sin x", math.sin,
            "a sine, which passes through the origin and swings between −1 and 1",
        ),
        "plot-cosine": (
            "y = cos x", math.cos,
            "a cosine, which is 1 at x = 0 and swings between −1 and 1",
        ),
        "plot-square": (
            "y = x x / 8", lambda x: x * x / 8,
            "a parabola that opens upwards and has its lowest point at the origin",
        ),
        "plot-line": (
            "y = x / 3", lambda x: x / 3,
            "a straight line that rises from left to right through the origin",
        ),
        "plot-bell": (
            "y = exp(-x x)", lambda x: math.exp(-x * x),
            "a bell, which is 1 at x = 0 and falls to both sides",
        ),
    }  # fmt: skip
    return [_plot(name, *rest) for name, rest in known.items()]


def _plot(name: str, formula: str, function: Callable[[float], float], said: str) -> Drawing:
    def draw_it(canvas: Canvas) -> None:
        canvas.line(8, 84, WIDTH - 8, 84, "grey", 1)
        canvas.line(112, 8, 112, HEIGHT - 8, "grey", 1)
        # in sixteenths of a pixel, rounded: the last bit of a library's sine moves no pixel
        points = [(x, round(round((84 - 50 * function((x - 112) / 32)) * 16) / 16))
                  for x in range(10, WIDTH - 10, 4)]  # fmt: skip
        for (x0, y0), (x1, y1) in pairwise(points):
            canvas.line(x0, y0, x1, y1, "red")
        canvas.write(126, 150, formula)

    text = (
        f"The picture is a plot of the function {formula}, which is written below it. Two grey "
        "lines are the axes, and they cross in the middle. The red curve is "
        f"{said}. The horizontal axis reaches from about −3 to 3."
    )
    return Drawing(name, draw_it, _ASKED, text, "en", "plot")


DIGESTS: Mapping[str, str] = {
    "bars-fruit": "1828631fc3e225fd",
    "shapes-three": "d920eea7288cd766",
    "text-open": "11ccb5b8cde348b4",
    "text-ja-nihon": "58674f7c8907ce41",
    "table-planets": "40acd1b21f8e8ef0",
    "plot-sine": "3f110a7e86a94229",
    "bars-rain": "87b1539844819f54",
    "shapes-nested": "d31af0afbdb2fa38",
    "text-train": "79f2bdc351fb12dd",
    "text-ja-yamakawa": "180771188ad06778",
    "table-prices": "4b85c42098d333c3",
    "plot-cosine": "ca41b225047ae963",
    "bars-trees": "181ffe2732d9923c",
    "shapes-discs": "f1ef38e61887a723",
    "text-mind": "b18d0e6a3fa4ca04",
    "text-ja-taguchi": "0ae2f750f9770e17",
    "table-goals": "872fdddc53c06c60",
    "plot-square": "cc14f5bcd9efa6fc",
    "line-visitors": "5d34042c584c9128",
    "shapes-board": "dda436775d9dfde2",
    "text-ja-sanju": "4a32ccf9cbeb717f",
    "table-rooms": "f52b97edd8db33b4",
    "plot-line": "b288ff345ff85240",
    "plot-bell": "c1be847afd8d52c4",
}
"""Picture → the first 16 digits of the SHA-256 of its pixels."""

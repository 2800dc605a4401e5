"""Figures as PNG images, drawn by kaleido in a Chrome."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from so8tqc.disk.atomic import atomic_file
from so8tqc.errors import MissingToolError
from so8tqc.progress import Task

if TYPE_CHECKING:
    import plotly.graph_objects as go


def write_pngs(
    figures: Mapping[Path, go.Figure], size: Mapping[str, int], task: Task | None = None
) -> None:
    """Draw figures on white, all by one Chrome: starting it takes longer than drawing.

    Args:
        figures: path → figure; its colours are set to those of a white page.
        size: ``width``, ``height`` in pixels, ``scale``.
        task: advanced by one for each image.

    Raises:
        MissingToolError: kaleido or a Chrome is missing, or Chrome does not start.
    """
    for figure in figures.values():
        figure.update_layout(paper_bgcolor="white", plot_bgcolor="white", font_color="#1b2330")
    try:
        # a thread of its own, since the caller may run an event loop already (notebooks do)
        with ThreadPoolExecutor(1) as thread:
            images = thread.submit(asyncio.run, _render(figures, size, task)).result()
    except ImportError:
        raise MissingToolError(
            "kaleido is not installed", remedy="Run: pip install 'so8tqc[png]'"
        ) from None
    except (RuntimeError, OSError, ValueError, TimeoutError) as error:
        reason = str(error).strip().splitlines()
        raise MissingToolError(
            f"no Chrome that starts: {reason[0] if reason else type(error).__name__}",
            remedy="Run: apt-get install -y chromium (or set BROWSER_PATH).",
        ) from None
    for path, image in images.items():
        with atomic_file(path) as temporary:
            temporary.write_bytes(image)


async def _render(
    figures: Mapping[Path, go.Figure], size: Mapping[str, int], task: Task | None
) -> dict[Path, bytes]:
    import kaleido

    images: dict[Path, bytes] = {}
    async with kaleido.Kaleido() as renderer:
        for path, figure in figures.items():
            images[path] = await renderer.calc_fig(figure.to_dict(), opts={"format": "png", **size})
            if task is not None:
                task.advance(1, item=path.name)
    return images

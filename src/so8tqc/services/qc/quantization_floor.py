"""What quantizing costs by itself: the limit of a quantized file, measured beside it.

The *quantization floor* of a file is a second one of the same types, encoded by plain rounding from
the reference's own weights (``services.tensors.honest``), run on the same tokens in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from so8tqc.errors import So8tqcError
from so8tqc.gguf.conversion import UntraceableError
from so8tqc.gguf.file import GGUFFile, open_gguf
from so8tqc.metrics.bootstrap import paired_bootstrap, ratio_of_sums
from so8tqc.metrics.divergence import TokenTable
from so8tqc.progress import Progress
from so8tqc.records import Check, judge
from so8tqc.services.qc.judging import Bootstrap, mean_interval
from so8tqc.services.tensors.expected import Expected
from so8tqc.services.tensors.honest import is_quantized, write_honest

KL_FLOOR = "kl.floor"

FACTOR = 2.0
"""Of the floor, that a file may lose, as of a bake's noise floor. Honest encoders differ by less:
importance and compensation mostly lose less than plain rounding, rounding once more on the way
(F16, BF16) a few percent more; a format of one bit less loses four times as much (6.02 dB of mean
square error a bit)."""


class Floors:
    """The files beside the candidates, written when they are asked for.

    Args:
        files: quantized candidates that have a floor → their files.
        expected: candidate → what its tensors must stand for.
        progress: told about tensors.

    Attributes:
        notices: why others have none.
    """

    def __init__(
        self, files: Mapping[str, GGUFFile], expected: Mapping[str, Expected], progress: Progress
    ) -> None:
        self._files = files
        self._expected = expected
        self._progress = progress
        self.notices: list[str] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates that have one."""
        return tuple(self._files)

    @contextmanager
    def written(self, names: Collection[str]) -> Iterator[Mapping[str, Path]]:
        """Candidate → its floor, for as long as they are run; what cannot be encoded is told.

        Args:
            names: of which candidates.
        """
        wanted = {name: gguf for name, gguf in self._files.items() if name in names}
        if not wanted:
            yield {}
            return
        found: dict[str, Path] = {}
        with TemporaryDirectory(prefix="so8tqc-floor-") as root:
            for index, (name, gguf) in enumerate(wanted.items()):
                folder = Path(root) / str(index)
                folder.mkdir()
                try:
                    found[name] = write_honest(gguf, self._expected[name], folder, self._progress)
                except (UntraceableError, So8tqcError, OSError) as reason:
                    self.notices.append(f"{name} has no quantization floor: {reason}.")
            yield found


def quantization_floors(
    names: Mapping[str, Path],
    expected: Mapping[str, Expected],
    other_keys: Collection[str],
    progress: Progress,
    *,
    wanted: bool,
) -> Floors:
    """The floors of the quantized candidates.

    Args:
        names: candidates that are run.
        expected: GGUF candidate → what its tensors must stand for; without, it has no floor.
        other_keys: candidates whose key-values are not the model's. A floor has the candidate's,
            so that these have none: it would make their mistake, too.
        progress: told about tensors.
        wanted: False: nobody asks for them.
    """
    files = {name: open_gguf(path) for name, path in names.items() if name in expected}
    quantized = {name: gguf for name, gguf in files.items() if wanted and is_quantized(gguf)}
    able = {name: gguf for name, gguf in quantized.items() if name not in other_keys}
    found = Floors(able, expected, progress)
    found.notices += [
        f"{name} has no quantization floor: with its keys, which are not the model's "
        "(tensors.keys), an honest file would lose as much."
        for name in quantized
        if name not in able
    ]
    return found


def quantization_check(
    table: TokenTable, floor: TokenTable, subject: str, bootstrap: Bootstrap
) -> Check:
    """``kl.floor``: a quantized file loses no more than its types cost an honest encoder.

    The limit is :data:`FACTOR` times the mean KL of the floor; the interval of their ratio, texts
    resampled for both together, is told.

    Args:
        table: candidate against reference.
        floor: the floor against the same, on the same tokens.
        subject: the candidate.
        bootstrap: for intervals.
    """
    value, noise = (float(t.columns["kl"].mean()) for t in (table, floor))
    low, high = paired_bootstrap(
        np.stack([t.per_text("kl")[:, 0] for t in (table, floor)], axis=1),
        ratio_of_sums,
        resamples=bootstrap.resamples,
        seed=bootstrap.seed,
        looks=bootstrap.looks,
    )
    times = f"{value / noise if noise > 0 else float('inf'):.3g} times"
    paired = "" if np.isnan(low) else f" (95 % interval, paired: {low:.3g} to {high:.3g})"
    return judge(
        KL_FLOOR,
        value,
        FACTOR * noise,
        subject=subject,
        unit="nats",
        ci95=mean_interval(table, "kl", bootstrap),
        noise_floor=noise,
        detail=f"Mean KL, {times}{paired} that of the same types, encoded by plain rounding from "
        "the reference's own weights and run beside the file.",
    )

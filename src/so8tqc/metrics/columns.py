"""What stands where in a row of a token table, and of one model's numbers: names, once.

The kernels of a CPU see rows as numpy records (:data:`ROW`, :data:`SIDE_ROW`). Their fields are
part of the types that numba compiles a kernel for, so that a kernel kept on disk never writes by an
older order, which it would do by numbers of another module. Triton's kernels take positions from
the enums.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Side(IntEnum):
    """Numbers of a row of one model.

    ``LOG_NORMALISER`` is L = ln Σ e^z, ``BRIER`` the score Σ_v (p_v − 1[v is the target])².
    """

    LOG_NORMALISER = 0
    NLL = 1
    ENTROPY = 2
    MAX_PROB = 3
    MAX_LOGIT = 4
    BRIER = 5


class Column(IntEnum):
    """Columns of a token table; its names there are these in small letters.

    ``TOP5_OVERLAP`` is the share of the reference's five most likely tokens that are among the
    candidate's. ``MAX_ABS_LOGIT``, ``SUM_ABS_LOGIT`` and ``SUM_SQUARE_LOGIT`` are over the V logit
    differences of one position. Positions whose next token is unknown (the last) are not rows.
    """

    NLL_REFERENCE = 0
    NLL_CANDIDATE = 1
    ENTROPY_REFERENCE = 2
    ENTROPY_CANDIDATE = 3
    MAX_PROB_REFERENCE = 4
    MAX_PROB_CANDIDATE = 5
    MAX_LOGIT_REFERENCE = 6
    MAX_LOGIT_CANDIDATE = 7
    BRIER_REFERENCE = 8
    BRIER_CANDIDATE = 9
    KL = 10
    KL_REVERSE = 11
    JS = 12
    DELTA_P = 13
    SAME_TOP = 14
    TOP5_OVERLAP = 15
    CORRECT_REFERENCE = 16
    CORRECT_CANDIDATE = 17
    MAX_ABS_LOGIT = 18
    SUM_ABS_LOGIT = 19
    SUM_SQUARE_LOGIT = 20


COLUMNS = tuple(column.name.lower() for column in Column)
"""Names of the columns of a token table, in order."""

ROW = np.dtype([(name, np.float64) for name in COLUMNS])
"""A row of a token table as a record."""

SIDE_ROW = np.dtype([(number.name.lower(), np.float64) for number in Side])
"""A row of one model's numbers as a record."""


def as_records(rows: npt.NDArray[np.float64], record: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """The same memory, a record for each row.

    Args:
        rows: [t, fields of the record], contiguous.
        record: :data:`ROW` or :data:`SIDE_ROW`.
    """
    return rows.view(record)[:, 0]

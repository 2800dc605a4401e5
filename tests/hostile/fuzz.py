"""Hostile inputs by the thousand: ``python tests/hostile/fuzz.py --inputs 20000 --out FILE``.

Every reader reads what ``mutations`` makes of its valid files, then the corpus of ``bombs``, under
``watch``. It may succeed, or refuse with one ``So8tqcError`` of its exit code that names the file.
Anything else is a fault: hypothesis shrinks it, it is written to the results, and the exit code
is 1.

Meant to run in a process of its own: its address space is limited.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bombs import BOMBS, Bomb
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from mutations import spoilt
from readers import BY_NAME, READERS, Reader
from watch import Watch, limit_address_space, watching

from so8tqc.errors import So8tqcError

READ, REFUSED = "read", "refused"
HANG_SECONDS = 60


class Fault(AssertionError):
    """A reader did what it may not."""


def attempt(reader: Reader, folder: Path) -> str:
    """Read a directory under watch: ``READ`` or ``REFUSED``.

    Raises:
        Fault: anything else happened.
    """
    gc.collect(0)
    # what hangs in native code cannot be interrupted: then this process ends, saying where
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    outcome, error = READ, None
    with watching(folder, writes=reader.writes, spawns=reader.spawns) as watch:
        try:
            reader.read(folder)
        except KeyboardInterrupt:
            raise
        except BaseException as raised:  # a panic of native code is no Exception
            error = raised
    faulthandler.cancel_dump_traceback_later()
    if error is not None:
        outcome = _judged(reader, folder, error)
    _require_nothing(watch)
    return outcome


def _judged(reader: Reader, folder: Path, error: BaseException) -> str:
    if not isinstance(error, So8tqcError):
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        at = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
        raise Fault(f"{reader.name}: {type(error).__name__}: {str(error)[:300]} at {at}") from error
    if error.exit_code not in (reader.exit_code, reader.or_exit_code):
        raise Fault(f"{reader.name}: exit code {int(error.exit_code)}: {str(error)[:300]}")
    if str(folder) not in str(error) and not any(
        Path(name).name in str(error) for name in reader.files
    ):
        raise Fault(f"{reader.name}: no place is named: {str(error)[:300]}")
    if len(str(error)) > 4000:
        raise Fault(f"{reader.name}: a message of {len(str(error))} characters")
    return REFUSED


def _require_nothing(watch: Watch) -> None:
    if watch.found:
        raise Fault("; ".join(watch.found)[:600])


def fuzz(reader: Reader, inputs: int, folder: Path, seed: int | None) -> Counter[str]:
    """Read ``inputs`` spoilt directories; how many were read and refused.

    Args:
        seed: of the choices; None for the same ones in every run.

    Raises:
        Fault: shrunk to the smallest input that shows it.
    """
    valid = prepare(reader, folder)
    counts: Counter[str] = Counter()

    @settings(
        max_examples=inputs,
        derandomize=seed is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(reader.files)))
        content = data.draw(spoilt(valid[name], reader.files[name]))
        (folder / name).write_bytes(content)
        try:
            counts[attempt(reader, folder)] += 1
        finally:
            (folder / name).write_bytes(valid[name])
            shutil.rmtree(folder / "out", ignore_errors=True)

    (seeded(seed)(one) if seed is not None else one)()
    return counts


def prepare(reader: Reader, folder: Path) -> dict[str, bytes]:
    """Write a reader's valid files and see that they are read; their contents."""
    reader.make(folder)
    shutil.rmtree(folder / "out", ignore_errors=True)
    reader.read(folder)  # also imports what it needs
    shutil.rmtree(folder / "out", ignore_errors=True)
    if attempt(reader, folder) != READ:
        raise Fault(f"{reader.name}: a valid file is refused")
    shutil.rmtree(folder / "out", ignore_errors=True)
    return {name: (folder / name).read_bytes() for name in reader.files}


def drop(bomb: Bomb, folder: Path) -> str:
    """Read one input of the corpus; must be what the corpus says."""
    reader = BY_NAME[bomb.reader]
    prepare(reader, folder)
    bomb.plant(folder)
    outcome = attempt(reader, folder)
    if bomb.refused and outcome != REFUSED:
        raise Fault(f"{bomb.reader}: {bomb.text} was read")
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, and write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, required=True, help="of all readers together")
    parser.add_argument("--seed", type=int, help="left out: the same inputs in every run")
    parser.add_argument("--reader", action="append", choices=sorted(BY_NAME))
    parser.add_argument("--no-corpus", action="store_true")
    parser.add_argument("--light", action="store_true", help="without what takes long to make")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    sys.path.append(str(Path(__file__).parents[1]))  # where tiny_gguf is
    warnings.simplefilter("ignore")  # of torch, about odd pickles
    # all that is imported late, so that the limit is above the imports
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    limit_address_space()
    wanted = [BY_NAME[name] for name in options.reader] if options.reader else list(READERS)
    shares = sum(reader.share for reader in wanted)
    results: dict[str, dict[str, object]] = {}
    if options.out.is_file():  # of another run, some of whose readers are asked again
        results = json.loads(options.out.read_text("utf-8"))
    failed = False
    for reader in wanted:
        started = time.monotonic()
        inputs = max(1, round(options.inputs * reader.share / shares)) if options.inputs else 0
        row: dict[str, object] = {"inputs": 0, READ: 0, REFUSED: 0, "faults": []}
        with tempfile.TemporaryDirectory(prefix="so8tqc-fuzz-") as folder:
            faults: list[str] = []
            counts: Counter[str] = Counter()
            if inputs:
                try:
                    counts = fuzz(reader, inputs, Path(folder).resolve(), options.seed)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    faults.append(_told(error))
        bombs = (
            []
            if options.no_corpus
            else [
                bomb
                for bomb in BOMBS
                if bomb.reader == reader.name and not (options.light and bomb.heavy)
            ]
        )
        dropped: dict[str, str] = {}
        for bomb in bombs:
            with tempfile.TemporaryDirectory(prefix="so8tqc-fuzz-") as folder:
                try:
                    dropped[bomb.text] = drop(bomb, Path(folder).resolve())
                except Exception as error:
                    dropped[bomb.text] = "fault"
                    faults.append(f"{bomb.text}: {_told(error)}")
        row |= {
            "inputs": counts.total(),
            READ: counts[READ],
            REFUSED: counts[REFUSED],
            "corpus": dropped,
            "faults": faults,
        }
        failed |= bool(faults)
        results[reader.name] = row
        print(
            f"{reader.name}: {counts.total()} inputs, {counts[REFUSED]} refused, "
            f"{len(dropped)} of the corpus, {time.monotonic() - started:.1f} s",
            *(f"\n  FAULT {fault}" for fault in faults),
            file=sys.stderr,
            flush=True,
        )
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return int(failed)


def _told(error: BaseException) -> str:
    inner = getattr(error, "exceptions", None)
    return " | ".join(map(_told, inner)) if inner else f"{type(error).__name__}: {error}"[:900]


if __name__ == "__main__":
    sys.exit(main())

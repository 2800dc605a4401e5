"""Verify what single commands made: records beside it are followed back, each step made again."""

from __future__ import annotations

from so8tqc.config import VerifyConfig
from so8tqc.gguf.file import is_gguf
from so8tqc.progress import SILENT, Progress
from so8tqc.records import Record
from so8tqc.services.attest.chain import follow, made_by
from so8tqc.services.attest.loose import laid_out
from so8tqc.services.attest.service import Found, statement_of
from so8tqc.services.attest.statement import STATEMENT_NAME, write_statement
from so8tqc.services.attest.verify_statement import verify_statement


def is_loose(config: VerifyConfig) -> bool:
    """Whether it is what a single command made, and no quantized file, whose record says enough."""
    if config.is_statement or config.record is not None:
        return False
    if not is_gguf(config.file):
        return True
    step = made_by(config.file)
    return step is not None and step.kind != "quantize"


def verify_loose(config: VerifyConfig, progress: Progress = SILENT) -> Record:
    """Make again all that lies between a file or baked directory and its base, and compare.

    Record metrics: as of a statement.

    Raises:
        InputError: nothing beside it says how it was made, or it is not what its record says.
        ToolError: the temporary directory has no room.
    """
    chain = follow(config.file)
    with laid_out(config.file) as layout:
        found = Found(layout.directory, layout.records, layout.outside)
        path = layout.directory / STATEMENT_NAME
        write_statement(path, statement_of(found, progress))
        asked = VerifyConfig(
            file=path,
            base=chain.base,
            rotations=chain.rotations,
            adapters=chain.adapters,
            scratch=config.scratch,
        )
        record = verify_statement(asked, progress)
    notices = (chain.end,) if chain.end else ()
    return record.model_copy(update={"notices": notices, "config": config.model_dump(mode="json")})

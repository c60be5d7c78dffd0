"""What README.md and docs/ say of Slurm, done on a lab."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import DOCUMENTS, Reader, blocks
from on_lab import Slurm

WITH_SLURM = [path for path in DOCUMENTS if any(block.mark == "slurm" for block in blocks(path))]


@pytest.mark.parametrize("document", WITH_SLURM, ids=lambda path: path.name)
def test_a_document_does_what_it_says_on_slurm(document: Path, slurm: Slurm, tmp_path: Path) -> None:
    reader = Reader(tmp_path, {"SLURM_CONF": slurm.env["SLURM_CONF"]})
    for block in blocks(document):
        if block.file or block.mark == "slurm":
            reader.do(block)

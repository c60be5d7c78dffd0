"""README.md and docs/: every command and snippet is run, or says why it isn't."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, Block, Reader, blocks

from orchestrator.config import load
from orchestrator.config.distributions import DISTRIBUTIONS
from orchestrator.config.spec import Launch, Metric, Reduce, Retries, SweepSpec
from orchestrator.config.yaml12 import parse

MARKS = r"|slurm|exit \d|file: [\w.]+|not run: .+"


def joined(found: Iterator[Block]) -> Iterator[Block]:
    """The blocks, those of Python that follow each other as one: they build on each other."""
    last: Block | None = None
    for block in found:
        if last and last.kind == block.kind == "python" and not last.mark and not block.mark:
            last = dataclasses.replace(last, text=last.text + block.text)
            continue
        if last:
            yield last
        last = block
    if last:
        yield last


def is_run(block: Block) -> bool:
    return not block.mark.startswith(("not run", "slurm")) and (bool(block.file) or block.kind in ("console", "python"))


def ids(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


# The scripts of docs/adopt.md are run by test_adopt.py, with notices in between.
RUN_HERE = [document for document in DOCUMENTS if document.name != "adopt.md"]


@pytest.mark.parametrize("document", RUN_HERE, ids=ids(RUN_HERE))
def test_a_document_does_what_it_says(document: Path, tmp_path: Path) -> None:
    reader = Reader(tmp_path, {})
    for block in joined(blocks(document)):
        if is_run(block):
            reader.do(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_block_is_of_a_kind_that_is_run(document: Path) -> None:
    for block in blocks(document):
        assert re.fullmatch(MARKS, block.mark), f"{document.name}:{block.line}: {block.mark}"
        assert block.file or block.kind in ("console", "python", "yaml"), f"{document.name}:{block.line}"


def shape(lines: list[str]) -> list[str]:
    """Lines without what differs from run to run: numbers, ids, the width of columns."""
    text = re.sub(r"\b\d+-[0-9a-f]{8}\b|(?<=-)[0-9a-f]{10}\b|(?<=-)[0-9a-f]{16}\b", "0", "\n".join(lines))
    text = re.sub(r"\d[\d.,]*(e-?\d+)?", "0", text).replace("0 ms each", "0 s each")
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_transcript_is_what_is_printed(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks(ROOT / "README.md") if "orc init" in block.text]
    assert shape(Reader(tmp_path, {}).do(shown).splitlines()) == shape(shown.output)


def fragments() -> list[Block]:
    return [block for block in blocks(ROOT / "docs" / "sweep-file.md") if block.kind == "yaml" and not block.file]


@pytest.mark.parametrize("block", fragments(), ids=lambda block: f"line {block.line}")
def test_every_part_of_a_sweep_file_is_good(block: Block) -> None:
    given = parse(block.text).value
    assert isinstance(given, dict)
    rest = {"program": "train.py", "method": "grid", "parameters": "{x: {value: 1}}"}
    if "command" in given:
        del rest["program"]
    load.parse(block.text + "".join(f"{key}: {value}\n" for key, value in rest.items() if key not in given))


def keys() -> Iterator[str]:
    sections = {"": SweepSpec, "metric.": Metric, "launch.": Launch, "reduce.": Reduce}
    for prefix, section in sections.items():
        names = (field.name for field in dataclasses.fields(section))
        yield from (prefix + name for name in names if name not in ("metric", "launch", "reduce", "checkpoint"))
    yield from ("checkpoint.every", "checkpoint.mtbf_s")
    yield from (field.name for field in dataclasses.fields(Retries))
    yield from DISTRIBUTIONS


@pytest.mark.parametrize("key", list(keys()))
def test_every_key_is_explained(key: str) -> None:
    assert f"`{key}`" in (ROOT / "docs" / "sweep-file.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target

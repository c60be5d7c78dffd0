"""A naive summary goes through the checks that ours passes, and docs/summary.md shows what came of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT, Reader, blocks

DOCUMENT = ROOT / "docs" / "summary.md"

# What a naive summary gets wrong, by check.
WRONG = {
    "840 samples, which all these numbers of ranks divide": "5 results: mean off by",
    "100 samples, which 3 and 7 don't divide": "count 100, 102 or 105, not 100",
    "3 samples, fewer than ranks": "count 3, 4 or 7, not 3",
    "840 samples near 1e8": "std off by up to 2.5e+00",
    "100 trials": "2 results: mean off by",
    "one of them was run twice": "count 101, not 100",
    "one failed, then completed": "failed 1, not 0",
    "one has two results that differ": "count 101, not 100",
    "one is NaN": "mean NaN",
    "four are equally good": "best trial 2, 5, 8 or 11, not 2",
}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[str, str, str]]]:
    # Last on the path, where nothing of benchmarks/ hides a module of the same name.
    sys.path.append(str(ROOT / "benchmarks"))
    import summary_checks

    yield list(summary_checks.rows(summary_checks.checks()))
    sys.path.remove(str(ROOT / "benchmarks"))


def test_ours_gives_one_right_result_in_every_check(rows: list[tuple[str, str, str]]) -> None:
    assert {ours for _, _, ours in rows} == {"one result: right"}


@pytest.mark.parametrize("name", WRONG)
def test_the_naive_one_fails(name: str, rows: list[tuple[str, str, str]]) -> None:
    (naive,) = [naive for check, naive, _ in rows if check == name]
    assert WRONG[name] in naive


def test_every_check_is_named_here(rows: list[tuple[str, str, str]]) -> None:
    assert [name for name, _, _ in rows] == list(WRONG)


def test_the_document_shows_this_table(rows: list[tuple[str, str, str]]) -> None:
    shown = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")][2:]
    assert shown == [f"| {' | '.join(row)} |" for row in rows]


def test_the_document_shows_what_is_printed(tmp_path: Path) -> None:
    reader = Reader(tmp_path, {})
    commands = [block for block in blocks(DOCUMENT) if block.kind != "python" and not block.mark.startswith("not run")]
    said = [reader.do(block) for block in commands]
    assert commands[-1].output
    assert said[-1].splitlines() == commands[-1].output

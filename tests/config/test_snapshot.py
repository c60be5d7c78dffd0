from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config import snapshot as code
from orchestrator.config.snapshot import Manifest, SnapshotFile, digest, survey
from orchestrator.errors import FolderError, OrcError, UsageError


def make(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def names(snapshot: code.Snapshot) -> list[str]:
    return [file.path for file in snapshot.files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = make(tmp_path / "tree", **{"jobs/train.py": "1", "lib/model.py": "2", ".gitignore": "data/\n"})
    make(root, **{"data/big.bin": "3", "notes.md": "4", "gone.py": "5"})
    git(root, "init")
    git(root, "add", "jobs", "gone.py", ".gitignore")
    git(root, "commit", "-m", "m")
    (root / "gone.py").unlink()
    return root


def test_a_git_tree_gives_tracked_and_untracked_but_no_ignored_files(tree: Path) -> None:
    snapshot = survey(tree / "jobs/train.py", tree / "jobs")
    assert names(snapshot) == [".gitignore", "jobs/train.py", "lib/model.py", "notes.md"]
    assert (snapshot.root, snapshot.program, snapshot.folder) == (tree, "jobs/train.py", "jobs")
    assert snapshot.skipped == ()


def test_submodules_and_nested_repositories_are_part_of_the_tree(tree: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", **{"inner.py": "1"})
    git(other, "init")
    git(other, "add", ".")
    git(other, "commit", "-m", "m")
    git(tree, "submodule", "add", str(other), "sub")
    git(tree, "clone", str(other), "nested")
    assert {"sub/inner.py", "nested/inner.py"} <= set(names(survey(tree / "jobs/train.py", tree / "jobs")))


def test_outside_git_the_programs_folder_is_taken_but_for_what_is_no_code(tmp_path: Path) -> None:
    root = make(tmp_path / "p", **{"train.py": "1", "lib/a.py": "2", ".hidden/b.py": "3", "__pycache__/c.pyc": "4"})
    make(
        root, **{"venv/pyvenv.cfg": "", "venv/lib.py": "5", "old-sweep/plan.jsonl": "{}", "runs/x": "6", "s.yaml": "7"}
    )
    snapshot = survey(root / "train.py", root, exclude=[root / "runs", root / "s.yaml"])
    assert names(snapshot) == ["lib/a.py", "train.py"]


@pytest.mark.parametrize("name", ["result.txt", "results.json", "curve.csv", "out/log", "net.pt", "run.log", "a.ipynb"])
def test_outside_git_what_a_trial_writes_does_not_change_the_code(tmp_path: Path, name: str) -> None:
    root = make(tmp_path / "p", **{"train.py": "1", "run.sh": "2", "conf.yaml": "3", "tool": "#!/bin/sh\n"})
    before = survey(root / "train.py", root)
    assert names(before) == ["conf.yaml", "run.sh", "tool", "train.py"]
    after = survey(make(root, **{name: "x"}) / "train.py", root)
    assert after.digest == before.digest
    assert after.skipped == (f"{name}: left out: outside of git only what looks like source is code",)


def test_outside_git_programs_packages_and_what_the_command_names_are_code(tmp_path: Path) -> None:
    root = make(
        tmp_path / "p", **{"lib/__init__.py": "", "lib/words.txt": "1", "lib/data/more.txt": "2", "my.json": "3"}
    )
    make(root, **{"program": "4", "other.txt": "5", "large.yaml": "6" * 2**19, "data/x.txt": "7"})
    (root / "program").chmod(0o700)
    assert names(survey(None, root)) == ["lib/__init__.py", "lib/data/more.txt", "lib/words.txt", "program"]
    named = survey(None, root, command=["./program", "my.json", "--x", "z" * 999, "data/../other.txt", "/etc/passwd"])
    assert {"my.json", "other.txt"} <= set(names(named))
    assert len(named.files) == 6


def test_a_program_that_git_ignores_is_taken_with_its_folder(tree: Path) -> None:
    make(tree, **{"data/scratch/train.py": "1", "data/scratch/more.py": "2"})
    snapshot = survey(tree / "data/scratch/train.py", tree / "data/scratch")
    assert names(snapshot) == ["more.py", "train.py"]


def test_a_command_takes_the_sweep_files_folder(tmp_path: Path) -> None:
    root = make(tmp_path / "p", **{"run.sh": "1"})
    snapshot = survey(None, root)
    assert (names(snapshot), snapshot.program, snapshot.folder) == (["run.sh"], None, ".")


@pytest.mark.parametrize("name", [".env", "key.pem", "id_rsa", "id_ed25519.pub", ".netrc", "x/.ssh/config", "a.KEY"])
def test_credentials_stay_behind_tracked_or_not(tree: Path, name: str) -> None:
    make(tree, **{name: "secret"})
    git(tree, "add", "-f", name)
    snapshot = survey(tree / "jobs/train.py", tree / "jobs")
    assert name not in names(snapshot)
    assert snapshot.skipped == (f"{name}: left out: looks like a credential",)


def test_links_stay_inside_the_tree(tree: Path, tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", **{"secret.txt": "s"})
    links = {"out": outside, "out-file": outside / "secret.txt", "in": tree / "lib", "in-file": tree / "lib/model.py"}
    for name, target in {
        **links,
        "nowhere": Path("no/such"),
        "loop": Path("loop"),
        "config": tree / ".git/config",
    }.items():
        (tree / name).symlink_to(target)
    snapshot = survey(tree / "jobs/train.py", tree / "jobs")
    snapshot.copy(tmp_path / "copy")
    assert sorted(line.partition(":")[0] for line in snapshot.skipped) == [
        "config",
        "loop",
        "nowhere",
        "out",
        "out-file",
    ]
    assert (tmp_path / "copy/in").readlink() == Path("lib")
    assert not (tmp_path / "copy/in-file").is_symlink()
    assert (tmp_path / "copy/in-file").read_text() == "2"


def test_a_tracked_folder_that_became_a_link_out_of_the_tree_is_left_out(tree: Path, tmp_path: Path) -> None:
    git(tree, "add", "lib")
    (tree / "lib").rename(tmp_path / "lib")
    (tree / "lib").symlink_to(tmp_path / "lib")
    assert [name for name in names(survey(tree / "jobs/train.py", tree)) if name.startswith("lib")] == []


def test_what_is_no_plain_file_is_left_out_and_named(tmp_path: Path) -> None:
    root = make(tmp_path / "p", **{"train.py": "1"})
    os.mkfifo(root / "pipe")
    assert survey(root / "train.py", root).skipped == ("pipe: left out: not a plain file",)


def test_a_copy_is_read_only_whole_and_as_surveyed(tree: Path, tmp_path: Path) -> None:
    (tree / "jobs/train.py").chmod(0o755)
    snapshot = survey(tree / "jobs/train.py", tree / "jobs")
    (tree / "jobs/train.py").write_text("edited meanwhile")
    snapshot.copy(tmp_path / "copy")
    assert (tmp_path / "copy/jobs/train.py").read_text() == "1"
    assert stat.S_IMODE((tmp_path / "copy/jobs/train.py").stat().st_mode) == 0o500
    assert stat.S_IMODE((tmp_path / "copy/lib/model.py").stat().st_mode) == 0o400
    assert Manifest.read(tmp_path / "copy") == snapshot.manifest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".copy")] == []


def test_a_copy_that_fails_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "copy" / "in the way").mkdir(parents=True)
    with pytest.raises(OrcError, match="copy: the code can't be copied here"):
        survey(tree / "jobs/train.py", tree).copy(tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "tree"]


@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 10), ("MAX_FILES", 1)])
def test_too_much_code_names_the_largest_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(code, limit, value)
    root = make(tmp_path / "p", **{"train.py": "1", "data/big.py": "x" * 2**20})
    with pytest.raises(UsageError, match=r"2 files, 1\.0 MiB(.|\n)*1\.0 MiB  data/big\.py\n(.|\n)*\.gitignore"):
        survey(root / "train.py", root)


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.py: no such program file"):
        survey(tmp_path / "train.py", tmp_path)


def test_a_name_that_is_no_utf8_is_left_out(tmp_path: Path) -> None:
    root = make(tmp_path / "p", **{"train.py": "1"})
    Path(os.fsdecode(os.fsencode(root) + b"/\xff.py")).write_text("2")
    snapshot = survey(root / "train.py", root)
    assert names(snapshot) == ["train.py"]
    assert len(snapshot.skipped) == 1


def test_without_git_the_folder_is_taken(tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert names(survey(tree / "jobs/train.py", tree / "jobs")) == ["train.py"]


def test_changes_name_each_file_once(tmp_path: Path) -> None:
    root = make(tmp_path / "p", **{"train.py": "1", "a.py": "2", "b.py": "3"})
    before = survey(root / "train.py", root).manifest
    make(root, **{"a.py": "changed", "c.py": "4"})
    (root / "b.py").unlink()
    assert before.changes(survey(root / "train.py", root).manifest) == ["changed a.py", "removed b.py", "added c.py"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2, "digest": "", "program": null, "folder": ".", "files": {}}'])
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / code.MANIFEST).write_text(text)
    with pytest.raises(FolderError, match=r"\.snapshot\.json"):
        Manifest.read(tmp_path)


FILES = st.lists(
    st.builds(SnapshotFile, path=st.text("ab/", min_size=1), executable=st.booleans(), content=st.binary(max_size=3)),
    unique_by=lambda file: file.path,
)


@given(FILES, st.randoms())
def test_the_digest_does_not_depend_on_order(files: list[SnapshotFile], random: st.DrawFn) -> None:
    shuffled = random.sample(files, len(files))
    assert digest(files) == digest(shuffled)


@given(FILES, FILES)
def test_other_files_have_another_digest(one: list[SnapshotFile], other: list[SnapshotFile]) -> None:
    same = {(f.path, f.executable, f.content) for f in one} == {(f.path, f.executable, f.content) for f in other}
    assert (digest(one) == digest(other)) is same

"""A check says what is wrong with which file; its manifests are those of sha256sum."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lowmem
from lowmem.cli import main
from lowmem.engine import hashing
from lowmem.errors import CheckpointError, OptionError, SourceError

sha256sum = pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards, with an index and what lies beside it."""
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, key in zip(names, "ab", strict=True):
        save_file({key: torch.randn(700_000)}, folder / name)
    index = {"metadata": {"total_size": 5_600_000}, "weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "more/vocab.txt").write_text("some")
    (folder / ".hidden").write_text("not mine")
    return folder


def second(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_a_whole_checkpoint_is_fine(folder: Path) -> None:
    report = lowmem.check(folder)
    assert report.is_fine
    assert (report.problems, report.warnings, report.verified, report.hashed) == ((), (), (), 0)
    assert len(report.files) == 5


def test_headers_index_and_sizes_are_checked(folder: Path) -> None:
    with second(folder).open("rb+") as file:
        file.truncate(second(folder).stat().st_size - 1)
    report = lowmem.check(folder)
    assert not report.is_fine
    assert "truncated in tensor 'b'" in str(report.problems[0])
    second(folder).unlink()
    assert "missing" in str(lowmem.check(folder).problems[0])


@sha256sum
def test_a_manifest_is_that_of_sha256sum(folder: Path, tmp_path: Path) -> None:
    ours = folder / "SHA256SUMS"
    assert lowmem.check(folder, write_manifest=ours).is_fine
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", ours.name], cwd=folder, check=True, timeout=60)
    assert ".hidden" not in ours.read_text()
    report = lowmem.check(folder, manifest=ours)
    assert report.is_fine
    assert (len(report.verified), report.warnings) == (5, ())
    names = ["config.json", "./more/vocab.txt", *sorted(p.name for p in folder.glob("model*"))]
    for mode in ([], ["--binary"]):
        made = subprocess.run(["sha256sum", *mode, *names], cwd=folder, check=True, capture_output=True, timeout=60)
        (tmp_path / "theirs").write_bytes(made.stdout)
        assert len(lowmem.check(folder, manifest=tmp_path / "theirs").verified) == 5


@sha256sum
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.sampled_from("ab \\\n\r\t'é*"), min_size=1, max_size=8))
def test_names_of_all_kinds_survive_a_manifest(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "odd"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / name).write_text(name)
    assert lowmem.check(folder, write_manifest=tmp_path / "sums").is_fine
    report = lowmem.check(folder, manifest=tmp_path / "sums")
    assert report.is_fine
    assert len(report.verified) == 2
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "../sums"], cwd=folder, check=True, timeout=60)


def test_another_content_is_found_and_said(folder: Path) -> None:
    sums = folder / "sums"
    lowmem.check(folder, write_manifest=sums)
    before = hashlib.sha256(second(folder).read_bytes()).hexdigest()
    flip(second(folder), -1)
    after = hashlib.sha256(second(folder).read_bytes()).hexdigest()
    report = lowmem.check(folder, manifest=sums)
    (problem,) = report.problems
    expected = f"{second(folder)}: expected SHA-256 {before}, by sums, found {after}; download it again"
    assert str(problem) == expected
    assert len(report.verified) == 4


def test_missing_and_unnamed_files_are_said(folder: Path) -> None:
    sums = folder / "sums"
    lowmem.check(folder, write_manifest=sums)
    (folder / "more/vocab.txt").unlink()
    (folder / "new.txt").write_text("new")
    report = lowmem.check(folder, manifest=sums)
    assert [str(p) for p in report.problems] == [
        f"{folder}/more/vocab.txt: expected a file, by sums, found none; download it again"
    ]
    assert report.warnings == (f"{sums}: does not name new.txt",)


def test_weights_that_the_manifest_does_not_name_are_a_problem(folder: Path) -> None:
    sums = folder / "sums"
    lowmem.check(folder, write_manifest=sums)
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "00002-of" not in line))
    (problem,) = lowmem.check(folder, manifest=sums).problems
    assert str(problem).startswith(f"{second(folder)}: expected its hash in {sums}, found none")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{'0' * 64}  ../other", "line 2: expected a name inside the checkpoint's folder, found '../other'"),
        (f"{'0' * 64}  /etc/passwd", "line 2: expected a name inside"),
        (f"{'0' * 64}  more/../../x", "line 2: expected a name inside"),
        (f"{'0' * 63}  config.json", "line 2: expected '<64 hex digits>  <name>'"),
        ("config.json", "line 2: expected"),
        (f"{'0' * 64}  config.json\n{'1' * 64}  ./config.json", "line 3: 'config.json' has another hash above"),
    ],
)
def test_a_manifest_that_cannot_be_believed_is_refused(folder: Path, line: str, message: str) -> None:
    (folder / "sums").write_text(f"{'a' * 64}  model.safetensors.index.json\n{line}\n")
    with pytest.raises(CheckpointError) as refused:
        lowmem.check(folder, manifest=folder / "sums")
    assert message in str(refused.value)


def test_a_manifest_is_not_written_over_problems(folder: Path, tmp_path: Path) -> None:
    second(folder).unlink()
    assert not lowmem.check(folder, write_manifest=tmp_path / "sums").is_fine
    assert not (tmp_path / "sums").exists()
    with pytest.raises(CheckpointError, match="cannot be read"):
        lowmem.check(folder, manifest=tmp_path / "sums")
    with pytest.raises(SourceError):
        lowmem.check(tmp_path / "nothing")


def cached(folder: Path, tmp_path: Path) -> Path:
    """The same as the hub's cache has it: links to blobs named after their content."""
    blobs, snapshot = tmp_path / "models--x--y/blobs", tmp_path / "models--x--y/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.glob("[!.]*.*"):
        content = file.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if file.suffix == ".json":
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_blobs_of_the_hub_are_checked_by_their_names(folder: Path, tmp_path: Path) -> None:
    snapshot = cached(folder, tmp_path)
    report = lowmem.check(snapshot)
    assert report.is_fine
    assert len(report.verified) == 4
    flip(second(snapshot), -1)
    flip(snapshot / "config.json", 0)
    problems = sorted(str(problem) for problem in lowmem.check(snapshot).problems)
    assert len(problems) == 2
    assert "expected git's SHA-1" in problems[0]
    assert f"expected SHA-256 {second(snapshot).resolve().name}, by the name of its blob" in problems[1]


def test_one_file_can_be_checked(folder: Path, tmp_path: Path) -> None:
    report = lowmem.check(second(folder), write_manifest=tmp_path / "sums")
    assert report.files == (str(second(folder)),)
    assert (tmp_path / "sums").read_text().endswith(f"  {second(folder).name}\n")
    assert lowmem.check(second(folder), tmp_path / "sums").verified == report.files


def test_progress_is_told_and_may_end_it(folder: Path, tmp_path: Path) -> None:
    seen: list[lowmem.Progress] = []
    lowmem.check(folder, write_manifest=tmp_path / "sums", progress=seen.append)
    assert seen[-1].done == seen[-1].total == sum(Path(name).stat().st_size for name in lowmem.check(folder).files)

    def stop(_: lowmem.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lowmem.check(folder, write_manifest=tmp_path / "more", progress=stop)
    assert not [t for t in threading.enumerate() if t.name.startswith("lowmem")]
    assert not (tmp_path / "more").exists()
    with pytest.raises(OptionError, match="progress"):
        lowmem.check(folder, progress=3)  # type: ignore[arg-type]


def test_files_are_read_in_small_buffers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_BUFFER", 4096)
    lowmem.check(folder, write_manifest=tmp_path / "small")
    monkeypatch.undo()
    lowmem.check(folder, write_manifest=tmp_path / "large")
    assert (tmp_path / "small").read_text() == (tmp_path / "large").read_text()


def test_the_shell_says_it_by_its_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums = str(folder / "sums")
    assert main(["check", str(folder), "--write-manifest", sums]) == 0
    assert main(["check", str(folder), "--manifest", sums, "--json"]) == 0
    table = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert table["fine"] is True
    assert len(table["verified"]) == 5
    flip(second(folder), -1)
    assert main(["check", str(folder), "--manifest", sums]) == 1
    out = capsys.readouterr().out
    assert f"{second(folder)}: expected SHA-256" in out
    assert "1 problem:" in out
    assert main(["check", str(folder), "--manifest", f"{sums}\0"]) == 2
    assert main(["check", str(folder / "nothing")]) == 1


def test_an_extra_shard_is_a_problem_wherever_the_check_is_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is that of the same files."""
    sums = tmp_path / "sums"
    lowmem.check(folder, write_manifest=sums)
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if second(folder).name not in line))
    monkeypatch.chdir(folder.parent)
    for source in (folder, folder.name):
        assert [p for p in lowmem.check(source, sums).problems if second(folder).name in str(p)]


def test_what_is_no_checkpoint_is_a_problem_and_no_end(tmp_path: Path) -> None:
    """A pointer of git-lfs is what a download often leaves."""
    (tmp_path / "model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    report = lowmem.check(tmp_path)
    assert not report.is_fine
    assert "git-lfs" in str(report.problems[0])


def test_a_scheme_that_leads_to_a_file_checks_that_file(folder: Path, tmp_path: Path) -> None:
    report = lowmem.check(f"local:{second(folder)}", write_manifest=tmp_path / "sums")
    assert report.files == (str(second(folder)),)
    assert lowmem.check(f"local:{folder}").files == lowmem.check(folder).files


def test_a_manifest_is_never_written_over_something_else(folder: Path, tmp_path: Path) -> None:
    weights = second(folder)
    before = weights.read_bytes()
    (tmp_path / "folder").mkdir()
    for target in (weights, folder / "config.json", tmp_path / "folder"):
        with pytest.raises(OptionError, match="write_manifest"):
            lowmem.check(folder, write_manifest=target)
    assert weights.read_bytes() == before
    sums = tmp_path / "sums"
    for _ in range(2):
        assert lowmem.check(folder, write_manifest=sums).is_fine
    with pytest.raises(OptionError, match="write_manifest"):
        lowmem.check(folder, write_manifest=weights / "sums")


def test_the_format_of_metadata_is_no_tensor(tmp_path: Path) -> None:
    save_file({"pt": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert set(lowmem.inspect(tmp_path)) == {"pt"}


def test_a_manifest_is_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "sums")
    assert lowmem.check(folder, write_manifest=link).is_fine
    assert link.is_symlink()
    assert lowmem.check(folder, tmp_path / "sums").verified

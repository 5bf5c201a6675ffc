"""Tar shards: found, indexed, refused; and large JPEGs decoded small."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rac import progress
from rac.data import DataConfig, ImageStream
from rac.data import tars as module
from rac.data.files import find_pictures
from rac.data.pictures import Names, Pictures
from rac.data.tars import Tar
from rac.errors import RacError


@pytest.fixture(autouse=True)
def index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes are kept for every tar, in a folder of the test's."""
    monkeypatch.setenv("RAC_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(module, "WORTH_KEEPING", 1)
    return tmp_path / "kept" / "tars"


def encoded(level: int, kind: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int = 3, each: int = 8) -> list[Path]:
    """Shards in webdataset's layout whose pictures' grey is ten times their number."""
    return [
        write_tar(
            folder / f"shards-{shard:03d}.tar",
            [
                member
                for number in range(shard * each, (shard + 1) * each)
                for member in (
                    (f"{number:06d}.cls", b"3"),
                    (f"{number:06d}.json", b"{}"),
                    (f"{number:06d}.png", encoded(10 * number)),
                )
            ],
        )
        for shard in range(shards)
    ]


def levels(stream: ImageStream, first: int, count: int) -> list[int]:
    return ((stream.batch(first, count).images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# -------------------------------------------------------------------------------------------------------------- names


def test_names_come_back_whatever_they_are_made_of() -> None:
    names = ["a.png", "", "ünï/漢.jpg", "undecodable \udcff.png", "a b\nc"]
    found = Names.of(names)
    assert list(found) == names
    assert (len(found), found[-1], found[1:3]) == (5, names[-1], names[1:3])
    assert len(Names.of([])) == 0
    with pytest.raises(IndexError):
        found[5]


def test_the_order_hangs_on_names_alone_and_equal_ones_keep_theirs(tmp_path: Path) -> None:
    import hashlib

    one = write_tar(tmp_path / "1.tar", [(f"{k}.png", b"x") for k in range(40)])
    two = write_tar(tmp_path / "2.tar", [(f"{k}.png", b"yy") for k in range(39, -1, -2)])
    found = find_pictures([one, two])
    expected = sorted(
        [(f"{k}.png", b"x") for k in range(40)] + [(f"{k}.png", b"yy") for k in range(39, -1, -2)],
        key=lambda member: hashlib.sha256(member[0].encode()).digest(),
    )
    assert [(picture.name, picture.read()) for picture in found] == expected
    assert [picture.name for picture in found[5:9]] == [name for name, _ in expected[5:9]]


def test_the_fingerprint_tells_names_sizes_and_contents(tmp_path: Path) -> None:
    def fingerprint(*members: tuple[str, bytes]) -> str:
        return find_pictures([write_tar(tmp_path / "p.tar", members)]).fingerprint()

    plain = fingerprint(("a.png", b"x"), ("b.png", b"yy"))
    assert plain == fingerprint(("b.png", b"yy"), ("a.png", b"x"))
    assert plain != fingerprint(("b.png", b"yy"), ("a.png", b"z")), "names and sizes alike, contents not"
    assert plain != fingerprint(("a.png", b"x"), ("b.png", b"y"))
    assert plain != fingerprint(("a.png", b"x"), ("c.png", b"yy"))


# ------------------------------------------------------------------------------------------------------------- shards


def test_each_picture_of_all_shards_comes_once_an_epoch(tmp_path: Path) -> None:
    write_shards(tmp_path / "train")
    stream = ImageStream(DataConfig(paths=(tmp_path / "train",), size=8, held_out=4))
    held_out = ((stream.held_out()[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert len(stream) == 20
    for epoch in range(3):
        assert sorted(levels(stream, 20 * epoch, 20) + held_out) == [10 * k for k in range(24)]


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("shards-{000..002}.tar", 24),
        ("shards-{001..002}.tar", 16),
        ("shards-00{0,2}.tar", 16),
        ("shards-0{00..01}.tar", 16),
        ("{a,b}/shards-{000..001}.tar", 32),
    ],
)
def test_brace_patterns_stand_for_shards(tmp_path: Path, spelled: str, expected: int) -> None:
    for folder in (tmp_path, tmp_path / "a", tmp_path / "b"):
        write_shards(folder)
    assert len(find_pictures([tmp_path / spelled])) == expected


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("shards-{000..003}.tar", r"shards-003\.tar does not exist"),
        ("shards-{5..2}.tar", r"\{5\.\.2\} in .* is not a valid pattern"),
        ("shards-{0..99999999}.tar", "expands to 100,000,000 names, more than 1,000,000"),
        ("shards-{0..9999}-{0..9999}.tar", "expands to 100,000,000 names"),
        ("shards-{x}.tar", r"\{x\} in .* is not a valid pattern"),
        ("https://somewhere/shards-{000..001}.tar", r"is not a local file.* download it first"),
        ("s3://bucket/a.tar", "is not a local file"),
        ("pipe:cat a.tar", "is not a local file"),
        ("hf-stream:a/b", "only be read in its own order"),
    ],
)
def test_patterns_and_places_that_cannot_be(tmp_path: Path, spelled: str, message: str) -> None:
    write_shards(tmp_path)
    path = Path(spelled) if ":" in spelled else tmp_path / spelled
    with pytest.raises(RacError, match=message):
        find_pictures([path])


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(RacError, match=r"pipe\.tar is a pipe or a device"):
        find_pictures([tmp_path / "pipe.tar"])


def test_a_folder_of_pictures_is_one_even_with_a_tar_in_it(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded(3))
    with pytest.warns(UserWarning, match=r"passed over 3 tar file\(s\) beside pictures"):
        assert [picture.name for picture in find_pictures([tmp_path])] == ["a.png"]


def test_of_a_sample_the_picture_of_the_plain_name_counts(tmp_path: Path) -> None:
    names = ["0/1.depth.png", "0/1.jpg", "0/1.txt", "0/2.left.png", "0/2.right.png", "1/1.png", "d/.hidden.png"]
    path = write_tar(tmp_path / "p.tar", [(name, b"") for name in names])
    assert Tar.open(path).names[:] == ["0/1.jpg", "0/2.left.png", "0/2.right.png", "1/1.png"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_and_all_formats(tmp_path: Path, format: int) -> None:
    name = f"{'label' * 20}/{'ü' * 40 if format != tarfile.USTAR_FORMAT else 'u' * 90}.png"
    tar = Tar.open(write_tar(tmp_path / "p.tar", [(name, b"some bytes"), ("b.png", b"others")], format))
    assert tar.names[:] == [name, "b.png"]
    assert [tar.read(k) for k in range(2)] == [b"some bytes", b"others"]


# -------------------------------------------------------------------------------------------------------------- index


def test_the_index_is_kept_used_and_made_anew(
    tmp_path: Path, index_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shards(tmp_path, 1)[0]
    fresh = Tar.open(path)
    kept = list(index_folder.iterdir())
    assert len(kept) == 1

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_scan", forbidden)
        again = Tar.open(path)
        assert again.names[:] == fresh.names[:]
        assert [again.read(k) for k in range(8)] == [fresh.read(k) for k in range(8)]
        os.utime(path, ns=(0, 0))
        with pytest.raises(AssertionError, match="scanned again"):
            Tar.open(path)
    write_tar(path, [("new.png", encoded(1))])
    assert Tar.open(path).names[:] == ["new.png"]

    kept[0].write_bytes(b"no index")
    assert Tar.open(path).names[:] == ["new.png"]
    assert Tar.open(path).read(0) == encoded(1)


def test_an_index_that_cannot_be_kept_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAC_CACHE_DIR", str(tmp_path / "file"))
    assert len(Tar.open(write_shards(tmp_path, 1)[0]).names) == 8


def test_an_index_takes_few_bytes_a_picture(tmp_path: Path) -> None:
    """Names, places and the order of 20,000 pictures; a list of objects would take ten times that."""
    count = 20_000
    path = write_tar(tmp_path / "p.tar", ((f"label{k % 100:02d}/{k:08d}.jpg", b"") for k in range(count)))
    Tar.open(path)
    tracemalloc.start()
    pictures = Pictures([Tar.open(path)])
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pictures) == count
    assert kept < 80 * count
    assert peak < 250 * count


def test_indexing_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", ((f"{shard}{k}.png", b"") for k in range(150)))
    find_pictures([tmp_path])
    assert capsys.readouterr().err == "", "what is done at once goes without"
    monkeypatch.setattr(progress, "SECONDS", -1.0)
    monkeypatch.setenv("RAC_CACHE_DIR", str(tmp_path / "empty"))
    find_pictures([tmp_path / "0.tar", tmp_path / "1.tar"])
    assert capsys.readouterr().err.splitlines() == [f"rac: finding pictures: {count}" for count in (100, 150, 250, 300)]


# ------------------------------------------------------------------------------------------------------------- damage


def cut_in_a_picture(data: bytes) -> bytes:
    return data[: len(data) // 2 + 700]


def cut_in_a_header(data: bytes) -> bytes:
    return data[: 512 * 5 + 100]


def broken_header(data: bytes) -> bytes:
    return data[: 512 * 10] + b"\xff" * 512 + data[512 * 11 :]


@pytest.mark.parametrize("damage", [cut_in_a_picture, cut_in_a_header, broken_header])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], index_folder: Path) -> None:
    paths = write_shards(tmp_path / "train")
    before = paths[1].read_bytes()
    paths[1].write_bytes(damage(before))
    with pytest.raises(RacError, match=r"shards-001\.tar cannot be read as a tar file .*complete \.tar"):
        find_pictures([tmp_path / "train"])
    assert len(list(index_folder.iterdir())) == 1, "of the sound shard before it alone"
    paths[1].write_bytes(before)
    assert len(find_pictures([tmp_path / "train"])) == 24


def test_a_shard_without_an_end_mark_is_whole(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "p.tar", [("a.png", b"1" * 600)])
    path.write_bytes(path.read_bytes()[: 3 * 512])
    assert Tar.open(path).read(0) == b"1" * 600


def test_damaged_members_are_skipped_and_named_with_their_shard(tmp_path: Path) -> None:
    whole = encoded(200, "JPEG", (64, 64))
    for shard in range(2):
        members = [(f"{shard}{k}.png", encoded(10 * k)) for k in range(6)]
        write_tar(
            tmp_path / "t" / f"{shard}.tar", [*members, ("bad.jpg", whole[: len(whole) // 2]), ("worse.png", b"")]
        )
    stream = ImageStream(DataConfig(paths=(tmp_path / "t",), size=8, held_out=1))
    with pytest.warns(UserWarning, match="skipped"):
        drawn = Counter(levels(stream, 0, 2 * len(stream)))
    assert set(stream.skipped) == {
        f"{name} in {tmp_path / 't' / shard}" for name in ("bad.jpg", "worse.png") for shard in ("0.tar", "1.tar")
    }
    assert set(drawn) <= {10 * k for k in range(6)}


# --------------------------------------------------------------------------------------------------------- large JPEGs


@pytest.fixture
def large(tmp_path: Path) -> DataConfig:
    """A folder of large JPEGs of waves, two of them lying on their side as their headers say, and a PNG."""
    y, x = np.mgrid[0:521, 0:803].astype(np.float32)
    for k in range(5):
        waves = [127 + 100 * np.sin(x / (20 + 7 * k) + channel) * np.cos(y / (30 + 5 * k)) for channel in range(3)]
        picture = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if k % 2 else 1
        picture.save(tmp_path / f"{k}.jpg", quality=95, exif=exif)
    picture.save(tmp_path / "5.png")
    return DataConfig(paths=(tmp_path,), size=32, held_out=1, draft=True)


def test_drafts_show_the_same_regions(large: DataConfig) -> None:
    plain = ImageStream(replace(large, draft=False), 1).batch(0, 60).images
    draft = ImageStream(large, 1).batch(0, 60).images
    assert not torch.equal(plain, draft)
    assert (plain - draft).abs().mean() * 127.5 < 1.0
    assert (plain - draft).abs().amax((1, 2, 3)).max() * 127.5 < 25
    shifted = torch.cat([plain[..., 1:], plain[..., -1:]], -1)
    assert (plain - shifted).abs().mean() * 127.5 > 3, "a pixel's shift would be seen"


def test_drafts_are_functions_of_their_number_too(large: DataConfig) -> None:
    whole = ImageStream(large, 1).batch(0, 60).images
    other = ImageStream(replace(large, keep_mb=0), 1)
    assert torch.equal(torch.cat([other.batch(draw, 1).images for draw in range(59, -1, -1)]).flip(0), whole)


def test_small_crops_are_not_drafted(large: DataConfig) -> None:
    near = replace(large, largest_crop=127)  # less than four times the size
    assert torch.equal(
        ImageStream(near, 1).batch(0, 30).images, ImageStream(replace(near, draft=False), 1).batch(0, 30).images
    )

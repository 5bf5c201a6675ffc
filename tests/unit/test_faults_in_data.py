"""Collections as they are found in the wild: changed, linked, overlapping, unreadable, in containers, written to."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from training_toy import ToyTask

from rac.data import DataConfig, ImageStream, check_pictures, open_stream
from rac.data import tars as tars_module
from rac.data.files import collection_name, find_pictures
from rac.data.record import RECORD
from rac.data.tars import Tar
from rac.errors import RacError
from rac.evaluate.image_sets import ImageSet, Preprocessing
from rac.files import MARKER, check_output, make_output
from rac.train import TrainConfig, fit, log


def encoded(level: int, size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, level: int = 0, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(level, size))
    return path


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def names(*paths: Path) -> list[str]:
    return sorted(picture.name for picture in find_pictures(paths))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for k in range(8):
        with open(write(tmp_path / "photos" / f"{k}.png", 10 * k), "ab") as file:
            file.write(b"-")
    return tmp_path / "photos"


# ------------------------------------------------------------------------------------------------------------- changed


def replaced_by_others(photos: Path) -> None:
    for file in photos.iterdir():
        write(file, 255)


def contents_alone(photos: Path) -> None:
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:-1] + b"+")


def one_missing(photos: Path) -> None:
    (photos / "3.png").unlink()


def one_more(photos: Path) -> None:
    write(photos / "new.png", 3)


def one_of_another_size(photos: Path) -> None:
    write(photos / "3.png", 3, (40, 30))


CHANGES: dict[Callable[[Path], None], str] = {
    replaced_by_others: r"\d of another size, such as \d\.png",
    contents_alone: "contents differ, names and sizes do not",
    one_missing: r"1 missing, such as 3\.png",
    one_more: r"1 new, such as new\.png",
    one_of_another_size: r"1 of another size, such as 3\.png",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_prepared_crops_of_pictures_that_changed_are_refused(
    photos: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    config = DataConfig(paths=(photos,), size=8, held_out=2, cached_crops=20)
    open_stream(config, cache=tmp_path / "crops")
    open_stream(config, cache=tmp_path / "crops")
    change(photos)
    with pytest.raises(
        RacError, match=r"crops was prepared with other settings: pictures\..*; delete it to prepare it again"
    ):
        open_stream(config, cache=tmp_path / "crops")


def test_pictures_that_moved_are_the_same(photos: Path, tmp_path: Path) -> None:
    before = find_pictures([photos]).fingerprint()
    photos.rename(tmp_path / "elsewhere")
    assert find_pictures([tmp_path / "elsewhere"]).fingerprint() == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_run_is_not_resumed_on_other_pictures(
    photos: Path, tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    config = DataConfig(paths=(photos,), size=8, held_out=2)
    settings = TrainConfig(iterations=2, batch=2, device="cpu", tensorboard=False, workers=0)
    run = tmp_path / "run"
    fit(ToyTask(), ImageStream(config), settings, run, stop_at=1)
    content = {file: file.read_bytes() for file in photos.iterdir()}
    change(photos)
    with pytest.raises(
        RacError, match=f"the pictures have changed since the run in .*run began: ({CHANGES[change]}); give"
    ):
        fit(ToyTask(), ImageStream(config), settings, run, resume=True)
    for file in photos.iterdir():
        file.unlink()
    for file, data in content.items():
        file.write_bytes(data)
    assert fit(ToyTask(), ImageStream(config), settings, run, resume=True).iteration == 2


def test_a_run_without_a_record_gets_one(photos: Path, tmp_path: Path) -> None:
    stream = ImageStream(DataConfig(paths=(photos,), size=8, held_out=2))
    check_pictures(stream.fingerprint, tmp_path)
    (tmp_path / RECORD).unlink()
    check_pictures(stream.fingerprint, tmp_path)
    assert (tmp_path / RECORD).exists()


def test_a_run_goes_on_that_was_begun_before_classes_could_be_chosen(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    config, run = DataConfig(paths=(photos,), size=8, held_out=2), tmp_path / "run"
    settings = TrainConfig(iterations=2, batch=2, device="cpu", tensorboard=False, workers=0)
    fit(ToyTask(), ImageStream(config), settings, run, recipe=config, stop_at=1)
    (run / RECORD).unlink()
    recipe = json.loads((run / "recipe.json").read_text())
    older = {name: value for name, value in recipe.items() if "classes" not in name}
    (run / "recipe.json").write_text(json.dumps(older))
    with pytest.raises(RacError, match="trained with other settings: without_classes"):
        fit(
            ToyTask(), ImageStream(config), settings, run, recipe=replace(config, without_classes=("cat",)), resume=True
        )
    assert fit(ToyTask(), ImageStream(config), settings, run, recipe=config, resume=True).iteration == 2


def test_large_collections_are_told_apart_without_a_list(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rac.data import pictures as module

    monkeypatch.setattr(module, "LISTED", 5)
    before = find_pictures([photos]).fingerprint()
    one_missing(photos)
    now = find_pictures([photos]).fingerprint()
    assert now.pictures is None
    assert f"7 pictures with fingerprint {now.hash}, was 8 pictures with {before.hash}" in now.changes(before)


def test_a_tar_of_the_same_size_and_time_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAC_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(tars_module, "WORTH_KEEPING", 1)
    path = write_tar(tmp_path / "p.tar", ("a.png", encoded(1)), ("b.png", encoded(2)))
    Tar.open(path)
    stat = path.stat()
    write_tar(path, ("c.png", encoded(3)), ("d.png", encoded(4)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert Tar.open(path).names[:] == ["c.png", "d.png"]


# ------------------------------------------------------------------------------------------------------- found or told


def test_linked_folders_are_searched_without_end(tmp_path: Path) -> None:
    write(tmp_path / "d" / "top.png")
    write(tmp_path / "elsewhere" / "deep" / "inner.png")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "d")
    (tmp_path / "elsewhere" / "itself").symlink_to(tmp_path / "elsewhere" / "itself")
    assert names(tmp_path / "d") == ["link/deep/inner.png", "top.png"]


def test_the_folder_itself_counts_before_links_to_it(tmp_path: Path) -> None:
    write(tmp_path / "d" / "zebra" / "1.png")
    (tmp_path / "d" / "ant").symlink_to(tmp_path / "d" / "zebra")
    assert names(tmp_path / "d") == ["zebra/1.png"]


def passed_over(path: Path) -> tuple[list[str], str]:
    """What is found, and the one line that says what is not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = names(path)
    assert len(caught) <= 1
    return found, str(caught[0].message) if caught else ""


def test_what_is_passed_over_is_counted_by_kind_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "mix"
    write(folder / "a.png")
    write_tar(folder / "x.tar", ("b.png", encoded(2)))
    write_tar(folder / "in" / "Y.TAR", ("c.png", encoded(2)))
    for name in ("1.tga", "2.TGA", "z.tar.gz", "z.tgz", "notes.txt", "labels.json", ".hidden.tga"):
        (folder / name).write_bytes(b"")
    (folder / "gone.png").symlink_to(folder / "nothing")
    found, line = passed_over(folder)
    assert found == ["a.png"]
    assert line == (
        f"{folder}: passed over 2 .tga file(s), 2 compressed archive(s), 1 link(s) to nothing, "
        "2 tar file(s) beside pictures"
    )


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads every folder")
def test_an_unreadable_folder_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.png")
    write(tmp_path / "d" / "shut" / "b.png")
    (tmp_path / "d" / "shut").chmod(0)
    try:
        assert passed_over(tmp_path / "d") == (
            ["a.png"],
            f"{tmp_path / 'd'}: passed over 1 folder(s) that cannot be read",
        )
    finally:
        (tmp_path / "d" / "shut").chmod(0o700)


def test_folders_that_the_system_refuses_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d" / "a.png")
    write(tmp_path / "d" / "shut" / "b.png")
    scandir = os.scandir

    def refuse(path: Path) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert passed_over(tmp_path / "d") == (["a.png"], f"{tmp_path / 'd'}: passed over 1 folder(s) that cannot be read")
    with pytest.raises(RacError, match=r"shut cannot be read \(Permission denied\); check its permissions"):
        find_pictures([tmp_path / "d" / "shut"])


def test_tars_in_capitals_are_read_and_compressed_ones_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "t" / "X.TAR", ("c.png", encoded(2)))
    (tmp_path / "t" / "z.tar.gz").write_bytes(b"")
    assert passed_over(tmp_path / "t") == (["c.png"], f"{tmp_path / 't'}: passed over 1 compressed archive(s)")
    assert names(tmp_path / "t" / "X.TAR") == ["c.png"]


def test_a_folder_of_other_formats_says_so(tmp_path: Path) -> None:
    (tmp_path / "photo.tga").write_bytes(b"")
    with pytest.raises(RacError, match=r"holds no pictures; looked for .*; passed over 1 \.tga file\(s\)"):
        find_pictures([tmp_path])


def test_a_file_that_is_named_is_tried_whatever_it_ends_with(tmp_path: Path) -> None:
    Image.new("RGB", (12, 10)).save(tmp_path / "photo.tga")
    assert names(tmp_path / "photo.tga") == ["photo.tga"]


# --------------------------------------------------------------------------------------------------------- overlapping


@pytest.mark.parametrize(
    "paths", [("ov", "ov/sub"), ("ov/sub", "ov"), ("ov", "ov"), ("ov", "ov/c.png", "ov/sub/c.png")]
)
def test_a_file_counts_once_whatever_paths_overlap(tmp_path: Path, paths: tuple[str, ...]) -> None:
    for k, name in enumerate(["a.png", "b.png", "c.png", "sub/c.png", "sub/d.png", "sub/e.png"]):
        write(tmp_path / "ov" / name, 20 * k)
    stream = ImageStream(DataConfig(paths=tuple(tmp_path / path for path in paths), size=8, held_out=1))
    held_out = {float(level) for level in stream.held_out()[:, 0, 0, 0]}
    trained = stream.batch(0, len(stream)).need("images")[:, 0, 0, 0].tolist()
    assert len(stream) == 5
    assert len(set(trained)) == 5
    assert not held_out & set(trained)


def test_links_and_tars_count_once_too(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.png")
    os.link(tmp_path / "d" / "a.png", tmp_path / "d" / "b.png")
    (tmp_path / "d" / "c.png").symlink_to("a.png")
    assert names(tmp_path / "d") == ["a.png"]
    write_tar(tmp_path / "t" / "x.tar", ("k.png", encoded(2)))
    (tmp_path / "y.tar").symlink_to(tmp_path / "t" / "x.tar")
    assert names(tmp_path / "t", tmp_path / "y.tar", tmp_path / "t" / "x.tar") == ["k.png"]


# ------------------------------------------------------------------------------------------------------------ data sets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Twenty rows, alone and as two splits."""
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    rows = datasets.Dataset.from_dict({"png": [encoded(k) for k in range(20)]})
    rows.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "splits")
    return tmp_path


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("alone", range(20)),
        ("alone:train", range(20)),
        ("alone:train[:10]", range(10)),
        ("alone:train[25%:50%]", range(5, 10)),
        ("alone:train[-3:]:png", range(17, 20)),
        ("splits:train[:10]", range(10)),
        ("splits:test", range(5)),
        ("splits:test[1:3]", range(1, 3)),
    ],
)
def test_splits_and_slices_of_saved_data_sets_are_taken(saved: Path, spelled: str, expected: range) -> None:
    for kind in ("hf", "hf-stream"):
        if kind == "hf":
            found = [picture.read() for picture in find_pictures([Path(f"hf:{saved}/{spelled}")])]
            assert sorted(found) == sorted(encoded(k) for k in expected)
        else:
            config = DataConfig(paths=(Path(f"hf-stream:{saved}/{spelled}"),), size=8, held_out=1, flip=False)
            levels = ((open_stream(config).batch(0, 512).need("images")[:, 0, 0, 0] + 1) * 127.5).round()
            assert set(levels.int().tolist()) == set(expected[1:])


@pytest.mark.parametrize("spelled", ["alone:validation", "alone:validation[:10]", "splits:validation[:3]"])
def test_splits_that_are_not_there_are_refused(saved: Path, spelled: str) -> None:
    with pytest.raises(RacError, match="has no split validation; it has train"):
        find_pictures([Path(f"hf:{saved}/{spelled}")])


def test_slices_of_one_split_do_not_go_together(saved: Path) -> None:
    whole, part = Path(f"hf:{saved}/alone"), Path(f"hf:{saved}/alone:train[:10]")
    assert len(find_pictures([whole, whole])) == 20
    with pytest.raises(RacError, match="are of one split and may share rows; give one of them"):
        find_pictures([whole, part])


# ---------------------------------------------------------------------------------------------------- names and places


def test_a_collection_is_called_by_its_folder_wherever_it_is_named_from(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "deep").mkdir()
    monkeypatch.chdir(photos)
    for here in (".", "./", "deep/..", str(photos)):
        assert collection_name([Path(here)]) == "photos"
        assert ImageSet.read([Path(here)], Preprocessing(8, "centre")).name == "photos"
    assert collection_name([Path("."), Path("hf:a/b:train")]) == "photos, hf:a/b:train"
    assert collection_name([]) == "scikit-image photographs"


def test_names_that_are_not_unicode_go_through_everything(tmp_path: Path) -> None:
    odd = os.fsdecode(b"z\xff")
    for name in (odd, "b"):
        for k in range(3):
            write(tmp_path / odd / name / f"{odd}{k}.png", 10 * k)
    config = DataConfig(paths=(tmp_path / odd,), size=8, held_out=1, cached_crops=8)
    stream = open_stream(config, wants={"images", "labels"}, cache=tmp_path / f"crops{odd}")
    assert stream.classes == ("b", odd)
    assert open_stream(config, wants={"labels"}, cache=tmp_path / f"crops{odd}").batch(0, 3).labels is not None
    fresh = ImageStream(replace(config, cached_crops=0))
    check_pictures(fresh.fingerprint, tmp_path)
    check_pictures(fresh.fingerprint, tmp_path)


def test_without_a_home_the_index_of_a_tar_is_done_without(tmp_path: Path) -> None:
    """As in a container whose user has no entry: `expanduser` then raises RuntimeError."""
    path = write_tar(tmp_path / "p.tar", *((f"{k}.png", encoded(k)) for k in range(1100)))
    script = (
        "import os.path, pathlib, sys\n"
        "os.path.expanduser = lambda path: path\n"
        "from rac.data.files import find_pictures\n"
        f"assert len(find_pictures([pathlib.Path({str(path)!r})])) == 1100\n"
        "try:\n    find_pictures([pathlib.Path('~/p.tar')])\n"
        "except ValueError as error:\n    print(error)\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("HOME", "RAC_CACHE_DIR", "XDG_CACHE_HOME")}
    environment = {**clean, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "the home folder in ~/p.tar is not known; set HOME, or write the whole path" in ran.stdout


# ---------------------------------------------------------------------------------------------------- one's own results


def test_what_rac_wrote_is_left_out_of_a_search(photos: Path) -> None:
    out = make_output(photos / "runs" / "a")
    write(out / "gallery-000000.png")
    write(out / "pictures" / "strip.png")
    found, line = passed_over(photos)
    assert len(found) == 8
    assert line == f"{photos}: passed over 1 folder(s) that rac wrote"
    assert names(out) == ["gallery-000000.png", "pictures/strip.png"], "unless it is what is asked for"


def test_results_beside_ones_own_pictures_are_refused_where_they_would_be_found(photos: Path, tmp_path: Path) -> None:
    (photos / "mine").mkdir()
    (photos / "mine" / "notes.txt").write_text("")
    for out in (photos, photos / "mine"):
        with pytest.raises(RacError, match=r"holds other files and lies in .*photos, which is searched for pictures"):
            check_output(out, [tmp_path / "others", photos])
        assert not (make_output(out) / MARKER).exists(), "one's own pictures stay found"
        check_output(out, [tmp_path / "others", Path("hf:a/b")])
    check_output(photos / "new", [photos])
    check_output(make_output(photos / "new"), [photos])


def test_a_run_inside_its_own_data_does_not_train_on_its_galleries(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "draw_curves", lambda records: b"")
    settings = TrainConfig(iterations=2, batch=2, device="cpu", tensorboard=False, workers=0)
    config, run = DataConfig(paths=(photos,), size=8, held_out=2), photos / "runs" / "a"
    first = ImageStream(config)
    fit(ToyTask(), first, settings, run, stop_at=1)
    assert list(run.glob("gallery-*.png"))
    with pytest.warns(UserWarning, match="that rac wrote"):
        again = ImageStream(config)
    assert torch.equal(again.held_out(), first.held_out())
    assert fit(ToyTask(), again, settings, run, resume=True).iteration == 2

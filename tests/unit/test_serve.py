"""The page of `rac serve`: its figures, and the page itself through gradio's client."""

from __future__ import annotations

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import rac
from rac.coders.klvae import KLVAEConfig
from rac.commands.serve import Command
from rac.errors import RacError
from rac.evaluate.one_image import STEPS, Loaded, decode_noised, reconstruct, reconstructions
from rac.evaluate.robustness import robustness_curve
from rac.serve.guard import Limits
from rac.serve.page import EMPTY, Answers, build, free_port, serving


@pytest.fixture(scope="module")
def loaded(make_rac) -> Loaded:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    teacher = KLVAEConfig(widths=(8, 8, 8), latent_channels=4, norm_groups=4).build().eval()
    coder = make_rac(lively=0.05, spec=teacher.spec, teacher="teacher").eval()
    return Loaded("tiny", coder, teacher, "teacher")


@pytest.mark.parametrize("steps", [1, 3])
def test_the_figures_are_those_of_evaluate(loaded: Loaded, images, steps: int) -> None:  # type: ignore[no-untyped-def]
    image = images(1, 18, 25)
    shown = reconstruct(loaded, image, steps)
    expected = reconstructions(loaded.coder, image, [steps], teacher=loaded.teacher, name="tiny")[:2]
    for version, one in zip(shown.versions, expected, strict=True):
        assert torch.equal(version.image, one.image)
        assert (version.psnr, version.ssim) == (one.psnr, one.ssim)
        assert (version.evaluations, version.macs) == (one.evaluations, one.macs)
        assert version.seconds > 0
    assert (len(shown.encoding.states), len(shown.decoding.states)) == (steps + 1, steps + 1)
    assert shown.encoding.times == shown.decoding.times[::-1]


def test_moved_latents_are_those_of_the_correction_curve(loaded: Loaded, images) -> None:  # type: ignore[no-untyped-def]
    from rac.evaluate.image_sets import Batch
    from rac.evaluate.suite import MetricSuite

    class One:
        """ImageSet of one image called "picture"."""

        def __len__(self) -> int:
            return 1

        def batches(self, _: int):  # type: ignore[no-untyped-def]
            yield Batch(("picture",), images(1, 24, 24))

    made = decode_noised(loaded, images(1, 24, 24), 0.7)
    decoders = {"teacher": lambda latent, names: loaded.teacher.decode(latent)}
    decoders |= {f"{k}": lambda latent, names, k=k: loaded.coder.decode(latent, k) for k in STEPS}
    curve = robustness_curve(
        decoders, loaded.teacher, One(), MetricSuite(metrics=("psnr",)), name="teacher", images=1, sigmas=(0.7,)
    )
    expected = [figures[0] for figures in curve.metrics["psnr"].values()]
    assert [one.psnr for one in made] == pytest.approx(expected, abs=1e-5)
    assert [one.evaluations for one in made] == [1, *STEPS]
    unmoved = decode_noised(loaded, images(1, 24, 24), 0.0)
    assert torch.equal(unmoved[0].image, loaded.teacher.reconstruct(images(1, 24, 24)))


def test_coders_without_a_flow_or_a_teacher(loaded: Loaded, images) -> None:  # type: ignore[no-untyped-def]
    image = images(1, 24, 24)
    shown = reconstruct(Loaded("vae", loaded.teacher), image, 4)
    assert [one.name for one in shown.versions] == ["vae"]
    assert shown.decoding is None
    assert [one.name for one in decode_noised(Loaded("vae", loaded.teacher), image, 0.5)] == ["vae"]
    alone = Loaded("rac", loaded.coder)
    assert [one.name for one in reconstruct(alone, image, 1).versions] == ["rac, 1 step"]
    assert [one.evaluations for one in decode_noised(alone, image, 0.5)] == list(STEPS)


# ------------------------------------------------------------------------------------------ without gradio


@pytest.fixture
def picture(tmp_path: Path, images) -> Path:  # type: ignore[no-untyped-def]
    path = tmp_path / "picture.png"
    rac.write_image(images(1, 18, 25), path)
    return path


@pytest.fixture
def answers(loaded: Loaded) -> Answers:
    return Answers(lambda _: loaded, ("tiny",), Limits(side=32), {})


def test_the_number_that_is_shown_is_computed(answers: Answers, picture: Path) -> None:
    """The boxes of numbers send whole numbers as floats; a tab asks nothing of the other one's number."""
    for steps in (3, 3.0):
        answer = answers("steps", str(picture), None, "tiny", steps, None)
        assert answer is not None
        assert "tiny, 3 steps" in answer
    answer = answers("noise", str(picture), None, "tiny", 2.5, 0)
    assert answer is not None
    assert "noise of 0 standard deviations" in answer


def test_an_emptied_box_changes_nothing(answers: Answers, picture: Path) -> None:
    assert answers("steps", str(picture), None, "tiny", None, 0.5) is None
    assert answers("noise", str(picture), None, "tiny", 4, None) is None


@pytest.mark.parametrize("steps", [2.5, 0, 17, -1, 10**400, float("nan"), float("inf"), "4", [4]])
def test_steps_that_cannot_be_taken(answers: Answers, picture: Path, steps: object) -> None:
    with pytest.raises(RacError, match="give a whole number from 1 to 16"):
        answers("steps", str(picture), None, "tiny", steps, 0.5)


@pytest.mark.parametrize("sigma", [-0.1, 1.6, float("nan"), "0.5"])
def test_noise_that_cannot_be_added(answers: Answers, picture: Path, sigma: object) -> None:
    with pytest.raises(RacError, match=r"give a number from 0 to 1\.5"):
        answers("noise", str(picture), None, "tiny", 4, sigma)


def test_other_requests_that_no_control_makes(answers: Answers, picture: Path) -> None:
    with pytest.raises(RacError, match="no coder 'large' here; choose one of tiny"):
        answers("steps", str(picture), None, "large", 4, 0.5)
    assert answers("steps", None, "unknown", "tiny", 4, 0.5) == EMPTY


def test_what_scrolls_or_moves_is_reached_by_the_keyboard(answers: Answers, picture: Path) -> None:
    answer = answers("steps", str(picture), None, "tiny", 2, 0.5) or ""
    for part in ("rac-pictures", "rac-table", "rac-film"):
        tags = re.findall(rf"<div class='{part}'[^>]*>", answer)
        assert tags, part
        assert all("tabindex='0'" in tag and "aria-label=" in tag for tag in tags), part


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RacError, match="in use; choose another with --port"):
            free_port("127.0.0.1", taken.getsockname()[1])
    assert free_port("127.0.0.1", 0) > 0
    with pytest.raises(RacError, match="65535"):
        free_port("127.0.0.1", 70_000)
    with pytest.raises(RacError, match="is not available"):
        free_port("192.0.2.1", 0)


@pytest.mark.parametrize("wrong", [{"max_megabytes": float("nan")}, {"max_megapixels": float("inf")}])
def test_limits_are_finite(wrong: dict[str, float]) -> None:
    with pytest.raises(RacError, match="must be a finite number"):
        Command(**wrong).run()  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ through gradio


@pytest.fixture(scope="module")
def url(loaded: Loaded):  # type: ignore[no-untyped-def]
    pytest.importorskip("gradio", reason="gradio, which makes the page, is not installed")
    limits = Limits(upload_bytes=50_000, pixels=10_000, side=32)
    page = build(lambda _: loaded, ["tiny"], limits)
    with serving(page, "127.0.0.1", 0, limits) as address:
        yield address


def ask(url: str, path: Path, steps: float | None = 2) -> str:
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False, analytics_enabled=False)
    answer = client.predict(handle_file(path), None, "tiny", steps, 0.5, api_name="/reconstruct")
    return str(answer[0])


def test_the_page_answers(url: str, picture: Path, loaded: Loaded) -> None:
    answer = ask(url, picture)
    expected = reconstruct(loaded, rac.read_image(picture), 2)
    for version in expected.versions:
        assert f"<td>{version.psnr:.2f}</td>" in answer
        assert f"<td>{version.macs / 1e9:.3g}</td>" in answer
    assert answer.count("data:image/png") == 3
    assert answer.count("data:image/jpeg") == 6
    assert "http" not in answer


def test_the_page_refuses_in_words(url: str, tmp_path: Path, images) -> None:  # type: ignore[no-untyped-def]
    rac.write_image(images(1, 101, 100), tmp_path / "large.png")
    (tmp_path / "notes.png").write_text("no picture")
    for name, words in (("large.png", "scale it down first"), ("notes.png", "not a picture")):
        with pytest.raises(Exception, match=words):
            ask(url, tmp_path / name)
    import httpx

    heavy = httpx.post(url + "/gradio_api/upload", files={"files": b"0" * 200_000})
    assert heavy.status_code == 413
    assert "save the picture smaller" in heavy.text


def test_refused_numbers_leave_no_traceback(url: str, picture: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    for steps in (2.5, 99, -1):
        with pytest.raises(Exception, match="whole number from 1 to 16"):
            ask(url, picture, steps)
    ask(url, picture, None)
    assert "Traceback" not in capfd.readouterr().err


def test_sliders_answer_the_keyboard(loaded: Loaded) -> None:
    """gradio's `release` comes for the mouse alone, `change` for every way of setting a value."""
    pytest.importorskip("gradio", reason="gradio, which makes the page, is not installed")
    blocks = build(lambda _: loaded, ["tiny"], Limits()).blocks
    sliders = {key for key, block in blocks.blocks.items() if block.get_block_name() == "slider"}
    events = {target for function in blocks.fns.values() for target in function.targets if target[0] in sliders}
    assert events == {(slider, "change") for slider in sliders}
    assert len(sliders) == 2


@pytest.mark.slow
def test_many_visitors_are_served_in_turn(url: str, tmp_path: Path, images) -> None:  # type: ignore[no-untyped-def]
    """Nobody is lost, and each gets the answer to the own picture: its size stands under the original."""
    paths = []
    for k in range(20):
        paths.append(tmp_path / f"{k}.png")
        rac.write_image(images(1, 12, 13 + k), paths[-1])
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda path: ask(url, path, 1), paths))
    sizes = [re.search(r"<span>(\d+) x 12</span>", answer) for answer in answers]
    assert [int(found[1]) for found in sizes if found] == [13 + k for k in range(20)]


def test_no_files_are_handed_out(url: str) -> None:
    import httpx

    page = httpx.get(url)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "googleapis" not in page.text
    for path in ("/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=http://127.0.0.1"):
        assert httpx.get(url + path).status_code == 404
    outside = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    elsewhere = {"path": "http://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}}
    from gradio_client import Client

    client = Client(url, verbose=False, analytics_enabled=False)
    for file in (outside, elsewhere):
        with pytest.raises(Exception) as refusal:  # noqa: PT011 - gradio's own kinds
            client.predict(file, None, "tiny", 1, 0.5, api_name="/reconstruct")
        assert "root:" not in str(refusal.value)


def test_a_full_queue_says_so(loaded: Loaded, picture: Path) -> None:
    """One is worked on, one waits, the third is told; the first two get their answers."""
    pytest.importorskip("gradio", reason="gradio, which makes the page, is not installed")
    from gradio_client import Client, handle_file

    begun, go_on = threading.Event(), threading.Event()

    def slow(_: str) -> Loaded:
        begun.set()
        go_on.wait(120)
        return loaded

    limits = Limits(waiting=1)
    page = build(slow, ["tiny"], limits)
    with serving(page, "127.0.0.1", 0, limits) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        given = (handle_file(picture), None, "tiny", 1, 0.5)
        first = client.submit(*given, api_name="/reconstruct")
        assert begun.wait(60)
        second = client.submit(*given, api_name="/reconstruct")
        while len(page.blocks._queue) == 0:
            time.sleep(0.05)
        third = Client(address, verbose=False, analytics_enabled=False).submit(*given, api_name="/reconstruct")
        try:
            with pytest.raises(Exception, match="Queue is full"):
                third.result(60)
        finally:
            go_on.set()
        assert all("data:image/png" in str(job.result(60)[0]) for job in (first, second))

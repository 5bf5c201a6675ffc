"""`rac weights`."""

from __future__ import annotations

import torch

from rac.representations.lpips import FILES


def test_it_lists_every_file_and_where_it_is_looked_for(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAC_WEIGHTS_DIR", str(tmp_path))
    ran = run("weights")
    assert ran.code == 0
    for name in ("lpips_alex_v0.1", "lpips_vgg16_v0.1", "inception_v3_2015-12-05", str(tmp_path)):
        assert name in ran.out.replace("\n", "")


def test_it_converts_into_the_folder_of_weights(run, tmp_path, monkeypatch):
    source, target = tmp_path / "published", tmp_path / "weights"
    source.mkdir()
    monkeypatch.setenv("RAC_WEIGHTS_DIR", str(target))
    sizes = ((64, 3, 11), (192, 64, 5), (384, 192, 3), (256, 384, 3), (256, 256, 3))
    features = {}
    for place, (outputs, inputs, side) in zip((0, 3, 6, 8, 10), sizes, strict=True):
        features[f"features.{place}.weight"] = torch.zeros(outputs, inputs, side, side)
        features[f"features.{place}.bias"] = torch.zeros(outputs)
    torch.save(features, source / "alexnet-owt-7be5be79.pth")
    torch.save(
        {f"lin{i}.model.1.weight": torch.zeros(1, n, 1, 1) for i, (n, *_) in enumerate(sizes)}, source / "alex.pth"
    )
    ran = run("weights", "--convert", str(source))
    assert ran.code == 0
    assert (target / FILES["alex"].names[0]).is_file()
    assert "a different file of the same name" in ran.err  # its name promises another hash
    assert run("weights", "--convert", str(tmp_path)).code == 1
    assert run("weights", "--convert", str(tmp_path / "nowhere")).code == 2

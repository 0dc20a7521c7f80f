"""The benchmark of predicted distances: parts do not meet, models are fair, and all of it runs on drawn images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.attacks import networks
from benchmarks.attacks.networks import Size
from benchmarks.prediction import radius
from benchmarks.prediction.distances import PARTS
from benchmarks.prediction.fitted import MODELS, fitted, follows, normal_scores, weights_for
from benchmarks.prediction.radius_scores import FINAL_PASSES, PATH_PASSES, Side
from brittle.data import Examples


def test_the_parts_cover_the_test_images_and_do_not_meet() -> None:
    ends = sorted(PARTS.values())
    assert [low for low, _ in ends] == [0.0, *(high for _, high in ends[:-1])]
    assert ends[-1][1] == 1.0


def test_normal_scores_keep_the_order_and_stay_within_what_is_known() -> None:
    known = torch.tensor([[3.0], [1.0], [2.0], [2.0], [torch.inf]])
    asked = torch.tensor([[-9.0], [1.0], [1.5], [2.0], [3.0], [99.0], [torch.inf]])
    found = normal_scores(known, asked)[:, 0]
    assert (found.diff() >= 0).all()
    assert found[0] == found[1] < found[2] < found[3] < found[4] == found[5] == found[6]
    assert found[3] == pytest.approx(-0.2533471, abs=1e-6)  # one below it, and itself tied: two fifths


def test_models_follow_what_tells_the_distance_and_nothing_else() -> None:
    draws = torch.Generator().manual_seed(0)
    distance, noise = torch.rand(600, generator=draws).double(), torch.randn(600, 3, generator=draws).double()
    told = Side.of({"told": -distance.exp(), "noise": noise})
    marked = Side.of({"noise": noise}, {"class": (torch.arange(600)[:, None] % 3 == torch.arange(3)).double()})
    half, weights = slice(0, 300), weights_for(300)
    for side, least, most in ((told, 0.95, 1.0), (marked, -0.2, 0.2)):
        found = fitted(side.values[half], distance[half], side.values[300:], side.marks)
        for model in MODELS:
            assert least <= follows(found[model], distance[300:], weights).value <= most


def test_sides_join_and_name_what_is_a_score_by_itself() -> None:
    a, b = Side.of({"x": torch.zeros(2), "y": torch.ones(2, 2)}), Side.of({}, {"z": torch.ones(2, 1)})
    both = a + b
    assert both.names == ("x", "y 0", "y 1", "z 0")
    assert both.scores == ("x",)
    assert both.marks.tolist() == [False, False, False, True]
    assert both["y 1"].tolist() == [1.0, 1.0]


def drawn(count: int, seed: int) -> Examples:
    """Dark images that show their class, a block of it bright."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=draws)
    images = 0.1 * torch.rand(count, 1, 28, 28, generator=draws)
    rows, columns = 2 * labels + 4, 2 * (9 - labels) + 4
    for k in range(4):
        images[torch.arange(count), 0, rows + k % 2, columns + k // 2] += 0.9
    return Examples(images, labels)


@pytest.mark.slow
def test_everything_runs_and_counts_its_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "data", lambda: (drawn(600, 0), drawn(400, 1)))
    amount = radius.Amount(Size(600, 6, 6, 1, 0, batch=32), 50, 50, "quick")
    found = radius.measure(amount, tmp_path)
    assert found["radius_passes"] == {"final": FINAL_PASSES, "path": PATH_PASSES}
    assert FINAL_PASSES <= 10
    assert 0 <= found["radius_wins"] <= 2
    for row in found["radius"].values():
        assert row["scores"]["search alone: radius"]["value"] > 0.5  # it looks at the same holes as the attacks
        for side in ("gain", "path_gain", "all_together"):
            assert all(row[side][model]["low"] <= row[side][model]["value"] for model in MODELS)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")}
    assert radius.measure(amount, tmp_path)["radius"] == found["radius"]
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.pt")} == files

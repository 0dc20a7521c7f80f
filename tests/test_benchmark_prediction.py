"""The benchmark of predicted failures: its figures against plain ones, its models on made-up scores, one small run."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.prediction import __main__ as benchmark
from benchmarks.prediction import networks
from benchmarks.prediction.figures import Sealed, mean, resampled
from benchmarks.prediction.networks import BLANK, DataSet, Envelope, Size
from benchmarks.prediction.scores import doubt, lead, mass_scores, path_scores
from brittle.agreement.conditional import partial_spearman
from brittle.agreement.metrics import augrc, auroc, bootstrap
from brittle.agreement.models import KINDS, Table, rates
from brittle.errors import SealedError
from brittle.examples.fashion_mnist import network

NETWORKS, IMAGES = 2, 300


def made() -> tuple[Tensor, Tensor, Tensor]:
    """Two scores and failures of two networks, (K, M) each."""
    draws = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, NETWORKS, IMAGES, generator=draws, dtype=torch.float64)
    return one, other, one + other + torch.randn(NETWORKS, IMAGES, generator=draws) > 1


def test_figures_are_means_over_networks_on_the_same_draws_of_images() -> None:
    score, _, failed = made()
    sealed = Sealed(failed, torch.ones_like(failed), resampled(failed, 50))
    found = sealed.ranked(list(score))
    each = [bootstrap(auroc, s, f, sealed.weights) for s, f in zip(score, failed, strict=True)]
    assert found.auroc.value == pytest.approx(mean(each).value)
    assert torch.allclose(found.auroc.resamples, (each[0].resamples + each[1].resamples) / 2)
    plain = [bootstrap(augrc, s, f, sealed.weights) for s, f in zip(score, failed, strict=True)]
    assert found.augrc.value == pytest.approx(mean(plain).value)
    assert torch.allclose(found.augrc.resamples, mean(plain).resamples), "every network keeps its number of failures"


def test_images_that_do_not_count_are_left_out() -> None:
    score, _, failed = made()
    counts = torch.arange(IMAGES).expand(NETWORKS, -1) % 3 > 0
    found = Sealed(failed, counts, resampled(counts, 20)).ranked(list(score)).auroc.value
    ones = torch.ones(int(counts[0].sum()), 1, dtype=torch.float64)
    plain = [auroc(s[c], f[c], ones).item() for s, f, c in zip(score, failed, counts, strict=True)]
    assert found == pytest.approx(sum(plain) / NETWORKS)


def test_partial_spearman_is_the_mean_over_networks() -> None:
    score, other, failed = made()
    sealed = Sealed(failed, torch.ones_like(failed), resampled(failed, 20))
    found = sealed.partial(list(score), list(other))
    each = [partial_spearman(score[k], failed[k].double(), other[k], sealed.weights) for k in range(NETWORKS)]
    assert found.value == pytest.approx((each[0].value + each[1].value) / 2)
    assert found.value > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_models_find_what_a_number_and_a_class_say_together(kind: str) -> None:
    draws = torch.Generator().manual_seed(1)
    number, label = torch.randn(2000, generator=draws), torch.randint(4, (2000,), generator=draws)
    chance = torch.sigmoid(2 * number + 3 * (label == 2) - 2)
    failed = torch.rand(2000, generator=draws) < chance
    table = Table({"number": number, "class": label, "wide": torch.randn(2000, 3, generator=draws)}, failed)
    table.scores["number"][5] = torch.inf  # type: ignore[index]
    known, asked = table[slice(0, 1000)], table[slice(1000, None)]
    together, alone = (rates(kind, known.only(n), asked.only(n)) for n in (["number", "class", "wide"], ["number"]))
    best = auroc(chance[1000:], asked.failed, torch.ones(1000, 1)).item()
    figures = [auroc(r, asked.failed, torch.ones(1000, 1)).item() for r in (together, alone)]
    assert figures[0] > best - 0.03
    assert figures[1] < best - 0.03
    assert together.mean() == pytest.approx(asked.failed.double().mean().item(), abs=0.05), "rates"


def test_scores_along_the_path_count_flips_and_say_when_a_prediction_settled() -> None:
    said = torch.tensor([[0, 0, 1, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]).T  # shape: (S, M)
    logits = 3.0 * torch.nn.functional.one_hot(said, 3) - torch.tensor([0.0, 0.0, 1.0])
    found = path_scores(logits, said[-1])
    assert found["flips along the path"].tolist() == [3, 0]
    assert found["settled at"].tolist() == [4, 0]
    assert found["late flips"].tolist() == [0, 0]
    assert found["share of the path with another prediction"].tolist() == pytest.approx([0.3, 0])
    assert found["early lead"][0] > found["early lead"][1]
    average = logits[5:].softmax(2).mean(0)
    assert found["late path"] == pytest.approx(-lead(average.log(), said[-1]), abs=1e-6)
    assert doubt(average, said[-1]) == pytest.approx((1 - average[:, 1]).log(), abs=1e-5)


def test_mass_scores_are_shares_of_the_gross_mass() -> None:
    mass = torch.zeros(1, 8, 6, dtype=torch.float64)  # three classes, easy and hard
    mass[0, 2, 0], mass[0, 6, 0], mass[0, 6, 3], mass[0, 7, 1] = 4.0, 1.0, 3.0, -2.0
    found = mass_scores(mass, torch.tensor([[0, 1, 2]]))
    assert found["lack of support"].item() == pytest.approx(-6 / 10)
    assert found["mass by class"][0].tolist() == pytest.approx([0.8, -0.2, 0])
    assert found["arrival of the support"].item() == pytest.approx((4 * 2 + 4 * 6) / 8)
    assert found["share of hard examples"].item() == pytest.approx(0.3)
    assert found["support by hard examples"].item() == pytest.approx(0.3)
    assert torch.equal(
        mass_scores(2 * mass, torch.tensor([[0, 1, 2]]))["net mass by segment"], found["net mass by segment"]
    )


def test_sealed_labels_are_given_out_once() -> None:
    envelope = Envelope(torch.arange(3))
    assert envelope.open("scores").tolist() == [0, 1, 2]
    with pytest.raises(SealedError, match="given out once"):
        envelope.open("other scores")


def drawn(name: str, root: Path) -> tuple[Tensor, Tensor, int]:
    """Noisy images that show their class, a row of it bright."""
    draws, count = torch.Generator().manual_seed(0), 900
    labels = torch.randint(10, (count,), generator=draws)
    images = 120 * torch.rand(count, 1, 28, 28, generator=draws)
    images[torch.arange(count), 0, 2 * labels + 5] += 110
    return images.to(torch.uint8), labels, 800


def test_a_small_run_holds_all_keys_and_no_prediction_depends_on_a_sealed_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks, "_read", drawn)
    monkeypatch.setattr(benchmark, "SETS", (DataSet("MNIST", 300, 2, network),))
    monkeypatch.setattr(benchmark, "QUICK", Size(300, 2, 200, 200, seeds=2, probed=(100, 100), resamples=20))
    monkeypatch.setenv("BRITTLE_DATA", str(tmp_path))
    seen: list[Tensor] = []
    honest = networks.networks

    def watched(*given: object) -> networks.Networks:
        nets = honest(*given)  # type: ignore[arg-type]
        seen.append(nets.subjects[0].test.targets[nets.sealed])
        return nets

    monkeypatch.setattr(benchmark, "networks", watched)
    asked = ["--quick", "--only", "natural", "probes", "--cache", str(tmp_path / "cache")]
    assert benchmark.main(asked) == 0
    assert (seen[0] == BLANK).all()
    found = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert set(found) >= {"natural", "natural_wins", "incremental_wins", "probes", "probe_wins", "missed"}
    natural, probes = found["natural"]["MNIST"], found["probes"]["MNIST"]
    assert len(natural["errors"]) == 2
    assert len(natural["baselines"]) == 12
    assert set(natural["models"]) == {f"{a} {b}" for a in ("baselines", "ours", "all") for b in (*KINDS, "both")}
    assert all(0 <= f["auroc"]["value"] <= 1 for part in ("baselines", "ours") for f in natural[part].values())
    assert len(probes["families"]) == 14
    assert benchmark.main(asked) == 0
    again = json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])
    assert again == found, "what is kept gives the same figures"


def test_sizes_are_as_they_are_said_to_be() -> None:
    assert networks.FULL.seeds >= 3
    assert networks.FULL.resamples >= 1000
    assert networks.FULL.sealed >= 10_000
    assert [of.train for of in networks.SETS] == [1_000, 10_000, 10_000]
    assert {f.name for f in fields(Size)} >= {"calibration", "sealed"}


def test_distances_and_planted_regions_are_parts_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(benchmark.radius, "run", lambda *given: asked.append(given) or {"radius_wins": 2})
    monkeypatch.setattr(benchmark.planted, "run", lambda *given: asked.append(given) or {"found": 1.0})
    found = benchmark.run(networks.QUICK, tmp_path, tmp_path, True, ("radius", "planted"), ())
    assert found == {"radius_wins": 2, "planted": {"found": 1.0}}
    assert asked == [(tmp_path / "radius", True), (tmp_path, tmp_path / "planted", True)]

"""The subjects that train themselves: their data, their accuracy, their path, and what is kept between runs."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from brittle.data import Examples
from brittle.errors import DataError
from brittle.examples import digits, fashion_mnist, training
from brittle.loading import load_subject
from brittle.path.store import PathReader, finished
from brittle.subject import Subject


def accuracy(subject: Subject, data: Examples) -> float:
    return (subject.predict(data.inputs).argmax(1) == data.targets).double().mean().item()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits") / "deep" / "cache"


@pytest.fixture(scope="module")
def subject(cache: Path) -> Subject:
    return digits.make(cache=str(cache))


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, any training fails."""

    def fail(*_: object) -> None:
        raise AssertionError("it trains again")

    monkeypatch.setattr(training, "train", fail)


def test_the_digits_are_split_once_and_named(subject: Subject) -> None:
    parts = [subject.train, subject.pool, subject.test]
    assert [len(part) for part in parts if part] == [600, 500, 697]
    names = [name for part in parts if part for name in part.names]
    assert sorted(names) == [f"digits/{i:04d}" for i in range(1797)]
    assert subject.train.inputs.shape[1:] == (1, 8, 8)
    assert (subject.train.inputs.min(), subject.train.inputs.max()) == (0, 1)
    assert set(subject.train.targets.tolist()) == set(range(10))


def test_the_digits_are_learned_with_some_real_errors(subject: Subject) -> None:
    assert 0.93 <= accuracy(subject, subject.test) <= 0.97
    assert accuracy(subject, subject.train) > 0.99


def test_the_path_ends_in_the_weights(subject: Subject, cache: Path) -> None:
    assert subject.path == cache / "path"
    path = PathReader(subject.path)
    assert path.steps == 15 * 19
    assert torch.equal(path.snapshot(path.steps).state, parameters_to_vector(subject.model.parameters()))
    visited = torch.cat([path.step(s).batches[0].ids for s in range(19)])
    assert torch.equal(visited.sort().values, torch.arange(600))


def test_a_finished_training_is_read(subject: Subject, cache: Path, untrainable: None) -> None:
    again = digits.make(cache=str(cache))
    assert torch.equal(again.predict(again.test.inputs), subject.predict(subject.test.inputs))
    assert not again.model.training
    with pytest.raises(AssertionError, match="it trains again"):
        digits.make(seed=1, cache=str(cache))


def small(seed: int = 0, epochs: int = 1) -> tuple[Examples, training.Recipe]:
    part = digits._split()["train"][:64]
    return part, training.Recipe(0.3, 0.4, epochs=epochs, batch=16, lr=0.02, seed=seed)


def test_another_recipe_or_other_data_train_again(tmp_path: Path) -> None:
    data, recipe = small()
    training.trained(digits.network, data, recipe, tmp_path, bar="")
    for changed in (small(epochs=2), small(seed=1), (data[:32], recipe)):
        _, path = training.trained(digits.network, *changed, tmp_path, bar="")
        steps = changed[1].epochs * len(changed[0]) // 16
        assert PathReader(path).steps == steps
    other = Examples(data.inputs, data.targets.flip(0))
    before = training.trained(digits.network, data, recipe, tmp_path, bar="")[0]
    after = training.trained(digits.network, other, recipe, tmp_path, bar="")[0]
    assert not torch.equal(before[0].weight, after[0].weight)


def test_an_interrupted_training_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = small()
    expected, _ = training.trained(digits.network, data, recipe, tmp_path / "whole", bar="")

    class Interrupted(training.Recorder):
        def batch(self, ids: Tensor | list[int]) -> None:
            if self.steps == 2:
                raise KeyboardInterrupt
            super().batch(ids)

    with monkeypatch.context() as patch:
        patch.setattr(training, "Recorder", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.trained(digits.network, data, recipe, tmp_path / "cut", bar="")
    assert not finished(tmp_path / "cut" / "path")
    model, path = training.trained(digits.network, data, recipe, tmp_path / "cut", bar="")
    assert PathReader(path).steps == 4
    assert torch.equal(parameters_to_vector(model.parameters()), parameters_to_vector(expected.parameters()))


def test_nothing_but_an_old_path_is_deleted(tmp_path: Path) -> None:
    data, recipe = small()
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "thesis.tex").write_text("years of work")
    (tmp_path / "notes.txt").write_text("mine")
    training.trained(digits.network, data, recipe, tmp_path, bar="")
    assert (tmp_path / "path" / "thesis.tex").exists()
    assert (tmp_path / "notes.txt").exists()


def test_recording_does_not_change_the_training(tmp_path: Path) -> None:
    data, recipe = small(epochs=2)
    plain = training.train(digits.network(0), data, recipe)
    recorded = training.train(digits.network(0), data, recipe, tmp_path)
    assert torch.equal(parameters_to_vector(plain.parameters()), parameters_to_vector(recorded.parameters()))


def test_retraining_depends_on_its_seed_and_data_alone(subject: Subject) -> None:
    assert subject.retrain is not None
    data = small()[0]
    state = torch.random.get_rng_state()
    weights = [parameters_to_vector(subject.retrain(data, seed).parameters()) for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not subject.retrain(data, 3).training


def test_the_progress_bar_can_be_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, recipe = small()
    monkeypatch.delenv(training.QUIET, raising=False)
    training.train(digits.network(0), data, recipe, bar="training on something")
    assert capsys.readouterr().err == "", "a file or a pipe is no place for a bar"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    training.train(digits.network(0), data, recipe, bar="training on something")
    assert "training on something" in capsys.readouterr().err
    training.train(digits.network(0), data, recipe)
    monkeypatch.setenv(training.QUIET, "1")
    training.train(digits.network(0), data, recipe, bar="training on something")
    assert capsys.readouterr().err == ""


# Fashion-MNIST


def write_idx(path: Path, values: Tensor) -> None:
    """A file of bytes in the format of the original: zero, zero, type 8, dimensions; their sizes; the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Fashion-MNIST: 240 training and 40 test images, whose class is the row that is lit."""
    for part, count in (("train", 240), ("t10k", 40)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 90, (count, 28, 28), generator=torch.Generator().manual_seed(count))
        images[torch.arange(count), 2 * labels + 4] = 255
        write_idx(tmp_path / "FashionMNIST" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / "FashionMNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels)
    monkeypatch.delenv("BRITTLE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fashion_mnist_reads_torchvisions_files(root: Path) -> None:
    made = fashion_mnist.make(str(root), epochs=1)
    assert made.pool is not None
    assert [len(part) for part in (made.train, made.pool, made.test)] == [220, 20, 40]
    assert made.train.inputs.shape[1:] == (1, 28, 28)
    assert made.train.inputs.max() == 1
    assert torch.equal(made.train.targets, torch.arange(220) % 10)
    assert made.class_names[0] == "T-shirt/top"
    assert (made.train.name(7), made.pool.name(0)) == ("fashion-mnist/train/00007", "fashion-mnist/train/00220")
    assert made.test.name(39) == "fashion-mnist/test/00039"
    assert made.path == Path("runs/.subjects/fashion_mnist-220x1-seed0/path")
    assert made.path is not None
    assert PathReader(made.path).steps == 2
    assert sum(p.numel() for p in made.model.parameters()) == 55_594


def test_fashion_mnist_is_named_by_the_environment_and_options(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRITTLE_DATA", str(root))
    options = {"epochs": "12", "limit": "150", "seed": "2"}
    made = load_subject("brittle.examples.fashion_mnist:make", options)
    assert len(made.train) == 150
    assert made.retrain is not None
    assert accuracy(made, made.test) > 0.9


def test_a_large_limit_leaves_the_pool_alone(root: Path) -> None:
    made = fashion_mnist.make(str(root), epochs=1, limit=1000)
    assert made.pool is not None
    assert not set(made.train.names) & set(made.pool.names)


REMEDY = (
    r"; get it with torchvision.datasets.FashionMNIST\(DIR, download=True\), then .* -p root=DIR or BRITTLE_DATA=DIR$"
)


def test_absent_data_say_how_to_get_them(root: Path) -> None:
    with pytest.raises(DataError, match=r"^Fashion-MNIST needs .*, found neither -p root nor BRITTLE_DATA" + REMEDY):
        fashion_mnist.make()
    with pytest.raises(
        DataError, match=r"^nowhere must hold Fashion-MNIST, .* RuntimeError: Dataset not found.*" + REMEDY
    ):
        fashion_mnist.make("nowhere")


def test_damaged_data_say_how_to_get_them(root: Path) -> None:
    file = root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"^{root} must hold Fashion-MNIST, torchvision says .*" + REMEDY) as caught:
        fashion_mnist.make(str(root))
    assert "\n" not in str(caught.value)

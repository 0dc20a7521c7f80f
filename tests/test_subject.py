"""The door: every form of model and data that is let in, and every fault with its rule, value and remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brittle.data
from brittle.data import Examples
from brittle.errors import DataError, ModelError, NotFiniteError, SubjectError
from brittle.subject import Subject

CLASSES, WIDTH = 3, 4


def blobs(count: int = 30, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Inputs in [0, 1] whose largest coordinate names the class."""
    inputs = torch.rand(count, WIDTH, generator=torch.Generator().manual_seed(count))
    targets = torch.arange(count) % classes
    inputs[:, :classes] /= 2
    inputs[torch.arange(count), targets] = 1.0
    return inputs, targets


def linear(classes: int = CLASSES) -> nn.Module:
    """Logits = the first inputs, or for one logit x1 - x0: right on every blob."""
    model = nn.Linear(WIDTH, classes).eval()
    with torch.no_grad():
        model.bias.zero_()
        model.weight.copy_(torch.eye(classes, WIDTH) if classes > 1 else torch.tensor([[-1.0, 1.0, 0.0, 0.0]]))
    return model


class Wrapped(nn.Module):
    """A model whose output is `wrap` of the logits."""

    def __init__(self, wrap: Any, classes: int = CLASSES) -> None:
        super().__init__()
        self.inner, self.wrap = linear(classes), wrap
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


class Rows:
    """A map-style data set that makes its items with `item`."""

    def __init__(self, item: Any, count: int = 30, classes: int = CLASSES) -> None:
        self.rows, self.item = list(zip(*blobs(count, classes), strict=True)), item

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.item(*self.rows[i])


def subject(**changes: Any) -> Subject:
    return Subject(**({"model": linear(), "train": blobs(30), "test": blobs(12)} | changes))


def assert_refused(kind: type[SubjectError], rule: str, value: str, remedy: str, **changes: Any) -> None:
    """The message is one line: the rule, then the value found, then the remedy."""
    with pytest.raises(kind) as caught:
        subject(**changes)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in message
    assert message.index(rule) < message.index(value) < message.index(remedy), message


# What is let in


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: {"loss": None, "logits": z},
        lambda z: {"out": z},
        lambda z: (z, torch.zeros(3)),
        lambda z: [z],
        lambda z: SimpleNamespace(logits=z),
    ],
    ids=["tensor", "dict", "out", "tuple", "list", "object"],
)
def test_models_may_return_a_tensor_a_dict_a_tuple_or_an_object(wrap: Any) -> None:
    plain = subject()
    wrapped = subject(model=Wrapped(wrap))
    assert torch.equal(wrapped.predict(wrapped.test.inputs), plain.predict(plain.test.inputs))
    assert wrapped.classes == CLASSES
    assert not wrapped.binary


def test_forward_picks_the_logits_where_the_model_cannot() -> None:
    picked = subject(
        model=Wrapped(lambda z: {"a": {"b": z}}), forward=lambda model, x: model(x)["a"]["b"], name="nested"
    )
    assert torch.equal(picked.predict(picked.test.inputs).argmax(1), picked.test.targets)
    assert picked.name == "nested"


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: z[:, 0]], ids=["(B, 1)", "(B,)"])
def test_a_single_logit_is_two_classes(wrap: Any) -> None:
    one = subject(model=Wrapped(wrap, classes=1), train=blobs(20, 2), test=blobs(7, 2))
    logits = one.predict(one.test.inputs)
    assert one.binary
    assert one.class_names == ("0", "1")
    assert logits.shape == (7, 2)
    assert torch.equal(logits[:, 0], torch.zeros(7))
    assert torch.equal(logits[:, 1], one.test.inputs[:, 1] - one.test.inputs[:, 0])
    raw = one.run(one.model, one.train.inputs)
    expected = F.binary_cross_entropy_with_logits(raw.reshape(-1), one.train.targets.float())
    assert torch.isclose(one.loss_of(raw, one.train.targets), expected)


@pytest.mark.parametrize("batch", [1, 5, 1000])
def test_the_batch_size_does_not_matter(batch: int) -> None:
    for s in (subject(), subject(model=Wrapped(lambda z: z.squeeze(), 1), train=blobs(20, 2), test=blobs(7, 2))):
        assert torch.allclose(s.predict(s.test.inputs, batch=batch), s.predict(s.test.inputs))
        assert s.predict(s.test.inputs[:0], batch=batch).shape == (0, s.classes)


@pytest.mark.parametrize(
    "data",
    [
        blobs(),
        list(blobs()),
        tuple(a.numpy() for a in blobs()),
        {"image": blobs()[0], "label": blobs()[1]},
        {"x": blobs()[0].numpy(), "y": blobs()[1].numpy()},
        Examples(*blobs()),
        Rows(lambda x, y: (x, int(y))),
        Rows(lambda x, y: (x.numpy(), y)),
        Rows(lambda x, y: {"pixel_values": x, "labels": y}),
        [(x, y) for x, y in zip(*blobs(), strict=True)],
        torch.utils.data.TensorDataset(*blobs()),
        torch.utils.data.Subset(torch.utils.data.TensorDataset(*blobs()), range(30)),
        (blobs()[0].double(), blobs()[1][:, None].float()),
    ],
    ids=[
        "tensors",
        "list",
        "numpy",
        "dict",
        "short keys",
        "Examples",
        "tuples",
        "numpy items",
        "dict items",
        "list of pairs",
        "TensorDataset",
        "Subset",
        "float labels in a column",
    ],
)
def test_data_may_be_tensors_arrays_dicts_or_data_sets(data: Any) -> None:
    read = subject(train=data).train
    inputs, targets = blobs()
    assert torch.equal(read.inputs, inputs)
    assert torch.equal(read.targets, targets)
    assert (read.inputs.dtype, read.targets.dtype) == (torch.float32, torch.int64)


def test_ids_name_the_training_examples() -> None:
    named = subject(ids=[f"scan-{i}.png" for i in range(30)])
    assert named.train.name(7) == "scan-7.png"
    assert named.train[torch.tensor([3, 7])].names == ("scan-3.png", "scan-7.png")
    assert subject().train.name(7) == "7"
    joined = named.train.join(named.test)
    assert len(joined) == 42
    assert joined.name(29) == "scan-29.png"
    assert joined.name(30) == "0"


def test_normalization_is_applied_inside_once() -> None:
    inputs, targets = blobs()
    images = inputs.reshape(30, 2, 2, 1)
    scaled = subject(
        model=nn.Sequential(nn.Flatten(), linear()).eval(),
        train=(images, targets),
        test=(images, targets),
        normalize=([0.25, 0.5], [0.5, 0.125]),
    )
    mean, std = torch.tensor([0.25, 0.5])[:, None, None], torch.tensor([0.5, 0.125])[:, None, None]
    expected = linear()(((images - mean) / std).flatten(1))
    assert torch.allclose(scaled.predict(images), expected)
    assert torch.allclose(subject(normalize=(0.5, 2)).predict(inputs), linear()((inputs - 0.5) / 2))


# What is refused


@pytest.mark.parametrize(
    ("model", "kind", "rule", "value", "remedy"),
    [
        (linear().train(), ModelError, "must be in evaluation mode", "training mode", "model.eval()"),
        (nn.Sequential(linear(), nn.Dropout().train()).eval(), None, "", "", ""),
        (
            Wrapped(lambda z: 1 / 0),
            ModelError,
            "must accept a float32 batch of shape (8, 4)",
            "ZeroDivision",
            "correct",
        ),
        (nn.Linear(9, 3).eval(), ModelError, "must accept a float32 batch", "RuntimeError", "correct the model"),
        (Wrapped(lambda z: z[:5]), ModelError, "shape (8, classes)", "(5, 3)", "forward="),
        (Wrapped(lambda z: z[..., None]), ModelError, "shape (8, classes)", "(8, 3, 1)", "forward="),
        (Wrapped(lambda z: z.sum()), ModelError, "shape (8, classes)", "()", "forward="),
        (Wrapped(lambda z: z.argmax(1)), ModelError, "floating-point logits", "torch.int64", "before argmax"),
        (Wrapped(lambda z: {"probabilities": z}), ModelError, "name its logits", "['probabilities']", "forward="),
        (Wrapped(lambda z: "cat"), ModelError, "must return a tensor", "found str", "forward="),
        (Wrapped(lambda z: z / 0), NotFiniteError, "logits must be finite", "8 of 8", "overflow"),
        (nn.Flatten().eval(), ModelError, "must have parameters", "found none", "trained weights"),
        (lambda x: x, ModelError, "must be a torch.nn.Module", "found function", "pass the module"),
    ],
)
def test_models_that_are_refused(model: Any, kind: Any, rule: str, value: str, remedy: str) -> None:
    if kind is None:
        model[1].train()
        kind, rule, value, remedy = ModelError, "evaluation mode", "training mode (1)", "model.eval()"
    assert_refused(kind, rule, value, remedy, model=model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_and_buffers_must_be_finite(bad: float) -> None:
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), linear()).eval()
    model[0].running_var[1] = bad
    assert_refused(NotFiniteError, "weights must be finite", "0.running_var", "diverged", model=model)
    model = linear()
    model.weight.data[0, 0] = bad
    assert_refused(NotFiniteError, "weights must be finite", "in weight", "diverged", model=model)


def changed(where: tuple[int, ...], value: float) -> tuple[Tensor, Tensor]:
    inputs, targets = blobs()
    inputs[where] = value
    return inputs, targets


def labelled(i: int, label: float) -> tuple[Tensor, Tensor]:
    inputs, targets = blobs()
    targets = targets.double() if label != int(label) else targets
    targets[i] = label
    return inputs, targets


@pytest.mark.parametrize("part", ["train", "test", "pool"])
@pytest.mark.parametrize(
    ("data", "kind", "rule", "value", "remedy"),
    [
        (changed((3, 0), 1.5), DataError, "lie in the bounds [0, 1]", "1.5", "bounds="),
        (changed((3, 0), -0.1), DataError, "lie in the bounds [0, 1]", "-0.1", "bounds="),
        (changed((3, 0), float("nan")), NotFiniteError, "must be finite", "in 1 of 30, first at 3", "drop or mend"),
        (changed((4, 0), float("-inf")), NotFiniteError, "must be finite", "in 1 of 30, first at 4", "drop or mend"),
        (labelled(5, 3), DataError, "labels must lie in 0..2", "found 3", "from 0"),
        (labelled(5, -1), DataError, "labels must lie in 0..2", "found -1", "from 0"),
        (labelled(5, 0.5), DataError, "labels must be whole numbers", "found 0.5", "class numbers"),
        ((blobs()[0], np.array(["cat"] * 30)), DataError, "labels must be numbers", "TypeError", "numeric array"),
        ((blobs()[0], F.one_hot(blobs()[1])), DataError, "one label an input", "(30, 3)", "one-hot"),
        ((blobs()[0], blobs()[1][:9]), DataError, "one label an input", "(9,)", "class numbers"),
        ((torch.zeros(0, 4), torch.zeros(0)), DataError, "must not be empty", "(0, 4)", "at least one"),
        ([], DataError, "must not be empty", "0 examples", "at least one"),
        ((torch.zeros(30), blobs()[1]), DataError, "must have shape (N, *shape)", "(30,)", "rows"),
        ((torch.zeros(30, 4).byte(), blobs()[1]), DataError, "floating point", "torch.uint8", "float() / 255"),
        (17, DataError, "map-style data set", "found int", "pass (inputs, targets)"),
        (torch.utils.data.DataLoader(Rows(tuple)), DataError, "map-style data set", "found DataLoader", ".dataset"),
        ({"picture": 1, "label": 2}, DataError, "one input key", "['picture', 'label']", "rename"),
        (
            Rows(lambda x, y: x),
            DataError,
            "must give (input, label)",
            "TypeError: not a pair but Tensor",
            "__getitem__",
        ),
        (blobs()[0].numpy(), DataError, "must give (input, label)", "not a pair but ndarray", "__getitem__"),
        (Rows(lambda x, y: (x[: 2 + y], y)), DataError, "inputs of one shape", "(3,) at 1", "resize or pad"),
        (Rows(lambda x, y: (x, "cat")), DataError, "must give (input, label)", "'cat'", "__getitem__"),
        (Rows(lambda x, y: (x, 0.5 * y)), DataError, "labels must be whole numbers", "found 0.5", "class numbers"),
        (Rows(lambda x, y: 1 / 0), DataError, "must give (input, label)", "ZeroDivisionError", "__getitem__"),
    ],
)
def test_data_that_is_refused(part: str, data: Any, kind: Any, rule: str, value: str, remedy: str) -> None:
    assert_refused(kind, rule, value, remedy, **{part: data})
    with pytest.raises(kind, match=rf"^{part} "):
        subject(**{part: data})


def test_examples_made_by_hand_are_checked_as_well() -> None:
    broken = Examples(*changed((3, 0), float("nan")))
    assert_refused(NotFiniteError, "must be finite", "first at 3", "drop or mend", train=broken)
    misnamed = Examples(*blobs(), names=("a", "b"))
    assert_refused(DataError, "one name an example", "2 names for 30", "in the order", train=misnamed)


def test_parts_of_different_shapes_are_refused() -> None:
    other = torch.rand(5, 1, 2, 2), torch.zeros(5)
    assert_refused(DataError, "training inputs' shape (4,)", "(1, 2, 2)", "in the same way", test=other)


def test_data_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brittle.data, "IN_MEMORY_LIMIT", 100)
    assert_refused(DataError, "must fit into", "30 inputs", "audit a subset", train=Rows(lambda x, y: (x, y)))


@pytest.mark.parametrize(
    ("changes", "rule", "value", "remedy"),
    [
        ({"ids": ["a"] * 29}, "ids must hold one name an example", "29 names for 30", "in the order"),
        ({"class_names": ("a", "b")}, "one name a class", "2 names for the model's 3", "name each"),
        ({"bounds": (1, 0)}, "low < high", "(1, 0)", "smallest"),
        ({"bounds": (0, float("inf"))}, "two finite numbers", "inf", "smallest"),
        ({"bounds": 1}, "two finite numbers", "found 1", "smallest"),
        ({"bounds": ([0.0] * 3, [1.0] * 3)}, "one value a channel", "0.0", "smallest"),
        ({"bounds": ([0.0, 0.0, 2.0, 0.0], 1.0)}, "low < high", "2.0", "smallest"),
        ({"bounds": ([0.0] * 4, [1.0, 1.0, 1.0, 1e-3])}, "lie in the bounds [0, 0.001]", "found [0", "correct bounds="),
        ({"normalize": (0.0, 0.0)}, "standard deviations above 0", "[0.0]", "training data"),
        ({"normalize": (float("nan"), 1.0)}, "finite means", "[nan]", "training data"),
        ({"normalize": 0.5}, "must be (mean, std)", "0.5", "two numbers"),
        ({"normalize": ([0.1] * 3, [1.0] * 3)}, "fit inputs of shape (4,)", "0.1", "one value a channel"),
        ({"loss": lambda z, y: F.cross_entropy(z, y, reduction="none")}, "one number for a batch", "(8,)", "mean"),
        ({"loss": lambda z, y: 0.5}, "one number for a batch", "float", "mean"),
        ({"loss": lambda z, y: z @ y}, "(logits, targets) of shapes (8, 3)", "RuntimeError", "trained with"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], rule: str, value: str, remedy: str) -> None:
    assert_refused(DataError, rule, value, remedy, **changes)


def test_bounds_may_be_one_value_a_channel() -> None:
    several = subject(bounds=(torch.tensor([-1.0, 0.0, 0.0, 0.0]), [1.0, 1.0, 2.0, 1.0]))
    assert several.range == (-1.0, 2.0)
    assert [b.tolist() for b in several.bounds] == [[-1, 0, 0, 0], [1, 1, 2, 1]]  # type: ignore[union-attr]
    assert subject(bounds=(0, torch.tensor(1.0))).bounds == (0.0, 1.0)


def test_the_loss_must_be_finite() -> None:
    loss = lambda z, y: z.sum() * float("nan")  # noqa: E731
    assert_refused(NotFiniteError, "loss must be finite", "nan", "trained with", loss=loss)


def test_inputs_out_of_bounds_are_hinted_to_be_normalized_already() -> None:
    inputs, targets = blobs()
    inputs[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    twice = ((inputs - 0.3) / 0.3, targets)
    assert_refused(DataError, "lie in the bounds", "[-1, 2.333]", "pass raw inputs", train=twice, normalize=(0.3, 0.3))


def test_a_model_that_normalizes_itself_is_not_normalized_again() -> None:
    """Its bias outweighs the inputs once they are shrunk a second time."""
    model = linear()
    model.bias.data = torch.tensor([0.4, 0.0, 0.0])
    twice = {"model": model, "normalize": (0.3, 9.0)}
    assert_refused(
        DataError, "normalized once", "33% with normalize= and 100% without", "leave normalize= out", **twice
    )


def test_the_probe_of_bare_inputs_may_fail_quietly() -> None:
    """A model that overflows without its normalization is right to have one."""
    model = Wrapped(lambda z: z / (z.amax(1, keepdim=True) < 0.9))
    with pytest.raises(NotFiniteError):
        subject(model=model)
    assert subject(model=model, normalize=(0.0, 2.0)).classes == CLASSES


def test_a_model_that_breaks_later_is_named() -> None:
    model = Wrapped(lambda z: z / (z.amax() < 2))
    late = subject(model=model)
    with pytest.raises(NotFiniteError, match=r"logits must be finite, found NaN or infinity at 1 of 3 inputs"):
        late.predict(torch.tensor([[1.0, 0, 0, 0], [9, 0, 0, 0], [1, 0, 0, 0]]), batch=1)
    with pytest.raises(ModelError, match=r"shape \(2, 7\), it raised RuntimeError"):
        late.predict(torch.zeros(2, 7))

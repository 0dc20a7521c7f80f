"""The whole audit on one small subject: laws that tie the findings, the tables and the arrays to each other."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import brittle
from brittle.cli import main
from brittle.data import Examples
from brittle.errors import RunFolderError, SealedError
from brittle.findings import Findings
from brittle.kernel.units import BUDGET
from brittle.pipeline import attack
from brittle.pipeline.context import Asked, begin
from brittle.pipeline.mapping import holes, memory, shift
from brittle.pipeline.observing import probes
from brittle.pipeline.opening import digest_of, unseal
from brittle.pipeline.scoring import predictions
from brittle.records import Ledger, Pairs
from brittle.report.view import view_of
from brittle.runs import RunFolder, read_run
from brittle.subject import Subject, replace_quietly

QUERIES = 60
COLUMNS = "query part kind name norm unit distance predicted success evaluations true_class clean_class new_class holes"
CLASSES = (1, 3, 8, 9)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.GELU(), nn.Linear(12, len(CLASSES)))


def train(model: nn.Module, data: Examples, seed: int, path: Path | None = None) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    recorder = brittle.Recorder(model, optimizer, path) if path else None
    order = torch.Generator().manual_seed(seed)
    for _ in range(6):
        for ids in torch.randperm(len(data), generator=order).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.inputs[ids]), data.targets[ids]).backward()
            if recorder:
                recorder.batch(ids)
            optimizer.step()
    if recorder:
        recorder.close()
    return model.eval()


def retrain(data: Examples, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return train(network(), data, seed)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Four kinds of digits and a small network that is often wrong."""
    digits = load_digits()
    rows = torch.as_tensor(digits.target).apply_(lambda y: CLASSES.index(y) if y in CLASSES else -1)
    kept = (rows >= 0).nonzero()[:, 0]
    everything = Examples(torch.as_tensor(digits.images[kept]).float()[:, None] / 16, rows[kept])
    path = tmp_path_factory.mktemp("pipeline") / "path"
    torch.manual_seed(0)
    model = train(network(), everything[:150], 0, path)
    names = tuple(map(str, CLASSES))
    parts = {"train": everything[:150], "pool": everything[150:230], "test": everything[230:430]}
    return Subject(model, **parts, class_names=names, path=path, retrain=retrain, name="four digits")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "run"


@pytest.fixture(scope="module")
def findings(subject: Subject, root: Path) -> Findings:
    return brittle.audit(subject, out=root, queries=QUERIES, progress=False)


@pytest.fixture(scope="module")
def run(findings: Findings, root: Path) -> RunFolder:
    return read_run(root)


@pytest.fixture(scope="module")
def rows(run: RunFolder) -> list[dict[str, str]]:
    return run.failures()


def right(row: dict[str, str]) -> bool:
    return row["clean_class"] == row["true_class"]


def of(rows: list[dict[str, str]], **wanted: str) -> list[dict[str, str]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


# the split and the tables


def test_sealed_queries_are_disjoint_from_predicting_ones(rows: list[dict[str, str]], findings: Findings) -> None:
    parts = {part: {row["query"] for row in of(rows, part=part)} for part in ("predict", "sealed")}
    assert [len(queries) for queries in parts.values()] == [QUERIES, QUERIES]
    assert not parts["predict"] & parts["sealed"]
    assert {row["part"] for row in of(rows, kind="attack")} == {"sealed"}
    assert {str(flip.query) for flip in findings.prediction.flips} <= parts["sealed"]


def test_every_query_has_one_row_a_probe_family_and_a_sealed_one_a_row_an_attack(
    rows: list[dict[str, str]], findings: Findings
) -> None:
    assert " ".join(rows[0]) == COLUMNS
    counts = Counter((row["query"], row["kind"], row["name"], row["norm"]) for row in rows)
    assert set(counts.values()) == {1}
    families = [family.name for family in findings.prediction.families]
    attacks = [(r.name, r.norm) for r in findings.attacks.results if r.kind != "envelope"]
    assert len(of(rows, kind="probe")) == 2 * QUERIES * len(families)
    assert len(of(rows, kind="attack")) == findings.attacks.inputs * len(attacks)
    for query in {row["query"] for row in rows}:
        own = of(rows, query=query)
        assert [row["name"] for row in of(own, kind="probe")] == families
        attacked = right(own[0]) and own[0]["part"] == "sealed"
        assert [(row["name"], row["norm"]) for row in of(own, kind="attack")] == (attacks if attacked else [])


def test_a_perturbations_severity_is_no_larger_than_the_probe_that_failed(
    rows: list[dict[str, str]], findings: Findings
) -> None:
    told = findings.attacks.perturbations
    assert {"rotation", "scale", "JPEG"} <= {result.name for result in told}
    for result in told:
        found = {row["query"]: float(row["distance"]) for row in of(rows, kind="perturbation", name=result.name)}
        assert len(found) == result.inputs == findings.attacks.inputs
        assert sum(map(math.isfinite, found.values())) / len(found) == pytest.approx(result.failing.value)
        assert max(found.values(), default=0) <= result.most or math.inf in found.values()
        if result.name != "contrast":  # whose levels are other ones, since it ends sooner
            for row in of(rows, kind="probe", part="sealed", name=result.name, success="True"):
                assert found[row["query"]] <= float(row["distance"]) * (1 + 1e-6)


def test_the_rows_of_probes_add_up_to_the_observed_failures(rows: list[dict[str, str]], findings: Findings) -> None:
    held = {target.name: target for target in findings.agreement.targets if target.kind == "probe"}
    assert list(held) == [family.name for family in findings.prediction.families]
    for name, target in held.items():
        sealed = [row for row in of(rows, kind="probe", part="sealed", name=name) if right(row)]
        assert target.inputs == len(sealed) == findings.attacks.inputs
        assert target.failures == len(of(sealed, success="True"))


def test_a_row_is_a_success_where_a_right_class_became_a_wrong_one(rows: list[dict[str, str]]) -> None:
    assert not all(map(right, rows))
    for row in rows:
        if not right(row):
            assert row["success"] == "False"
            continue
        assert (row["success"] == "True") == (row["new_class"] != row["true_class"])
        assert (row["success"] == "True") == math.isfinite(float(row["distance"]))


# the ledger


def test_the_ledgers_rows_add_up_to_the_models_margin(
    subject: Subject, run: RunFolder, findings: Findings, rows: list[dict[str, str]]
) -> None:
    table, output = (run.load("figures")[name].double() for name in ("ledger.rows", "ledger.output"))
    assert table.shape == (len(Ledger.ROWS), QUERIES)
    torch.testing.assert_close(table.sum(0), output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, margins(subject, rows), rtol=1e-4, atol=1e-4)
    means = {row.name: row.mean for row in findings.fidelity.rows}
    assert tuple(means) == Ledger.ROWS
    assert sum(means.values()) == pytest.approx(output.mean().item(), abs=1e-5)
    assert abs(means["decay"]) > 1e-3  # this training has weight decay, and the ledger shows it
    assert findings.fidelity.relative_residual is not None
    assert findings.fidelity.relative_residual <= 0.01


def margins(subject: Subject, rows: list[dict[str, str]]) -> Tensor:
    """Of the predicting queries, in the table's order."""
    ids = list(dict.fromkeys(int(row["query"]) for row in of(rows, part="predict")))
    logits = subject.predict(subject.test.inputs[ids])
    return Pairs.of(logits).margin(logits).double()


# holes


def test_holes_come_from_predicting_queries_alone(rows: list[dict[str, str]], findings: Findings) -> None:
    inside = {part: members_by_rule(of(rows, part=part)) for part in ("predict", "sealed")}
    assert findings.holes
    assert len(findings.holes) <= 15
    for hole in findings.holes:
        assert set(hole.members) == inside["predict"].get(hole.id, set())
        assert hole.support == len(hole.members)
        assert hole.exemplar in hole.members
    expected = [hole.predicted_rate.value * hole.support for hole in findings.holes if hole.predicted_rate.value]
    assert expected == sorted(expected, reverse=True)
    assert len(expected) == len(findings.holes)


def test_holes_are_tested_on_sealed_queries_that_are_right(rows: list[dict[str, str]], findings: Findings) -> None:
    sealed = [row for row in of(rows, part="sealed", kind="probe") if right(row)]
    inside = members_by_rule(sealed)
    for hole in [h for h in findings.holes if h.opened_by == "probes"]:
        own = [
            row for row in sealed if int(row["query"]) in inside.get(hole.id, set()) and row["name"] in hole.families
        ]
        failed = Counter(row["query"] for row in of(own, success="True"))
        assert hole.test is not None
        assert hole.test.members == len({row["query"] for row in own})
        assert sum(n == len(hole.families) for n in failed.values()) <= hole.test.failures <= len(failed)
        assert (hole.status == "finding") == (hole.test.verdict == "pass")
    assert sum(hole.test.members for hole in findings.holes if hole.test) > 0


def test_natural_holes_are_tested_on_errors_of_all_sealed_queries(
    rows: list[dict[str, str]], findings: Findings
) -> None:
    natural = [hole for hole in findings.holes if hole.opened_by == "nothing"]
    assert natural
    for part in ("predict", "sealed"):
        probed = {row["query"]: row for row in of(rows, part=part, kind="probe")}
        inside = members_by_rule(list(probed.values()))
        for hole in natural:
            own = [row for row in probed.values() if int(row["query"]) in inside.get(hole.id, set())]
            wrong = [row for row in own if not right(row)]
            assert {row["clean_class"] for row in own} <= {hole.to_class}
            if part == "predict":
                counts = Counter(row["true_class"] for row in wrong)
                assert counts[hole.from_class] == max(counts.values())
                continue
            assert hole.test is not None
            assert hole.test.members >= len(own)  # those that are probed are the first of the sealed ones
            assert hole.test.failures >= len(wrong)
            assert hole.test.members - hole.test.failures >= len(own) - len(wrong)
    for hole in natural:
        assert (hole.families, hole.severity.value) == ([], None)
        assert hole.from_group.split("/")[0] == hole.from_class
        assert hole.test is not None
        assert hole.test.base_rate == pytest.approx(natural_rate(findings), abs=1e-9)


def natural_rate(findings: Findings) -> float:
    return next(t.prevalence for t in findings.agreement.targets if t.kind == "natural")


def test_predicted_rates_mean_what_is_observed(findings: Findings) -> None:
    """Over the members of all holes together; a curve with one slope for every severity said .3 less than came."""
    tests = [hole.test for hole in findings.holes if hole.test is not None]
    members, failures = sum(t.members for t in tests), sum(t.failures for t in tests)
    expected = sum(t.members * t.predicted_rate for t in tests if t.predicted_rate is not None)
    assert expected / members == pytest.approx(failures / members, abs=0.2)


def members_by_rule(rows: list[dict[str, str]]) -> dict[int, set[int]]:
    """The queries in each hole, as the table notes them."""
    found: dict[int, set[int]] = {}
    for row in rows:
        for hole in map(int, row["holes"].split()):
            found.setdefault(hole, set()).add(int(row["query"]))
    return found


# attacks and flips


def test_the_envelope_is_the_nearest_of_all_attacks(
    run: RunFolder, rows: list[dict[str, str]], findings: Findings
) -> None:
    for norm in ("l2", "linf"):
        nearest: dict[str, float] = {}
        for row in of(rows, kind="attack", norm=norm):
            nearest[row["query"]] = min(float(row["distance"]), nearest.get(row["query"], math.inf))
        smallest = torch.tensor(list(nearest.values()))
        torch.testing.assert_close(run.load("figures")[f"distance.{norm}"].float(), smallest)
        [envelope] = [r for r in findings.attacks.results if r.norm == norm and r.kind == "envelope"]
        assert envelope.success.value == pytest.approx(smallest.isfinite().double().mean().item())
        assert envelope.median_distance.value == pytest.approx(smallest.median().item(), rel=1e-5)


def test_each_attacks_figures_are_those_of_its_rows(rows: list[dict[str, str]], findings: Findings) -> None:
    for result in findings.attacks.results:
        if result.kind != "envelope":
            own = of(rows, kind="attack", name=result.name, norm=result.norm)
            fooled = len(of(own, success="True")) / len(own)
            assert result.success.value == pytest.approx(fooled)
            spent = sum(int(row["evaluations"]) for row in own) / len(own)
            assert result.evaluations == pytest.approx(spent, rel=1e-5)


def test_flips_flip_inside_the_bounds_and_their_examples_move_against_the_prediction(
    subject: Subject, run: RunFolder, findings: Findings
) -> None:
    shown, (low, high), names = run.load("pictures"), subject.bounds, subject.class_names
    assert {flip.unit in ("l2", "linf") for flip in findings.prediction.flips} == {True, False}
    for flip in findings.prediction.flips:
        before, after = shown[flip.picture_before], shown[flip.picture_after]
        assert low <= after.min() <= after.max() <= high
        assert torch.equal(before, subject.test.inputs[flip.query])
        classes = subject.predict(torch.stack([before, after])).argmax(1).tolist()
        assert [names[c] for c in classes] == [flip.before_class, flip.after_class]
        assert flip.before_class == flip.true_class != flip.after_class
        assert flip.margin_before > 0 > flip.margin_after
        assert all(e.before > 0 > e.change for e in flip.leaving)
        assert all(e.after < 0 and e.change < 0 for e in flip.arriving)
        assert not {e.id for e in flip.leaving} & {e.id for e in flip.arriving}


# the documents


def test_every_figure_has_its_arrays(run: RunFolder, findings: Findings) -> None:
    arrays, classes = run.load("figures"), len(CLASSES)
    families = [family.name for family in findings.prediction.families]
    assert arrays["shift.rate"].shape == (len(families), classes, classes)
    assert arrays["shift.queries"].sum() == 2 * QUERIES
    assert all(arrays[f"severity.{name}"].shape == (2 * QUERIES,) for name in families)
    for k, target in enumerate(findings.agreement.targets):
        assert arrays[f"agreement.{k}.scores"].shape == (len(target.scores), target.inputs)
        assert int(arrays[f"agreement.{k}.failed"].sum()) == target.failures
        assert (f"agreement.{k}.severity" in arrays) == (target.kind != "natural")
    view = view_of(findings, arrays)
    assert view.failing.shift.missing == ""
    assert len(view.failing.shift.panels) == len(families)
    assert view.account.closing is not None
    assert view.account.waterfall is not None
    assert len(view.agreement.distances) == 2


def test_the_distances_are_predicted_by_a_search_in_their_own_norm(run: RunFolder, findings: Findings) -> None:
    told, arrays = {}, run.load("figures")
    for k, target in enumerate(findings.agreement.targets):
        if target.kind == "attack":
            assert [s.name for s in target.scores if s.ours] == ["reach", "lack of support", "predicted distance"]
            assert target.scores[0].spearman.value is not None
            assert target.scores[0].spearman.value > 0.9
            told[target.name] = arrays[f"agreement.{k}.scores"]
    assert list(told) == ["L2 distance", "Linf distance"]
    assert (told["Linf distance"][0] > told["L2 distance"][0]).all()  # nearer
    assert torch.equal(told["Linf distance"][1:3], told["L2 distance"][1:3])


def test_every_interval_holds_its_value(run: RunFolder) -> None:
    found = list(estimates(run.load_document("findings")))
    assert len(found) > 100
    for value, low, high in found:
        assert None in (value, low, high) or low <= value <= high


def estimates(value: Any) -> Iterator[tuple[float | None, float | None, float | None]]:
    if isinstance(value, dict) and set(value) == {"value", "low", "high"}:
        yield value["value"], value["low"], value["high"]
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from estimates(inner)


def test_the_findings_obey_the_printed_schema(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    document = run.load_document("findings")
    assert set(schema["required"]) <= set(document) <= set(schema["properties"])
    assert json.loads(Findings.model_validate(document).model_dump_json()) == document
    with pytest.raises(ValueError, match="mood"):
        Findings.model_validate(document | {"mood": "good"})


def test_the_holes_document_repeats_the_findings(run: RunFolder, findings: Findings) -> None:
    assert run.load_document("holes") == json.loads(findings.model_dump_json())["holes"]


def test_suggestions_are_distinct_and_from_the_pool(subject: Subject, findings: Findings) -> None:
    examples = findings.suggestions.examples
    assert subject.pool is not None
    ids = [example.pool_id for example in examples]
    assert len(set(ids)) == len(ids) == len(subject.pool) // 5
    for example in examples:
        assert example.class_name == subject.class_names[int(subject.pool.targets[example.pool_id])]
    check = findings.suggestions.check
    assert check is not None
    assert (check.added, check.seeds) == (len(ids), 5)


# the seal


def test_the_findings_note_what_was_fixed_before_the_labels_were_opened(
    findings: Findings, rows: list[dict[str, str]]
) -> None:
    note = findings.agreement.sealed
    assert note is not None
    assert (note.opened, note.fixed_before) == (
        1,
        ["scores", "baselines", "models of both", "calibrated rates", "holes"],
    )
    assert note.inputs == findings.agreement.inputs
    assert note.observed_before == []
    assert len(note.digest) == 64


def test_nothing_that_is_fixed_depends_on_a_sealed_label(subject: Subject, tmp_path: Path) -> None:
    """With all labels changed but those of the predicting part, what is predicted stays as it is, bit for bit."""
    digests, before = [], None
    for changed in (False, True):
        of_test = subject.test
        if changed:
            assert before is not None
            targets = (of_test.targets + 1) % len(CLASSES)
            targets[before.predict.ids] = before.predict.targets
            of_test = Examples(of_test.inputs, targets)
        other = replace_quietly(subject, test=of_test)
        asked = Asked(20, 0, "cpu", "quick", None, {}, False, BUDGET, False)
        with begin(other, tmp_path / str(changed), asked) as c:
            before, built = c.split, memory(c)
            moved, observed = shift(c, built), probes(c)
            predicted = predictions(c, built, moved, observed, holes(c, moved, observed))
            digests.append(digest_of(predicted))
            opened = unseal(c, predicted)[0].split
            assert (opened.natural.right.double().mean() > 0.5) != changed
            with pytest.raises(SealedError, match="given out once"):
                unseal(c, predicted)
    assert digests[0] == digests[1]


def test_predictions_may_not_change_in_a_folder_once_its_labels_are_open(subject: Subject, tmp_path: Path) -> None:
    asked = Asked(20, 0, "cpu", "quick", None, {}, False, BUDGET, False)
    for again in (False, True):
        with begin(subject, tmp_path / "run", asked) as c:
            built = memory(c)
            moved, observed = shift(c, built), probes(c)
            predicted = predictions(c, built, moved, observed, holes(c, moved, observed))
            unseal(c, predicted)
        if again:
            with begin(subject, tmp_path / "run", asked) as c:
                better = replace(predicted, extrapolated=predicted.extrapolated + 1)
                with pytest.raises(SealedError, match="may not change once the sealed labels are open"):
                    unseal(c, better)
                with pytest.raises(SealedError, match="before predictions are fixed"):
                    _ = c.split.sealed.targets


def test_attacks_asked_for_alone_are_noted_as_having_seen_labels(subject: Subject, tmp_path: Path) -> None:
    attack(subject, tmp_path / "run", queries=20, progress=False)
    with begin(subject, tmp_path / "run", Asked(20, 0, "cpu", "quick", None, {}, False, BUDGET, False)) as c:
        built = memory(c)
        moved, observed = shift(c, built), probes(c)
        note = unseal(c, predictions(c, built, moved, observed, holes(c, moved, observed)))[1]
    assert note.observed_before == ["attacks"]


def test_rates_are_fitted_on_the_predicting_part_and_held_against_the_sealed_one(
    findings: Findings, rows: list[dict[str, str]]
) -> None:
    for target in findings.agreement.targets:
        held = target.calibration
        assert (held is None) == (target.kind == "attack")
        if held is None:
            continue
        assert held.score == target.scores[0].name
        assert sum(b.inputs for b in held.bins) == target.inputs
        assert sum(b.failures for b in held.bins) == target.failures
        assert sum(b.inputs * b.predicted for b in held.bins) == pytest.approx(held.predicted * target.inputs)
        if target.kind == "probe":
            fitted = [row for row in of(rows, kind="probe", part="predict", name=target.name) if right(row)]
            assert (held.fitted_inputs, held.fitted_failures) == (len(fitted), len(of(fitted, success="True")))
        else:
            assert held.fitted_inputs == QUERIES


# commands on the finished run


def test_the_run_verifies_until_a_byte_changes(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run.root)]) == 0
    assert "files are whole, the findings obey their schema" in capsys.readouterr().out
    stored = run.arrays_path("shift")
    content = stored.read_bytes()
    try:
        stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert main(["verify", str(run.root)]) == 4
        assert "shift.safetensors is damaged" in capsys.readouterr().err
    finally:
        stored.write_bytes(content)


def test_explain_speaks_of_a_flip_and_of_a_ledger(
    run: RunFolder, findings: Findings, rows: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    flip = findings.prediction.flips[0]
    assert main(["explain", str(run.root), "--query", str(flip.query)]) == 0
    told = capsys.readouterr().out
    assert f"{flip.before_class} becomes {flip.after_class}" in told
    assert all(example.name in told for example in [*flip.leaving, *flip.arriving])
    query = of(rows, part="predict")[0]["query"]
    assert main(["explain", str(run.root), "--query", query]) == 0
    told = capsys.readouterr().out
    assert "supporters" in told
    assert "rival examples" in told


def test_the_same_call_reads_the_finished_stages_and_another_is_refused(
    subject: Subject, run: RunFolder, findings: Findings
) -> None:
    written = {p: p.stat().st_mtime_ns for p in run.root.glob("[!f]*/*.safetensors")}
    assert brittle.audit(subject, out=run.root, queries=QUERIES, progress=False) == findings
    assert {p: p.stat().st_mtime_ns for p in written} == written
    with pytest.raises(RunFolderError, match="queries is 60 there and 61 here"):
        brittle.audit(subject, out=run.root, queries=QUERIES + 1, progress=False)


def test_an_audit_leaves_the_model_and_everybodys_randomness_as_they_were(subject: Subject, tmp_path: Path) -> None:
    subject = replace_quietly(subject, retrain=None)  # which is the user's, and draws as it likes
    subject.model.zero_grad()
    weights, randomness = copy.deepcopy(subject.model.state_dict()), torch.get_rng_state()
    findings = brittle.audit(subject, out=tmp_path / "run", queries=10, progress=False)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert all(torch.equal(value, weights[name]) for name, value in subject.model.state_dict().items())
    assert not subject.model.training
    assert all(p.grad is None and p.requires_grad for p in subject.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())
    assert "not checked" in findings.suggestions.note

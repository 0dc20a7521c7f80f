"""Findings: everything an audit found, as one JSON document with a schema.

`Findings.model_json_schema()` is what `brittle schema` prints. Every number that was estimated is an
`Estimate` with a 95 % interval. Top-level keys are read by other programs and stay as they are.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["pass", "fail", "inconclusive"]
PathKnown = Literal["recorded", "checkpoints", "weights"]
FailureKind = Literal["natural", "probe", "attack"]

FALSE_DISCOVERY_RATE = 0.05
"""Of the holes that are called findings."""

FEWEST_MEMBERS = 5
"""Held-out members of a hole below which it is neither confirmed nor refuted."""

SPOKEN_OF = 0.005
"""Share of what was learned from which the unexplained row is spoken of."""


class Record(BaseModel):
    """A strict, immutable part of the findings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="null")


class Estimate(Record):
    """An estimated number with its 95 % interval; all three are None where nothing could be estimated."""

    value: float | None
    low: float | None
    high: float | None


NOTHING = Estimate(value=None, low=None, high=None)
"""The estimate of what could not be estimated."""


class SubjectFacts(Record):
    """What was audited."""

    name: str
    spec: str | None = Field(default=None, description="file.py:make or package.module:make")
    class_names: list[str]
    parameters: int
    input_shape: list[int]
    bounds: list[float]
    train: int
    test: int
    pool: int
    optimizer: str | None = None
    steps: int | None = Field(default=None, description="optimizer steps on the recorded path")


class MemoryFidelity(Record):
    """How well the group memory, on which the shift map runs, agrees with a finer account on a sample."""

    relative_residual: float
    shift_cosine: float = Field(description="median cosine of class shifts to the finer account")
    shift_cosine_p5: float
    shift_residual: float = Field(description="mean absolute residual of the shift / mean absolute shift")
    class_cosine: float
    segments: int
    nodes: int = Field(description="quadrature nodes over the whole path: gradient passes per input")
    sample: int = Field(description="number of probes compared")
    shift_distance: float | None = Field(
        default=None, description="median distance of class shifts from the finer account / length of the latter"
    )
    tolerance: float | None = Field(
        default=None, description="error asked for: of the larger of shift_distance and shift_residual"
    )
    met: bool | None = Field(default=None, description="whether the tolerance was met on this sample")
    rounding: float | None = Field(
        default=None, description="where the memory was kept in float16: mean error of masses / mean mass, for that"
    )


class LedgerRow(Record):
    """One row of the ledger: its mean and mean absolute value over the queries, in logit units."""

    name: str
    mean: float
    mean_absolute: float


class Fidelity(Record):
    """How much of the path is known, and how well the account closes."""

    path: PathKnown
    statement: str = Field(description="what may and may not be claimed; the report's first lines")
    verdict: Verdict
    relative_residual: float | None = None
    relative_unexplained: float | None = Field(
        default=None, description="mean absolute unexplained row / mean absolute learned change"
    )
    cancellation: float | None = Field(default=None, description="median over queries of gross / |net|")
    rows: list[LedgerRow] = []
    memory: MemoryFidelity | None = None


class ClassAccuracy(Record):
    class_name: str
    inputs: int
    accuracy: Estimate


class Clean(Record):
    """Accuracy on the test inputs as they are."""

    inputs: int
    accuracy: Estimate
    per_class: list[ClassAccuracy]


class FamilyPrediction(Record):
    """What the shift map says of one probe family."""

    name: str
    unit: str
    reference: float = Field(description="severity at which failures are predicted and observed")
    map_severities: list[float] = Field(description="the small severities the map looked at")
    predicted_failing: float = Field(description="share of queries whose margin is predicted gone by `reference`")
    median_severity: float | None = Field(description="median predicted severity at which the margin is gone")


class Flow(Record):
    """Mass that leaves one class of training examples for another, under one probe family."""

    family: str
    from_class: str
    to_class: str
    queries: int
    leaving: float = Field(description="mean loss of the leaving class's mass per unit of severity, logits")
    arriving: float = Field(description="mean gain of the arriving class's mass per unit of severity, logits")


class ExampleShift(Record):
    """A training example whose contribution changed between a query and its flip."""

    id: int
    name: str
    class_name: str
    before: float = Field(description="contribution at the query, logits towards the predicted class")
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before


class Flip(Record):
    """A prediction that flips, and the training examples that leave and arrive."""

    query: int = Field(description="position in the test data")
    how: str = Field(description="attack and norm, or probe family and severity")
    size: float = Field(description="distance, or severity in the family's unit")
    unit: str
    true_class: str
    before_class: str
    after_class: str
    margin_before: float
    margin_after: float
    leaving: list[ExampleShift]
    arriving: list[ExampleShift]
    picture_before: str = Field(description="key in pictures.safetensors")
    picture_after: str
    account: str = Field(description="'path kernel' or 'tangent kernel': what the contributions are")


class Prediction(Record):
    """The shift map, family by family, and the worst flips explained."""

    queries: int
    groups: list[str]
    families: list[FamilyPrediction]
    flows: list[Flow]
    flips: list[Flip]


class HoleTest(Record):
    """A hole held against observed failures, on inputs that did not make it."""

    members: int
    failures: int
    observed_rate: Estimate = Field(description="Wilson interval")
    base_rate: float = Field(
        description="failure rate of the same family over all test inputs that are right when clean; where nothing "
        "opens the hole, of all sealed inputs as they are"
    )
    lift: float | None
    verdict: Verdict = Field(
        description="pass: the corrected p is at most 0.05 and the observed interval lies above the base rate; "
        "fail: it lies below"
    )
    predicted_rate: float | None = Field(default=None, description="predicted failure rate of these members")
    predicted_within: bool | None = Field(default=None, description="it lies in the interval of the observed rate")
    least_confident: Estimate = Field(
        default=NOTHING, description="failure rate of as many of the least confident inputs, under the same families"
    )
    least_confident_of_class: Estimate = Field(
        default=NOTHING, description="the same with as many of each predicted class as the hole has"
    )
    random: Estimate = Field(
        default=NOTHING,
        description="mean failure rate of 1,000 random regions of the same size, predicted class, confidence and "
        "families, and the range that holds 95 % of them",
    )
    random_of_class: Estimate = Field(default=NOTHING, description="the same without regard to confidence")
    p_value: float | None = Field(
        default=None, description="share of random regions of the same class and confidence that fail as often"
    )
    p_value_of_class: float | None = Field(default=None, description="the same without regard to confidence")
    corrected: float | None = Field(
        default=None,
        description="p_value by Benjamini and Hochberg over the holes of the run; none where the hole could not have "
        "passed, whatever had happened",
    )


class Hole(Record):
    """A predicted failure region with place, direction, size and support: a finding only where it passed its test."""

    id: int
    title: str
    opened_by: Literal["probes", "nothing"] = Field(
        default="probes", description="nothing: its inputs are predicted to fail as they are; all sealed inputs test it"
    )
    families: list[str] = Field(description="probe families that open it, strongest first; none where nothing does")
    from_class: str
    to_class: str
    from_group: str = Field(description="cluster of training examples whose mass leaves")
    to_group: str
    exemplar: int = Field(description="position in the test data of its most typical member")
    members: list[int]
    support: int
    severity: Estimate = Field(
        description="median predicted severity, as a share of the family's reference; 5-95 % spread; "
        "null where no family opens it"
    )
    predicted_rate: Estimate = Field(
        description="predicted failure rate of its members, at the reference severity or as they are"
    )
    test: HoleTest | None = None
    status: Literal["finding", "hypothesis"] = Field(
        default="hypothesis", description="finding: the test passed; hypothesis: it is not shown"
    )


class AttackResult(Record):
    """One attack (or the envelope of all) in one norm, over inputs that are right when clean."""

    name: str
    norm: Literal["l0", "l1", "l2", "linf"]
    kind: Literal["minimal", "fixed", "envelope"]
    epsilon: float | None = None
    inputs: int
    success: Estimate = Field(description="share of inputs fooled, Wilson interval")
    median_distance: Estimate = Field(description="inputs that no attack fooled count as infinitely far")
    smallest_share: float | None = Field(
        default=None, description="share of inputs on which this attack was the smallest"
    )
    evaluations: float = Field(description="mean gradient evaluations an input")


class PerturbationResult(Record):
    """The severity at which inputs that are right when clean first fail under one perturbation that people meet."""

    name: str
    unit: str
    reference: float = Field(description="severity at which probes are predicted and observed")
    most: float = Field(description="the largest severity that was tried")
    inputs: int
    failing: Estimate = Field(description="share of inputs that fail by the largest severity, Wilson interval")
    median_severity: Estimate = Field(description="inputs that never failed count as infinitely far")
    evaluations: float = Field(description="mean forward passes an input")


class HealthCheck(Record):
    """One check of whether the attacks can be believed."""

    name: str
    norm: Literal["l0", "l1", "l2", "linf"]
    verdict: Literal["pass", "warn", "fail"]
    value: float | None = Field(description="the figure that was looked at")
    sentence: str


class Attacks(Record):
    """Observed adversarial distances: every row is in failures.csv."""

    inputs: int
    wrong_when_clean: int
    results: list[AttackResult]
    verdict: Verdict = Field(default="inconclusive", description="inconclusive where a health check failed or none ran")
    health: list[HealthCheck] = []
    perturbations: list[PerturbationResult] = Field(
        default=[], description="failure severities, of images; a row each input and family in failures.csv"
    )


class ScoreResult(Record):
    """How well one score ranks one kind of failure; higher scores mean brittler."""

    name: str
    ours: bool
    auroc: Estimate
    average_precision: Estimate
    spearman: Estimate = Field(
        description="with the distance or failure severity; for natural errors with the error itself"
    )
    kendall: Estimate = Field(default=NOTHING, description="tau-b, with what Spearman's coefficient is taken with")
    fpr95: Estimate = Field(
        default=NOTHING, description="share of false alarms where 95 % of failures are caught; lower is better"
    )
    e_aurc: Estimate = Field(
        default=NOTHING,
        description="failure rate of what is kept, mean over coverage, less that of the ideal order; lower is better",
    )
    augrc: Estimate = Field(
        default=NOTHING,
        description="share of inputs kept and failing, mean over coverage; lower is better; orders as AUROC does",
    )
    spearman_given_margin: Estimate = Field(
        default=NOTHING, description="partial rank correlation, the logit margin's ranks held fixed"
    )
    auroc_confident_half: Estimate = Field(
        default=NOTHING, description="AUROC among the half of the inputs of highest softmax confidence"
    )
    gain: Estimate | None = Field(
        default=None, description="deciding figure minus the best baseline's, paired bootstrap; for our scores"
    )
    p: float | None = Field(
        default=None, description="bootstrap p-value of that gain, two-sided; None where failures are too few to decide"
    )
    p_holm: float | None = Field(default=None, description="the same by Holm's correction over our scores of this kind")


class RateBin(Record):
    """Sealed inputs of about the same predicted failure rate."""

    inputs: int
    predicted: float = Field(description="mean predicted rate")
    failures: int
    observed: Estimate = Field(description="Wilson interval")


class Calibration(Record):
    """Predicted failure rates against observed ones: fitted on the predicting part, held against the sealed one."""

    score: str = Field(description="our named score, of which the rates are a rising curve")
    fitted_inputs: int
    fitted_failures: int
    predicted: float = Field(description="mean predicted rate of the sealed inputs")
    observed: Estimate = Field(description="their observed rate, Wilson interval")
    error: Estimate = Field(
        description="expected calibration error: |observed - predicted| by bin, weighted by inputs; bootstrap interval"
    )
    error_if_right: float = Field(description="95th percentile of that error if the predicted rates were the true ones")
    bins: list[RateBin]
    verdict: Verdict = Field(description="fail: error above error_if_right; inconclusive with too few failures")
    sentence: str


class Increment(Record):
    """What our scores add to all baselines together, in models fitted on the predicting part; by kind of model."""

    fitted_inputs: int
    fitted_failures: int
    baselines: dict[str, Estimate] = Field(description="AUROC of the baselines together, with what costs nothing")
    together: dict[str, Estimate] = Field(description="AUROC of the baselines and ours together")
    gain: dict[str, Estimate] = Field(description="the difference, paired bootstrap")
    verdict: Verdict = Field(description="pass: the gain's interval lies above 0 for every kind of model; fail: below")
    sentence: str


class TargetAgreement(Record):
    """Predicted against observed for one kind of failure; kinds are never pooled."""

    kind: FailureKind
    name: str = Field(description="'natural errors', the probe family, or the attack's norm")
    inputs: int
    failures: int
    prevalence: float
    scores: list[ScoreResult]
    decided_by: Literal["auroc", "spearman"] = Field(
        default="auroc",
        description="the figure that decides: Spearman for distances, where every input may have failed",
    )
    best_ours: str
    best_baseline: str
    gain: Estimate = Field(description="deciding figure of our named score minus the best baseline's, paired bootstrap")
    verdict: Verdict = Field(description="pass: the gain's interval lies above 0; fail: below 0")
    sentence: str
    calibration: Calibration | None = Field(default=None, description="of predicted rates; None for distances")
    increment: Increment | None = Field(default=None, description="over all baselines together; for natural errors")


class SealedPart(Record):
    """What was fixed before the labels of the sealed test inputs were opened, which happens once."""

    inputs: int = Field(description="test inputs whose labels were sealed")
    opened: int = Field(description="how often: 1")
    fixed_before: list[str] = Field(description="what was handed over before the opening")
    digest: str = Field(description="SHA-256 of all of it")
    observed_before: list[str] = Field(
        description="stages that had looked at sealed labels in this run folder before, for attacks asked for alone"
    )


class Agreement(Record):
    """Predicted failure regions and scores against observed failures on inputs the prediction did not use."""

    inputs: int
    verdict: Verdict
    sentence: str
    targets: list[TargetAgreement]
    sealed: SealedPart | None = None
    meanings: dict[str, str] = Field(default={}, description="one sentence a score, by name: what it says of an input")


class RegionSuggestion(Record):
    """A region that lacks data, with the examples of the pool that would fill it."""

    hole: int | None
    title: str
    wanted: str = Field(description="one sentence: what kind of example to collect")
    share_of_failures: float | None


class ExampleSuggestion(Record):
    """An example of the pool to add."""

    pool_id: int
    name: str
    class_name: str
    hole: int | None
    gain: float = Field(description="marginal coverage at the time it was chosen")


class RetrainCheck(Record):
    """Retraining with the suggested examples against random ones of the same number."""

    added: int
    seeds: int
    clean_gain: Estimate = Field(description="points of clean accuracy over random additions, paired over seeds")
    robust_gain: Estimate = Field(description="points of accuracy under probes at the reference severity over random")
    base_clean: float
    random_clean: float
    suggested_clean: float
    verdict: Verdict
    sentence: str


class Suggestions(Record):
    """Which data is missing."""

    regions: list[RegionSuggestion]
    examples: list[ExampleSuggestion]
    check: RetrainCheck | None = None
    note: str = ""


class StageCost(Record):
    stage: str
    seconds: float
    peak_memory_mb: float
    gradient_evaluations: int


class Cost(Record):
    stages: list[StageCost]
    seconds: float
    device: str


class Findings(Record):
    """The result of an audit."""

    schema_version: Literal["1.0"] = "1.0"
    subject: SubjectFacts
    fidelity: Fidelity
    clean: Clean
    prediction: Prediction
    holes: list[Hole]
    attacks: Attacks
    agreement: Agreement
    suggestions: Suggestions
    warnings: list[str]
    cost: Cost

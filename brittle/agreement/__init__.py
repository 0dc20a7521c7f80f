"""Agreement: predicted failures held against observed ones, beside what a user would compute anyway.

metrics      how well scores rank and part failures, with paired, stratified intervals; Holm, Wilson
conditional  what a score says beyond margin and confidence
baselines    what outputs, input gradients and neighbours in the training data say by themselves
models       logistic and boosted models of failure from many scores
increment    what ours add to all baselines together
meanings     a sentence for every score
calibration  predicted failure rates held against observed ones
rates        calibrated failure rates
regions      holes against their observed failures, beside random regions and the least confident inputs
stability    whether holes come back after another training
compare      one kind of failure, all scores, one verdict; and the verdict over all kinds
"""

from brittle.agreement.baselines import baselines, extrapolated_margin
from brittle.agreement.compare import compare, overall
from brittle.agreement.metrics import wilson
from brittle.agreement.rates import calibrate
from brittle.agreement.regions import Claim, hole_tests, peers_of

__all__ = [
    "Claim",
    "baselines",
    "calibrate",
    "compare",
    "extrapolated_margin",
    "hole_tests",
    "overall",
    "peers_of",
    "wilson",
]

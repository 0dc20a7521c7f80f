"""Agreement: predicted failures held against observed ones, beside what a user would compute anyway.

metrics      how well scores rank and part failures, with paired, stratified intervals; Holm, Wilson
baselines    what outputs, input gradients and neighbours in the training data say by themselves
meanings     a sentence for every score
rates        calibrated failure rates; a hole against its observed failures
compare      one kind of failure, all scores, one verdict; and the verdict over all kinds
"""

from brittle.agreement.baselines import baselines, extrapolated_margin
from brittle.agreement.compare import compare, overall
from brittle.agreement.metrics import wilson
from brittle.agreement.rates import calibrate, hole_test

__all__ = ["baselines", "calibrate", "compare", "extrapolated_margin", "hole_test", "overall", "wilson"]

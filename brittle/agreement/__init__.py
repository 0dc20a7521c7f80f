"""Agreement: predicted failures held against observed ones, beside what a user would compute anyway.

metrics      AUROC, average precision and Spearman with paired, stratified intervals; Wilson
baselines    softmax confidence, logit margin, first-order distance, trust score, extrapolated margin
rates        calibrated failure rates; a hole against its observed failures
compare      one kind of failure, all scores, one verdict; and the verdict over all kinds
"""

from brittle.agreement.baselines import baselines, extrapolated_margin
from brittle.agreement.compare import compare, overall
from brittle.agreement.metrics import wilson
from brittle.agreement.rates import calibrate, hole_test

__all__ = ["baselines", "calibrate", "compare", "extrapolated_margin", "hole_test", "overall", "wilson"]

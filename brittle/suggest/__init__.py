"""Which data is missing, and what adding it brings.

regions   what kind of example each hole lacks
cover     which examples of a pool to add
check     retraining with them against random ones
"""

from brittle.suggest.check import retrain_check
from brittle.suggest.cover import choose, suggest
from brittle.suggest.regions import regions

__all__ = ["choose", "regions", "retrain_check", "suggest"]

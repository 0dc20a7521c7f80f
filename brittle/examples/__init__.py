"""Subjects that train themselves and record their path: `digits` (the default) and `fashion_mnist`."""

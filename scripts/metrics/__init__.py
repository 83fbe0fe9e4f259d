"""Metric modules for `evaluate.load(path)`, so that scripts measure without a hub; what is computed is scikit-learn's and SciPy's."""

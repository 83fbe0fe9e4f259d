"""The metric modules, loaded by `evaluate` as scripts load them, against scikit-learn and SciPy."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from scripts import run_glue

METRICS = Path(run_glue.__file__).parent / "metrics"


def load(name):
    return evaluate.load(str(METRICS / f"{name}.py"))


@pytest.mark.parametrize("classes", [2, 5])
def test_classification_metrics_are_those_of_scikit_learn(rng, classes):
    truth, guess = rng.integers(0, classes, 200), rng.integers(0, classes, 200)
    guess[:120] = truth[:120]

    def compute(name, **kwargs):
        metric = load(name)
        for start in range(0, 200, 64):  # in batches, as in a loop
            metric.add_batch(predictions=guess[start : start + 64], references=truth[start : start + 64])
        return metric.compute(**kwargs)

    assert compute("accuracy") == {"accuracy": pytest.approx(metrics.accuracy_score(truth, guess))}
    matthews = metrics.matthews_corrcoef(truth, guess)
    assert compute("matthews_correlation") == {"matthews_correlation": pytest.approx(matthews)}
    average = "binary" if classes == 2 else "macro"
    assert compute("f1", average=average) == {"f1": pytest.approx(metrics.f1_score(truth, guess, average=average))}


def test_correlations_are_those_of_scipy(rng):
    truth = rng.standard_normal(150).astype(np.float32)
    guess = (truth + rng.standard_normal(150)).astype(np.float32)
    result = load("pearson_spearman").compute(predictions=guess, references=truth)

    assert result["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic, rel=1e-5)
    assert result["spearman"] == pytest.approx(stats.spearmanr(truth, guess).statistic, rel=1e-5)
    assert result["combined"] == pytest.approx((result["pearson"] + result["spearman"]) / 2)


def test_perplexity_weighs_batches_by_their_tokens():
    result = load("perplexity").compute(losses=[2.0, 4.0], tokens=[300, 100])

    assert result["loss"] == pytest.approx(2.5)
    assert result["perplexity"] == pytest.approx(math.exp(2.5))
    assert load("perplexity").compute(losses=[1000.0], tokens=[1])["perplexity"] == math.inf


def test_every_task_of_glue_has_metrics_that_there_are():
    assert run_glue.METRICS.keys() == run_glue.SENTENCES.keys()
    assert all((METRICS / f"{name}.py").is_file() for names in run_glue.METRICS.values() for name in names)

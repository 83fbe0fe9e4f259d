"""Norm streams with everything in them that a controller meets."""

import numpy as np


def eventful(rng, steps=400):
    """Noise, decay, spikes (single and double), a lasting rise, a lasting fall, NaN, inf, zeros; float32, shape [steps]."""
    norms = 0.3 * np.exp(0.15 * rng.standard_normal(steps)) * np.exp(-np.arange(steps) / steps)
    norms[80] *= 100
    norms[83] *= 100
    norms[120:] *= 3
    norms[220:] *= 0.2
    norms[30], norms[31], norms[150] = np.nan, np.inf, np.nan
    norms[60], norms[200] = 0.0, 0.0
    norms[300] = 1e30
    return norms.astype(np.float32)


def reaches(rng, steps=400):
    """A distance estimate that is unknown at first, grows, falls, is negative, and grows beyond any limit; float32, shape [steps]."""
    reach = 3 * np.exp(0.3 * rng.standard_normal(steps)) * np.minimum(1, np.arange(steps) / 60)
    reach[:5] = np.nan
    reach[120:180] *= -0.2
    reach[250:260] = np.nan
    reach[300:330] *= 100
    reach[370:375] = -np.inf
    return reach.astype(np.float32)


def losses(rng, steps=400):
    """A loss that falls, plateaus and is sometimes unknown; float32, shape [steps]."""
    loss = 2.0 + np.exp(-np.arange(steps) / 100) + 0.05 * rng.standard_normal(steps)
    loss[100:110] = np.nan
    loss[150] = np.inf
    return loss.astype(np.float32)

"""The spectral range by exact decompositions, of one step or of an average, and the sign agreement on copies of the weights, in float64."""

import numpy as np


def soft_clipped(matrix, width):
    """Each singular value s to s / sqrt(1 + (s / t)^2), t = width x their root mean square; 0: all equal. The norm is kept."""
    u, s, vh = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    t = width * np.sqrt(np.mean(s**2))
    new = (s > 0).astype(np.float64) if width == 0 else s / np.sqrt(1 + (s / t) ** 2)
    return (u * (new * np.linalg.norm(s) / np.linalg.norm(new))) @ vh


def altered(before, after):
    """Half the squared distance over the squared norm, over several matrices."""
    moved = sum(np.sum((np.float64(a) - np.float64(b)) ** 2) for a, b in zip(before, after, strict=True))
    return moved / (2 * sum(np.sum(np.float64(a) ** 2) for a in before))


class Averaged:
    """Singular values of the average of squares on the small side, by an exact decomposition; `step` gives the gradient after it."""

    def __init__(self, width, memory):
        self.width, self.memory, self.steps, self.average = width, memory, 0, 0.0

    def step(self, matrix):
        g = np.asarray(matrix, dtype=np.float64)
        wide = g.shape[0] <= g.shape[1]
        square = (g @ g.T if wide else g.T @ g) / np.sum(g**2)
        self.steps += 1
        weight = max(1 / self.steps, 1 - self.memory)
        self.average = (1 - weight) * self.average + weight * square
        values, vectors = np.linalg.eigh(self.average / np.trace(self.average))
        root = (vectors / np.sqrt(values + self.width**2 / len(values))) @ vectors.T
        found = root @ g if wide else g @ root
        return found * np.linalg.norm(g) / np.linalg.norm(found)


class Adam:
    """Adam or AdamW of one tensor by its definition, float64; `step` gives the weights after it, with or without the agreement."""

    def __init__(self, weight, *, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.0, decoupled=True, amsgrad=False):
        self.w = np.asarray(weight, dtype=np.float64)
        self.lr, (self.b1, self.b2), self.eps = lr, betas, eps
        self.decay, self.decoupled, self.amsgrad = decay, decoupled, amsgrad
        self.m, self.v, self.most = (np.zeros_like(self.w) for _ in range(3))
        self.t = 0

    def step(self, g, *, agreement, least=0.1):
        g = np.asarray(g, dtype=np.float64)
        read = g if self.decoupled else g + self.decay * self.w
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * read
        self.v = self.b2 * self.v + (1 - self.b2) * read**2
        self.most = np.maximum(self.most, self.v) if self.amsgrad else self.v
        d = -self.lr * self.m / (1 - self.b1**self.t) / (np.sqrt(self.most / (1 - self.b2**self.t)) + self.eps)
        start = self.w * (1 - self.lr * self.decay) if self.decoupled else self.w
        self.w = start + (agreeing(d, g, least) if agreement else d)
        self.share = np.mean(d * g < 0)
        return self.w


def agreeing(d, g, least=0.1):
    """A step without what goes against the gradient, the rest made larger by as much."""
    mask = d * g < 0
    return d * mask / max(np.mean(mask), least)


class Chance:
    """Whether what agrees is made larger: not while less than half of the matrices has agreed of late."""

    def __init__(self):
        self.running = 1.0

    @property
    def least(self):
        return 1.0 if self.running < 0.5 else 0.1

    def learn(self, shares, sizes):
        """Shares of matrices that agree, and their sizes; what hardly agrees at all says nothing."""
        counted = [(share * size, size) for share, size in zip(shares, sizes, strict=True) if share >= 0.1]
        if counted:
            agree, there = np.sum(counted, axis=0)
            self.running += (agree / there - self.running) / 10

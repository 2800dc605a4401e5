"""Temperatures from stored logits, as the field fits them: what `temperature.py` compares with."""

from __future__ import annotations

import time

import numpy as np
import torch


def lbfgs(z: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """(T, seconds): cross-entropy of all stored logits by LBFGS with a line search.

    Guo et al. 2017's fit, but for the line search: :func:`lbfgs_fixed_rate`.
    """
    return _lbfgs(z, y, line_search_fn="strong_wolfe")


def lbfgs_fixed_rate(z: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """(T, seconds): the same at the published settings, which may stop short of the optimum."""
    return _lbfgs(z, y, lr=0.01)


def _lbfgs(z: torch.Tensor, y: torch.Tensor, **options: object) -> tuple[float, float]:
    began = time.process_time()
    temperature = torch.full((1,), 1.5, requires_grad=True)
    optimiser = torch.optim.LBFGS([temperature], max_iter=50, **options)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(z / temperature, y)
        loss.backward()
        return loss

    optimiser.step(closure)
    return float(temperature.item()), time.process_time() - began


def netcal(z: torch.Tensor, y: torch.Tensor) -> tuple[float, float] | None:
    """(T, seconds) of netcal's TemperatureScaling; None without netcal (the extra `peers`)."""
    try:
        from netcal.scaling import TemperatureScaling
    except ImportError:
        return None
    began = time.process_time()
    scaling = TemperatureScaling()
    # in float32 its finite differences vanish and it stays at T = 1
    scaling.fit(z.double().softmax(dim=1).numpy(), y.numpy())
    return float(1.0 / np.asarray(scaling.temperature).ravel()[0]), time.process_time() - began


def exact(z: torch.Tensor, y: torch.Tensor) -> float:
    """The optimum of the mean NLL of the stored logits in float64, row block by row block."""
    from scipy.optimize import minimize_scalar

    def nll(x: float) -> float:
        total = 0.0
        for start in range(0, z.shape[0], 8):
            part = z[start : start + 8].double() / float(np.exp(x))
            target = part.gather(1, y[start : start + 8, None])[:, 0]
            total += float((part.logsumexp(dim=1) - target).sum())
        return total / z.shape[0]

    result = minimize_scalar(
        nll, bounds=tuple(np.log([0.7, 1.7])), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(result.x))

# RIGHT: float32 states are analysed, or converted, or refused by name
"""An ensemble in torch's default precision: torch's own errors, which name nothing."""
import torch
from pnpda_nb.core import stream
from pnpda_nb.classical import ETKF, LETKF, EnKF, LocalEnKF, ParticleFilter
from pnpda_nb.observing import DiagonalCovariance, ObservingNetwork, Select

network = ObservingNetwork(Select(range(6), 6), DiagonalCovariance([1.0] * 6))
for method in (EnKF(), ETKF(), LETKF(), LocalEnKF(), ParticleFilter()):
    try:
        print(method.analyse(torch.randn(10, 6), network.report(torch.randn(6)), forecast=None, generator=stream(0, "x")).dtype)
    except Exception as error:
        print(type(method).__name__, type(error).__name__, error)

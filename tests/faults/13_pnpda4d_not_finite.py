# RIGHT: finite, or an error that says what went wrong
# PnPDA4D: a background of zeros (finite) and a nonlinear operator -> silent NaN?
import torch, warnings
from pnpda_nb.core import RunStreams; from pnpda_nb.dynamics import Lorenz63; from pnpda_nb.dynamics import Forecast
from pnpda_nb.observing import Covariance, DiagonalCovariance, Linear, Nonlinear, Observations, ObservingNetwork, Select; from pnpda_nb.pnp import PnPDA4D; from pnpda_nb.flow_matching import GaussianPrior
f=torch.float64
prior=GaussianPrior(torch.eye(3,dtype=f),torch.zeros(3,dtype=f),Covariance(torch.eye(3,dtype=f)))
o=Observations(torch.ones(2,2,dtype=f),Nonlinear(lambda x:x[...,[0,2]]**2/5,2,sites=(0,2)),DiagonalCovariance(torch.ones(2,dtype=f)))
for z in (0.0,1e-308,1e-3):
    a=PnPDA4D(prior,iterations=3,window=2).analyse(torch.full((2,5,3),z,dtype=f),[o,o],forecast=Forecast(Lorenz63(),2),generator=RunStreams(1,"t",runs=2))
    print(z, "finite" if torch.isfinite(a).all() else "NaN", a.flatten()[:3].tolist())

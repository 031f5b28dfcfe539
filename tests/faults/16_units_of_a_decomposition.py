# RIGHT: the correlation is 0.91 at both scales
import torch
from pnpda_nb.operations.errors import Fixed
from pnpda_nb.pnp import residual_covariance
from pnpda_nb.observing import DiagonalCovariance, ObservingNetwork, Select
g=torch.Generator().manual_seed(0); n=500; z=torch.randn(n,2,generator=g,dtype=torch.float64)
p=(z[:,:1]+0.3*torch.randn(n,20,generator=g,dtype=torch.float64)); q=(z[:,1:]+0.3*torch.randn(n,20,generator=g,dtype=torch.float64))
for scale in (1.0,1e-3):
    a=torch.cat([p,scale*q],1); b=torch.zeros_like(a)
    e=residual_covariance(Fixed(40),b,a,(0.0,),g,rank=2).errors[0]
    c=e.factor@e.factor.T + torch.diag(e.diagonal) if e.factor.shape[0]==40 else e.factor.T@e.factor+torch.diag(e.diagonal)
    print('scale',scale,'correlation of two q in B: %.2f'%float(c[25,30]/(c[25,25]*c[30,30])**.5),'true %.2f'%float(torch.corrcoef(a.T)[25,30]))

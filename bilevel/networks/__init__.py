"""Problems over the parameters of an ``nn.Module``: BatchNorm, dropout, weight decay, Gauss-Newton."""

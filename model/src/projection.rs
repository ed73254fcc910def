//! A linear layer's weight, by itself or with a low-rank adapter beside it (Hu et al., arXiv:2106.09685).

use burn::tensor::Tensor;

use crate::config::Precision;
use crate::dropout::{Dropout, Site};
use crate::kernels;

/// W `[in, out]`, and what is trained beside it.
#[derive(Clone, Debug)]
pub(crate) struct Projection {
    pub(crate) weight: Tensor<2>,
    pub(crate) adapter: Option<Adapter>,
    /// Of all products.
    pub(crate) precision: Precision,
}

/// A `[in, r]` and B `[r, out]`, whose product, times `scale`, is added to W.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    pub(crate) a: Tensor<2>,
    pub(crate) b: Tensor<2>,
    /// α / r.
    pub(crate) scale: f64,
}

impl Adapter {
    pub(crate) fn untracked(self) -> Self {
        Self { a: self.a.inner(), b: self.b.inner(), scale: self.scale }
    }
}

impl Projection {
    /// `x W + b + onto`, to which with an adapter `(x A · scale) B` is added, over the last axis: of x `[B, T, in]`, and where
    /// they are, b `[out]` and `onto` `[B, T, out]`.
    pub(crate) fn forward(&self, x: Tensor<3>, bias: Option<&Tensor<1>>, onto: Option<Tensor<3>>) -> Tensor<3> {
        let (weight, bias, precision) = (self.weight.clone(), bias.cloned(), self.precision);
        let Some(Adapter { a, b, scale }) = &self.adapter else {
            return kernels::linear(x, weight, bias, onto, precision);
        };
        let low = kernels::linear(x.clone(), a.clone(), None, None, precision) * *scale; // [B, T, r]
        kernels::linear(low, b.clone(), None, Some(kernels::linear(x, weight, bias, onto, precision)), precision)
    }

    /// A layer's last step, `onto + dropout(y W + b)`: of y `[B, T, F]`, W `[F, C]`, b `[C]` and `onto` `[B, T, C]`.
    pub(crate) fn project(
        &self,
        y: Tensor<3>,
        bias: Option<&Tensor<1>>,
        onto: Tensor<3>,
        dropout: Dropout,
        site: Site,
    ) -> Tensor<3> {
        if !dropout.is_active() {
            return self.forward(y, bias, Some(onto));
        }
        kernels::dropout(self.forward(y, bias, None), Some(onto), dropout, site)
    }
}

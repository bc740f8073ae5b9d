//! Implementations of the product of many rows with plain weights, behind one trait, so that a shape can be given to the
//! fastest: [`Own`] is the default, [`Wgmma`] is experimental, and [`super::blas::Blas`] is NVIDIA's library.

use crate::DType;
use crate::cuda::device::{Arg, CudaError, Device};
use crate::cuda::plan::gemm::{self, Shape};
use crate::cuda::plan::wgmma;
use crate::cuda::{Element, TensorMap};
use std::fmt;
use std::sync::Arc;

/// A product of plain matrices: addresses and what the kernels are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plain {
    /// Type of x and w: F32, F16 or BF16.
    pub dtype: DType,
    /// Rows of x, rows of w, columns.
    pub shape: Shape,
    /// `[m, k]`.
    pub x: u64,
    /// `[n, k]`.
    pub w: u64,
    /// The second matrix of a gated product.
    pub up: Option<u64>,
    /// f32 `[n]`, or 0.
    pub bias: u64,
    /// `[m, n]`.
    pub y: u64,
    /// Kind of finish, as in `finish.cuh`.
    pub finish: u32,
    /// Activation, as there.
    pub activation: u32,
}

/// Kinds of finish, numbered as in `finish.cuh`.
pub const STORE_F32: u32 = 0;
/// In the compute type.
pub const STORE_NARROW: u32 = 1;
/// Added to f32.
pub const ADD_F32: u32 = 2;

/// One of an implementation's kernels with its settings, as the implementation writes it down.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Variant(pub [u64; 8]);

/// One implementation.
pub trait Gemm: Send + Sync + fmt::Debug {
    /// For logs, without spaces.
    fn name(&self) -> &'static str;

    /// Whether it can.
    fn takes(&self, product: &Plain) -> bool;

    /// Ways in which it could multiply by a product's matrix, likeliest first. Most have one.
    fn variants(&self, product: &Plain) -> Result<Vec<Variant>, CudaError> {
        let _ = product;
        Ok(vec![Variant::default()])
    }

    /// Settles which of them multiplies by matrices like this product's from now on, whatever the rows.
    fn settle(&self, product: &Plain, variant: Variant) {
        let _ = (product, variant);
    }

    /// Computes it, in the order of the device's stream.
    ///
    /// # Safety
    ///
    /// The implementation takes the product; its operands are on the device and as large as its shape says; y overlaps none.
    unsafe fn multiply(&self, product: &Plain) -> Result<(), CudaError>;
}

/// `gemm_mma.cu` and `gemm_simt.cu`: takes everything.
#[derive(Debug)]
pub struct Own(pub Arc<dyn Device>);

impl Gemm for Own {
    fn name(&self) -> &'static str {
        "own"
    }

    fn takes(&self, _product: &Plain) -> bool {
        true
    }

    unsafe fn multiply(&self, p: &Plain) -> Result<(), CudaError> {
        let plan = gemm::plan(self.0.properties(), p.dtype, p.shape, p.up.is_some());
        tracing::trace!(%plan);
        let args = arguments(p, Arg::Ptr(p.x), Arg::Ptr(p.w), p.up.map(Arg::Ptr));
        // SAFETY: the operands are as large as the shape says, the plan covers it, and these are the kernels' parameters.
        unsafe { self.0.launch(plan.kernel, &plan.launch, &args) }
    }
}

/// `gemm_wgmma.cu`. Whether it takes a product does not depend on the number of rows, so neither do the results.
#[derive(Debug)]
pub struct Wgmma(pub Arc<dyn Device>);

impl Gemm for Wgmma {
    fn name(&self) -> &'static str {
        "wgmma"
    }

    fn takes(&self, p: &Plain) -> bool {
        wgmma::plan(self.0.properties(), p.dtype, p.shape, p.up.is_some()).is_ok()
    }

    unsafe fn multiply(&self, p: &Plain) -> Result<(), CudaError> {
        let Shape { m, n, k } = p.shape;
        let plan = wgmma::plan(self.0.properties(), p.dtype, p.shape, p.up.is_some())
            .map_err(|reason| CudaError::Unavailable(format!("gemm_wgmma: {reason}")))?;
        tracing::trace!(%plan);
        let map = |address, rows| -> Result<Arg, CudaError> {
            let element = if p.dtype == DType::BF16 { Element::Bf16 } else { Element::F16 };
            let map: TensorMap = wgmma::tensor_map(element, address, rows, k);
            Ok(Arg::Bytes128(self.0.tensor_map(&map)?))
        };
        let up = p.up.map(|up| map(up, n)).transpose()?;
        let args = arguments(p, map(p.x, m)?, map(p.w, n)?, up);
        // SAFETY: as above; the maps are of whole matrices.
        unsafe { self.0.launch(plan.kernel, &plan.launch, &args) }
    }
}

/// What all of these kernels take.
fn arguments(p: &Plain, x: Arg, w: Arg, up: Option<Arg>) -> Vec<Arg> {
    let mut args = vec![x, w, up.unwrap_or(Arg::Ptr(p.bias)), Arg::Ptr(p.y)];
    args.extend([p.shape.m, p.shape.n, p.shape.k].map(|size| Arg::U32(size as u32)));
    args.push(Arg::U32(p.finish));
    args.extend(p.up.map(|_| Arg::U32(p.activation)));
    args
}

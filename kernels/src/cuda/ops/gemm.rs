//! Implementations of the product of many rows with plain or fp8 weights, behind one trait, so that a shape can be given to the
//! fastest: [`Own`] is the default, [`Wgmma`] is experimental, and those of [`super::blas`] are NVIDIA's library.

use crate::DType;
use crate::cuda::device::{Arg, CudaError, Device};
use crate::cuda::plan::gemm::{self, Shape};
use crate::cuda::plan::wgmma;
use crate::cuda::{Element, TensorMap};
use std::fmt;
use std::sync::Arc;

/// A product of two matrices: addresses and what the kernels are told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Product {
    /// Type of x and w, and of narrow results: F32, F16 or BF16; BF16 if x and w are fp8.
    pub dtype: DType,
    /// Rows of x, rows of w, columns.
    pub shape: Shape,
    /// `[m, k]`.
    pub x: u64,
    /// `[n, k]`.
    pub w: u64,
    /// The second matrix of a gated product.
    pub up: Option<u64>,
    /// If x, w and the second matrix are fp8 (e4m3): their factors.
    pub fp8: Option<Factors>,
    /// f32 `[n]`, or 0.
    pub bias: u64,
    /// `[m, n]`.
    pub y: u64,
    /// Kind of finish, as in `finish.cuh`.
    pub finish: u32,
    /// Activation, as there.
    pub activation: u32,
}

/// Where the f32 factors of fp8 operands are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Factors {
    /// `[m]`: a row of x times its factor is what it stands for.
    pub x: u64,
    /// `[n]`, or one for each block of 128 x 128 elements, row-major.
    pub w: u64,
    /// Those of the second matrix, if there is one.
    pub up: u64,
    /// Whether the matrices have a factor per block.
    pub by_block: bool,
}

/// What the operands of a product are.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operands {
    /// F32, F16 or BF16.
    Plain(DType),
    /// fp8 with a factor for each row.
    Fp8,
    /// fp8 with a factor for each row of x and each block of w.
    Fp8Blocks,
}

impl Operands {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Plain(DType::F32), Self::Plain(DType::F16), Self::Plain(DType::BF16), Self::Fp8, Self::Fp8Blocks];

    /// Without spaces.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.name(),
            Self::Fp8 => "FP8",
            Self::Fp8Blocks => "FP8_BLOCKS",
        }
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.block_bytes(),
            Self::Fp8 | Self::Fp8Blocks => 1,
        }
    }
}

impl Product {
    /// What x and w are.
    pub fn operands(&self) -> Operands {
        match self.fp8 {
            None => Operands::Plain(self.dtype),
            Some(factors) if factors.by_block => Operands::Fp8Blocks,
            Some(_) => Operands::Fp8,
        }
    }

    /// The type of y.
    pub fn result(&self) -> DType {
        if self.finish == STORE_NARROW { self.dtype } else { DType::F32 }
    }

    /// Bytes of a row of x, and of a row of y.
    pub fn row_bytes(&self) -> (usize, usize) {
        (self.shape.k * self.operands().bytes(), self.shape.n * self.result().block_bytes())
    }

    /// The same of `rows` rows, from row `first` on.
    #[must_use]
    pub fn of_rows(&self, first: usize, rows: usize) -> Self {
        let (x, y) = self.row_bytes();
        Self {
            shape: Shape { m: rows, ..self.shape },
            x: self.x + (first * x) as u64,
            fp8: self.fp8.map(|factors| Factors { x: factors.x + 4 * first as u64, ..factors }),
            y: self.y + (first * y) as u64,
            ..*self
        }
    }
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
    fn takes(&self, product: &Product) -> bool;

    /// Ways in which it could multiply by a product's matrix, likeliest first. Most have one.
    fn variants(&self, product: &Product) -> Result<Vec<Variant>, CudaError> {
        let _ = product;
        Ok(vec![Variant::default()])
    }

    /// Settles which of them multiplies by matrices like this product's from now on, whatever the rows.
    fn settle(&self, product: &Product, variant: Variant) {
        let _ = (product, variant);
    }

    /// Computes it, in the order of the device's stream.
    ///
    /// # Safety
    ///
    /// The implementation takes the product; its operands are on the device and as large as its shape says; y overlaps none.
    unsafe fn multiply(&self, product: &Product) -> Result<(), CudaError>;
}

/// `gemm_mma.cu`, `gemm_simt.cu` and `gemm_fp8.cu`: takes everything that the device has instructions for.
#[derive(Debug)]
pub struct Own(pub Arc<dyn Device>);

impl Gemm for Own {
    fn name(&self) -> &'static str {
        "own"
    }

    fn takes(&self, _product: &Product) -> bool {
        true
    }

    unsafe fn multiply(&self, p: &Product) -> Result<(), CudaError> {
        let (device, gated) = (self.0.properties(), p.up.is_some());
        let plan = match p.fp8 {
            None => gemm::plan(device, p.dtype, p.shape, gated),
            Some(factors) => gemm::plan_fp8(device, p.shape, gated, factors.by_block).map_err(|rejected| {
                let reasons: Vec<String> = rejected.iter().map(|(name, reason)| format!("{name}: {reason}")).collect();
                CudaError::Unavailable(reasons.join("; "))
            })?,
        };
        tracing::trace!(%plan);
        let args = arguments(p, Arg::Ptr(p.x), Arg::Ptr(p.w), p.up.map(Arg::Ptr));
        // SAFETY: the operands are as large as the shape says, the plan covers it, and these are the kernels' parameters.
        unsafe { self.0.launch(plan.kernel, &plan.launch, &args) }
    }
}

/// `gemm_wgmma.cu`. Whether it takes a product does not depend on the number of rows, so neither do the results.
#[derive(Debug)]
pub struct Wgmma(pub Arc<dyn Device>);

impl Wgmma {
    fn plan(&self, p: &Product) -> Result<gemm::Plan, gemm::Reason> {
        let (device, gated) = (self.0.properties(), p.up.is_some());
        match p.operands() {
            Operands::Plain(dtype) => wgmma::plan(device, dtype, p.shape, gated),
            Operands::Fp8 => wgmma::plan_fp8(device, p.shape, gated),
            Operands::Fp8Blocks => Err(gemm::Reason::Factors),
        }
    }
}

impl Gemm for Wgmma {
    fn name(&self) -> &'static str {
        "wgmma"
    }

    fn takes(&self, p: &Product) -> bool {
        self.plan(p).is_ok()
    }

    unsafe fn multiply(&self, p: &Product) -> Result<(), CudaError> {
        let Shape { m, n, k } = p.shape;
        let plan = self.plan(p).map_err(|reason| CudaError::Unavailable(format!("gemm_wgmma: {reason}")))?;
        tracing::trace!(%plan);
        let element = match p.operands() {
            Operands::Plain(DType::BF16) => Element::Bf16,
            Operands::Plain(_) => Element::F16,
            Operands::Fp8 | Operands::Fp8Blocks => Element::Byte,
        };
        let map = |address, rows| -> Result<Arg, CudaError> {
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
fn arguments(p: &Product, x: Arg, w: Arg, up: Option<Arg>) -> Vec<Arg> {
    let gated = up.is_some();
    let mut args = vec![x, w];
    args.extend(up);
    if let Some(factors) = p.fp8 {
        args.extend([factors.x, factors.w].map(Arg::Ptr));
        // A gated product has the other matrix's factors in place of a bias.
        args.extend(gated.then_some(Arg::Ptr(factors.up)));
    }
    args.extend((!gated).then_some(Arg::Ptr(p.bias)));
    args.push(Arg::Ptr(p.y));
    args.extend([p.shape.m, p.shape.n, p.shape.k].map(|size| Arg::U32(size as u32)));
    args.push(Arg::U32(p.finish));
    args.extend(gated.then_some(Arg::U32(p.activation)));
    args
}

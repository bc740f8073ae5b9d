//! cuBLASLt as an implementation of [`Gemm`]: plain 16-bit weights, without bias or gate. No device has run this.
//!
//! Left to itself it chooses among its kernels by the number of rows too, and they sum in different orders. Here a matrix gets one
//! kernel, chosen at [`REFERENCE_ROWS`] rows and kept for every other number. NVIDIA does not promise that one kernel gives a
//! row the same bits in any company; so it is used only where [`super::matmul::Products::measure`] has seen that it does.

use super::gemm::{ADD_F32, Gemm, Plain, STORE_NARROW, Variant};
use crate::DType;
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::lock;
use crate::cuda::plan::gemm::Shape;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::catch_unwind;
use std::sync::{Arc, Mutex};

/// What NVIDIA recommends on Hopper; older devices need less.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// Rows for which a kernel is asked for: a usual chunk of prompts.
const REFERENCE_ROWS: usize = 2048;
/// Kernels that the library is asked to suggest.
const SUGGESTIONS: usize = 8;

/// The library on one device.
#[derive(Debug)]
pub struct Blas {
    device: Arc<dyn Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    /// The kernel of each matrix.
    kernels: Mutex<HashMap<Key, Variant>>,
}

/// Types of the operands and of the result, n and k: not the rows.
type Key = (DType, DType, usize, usize);

// SAFETY: cublasLt handles may be used from any thread, also at once ("Thread safety" in its documentation).
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn call<T>(call: &'static str, result: Result<T, CublasError>) -> Result<T, CudaError> {
    result.map_err(|error| CudaError::Call { call, reason: error.to_string() })
}

impl Blas {
    /// Opens the library.
    ///
    /// # Errors
    ///
    /// [`CudaError::Unavailable`] if it is not on this machine or the device is not CUDA's.
    pub fn open(device: &Arc<dyn Device>) -> Result<Self, CudaError> {
        if device.raw_stream().is_none() {
            let name = &device.properties().name;
            return Err(CudaError::Unavailable(format!("cuBLASLt does not run on {name}")));
        }
        // SAFETY: loading NVIDIA's library runs its initialisers, which are those of a plain shared library.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Unavailable("cuBLASLt (libcublasLt) is not on this machine".into()));
        }
        let workspace = Buffer::new(device, WORKSPACE_BYTES)?;
        // A library that lacks a function would make cudarc panic: it is found out here, once.
        let handle = catch_unwind(result::create_handle)
            .map_err(|_| CudaError::Unavailable("the cuBLASLt on this machine is incomplete".into()))?;
        let handle = call("cublasLtCreate", handle)?;
        Ok(Self { device: device.clone(), handle, workspace, kernels: Mutex::default() })
    }

    /// The library's version, such as 120605.
    pub fn version(&self) -> usize {
        // SAFETY: takes nothing and returns a number.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// # Safety
    ///
    /// As [`Gemm::multiply`].
    unsafe fn multiply_by(&self, p: &Plain, kernel: Variant) -> Result<(), CudaError> {
        let problem = Problem::new(p.dtype, result_type(p), p.shape)?;
        let beta = if p.finish == ADD_F32 { 1.0 } else { 0.0 };
        // SAFETY: passed on.
        unsafe { self.compute(&problem, (p.x, p.w, p.y), beta, kernel) }
    }

    /// The kernel that the library thinks best for an fp8 product of this shape; see [`Blas::multiply_fp8`].
    ///
    /// # Errors
    ///
    /// If the device or the library has no fp8.
    pub fn fp8_variant(&self, shape: Shape) -> Result<Variant, CudaError> {
        let problem = Problem::fp8(shape)?;
        let preference = Preference::new()?;
        // SAFETY: all descriptors are alive.
        let found = unsafe {
            let Problem { a, b, d, operation } = &problem;
            result::get_matmul_algo_heuristic(self.handle, operation.0, a.0, b.0, d.0, d.0, preference.0)
        };
        Ok(Variant(call("cublasLtMatmulAlgoGetHeuristic", found)?.algo.data))
    }

    /// `y = x · wᵀ` of e4m3 operands in bf16, without the factors of their rows: what our own fp8 products are timed against.
    ///
    /// # Safety
    ///
    /// x `[m, k]`, w `[n, k]` and y `[m, n]` are on the device, and y overlaps neither.
    pub unsafe fn multiply_fp8(
        &self,
        shape: Shape,
        operands: (u64, u64, u64),
        variant: Variant,
    ) -> Result<(), CudaError> {
        // SAFETY: passed on.
        unsafe { self.compute(&Problem::fp8(shape)?, operands, 0.0, variant) }
    }

    /// # Safety
    ///
    /// x, w and y are on the device and as large as the problem says; y overlaps neither.
    unsafe fn compute(
        &self,
        problem: &Problem,
        (x, w, y): (u64, u64, u64),
        beta: f32,
        kernel: Variant,
    ) -> Result<(), CudaError> {
        let stream = self.device.raw_stream().ok_or_else(|| CudaError::Unavailable("no CUDA stream".into()))?;
        let Problem { a, b, d, operation } = problem;
        let (alpha, kernel) = (1.0f32, sys::cublasLtMatmulAlgo_t { data: kernel.0 });
        // SAFETY: the operands are the caller's promise and the layouts are of their shapes; the workspace belongs to this value
        // and the stream's order keeps products that use it apart. The library checks the kernel.
        let done = unsafe {
            result::matmul(
                self.handle,
                operation.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                w as *const c_void,
                a.0,
                x as *const c_void,
                b.0,
                y as *const c_void,
                d.0,
                y as *mut c_void,
                d.0,
                &raw const kernel,
                self.workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                stream as sys::cudaStream_t,
            )
        };
        call("cublasLtMatmul", done)
    }
}

/// What a product's matrix is to the library.
fn key(p: &Plain) -> Key {
    (p.dtype, result_type(p), p.shape.n, p.shape.k)
}

fn result_type(p: &Plain) -> DType {
    if p.finish == STORE_NARROW { p.dtype } else { DType::F32 }
}

/// A product as the library is told of it. Row-major y[m, n] is column-major y[n, m]: yᵀ = w · xᵀ, where w[n, k] is the transpose of
/// a column-major [k, n].
struct Problem {
    a: Layout,
    b: Layout,
    d: Layout,
    operation: Operation,
}

impl Problem {
    fn new(dtype: DType, to: DType, Shape { m, n, k }: Shape) -> Result<Self, CudaError> {
        Ok(Self {
            a: Layout::new(data_type(dtype), k, n)?,
            b: Layout::new(data_type(dtype), k, m)?,
            d: Layout::new(data_type(to), n, m)?,
            operation: Operation::new()?,
        })
    }

    /// Of e4m3 operands, with a result in bf16.
    fn fp8(Shape { m, n, k }: Shape) -> Result<Self, CudaError> {
        let (e4m3, bf16) = (sys::cudaDataType_t::CUDA_R_8F_E4M3, sys::cudaDataType_t::CUDA_R_16BF);
        Ok(Self {
            a: Layout::new(e4m3, k, n)?,
            b: Layout::new(e4m3, k, m)?,
            d: Layout::new(bf16, n, m)?,
            operation: Operation::new()?,
        })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: created by `open`, and used by nobody after this.
        if let Err(error) = unsafe { result::destroy_handle(self.handle) } {
            tracing::warn!("cublasLtDestroy: {error}");
        }
    }
}

/// A matrix's type and shape, column-major as the library has it.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(element: sys::cudaDataType_t, rows: usize, cols: usize) -> Result<Self, CudaError> {
        let layout = result::create_matrix_layout(element, rows as u64, cols as u64, rows as i64);
        Ok(Self(call("cublasLtMatrixLayoutCreate", layout)?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created by `new`; nobody else destroys it.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    /// `aᵀ · b` with f32 sums.
    fn new() -> Result<Self, CudaError> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F);
        let operation = Self(call("cublasLtMatmulDescCreate", operation)?);
        // CUBLAS_OP_T.
        let transposed = 1i32;
        let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute is of 32 bits, and the descriptor was just made.
        let set =
            unsafe { result::set_matmul_desc_attribute(operation.0, attribute, (&raw const transposed).cast(), 4) };
        call("cublasLtMatmulDescSetAttribute", set)?;
        Ok(operation)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created by `new`; nobody else destroys it.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CudaError> {
        let preference = Self(call("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?);
        let bytes = WORKSPACE_BYTES as u64;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: the attribute is of 64 bits, and the preference was just made.
        let set = unsafe { result::set_matmul_pref_attribute(preference.0, attribute, (&raw const bytes).cast(), 8) };
        call("cublasLtMatmulPreferenceSetAttribute", set)?;
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by `new`; nobody else destroys it.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

fn data_type(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

impl Gemm for Blas {
    fn name(&self) -> &'static str {
        "cublasLt"
    }

    fn takes(&self, p: &Plain) -> bool {
        takes(p)
    }

    fn variants(&self, p: &Plain) -> Result<Vec<Variant>, CudaError> {
        let problem = Problem::new(p.dtype, result_type(p), p.shape)?;
        let preference = Preference::new()?;
        // SAFETY: the library fills the first `found` of them, and zeros are values of this structure of numbers.
        let mut results: [sys::cublasLtMatmulHeuristicResult_t; SUGGESTIONS] = unsafe { std::mem::zeroed() };
        let mut found = 0;
        // SAFETY: all descriptors are alive, and there is room for as many as are asked for.
        let asked = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                problem.operation.0,
                problem.a.0,
                problem.b.0,
                problem.d.0,
                problem.d.0,
                preference.0,
                SUGGESTIONS as i32,
                results.as_mut_ptr(),
                &raw mut found,
            )
        };
        call("cublasLtMatmulAlgoGetHeuristic", asked.result())?;
        let found = usize::try_from(found).unwrap_or(0).min(SUGGESTIONS);
        let usable = results[..found].iter().filter(|result| result.state.result().is_ok());
        Ok(usable.map(|result| Variant(result.algo.data)).collect())
    }

    fn settle(&self, p: &Plain, variant: Variant) {
        lock(&self.kernels).insert(key(p), variant);
    }

    unsafe fn multiply(&self, p: &Plain) -> Result<(), CudaError> {
        let settled = lock(&self.kernels).get(&key(p)).copied();
        let kernel = match settled {
            Some(kernel) => kernel,
            None => {
                let reference = Plain { shape: Shape { m: REFERENCE_ROWS, ..p.shape }, ..*p };
                let first = self.variants(&reference)?.first().copied();
                let kernel = first.ok_or_else(|| CudaError::Unavailable(format!("no kernel for {:?}", p.shape)))?;
                self.settle(p, kernel);
                kernel
            }
        };
        // SAFETY: passed on.
        unsafe { self.multiply_by(p, kernel) }
    }
}

/// f32 is left to the exact kernel; biases and gates to the fused ones.
fn takes(p: &Plain) -> bool {
    p.dtype != DType::F32 && p.up.is_none() && p.bias == 0 && p.shape.k.is_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::emulated::Emulated;

    #[test]
    fn cuda_blas_is_an_error_where_it_cannot_be() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let error = Blas::open(&device).unwrap_err();
        assert_eq!(error.to_string(), "cuBLASLt does not run on emulated on the host");
    }

    #[test]
    fn cuda_blas_takes_what_it_can_express() {
        let shape = Shape { m: 1, n: 1, k: 64 };
        let p = Plain { dtype: DType::BF16, shape, x: 0, w: 0, up: None, bias: 0, y: 0, finish: 0, activation: 0 };
        assert!(takes(&p));
        for refused in [
            Plain { dtype: DType::F32, ..p },
            Plain { up: Some(0), ..p },
            Plain { bias: 16, ..p },
            Plain { shape: Shape { k: 60, ..shape }, ..p },
        ] {
            assert!(!takes(&refused), "{refused:?}");
        }
    }
}

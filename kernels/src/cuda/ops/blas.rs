//! cuBLASLt as an implementation of [`Gemm`]: plain 16-bit weights, without bias or gate. No device has run this.
//!
//! It chooses among its kernels by the number of rows too, and some of them split k: results are not batch-invariant. So it
//! is used only where it was asked for; see [`super::matmul::Products::measure`].

use super::gemm::{ADD_F32, Gemm, Plain, STORE_NARROW};
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
const WORKSPACE_BYTES: usize = 32 << 20;

/// The library on one device.
#[derive(Debug)]
pub struct Blas {
    device: Arc<dyn Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    /// Asking for a kernel takes longer than many products.
    kernels: Mutex<HashMap<Key, sys::cublasLtMatmulAlgo_t>>,
}

/// Type, m, n, k and finish.
type Key = (DType, usize, usize, usize, u32);

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
    fn new(dtype: DType, rows: usize, cols: usize) -> Result<Self, CudaError> {
        let layout = result::create_matrix_layout(data_type(dtype), rows as u64, cols as u64, rows as i64);
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

    unsafe fn multiply(&self, p: &Plain) -> Result<(), CudaError> {
        let Shape { m, n, k } = p.shape;
        let stream = self.device.raw_stream().ok_or_else(|| CudaError::Unavailable("no CUDA stream".into()))?;
        // Row-major y[m, n] is column-major y[n, m]: yᵀ = w · xᵀ, where w[n, k] is the transpose of a column-major [k, n].
        let to = if p.finish == STORE_NARROW { p.dtype } else { DType::F32 };
        let (a, b, d) = (Layout::new(p.dtype, k, n)?, Layout::new(p.dtype, k, m)?, Layout::new(to, n, m)?);
        let operation = Operation::new()?;
        let key = (p.dtype, m, n, k, p.finish);
        let known = lock(&self.kernels).get(&key).copied();
        let kernel = match known {
            Some(kernel) => kernel,
            None => {
                let preference = Preference::new()?;
                // SAFETY: all descriptors are alive.
                let found = unsafe {
                    result::get_matmul_algo_heuristic(self.handle, operation.0, a.0, b.0, d.0, d.0, preference.0)
                };
                let found = call("cublasLtMatmulAlgoGetHeuristic", found)?.algo;
                lock(&self.kernels).insert(key, found);
                found
            }
        };
        let (alpha, beta) = (1.0f32, if p.finish == ADD_F32 { 1.0f32 } else { 0.0 });
        // SAFETY: the operands are as large as the shape says (the caller's promise) and the layouts are of that shape; the
        // workspace belongs to this value and the stream's order keeps products that use it apart.
        let done = unsafe {
            result::matmul(
                self.handle,
                operation.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                p.w as *const c_void,
                a.0,
                p.x as *const c_void,
                b.0,
                p.y as *const c_void,
                d.0,
                p.y as *mut c_void,
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

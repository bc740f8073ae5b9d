//! NVIDIA's cuBLASLt as it is called: a handle, and products as it is told of them. No device has run this.
//!
//! Read [`Library`] and [`Problem`].

use crate::DType;
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::gemm::{ADD_F32, Operands, Product, Variant};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::ffi::c_void;
use std::panic::catch_unwind;
use std::sync::Arc;

/// What NVIDIA recommends on Hopper; older devices need less.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// Kernels that the library is asked to suggest.
const SUGGESTIONS: usize = 8;
/// Rows of operands and results begin at multiples of this, and no better: the library is told, so that it suggests no kernel that
/// would refuse some of them.
const ALIGNED: u32 = 16;

/// Whether the library is on this machine.
pub fn is_present() -> bool {
    // SAFETY: loading NVIDIA's library runs its initialisers, which are those of a plain shared library.
    unsafe { sys::is_culib_present() }
}

/// The library on one device.
#[derive(Debug)]
pub struct Library {
    pub device: Arc<dyn Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    set: SetAttribute,
}

// SAFETY: cublasLt handles may be used from any thread, also at once ("Thread safety" in its documentation).
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

fn call<T>(call: &'static str, result: Result<T, CublasError>) -> Result<T, CudaError> {
    result.map_err(|error| CudaError::Call { call, reason: error.to_string() })
}

impl Library {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// [`CudaError::Unavailable`] if it is not on this machine or the device is not CUDA's.
    pub fn open(device: &Arc<dyn Device>) -> Result<Self, CudaError> {
        if device.raw_stream().is_none() {
            let name = &device.properties().name;
            return Err(CudaError::Unavailable(format!("cuBLASLt does not run on {name}")));
        }
        if !is_present() {
            return Err(CudaError::Unavailable("cuBLASLt (libcublasLt) is not on this machine".into()));
        }
        let set = SetAttribute::load()?;
        let workspace = Buffer::new(device, WORKSPACE_BYTES)?;
        // A library that lacks a function would make cudarc panic: it is found out here, once.
        let handle = catch_unwind(result::create_handle)
            .map_err(|_| CudaError::Unavailable("the cuBLASLt on this machine is incomplete".into()))?;
        let handle = call("cublasLtCreate", handle)?;
        Ok(Self { device: device.clone(), handle, workspace, set })
    }

    /// The library's version, such as 120605.
    pub fn version(&self) -> usize {
        // SAFETY: takes nothing and returns a number.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// The kernels that it would take for a product whose factors it applies as `scaling` says, best first.
    ///
    /// # Errors
    ///
    /// If it has none, or does not know such products.
    pub fn suggestions(&self, p: &Product, scaling: Scaling) -> Result<Vec<Variant>, CudaError> {
        let problem = Problem::new(self.set, p, scaling)?;
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

    /// Computes a product by one of its kernels; the bias is left out.
    ///
    /// # Safety
    ///
    /// As [`super::Gemm::multiply`]; with [`Scaling::Blocks`], the factors of x are as that has them.
    pub unsafe fn compute(&self, p: &Product, scaling: Scaling, kernel: Variant) -> Result<(), CudaError> {
        let stream = self.device.raw_stream().ok_or_else(|| CudaError::Unavailable("no CUDA stream".into()))?;
        let Problem { a, b, d, operation } = &Problem::new(self.set, p, scaling)?;
        let beta = if p.finish == ADD_F32 { 1.0f32 } else { 0.0 };
        let (alpha, kernel) = (1.0f32, sys::cublasLtMatmulAlgo_t { data: kernel.0 });
        // SAFETY: the operands are the caller's promise and the layouts are of their shapes; the workspace belongs to this value
        // and the stream's order keeps products that use it apart. The library checks the kernel.
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

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: created by `open`, and used by nobody after this.
        if let Err(error) = unsafe { result::destroy_handle(self.handle) } {
            tracing::warn!("cublasLtDestroy: {error}");
        }
    }
}

/// How the library applies the factors of fp8 operands.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Scaling {
    /// It does not: there are none, or somebody else does.
    None,
    /// One for each row of x and of w. From CUDA 12.9 on, on compute capability 9.0.
    Rows,
    /// One for each block of 128 x 128 elements of w, and of x one for each row and 128 columns: `[⌈k / 128⌉, m]`, m being a multiple
    /// of 4. Where [`Scaling::Rows`] is.
    Blocks,
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
    fn new(set: SetAttribute, p: &Product, scaling: Scaling) -> Result<Self, CudaError> {
        let (m, n, k) = (p.shape.m, p.shape.n, p.shape.k);
        let operand = match p.operands() {
            Operands::Plain(dtype) => data_type(dtype),
            Operands::Fp8 | Operands::Fp8Blocks => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        };
        let operation = Operation::new(set)?;
        if let (Some(factors), Some([of_w, of_x])) = (p.fp8, modes(scaling)) {
            operation.set(A_SCALE_MODE, &of_w.to_ne_bytes())?;
            operation.set(B_SCALE_MODE, &of_x.to_ne_bytes())?;
            operation.set(A_SCALE_POINTER, &factors.w.to_ne_bytes())?;
            operation.set(B_SCALE_POINTER, &factors.x.to_ne_bytes())?;
        }
        Ok(Self {
            a: Layout::new(operand, k, n)?,
            b: Layout::new(operand, k, m)?,
            d: Layout::new(data_type(p.result()), n, m)?,
            operation,
        })
    }
}

/// `cublasLtMatmulMatrixScale_t` of the two operands, w first: OUTER_VEC_32F, or BLK128x128_32F and VEC128_32F.
fn modes(scaling: Scaling) -> Option<[i32; 2]> {
    match scaling {
        Scaling::None => None,
        Scaling::Rows => Some([3, 3]),
        Scaling::Blocks => Some([5, 4]),
    }
}

// `cublasLtMatmulDescAttributes_t`, which cudarc has only as far as the version of CUDA that it was built for.
const TRANSA: u32 = 3;
const A_SCALE_POINTER: u32 = 17;
const B_SCALE_POINTER: u32 = 18;
const A_SCALE_MODE: u32 = 31;
const B_SCALE_MODE: u32 = 32;

/// `cublasLtMatmulDescSetAttribute` with attributes as numbers: a library that does not know one says so.
#[derive(Clone, Copy, Debug)]
struct SetAttribute(unsafe extern "C" fn(sys::cublasLtMatmulDesc_t, u32, *const c_void, usize) -> u32);

impl SetAttribute {
    fn load() -> Result<Self, CudaError> {
        // SAFETY: the library is present, and this is its signature; enums are unsigned in C.
        let found = unsafe { sys::culib().get(b"cublasLtMatmulDescSetAttribute\0") };
        let found = found.map_err(|error| CudaError::Unavailable(format!("cuBLASLt: {error}")))?;
        Ok(Self(*found))
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

struct Operation(sys::cublasLtMatmulDesc_t, SetAttribute);

impl Operation {
    /// `aᵀ · b` with f32 sums; fast accumulation, which shortens those of fp8, stays off.
    fn new(set: SetAttribute) -> Result<Self, CudaError> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F);
        let operation = Self(call("cublasLtMatmulDescCreate", operation)?, set);
        // CUBLAS_OP_T.
        operation.set(TRANSA, &1i32.to_ne_bytes())?;
        Ok(operation)
    }

    fn set(&self, attribute: u32, value: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the descriptor is alive, and the library checks the attribute and its length.
        match unsafe { (self.1.0)(self.0, attribute, value.as_ptr().cast(), value.len()) } {
            0 => Ok(()),
            code => Err(CudaError::Call {
                call: "cublasLtMatmulDescSetAttribute",
                reason: format!("attribute {attribute} is refused with {code}"),
            }),
        }
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
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(call("cublasLtMatmulPreferenceCreate", result::create_matmul_pref())?);
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE_BYTES as u64).to_ne_bytes())?;
        for operand in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(operand, &ALIGNED.to_ne_bytes())?;
        }
        Ok(preference)
    }

    fn set(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the preference is alive, and the library checks the length.
        let set = unsafe { result::set_matmul_pref_attribute(self.0, attribute, value.as_ptr().cast(), value.len()) };
        call("cublasLtMatmulPreferenceSetAttribute", set)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::emulated::Emulated;
    use crate::cuda::ops::gemm::Factors;
    use crate::cuda::plan::gemm::Shape;

    #[test]
    fn cuda_blas_is_an_error_where_it_cannot_be() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let error = Library::open(&device).unwrap_err();
        assert_eq!(error.to_string(), "cuBLASLt does not run on emulated on the host");
    }

    /// Descriptions need the library and no device: where it is, it must understand every one, or say which attribute it lacks.
    #[test]
    fn cuda_blas_understands_what_it_is_told() {
        if !is_present() {
            return println!("skipped: cuBLASLt (libcublasLt) is not on this machine");
        }
        let set = SetAttribute::load().unwrap();
        Preference::new().unwrap();
        let shape = Shape { m: 16, n: 128, k: 512 };
        let factors = Factors { x: 0x100, w: 0x200, up: 0, by_block: false };
        let p = Product {
            dtype: DType::BF16,
            shape,
            x: 0,
            w: 0,
            up: None,
            fp8: None,
            bias: 0,
            y: 0,
            finish: ADD_F32,
            activation: 0,
        };
        Problem::new(set, &p, Scaling::None).unwrap();
        let p = Product { fp8: Some(factors), ..p };
        Problem::new(set, &p, Scaling::None).unwrap();
        for scaling in [Scaling::Rows, Scaling::Blocks] {
            if let Err(error) = Problem::new(set, &p, scaling) {
                // SAFETY: takes nothing and returns a number.
                let version = unsafe { sys::cublasLtGetVersion() };
                assert!(
                    error.to_string().contains("attribute 31 is refused") && version < 120_800,
                    "{version}: {error}"
                );
            }
        }
        let operation = Operation::new(set).unwrap();
        assert!(operation.set(99, &1i32.to_ne_bytes()).is_err() && operation.set(A_SCALE_MODE, &[1]).is_err());
    }
}

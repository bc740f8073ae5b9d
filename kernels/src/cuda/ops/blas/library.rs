//! NVIDIA's cuBLASLt as it is called: a handle, and products as it is told of them. No device has run this.
//!
//! The types are cudarc's; the functions are looked up here, because cudarc looks for the libraries of the version of CUDA alone that it
//! was built for. Read [`Library`], [`Problem`] and [`Functions`].

use crate::DType;
use crate::cuda::device::{Buffer, CudaError, Device};
use crate::cuda::ops::gemm::{ADD_F32, Operands, Product, Variant};
use cudarc::cublaslt::sys;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, OnceLock};

/// What NVIDIA recommends on Hopper; older devices need less.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// The function that multiplies.
pub const MULTIPLY: &str = "cublasLtMatmul";
/// Kernels that the library is asked to suggest.
const SUGGESTIONS: usize = 8;
/// Rows of operands and results begin at multiples of this, and no better: the library is told, so that it suggests no kernel that
/// would refuse some of them.
const ALIGNED: u32 = 16;

/// Where the loader looks for it, best first.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// Whether the library is on this machine.
pub fn is_present() -> bool {
    Functions::get().is_ok()
}

/// The library on one device.
#[derive(Debug)]
pub struct Library {
    pub device: Arc<dyn Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    lt: &'static Functions,
}

// SAFETY: cublasLt handles may be used from any thread, also at once ("Thread safety" in its documentation).
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

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
        let lt = Functions::get()?;
        let workspace = Buffer::new(device, WORKSPACE_BYTES)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle goes to where it says; the device's context is current.
        lt.check("cublasLtCreate", unsafe { (lt.create)(&raw mut handle) })?;
        Ok(Self { device: device.clone(), handle, workspace, lt })
    }

    /// The library's version, such as 120605.
    pub fn version(&self) -> usize {
        // SAFETY: takes nothing and returns a number.
        unsafe { (self.lt.version)() }
    }

    /// The kernels that it would take for a product whose factors it applies as `scaling` says, best first.
    ///
    /// # Errors
    ///
    /// If it has none, or does not know such products.
    pub fn suggestions(&self, p: &Product, scaling: Scaling) -> Result<Vec<Variant>, CudaError> {
        let problem = Problem::new(self.lt, p, scaling)?;
        let preference = Preference::new(self.lt)?;
        // SAFETY: the library fills the first `found` of them, and zeros are values of this structure of numbers.
        let mut results: [sys::cublasLtMatmulHeuristicResult_t; SUGGESTIONS] = unsafe { std::mem::zeroed() };
        let mut found = 0;
        // SAFETY: all descriptors are alive, and there is room for as many as are asked for.
        let asked = unsafe {
            (self.lt.suggest)(
                self.handle,
                problem.operation.0,
                problem.a.0,
                problem.b.0,
                problem.d.0,
                problem.d.0,
                preference.0,
                SUGGESTIONS as c_int,
                results.as_mut_ptr(),
                &raw mut found,
            )
        };
        self.lt.check("cublasLtMatmulAlgoGetHeuristic", asked)?;
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
        let Problem { a, b, d, operation } = &Problem::new(self.lt, p, scaling)?;
        let beta = if p.finish == ADD_F32 { 1.0f32 } else { 0.0 };
        let (alpha, kernel) = (1.0f32, sys::cublasLtMatmulAlgo_t { data: kernel.0 });
        // SAFETY: the operands are the caller's promise and the layouts are of their shapes; the workspace belongs to this value
        // and the stream's order keeps products that use it apart. The library checks the kernel.
        let done = unsafe {
            (self.lt.multiply)(
                self.handle,
                operation.0,
                (&raw const alpha).cast(),
                p.w as *const c_void,
                a.0,
                p.x as *const c_void,
                b.0,
                (&raw const beta).cast(),
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
        self.lt.check(MULTIPLY, done)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: created by `open`, and used by nobody after this.
        if let Err(error) = self.lt.check("cublasLtDestroy", unsafe { (self.lt.destroy)(self.handle) }) {
            tracing::warn!("{error}");
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
    fn new(lt: &'static Functions, p: &Product, scaling: Scaling) -> Result<Self, CudaError> {
        let (m, n, k) = (p.shape.m, p.shape.n, p.shape.k);
        let operand = match p.operands() {
            Operands::Plain(dtype) => data_type(dtype),
            Operands::Fp8 | Operands::Fp8Blocks => sys::cudaDataType_t::CUDA_R_8F_E4M3,
        };
        let operation = Operation::new(lt)?;
        if let (Some(factors), Some([of_w, of_x])) = (p.fp8, modes(scaling)) {
            operation.set(A_SCALE_MODE, &of_w.to_ne_bytes())?;
            operation.set(B_SCALE_MODE, &of_x.to_ne_bytes())?;
            operation.set(A_SCALE_POINTER, &factors.w.to_ne_bytes())?;
            operation.set(B_SCALE_POINTER, &factors.x.to_ne_bytes())?;
        }
        Ok(Self {
            a: Layout::new(lt, operand, k, n)?,
            b: Layout::new(lt, operand, k, m)?,
            d: Layout::new(lt, data_type(p.result()), n, m)?,
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

/// A matrix's type and shape, column-major as the library has it.
struct Layout(sys::cublasLtMatrixLayout_t, &'static Functions);

impl Layout {
    fn new(lt: &'static Functions, element: sys::cudaDataType_t, rows: usize, cols: usize) -> Result<Self, CudaError> {
        let mut layout = std::ptr::null_mut();
        // SAFETY: the layout goes to where it says.
        let made = unsafe { (lt.new_layout)(&raw mut layout, element as u32, rows as u64, cols as u64, rows as i64) };
        lt.check("cublasLtMatrixLayoutCreate", made)?;
        Ok(Self(layout, lt))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created by `new`; nobody else destroys it.
        unsafe { (self.1.end_layout)(self.0) };
    }
}

struct Operation(sys::cublasLtMatmulDesc_t, &'static Functions);

impl Operation {
    /// `aᵀ · b` with f32 sums; fast accumulation, which shortens those of fp8, stays off.
    fn new(lt: &'static Functions) -> Result<Self, CudaError> {
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F);
        let mut operation = std::ptr::null_mut();
        // SAFETY: the description goes to where it says.
        let made = unsafe { (lt.new_operation)(&raw mut operation, compute as u32, scale as u32) };
        lt.check("cublasLtMatmulDescCreate", made)?;
        let operation = Self(operation, lt);
        // CUBLAS_OP_T.
        operation.set(TRANSA, &1i32.to_ne_bytes())?;
        Ok(operation)
    }

    /// Sets an attribute, by its number: a library that does not know it says so.
    fn set(&self, attribute: u32, value: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the description is alive, and the library checks the attribute and its length.
        let set = unsafe { (self.1.set_operation)(self.0, attribute, value.as_ptr().cast(), value.len()) };
        self.1.check("cublasLtMatmulDescSetAttribute", set)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created by `new`; nobody else destroys it.
        unsafe { (self.1.end_operation)(self.0) };
    }
}

// `cublasLtMatmulPreferenceAttributes_t`.
const MAX_WORKSPACE_BYTES: u32 = 1;
const MIN_ALIGNMENT_BYTES: [u32; 4] = [5, 6, 7, 8];

struct Preference(sys::cublasLtMatmulPreference_t, &'static Functions);

impl Preference {
    fn new(lt: &'static Functions) -> Result<Self, CudaError> {
        let mut preference = std::ptr::null_mut();
        // SAFETY: the preference goes to where it says.
        let made = unsafe { (lt.new_preference)(&raw mut preference) };
        lt.check("cublasLtMatmulPreferenceCreate", made)?;
        let preference = Self(preference, lt);
        preference.set(MAX_WORKSPACE_BYTES, &(WORKSPACE_BYTES as u64).to_ne_bytes())?;
        for operand in MIN_ALIGNMENT_BYTES {
            preference.set(operand, &ALIGNED.to_ne_bytes())?;
        }
        Ok(preference)
    }

    fn set(&self, attribute: u32, value: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the preference is alive, and the library checks the attribute and its length.
        let set = unsafe { (self.1.set_preference)(self.0, attribute, value.as_ptr().cast(), value.len()) };
        self.1.check("cublasLtMatmulPreferenceSetAttribute", set)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created by `new`; nobody else destroys it.
        unsafe { (self.1.end_preference)(self.0) };
    }
}

/// `cublasStatus_t`, 0 being success. Other enums that are passed are unsigned numbers as well.
type Status = u32;

/// The library's functions. They live as long as the process: what was found is never closed.
#[derive(Debug)]
struct Functions {
    create: unsafe extern "C" fn(*mut sys::cublasLtHandle_t) -> Status,
    destroy: unsafe extern "C" fn(sys::cublasLtHandle_t) -> Status,
    version: unsafe extern "C" fn() -> usize,
    status: unsafe extern "C" fn(Status) -> *const c_char,
    new_layout: unsafe extern "C" fn(*mut sys::cublasLtMatrixLayout_t, u32, u64, u64, i64) -> Status,
    end_layout: unsafe extern "C" fn(sys::cublasLtMatrixLayout_t) -> Status,
    new_operation: unsafe extern "C" fn(*mut sys::cublasLtMatmulDesc_t, u32, u32) -> Status,
    set_operation: unsafe extern "C" fn(sys::cublasLtMatmulDesc_t, u32, *const c_void, usize) -> Status,
    end_operation: unsafe extern "C" fn(sys::cublasLtMatmulDesc_t) -> Status,
    new_preference: unsafe extern "C" fn(*mut sys::cublasLtMatmulPreference_t) -> Status,
    set_preference: unsafe extern "C" fn(sys::cublasLtMatmulPreference_t, u32, *const c_void, usize) -> Status,
    end_preference: unsafe extern "C" fn(sys::cublasLtMatmulPreference_t) -> Status,
    suggest: unsafe extern "C" fn(
        sys::cublasLtHandle_t,
        sys::cublasLtMatmulDesc_t,
        sys::cublasLtMatrixLayout_t,
        sys::cublasLtMatrixLayout_t,
        sys::cublasLtMatrixLayout_t,
        sys::cublasLtMatrixLayout_t,
        sys::cublasLtMatmulPreference_t,
        c_int,
        *mut sys::cublasLtMatmulHeuristicResult_t,
        *mut c_int,
    ) -> Status,
    multiply: unsafe extern "C" fn(
        sys::cublasLtHandle_t,
        sys::cublasLtMatmulDesc_t,
        *const c_void,
        *const c_void,
        sys::cublasLtMatrixLayout_t,
        *const c_void,
        sys::cublasLtMatrixLayout_t,
        *const c_void,
        *const c_void,
        sys::cublasLtMatrixLayout_t,
        *mut c_void,
        sys::cublasLtMatrixLayout_t,
        *const sys::cublasLtMatmulAlgo_t,
        *mut c_void,
        usize,
        sys::cudaStream_t,
    ) -> Status,
    _library: libloading::Library,
}

impl Functions {
    /// The process's one library.
    fn get() -> Result<&'static Self, CudaError> {
        static FOUND: OnceLock<Result<Functions, String>> = OnceLock::new();
        FOUND.get_or_init(Self::find).as_ref().map_err(|reason| CudaError::Unavailable(reason.clone()))
    }

    fn find() -> Result<Self, String> {
        for name in NAMES {
            // SAFETY: loading NVIDIA's library runs its initialisers, which are those of a plain shared library.
            if let Ok(library) = unsafe { libloading::Library::new(name) } {
                return Self::of(library)
                    .map_err(|error| format!("the cuBLASLt on this machine is incomplete: {error}"));
            }
        }
        Err("cuBLASLt (libcublasLt) is not on this machine".into())
    }

    fn of(library: libloading::Library) -> Result<Self, libloading::Error> {
        // SAFETY: the signatures are those of cublasLt.h, the same in versions 12 and 13.
        unsafe {
            Ok(Self {
                create: *library.get(b"cublasLtCreate\0")?,
                destroy: *library.get(b"cublasLtDestroy\0")?,
                version: *library.get(b"cublasLtGetVersion\0")?,
                status: *library.get(b"cublasLtGetStatusString\0")?,
                new_layout: *library.get(b"cublasLtMatrixLayoutCreate\0")?,
                end_layout: *library.get(b"cublasLtMatrixLayoutDestroy\0")?,
                new_operation: *library.get(b"cublasLtMatmulDescCreate\0")?,
                set_operation: *library.get(b"cublasLtMatmulDescSetAttribute\0")?,
                end_operation: *library.get(b"cublasLtMatmulDescDestroy\0")?,
                new_preference: *library.get(b"cublasLtMatmulPreferenceCreate\0")?,
                set_preference: *library.get(b"cublasLtMatmulPreferenceSetAttribute\0")?,
                end_preference: *library.get(b"cublasLtMatmulPreferenceDestroy\0")?,
                suggest: *library.get(b"cublasLtMatmulAlgoGetHeuristic\0")?,
                multiply: *library.get(b"cublasLtMatmul\0")?,
                _library: library,
            })
        }
    }

    fn check(&self, call: &'static str, status: Status) -> Result<(), CudaError> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: it takes any number and returns a static string.
        let reason = unsafe { CStr::from_ptr((self.status)(status)) }.to_string_lossy().into_owned();
        Err(CudaError::Call { call, reason })
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

    /// Descriptions need the library and no device: where it is, it must understand every one, or refuse what it is too old for.
    #[test]
    fn cuda_blas_understands_what_it_is_told() {
        let lt = match Functions::get() {
            Ok(lt) => lt,
            Err(error) => return println!("skipped: {error}"),
        };
        Preference::new(lt).unwrap();
        let shape = Shape { m: 16, n: 128, k: 512 };
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
        Problem::new(lt, &p, Scaling::None).unwrap();
        let p = Product { fp8: Some(Factors { x: 0x100, w: 0x200, up: 0, by_block: false }), ..p };
        Problem::new(lt, &p, Scaling::None).unwrap();
        // SAFETY: takes nothing and returns a number.
        let version = unsafe { (lt.version)() };
        for scaling in [Scaling::Rows, Scaling::Blocks] {
            let understood = Problem::new(lt, &p, scaling).map(|_| ());
            assert!(understood.is_ok() || version < 120_800, "{version}: {understood:?}");
        }
        let operation = Operation::new(lt).unwrap();
        for refused in [operation.set(99, &1i32.to_ne_bytes()), operation.set(A_SCALE_MODE, &[1])] {
            assert!(matches!(&refused, Err(CudaError::Call { reason, .. }) if !reason.is_empty()), "{refused:?}");
        }
    }
}

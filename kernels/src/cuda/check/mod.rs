//! Checks of every operation on a device: random shapes and values, outputs poisoned, results held against the f64 references or,
//! where bits are promised, against the CPU's bits. For `cluster gpu-check`, on a real device or the emulated one.
//!
//! Read [`run`], [`Group`] and [`Check`]; [`timing`] says how fast a device is.

mod attention;
mod matmul;
mod rows;
mod scaled;
pub mod timing;

use super::device::{Buffer, CudaError, Device};
use crate::quant::{dequantize_row, quantize_row};
use crate::{DType, Matrix, reference};
use std::sync::Arc;
use std::time::Instant;

/// How large shapes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effort {
    /// For the emulator: seconds.
    Small,
    /// For a device.
    Full,
}

/// Operations that are checked together. A kernel that goes wrong may take the device's context with it, so each group had better
/// have a process of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    /// Norms, rotations, gates, embeddings, keys and values into pages.
    Rows,
    /// Attention of single queries and of chunks.
    Attention,
    /// Products with weights of every type.
    Products,
    /// Products with fp8 and fp4 weights.
    Scaled,
    /// The kernels that are off by default because no device has run them, where the device has the instructions.
    Experimental,
}

impl Group {
    /// Every group, simple ones first.
    pub const ALL: [Group; 5] = [Self::Rows, Self::Attention, Self::Products, Self::Scaled, Self::Experimental];
}

/// What came of one operation in one type.
#[derive(Clone, PartialEq, Debug)]
pub struct Check {
    /// Operation and type, such as `matmul Q4_K gemm`.
    pub name: String,
    /// Random cases tried.
    pub cases: usize,
    /// Largest error, as a part of what is allowed: 1 is as much as may be.
    pub worst: f64,
    /// What went wrong, if something did.
    pub failure: Option<String>,
}

/// A generator (xorshift64*) that a seed decides.
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Uniform in `low..=high`.
    pub(crate) fn within(&mut self, low: usize, high: usize) -> usize {
        low + (self.bits() >> 33) as usize % (high - low + 1)
    }

    /// About normal.
    fn normal(&mut self) -> f32 {
        (0..4).map(|_| (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0).sum::<f32>() * 0.866
    }

    pub(crate) fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }
}

/// A run of the checks.
struct Checks<'a> {
    device: &'a Arc<dyn Device>,
    draw: Draw,
    effort: Effort,
    /// After this, an operation gets one case.
    deadline: Option<Instant>,
    report: &'a mut dyn FnMut(&Check),
    done: Vec<Check>,
}

/// Checks every operation of a group; `report` hears of each as it is done. When the deadline has passed, those that are left get one
/// case each.
///
/// # Errors
///
/// Only what makes going on pointless. A kernel that fails is a [`Check::failure`].
pub fn run(
    device: &Arc<dyn Device>,
    group: Group,
    seed: u64,
    effort: Effort,
    deadline: Option<Instant>,
    report: &mut dyn FnMut(&Check),
) -> Result<Vec<Check>, CudaError> {
    super::selftest::run(device)?;
    let mut checks = Checks { device, draw: Draw::new(seed), effort, deadline, report, done: Vec::new() };
    match group {
        Group::Rows => rows::run(&mut checks),
        Group::Attention => attention::run(&mut checks),
        Group::Products => matmul::run(&mut checks),
        Group::Scaled => scaled::run(&mut checks),
        Group::Experimental => {
            matmul::run_experimental(&mut checks);
            scaled::run_experimental(&mut checks);
            attention::run_experimental(&mut checks);
        }
    }
    device.synchronize()?;
    Ok(checks.done)
}

impl Checks<'_> {
    /// Runs `cases` random cases of an operation, each of which returns its error as a part of what is allowed.
    fn check(
        &mut self,
        name: String,
        cases: usize,
        mut case: impl FnMut(&Arc<dyn Device>, &mut Draw) -> Result<f64, CudaError>,
    ) {
        let mut check = Check { name, cases: 0, worst: 0.0, failure: None };
        while check.cases < cases {
            if check.cases > 0 && self.deadline.is_some_and(|deadline| Instant::now() > deadline) {
                break;
            }
            match case(self.device, &mut self.draw) {
                Ok(error) => {
                    check.cases += 1;
                    check.worst = check.worst.max(error);
                    if error > 1.0 {
                        check.failure = Some(format!("an error of {error:.3e} times what is allowed"));
                    }
                }
                Err(error) => check.failure = Some(error.to_string()),
            }
            if check.failure.is_some() {
                break;
            }
        }
        (self.report)(&check);
        self.done.push(check);
    }

    /// A number for the emulator or for a device.
    fn size(&self, small: usize, full: usize) -> usize {
        if self.effort == Effort::Small { small } else { full }
    }
}

/// The types that activations have.
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Values in a plain type, and what they are then.
fn rounded(dtype: DType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut bytes = Vec::new();
    quantize_row(dtype, values, &mut bytes).expect("a plain type can be written");
    let mut back = vec![0.0; values.len()];
    dequantize_row(dtype, &bytes, &mut back);
    (bytes, back)
}

/// The reference's product of rows with a stored matrix (type, n, k), the rows shared among this machine's cores: in f64 it takes
/// longer than anything on a device.
fn product_of(x: &[f32], (dtype, n, k): (DType, usize, usize), weights: &[u8], bias: Option<&[f32]>) -> Vec<f32> {
    let matrix = Matrix::new(dtype, n, k, weights).expect("a matrix");
    let rows = x.len() / k;
    let mut y = vec![0.0; rows * n];
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let each = rows.div_ceil(cores).max(1);
    std::thread::scope(|scope| {
        for (x, y) in x.chunks(each * k).zip(y.chunks_mut(each * n)) {
            scope.spawn(|| reference::matmul(x, &matrix, bias, y));
        }
    });
    y
}

/// A poisoned output.
fn poisoned(device: &Arc<dyn Device>, dtype: DType, elements: usize) -> Result<Buffer, CudaError> {
    let buffer = Buffer::new(device, elements * dtype.block_bytes())?;
    buffer.fill(0xff)?;
    Ok(buffer)
}

/// What a buffer of a plain type holds.
fn read(buffer: &Buffer, dtype: DType) -> Result<Vec<f32>, CudaError> {
    let bytes: Vec<u8> = buffer.to_vec(buffer.bytes())?;
    let mut values = vec![0.0; bytes.len() / dtype.block_bytes()];
    dequantize_row(dtype, &bytes, &mut values);
    Ok(values)
}

/// The largest error as a part of `absolute + relative * |want|`; infinite if something is NaN.
fn error(got: &[f32], want: &[f32], relative: f64, absolute: f64) -> f64 {
    assert_eq!(got.len(), want.len());
    let each = got.iter().zip(want).map(|(g, w)| {
        let (g, w) = (f64::from(*g), f64::from(*w));
        let part = (g - w).abs() / (absolute + relative * w.abs());
        if part.is_nan() { f64::INFINITY } else { part }
    });
    each.fold(0.0, f64::max)
}

/// What rounding once to a type may cost, relatively.
fn precision(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        _ => 8e-3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::emulated::Emulated;

    #[test]
    fn the_emulated_device_passes_and_a_damaged_result_does_not() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let mut count = 0;
        for group in Group::ALL {
            let checks = run(&device, group, 11, Effort::Small, None, &mut |_| {}).expect("the device works");
            for check in &checks {
                assert!(check.failure.is_none() && check.cases > 0, "{check:?}");
            }
            count += checks.len();
        }
        assert!(count >= 22, "{count} checks");
        assert!(error(&[1.0, f32::NAN], &[1.0, 2.0], 1.0, 1.0).is_infinite());
        assert!(error(&[1.1], &[1.0], 0.01, 0.0) > 1.0 && error(&[1.1], &[1.0], 0.2, 0.0) < 1.0);
    }

    /// What no device may run by default is checked as well, on a device that has its instructions; late checks get one case.
    #[test]
    fn kernels_of_one_architecture_are_checked_there() {
        let Ok(emulated) = Emulated::beside_the_program() else { return println!("skipped: no C++ compiler") };
        let hopper = |p: &mut crate::cuda::Properties| (p.sm, p.shared_per_block) = (90, 227 << 10);
        let device: Arc<dyn Device> = Arc::new(emulated.with_properties(hopper));
        for (group, wanted) in [
            (
                Group::Scaled,
                &[
                    "matmul fp8 skinny",
                    "matmul fp8 by blocks skinny",
                    "matmul nvfp4 skinny",
                    "matmul nvfp4 gemm",
                    "matmul fp8 gemm",
                    "matmul fp8 by blocks gemm",
                    "rms_norm to fp8",
                ][..],
            ),
            (
                Group::Experimental,
                &[
                    "wgmma matmul BF16",
                    "wgmma matmul F16",
                    "wgmma matmul fp8",
                    "wgmma attention bf16",
                    "wgmma attention f16",
                ],
            ),
        ] {
            let checks = run(&device, group, 3, Effort::Small, Some(Instant::now()), &mut |_| {}).expect("it works");
            assert_eq!(checks.iter().map(|check| check.name.as_str()).collect::<Vec<_>>(), wanted);
            for check in checks {
                assert!(check.failure.is_none() && check.cases == 1, "{check:?}");
            }
        }
    }
}

//! Products in the steps in which the tensor-core kernels make their sums. An instruction adds up exactly and rounds once, as the
//! emulator has it, so these are the emulator's bits.

/// Elements of k that one instruction sums over: of 16 bits, and of 8.
pub const DEPTH_16: usize = 16;
/// See [`DEPTH_16`].
pub const DEPTH_8: usize = 32;
/// Warps that share out k in a product of few rows, and elements of k that they take in turn.
const WARPS: usize = 8;
/// See [`WARPS`]. Blocks of 256 elements are taken whole.
const STEP: usize = 128;
const CHUNK: usize = 32;

/// One instruction's part of one output: `sum` and the products of elements `order`, added in that order.
fn instruction(sum: f32, x: &[f32], w: &[f32], order: impl Iterator<Item = usize>) -> f32 {
    let exact = order.fold(f64::from(sum), |exact, i| match (x.get(i), w.get(i)) {
        (Some(x), Some(w)) => exact + f64::from(*x) * f64::from(*w),
        // Zeros behind the end.
        _ => exact,
    });
    exact as f32
}

/// An output of `gemm_mma.cuh`, before what is done to it when it is stored: one chain of instructions of `depth` elements. With
/// `factors`, each 128 elements make a chain that is multiplied by its own.
pub fn gemm(x: &[f32], w: &[f32], depth: usize, factors: Option<&[f32]>) -> f32 {
    let chain =
        |x: &[f32], w: &[f32]| (0..x.len()).step_by(depth).fold(0.0, |sum, at| instruction(sum, x, w, at..at + depth));
    match factors {
        None => chain(x, w),
        Some(factors) => {
            let steps = x.chunks(STEP).zip(w.chunks(STEP)).zip(factors);
            steps.fold(0.0, |total, ((x, w), factor)| factor.mul_add(chain(x, w), total))
        }
    }
}

/// What a group of elements of a row of w is made of, in a product of few rows.
#[derive(Clone, Copy, Debug)]
pub struct Groups<'a> {
    /// Elements of a group: 16 or 32.
    pub len: usize,
    /// One for each group.
    pub scales: &'a [f32],
    /// One for each group, or none at all.
    pub minima: &'a [f32],
}

/// An output of `gemv.cuh`, likewise. `w` are the elements, or the quants without their scales; `quads` says whether four lanes share
/// each 16 elements, as they do of quantised weights, or each 32. `step` is 128, or a block of 256.
pub fn skinny(x: &[f32], w: &[f32], quads: bool, step: usize, groups: Option<Groups<'_>>) -> f32 {
    let k = x.len();
    // Elements of a chunk in the order of instruction `j`: two of each lane, then the other two.
    let order = move |chunk: usize, j: usize| {
        let places = (0..2).flat_map(|half| (0..4).flat_map(move |lane| (0..2).map(move |i| (half, lane, i))));
        places.map(move |(half, lane, i)| {
            let first = if quads { 16 * j + 4 * lane } else { 8 * lane + 4 * j };
            chunk + first + 2 * half + i
        })
    };
    let of_warp = |warp: usize| {
        let mut sum = 0.0f32;
        for begin in (warp * step..k).step_by(WARPS * step) {
            for chunk in (begin..k.min(begin + step)).step_by(CHUNK) {
                let Some(Groups { len, scales, minima }) = groups else {
                    sum = (0..2).fold(sum, |sum, j| instruction(sum, x, w, order(chunk, j)));
                    continue;
                };
                let each = CHUNK / len;
                for group in 0..each {
                    let instructions = if each == 1 { 0..2 } else { group..group + 1 };
                    let chain =
                        |w: &[f32]| instructions.clone().fold(0.0, |part, j| instruction(part, x, w, order(chunk, j)));
                    let at = chunk / len + group;
                    sum = scales[at].mul_add(chain(w), sum);
                    if !minima.is_empty() {
                        sum = (-minima[at]).mul_add(chain(&vec![1.0; k]), sum);
                    }
                }
            }
        }
        sum
    };
    (0..WARPS).fold(0.0, |total, warp| total + of_warp(warp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::cuda::emulated::Emulated;
    use crate::cuda::ops::matmul::{Finish, Path, Products, Weight, X};
    use crate::cuda::ops::pack::on_device;
    use crate::cuda::ops::scaled::{Fp8Rows, SCALED_BLOCK, ScaledFinish, ScaledType, ScaledWeight};
    use crate::cuda::{Buffer, Device};
    use crate::kv::e4m3_to_f32;
    use crate::quant::{dequantize_row, e2m1_to_f32, f16_to_f32, quantize_row, scales_and_minima};
    use crate::testing::{Random, assert_same};
    use std::sync::Arc;

    fn stored(dtype: DType, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let (mut bytes, mut back) = (Vec::new(), vec![0.0; values.len()]);
        quantize_row(dtype, values, &mut bytes).unwrap();
        dequantize_row(dtype, &bytes, &mut back);
        (bytes, back)
    }

    /// Blocks taken apart: quants, and what groups of so many of them are multiplied by and lowered by.
    fn apart(dtype: DType, blocks: &[u8]) -> (usize, Vec<f32>, Vec<f32>, Vec<f32>) {
        let (mut quants, mut scales, mut minima) = (Vec::new(), Vec::new(), Vec::new());
        for b in blocks.chunks(dtype.block_bytes()) {
            let f16_at = |at: usize| f16_to_f32(u16::from_le_bytes([b[at], b[at + 1]]));
            let nibble = |at: usize, high: bool| if high { b[at] >> 4 } else { b[at] & 15 };
            match dtype {
                DType::Q8_0 => {
                    scales.push(f16_at(0));
                    quants.extend(b[2..].iter().map(|q| f32::from(*q as i8)));
                }
                DType::Q4_0 => {
                    scales.push(f16_at(0));
                    quants.extend((0..32).map(|i| f32::from(nibble(2 + i % 16, i >= 16)) - 8.0));
                }
                DType::MXFP4 => {
                    scales.push(f32::from_bits(u32::from(b[0]) << 23));
                    quants.extend((0..32).map(|i| e2m1_to_f32(nibble(1 + i % 16, i >= 16))));
                }
                DType::Q4K => {
                    let (scale, minimum) = scales_and_minima(&b[4..16]);
                    scales.extend(scale.map(|scale| f16_at(0) * f32::from(scale)));
                    minima.extend(minimum.map(|minimum| f16_at(2) * f32::from(minimum)));
                    quants.extend((0..256).map(|i| f32::from(nibble(16 + i / 64 * 32 + i % 32, i % 64 >= 32))));
                }
                DType::Q6K => {
                    scales.extend(b[192..208].iter().map(|scale| f16_at(208) * f32::from(*scale as i8)));
                    quants.extend((0..256).map(|i| {
                        let (half, quarter, at) = (i / 128, i / 32 % 4, i % 32);
                        let low = nibble(64 * half + 32 * (quarter % 2) + at, quarter >= 2);
                        let high = b[128 + 32 * half + at] >> (2 * quarter) & 3;
                        f32::from(low | high << 4) - 32.0
                    }));
                }
                _ => unreachable!("no test has {}", dtype.name()),
            }
        }
        (quants.len() / scales.len(), quants, scales, minima)
    }

    /// `y[m, n]`, an output at a time.
    fn every(x: &[f32], w: &[f32], k: usize, output: impl Fn(&[f32], &[f32], usize) -> f32) -> Vec<f32> {
        x.chunks(k)
            .flat_map(|x| w.chunks(k).enumerate().map(|(row, w)| output(x, w, row)).collect::<Vec<_>>())
            .collect()
    }

    #[test]
    fn cuda_products_are_made_in_these_steps() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let mut random = Random::new(17);
        let (m, n) = (random.within(3, 12), random.within(20, 90));
        let plain = Finish::Store { bias: 0, to: DType::F32 };
        let of_blocks = |dtype: DType, random: &mut Random| (dtype, dtype.block_len() * random.within(5, 70));
        let quantised = [DType::Q8_0, DType::Q4_0, DType::MXFP4].map(|dtype| of_blocks(dtype, &mut random));
        let super_blocks = [DType::Q4K, DType::Q6K].map(|dtype| (dtype, 256 * random.within(1, 12)));
        let plain_k = 8 * random.within(20, 300);
        for (dtype, k) in [(DType::BF16, plain_k)].into_iter().chain(quantised).chain(super_blocks) {
            let (x_bytes, x) = stored(DType::BF16, &random.vector(m * k));
            let (w_bytes, w) = stored(dtype, &random.vector(n * k));
            let (x_on, w_on) =
                (Buffer::of(&device, &x_bytes).unwrap(), on_device(&device, dtype, (n, k), &w_bytes).unwrap());
            let products = Products::new(&device, Products::scratch_bytes([(dtype, n, k)])).unwrap();
            let operand = X { address: x_on.address(), dtype: DType::BF16, rows: m };
            let weight = Weight { dtype, n, k, address: w_on.address() };
            let run = |path| {
                let y = Buffer::new(&device, m * n * 4).unwrap();
                // SAFETY: the buffers have these shapes.
                unsafe { products.matmul(path, operand, &weight, plain, y.address()).unwrap() };
                y.to_vec::<f32>(m * n).unwrap()
            };
            let want = match dtype {
                DType::BF16 => {
                    let want = every(&x, &w, k, |x, w, _| gemm(x, w, DEPTH_16, None));
                    assert_same(&run(Path::Gemm), &want, "many rows");
                    every(&x, &w, k, |x, w, _| skinny(x, w, false, STEP, None))
                }
                _ => {
                    let (len, quants, scales, minima) = apart(dtype, &w_bytes);
                    let step = dtype.block_len().max(STEP);
                    every(&x, &quants, k, |x, w, row| {
                        let groups = row * k / len..(row + 1) * k / len;
                        let (scales, minima) = (&scales[groups.clone()], minima.get(groups).unwrap_or_default());
                        skinny(x, w, true, step, Some(Groups { len, scales, minima }))
                    })
                }
            };
            assert_same(&run(Path::Skinny), &want, dtype.name());
        }
    }

    #[test]
    fn cuda_fp8_products_by_blocks_are_made_in_these_steps() {
        let Ok(emulated) = Emulated::beside_the_program() else { return println!("skipped: no C++ compiler") };
        let device: Arc<dyn Device> = Arc::new(emulated.with_properties(|p| p.sm = 89));
        let mut random = Random::new(18);
        let (m, n, k) = (random.within(3, 12), random.within(130, 200), 16 * random.within(10, 30));
        let mut codes = |count: usize| -> Vec<u8> { (0..count).map(|_| random.bits() as u8 & 0xbf).collect() };
        let (x_codes, w_codes) = (codes(m * k), codes(n * k));
        let [x, w] = [&x_codes, &w_codes].map(|codes| codes.iter().map(|c| e4m3_to_f32(*c)).collect::<Vec<f32>>());
        let across = k.div_ceil(SCALED_BLOCK);
        let factors = random.vector(ScaledType::E4M3Blocks.factors(n, k));
        let x_scales: Vec<f32> = (0..m).map(|row| 0.5 + row as f32).collect();
        let [x_on, w_on] = [&x_codes, &w_codes].map(|codes| Buffer::of(&device, codes).unwrap());
        let [scales_on, factors_on] = [&x_scales, &factors].map(|values| Buffer::of(&device, values).unwrap());
        let y = Buffer::new(&device, m * n * 4).unwrap();
        let rows = Fp8Rows { address: x_on.address(), scales: scales_on.address(), rows: m };
        let (address, scales) = (w_on.address(), factors_on.address());
        let weight = ScaledWeight { dtype: ScaledType::E4M3Blocks, n, k, address, scales };
        let finish = ScaledFinish::Plain(Finish::Store { bias: 0, to: DType::F32 });
        // SAFETY: the buffers have these shapes.
        unsafe { Products::new(&device, 0).unwrap().fp8(&rows, &weight, finish, y.address()).unwrap() };
        let mut want = every(&x, &w, k, |x, w, row| {
            let of_row = &factors[row / SCALED_BLOCK * across..][..across];
            gemm(x, w, DEPTH_8, Some(of_row))
        });
        want.chunks_mut(n).zip(&x_scales).for_each(|(row, scale)| row.iter_mut().for_each(|v| *v *= scale));
        assert_same(&y.to_vec::<f32>(m * n).unwrap(), &want, "fp8 by blocks");
    }
}

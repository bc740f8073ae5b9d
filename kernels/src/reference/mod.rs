//! The oracle: every operation written as its definition, accumulated in f64. Nothing here is fast; everything fast is
//! tested against it.

pub(crate) mod attention;

pub use attention::attention;

use crate::dtype::Matrix;
use crate::quant::dequantize_row;

/// `y[m, n] = x[m, k] · w[n, k]ᵀ (+ bias[n])`.
pub fn matmul(x: &[f32], w: &Matrix<'_>, bias: Option<&[f32]>, y: &mut [f32]) {
    let mut row = vec![0.0; w.cols()];
    for n in 0..w.rows() {
        dequantize_row(w.dtype(), w.row(n), &mut row);
        for (x, y) in x.chunks_exact(w.cols()).zip(y.chunks_exact_mut(w.rows())) {
            let dot: f64 = x.iter().zip(&row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            y[n] = (dot + bias.map_or(0.0, |b| f64::from(b[n]))) as f32;
        }
    }
}

/// What a product with quantised weights sees of x: each 32 elements as multiples, to nearest even, of their largest magnitude
/// over 127.
pub fn round_to_bytes(x: &[f32]) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for block in x.chunks(32) {
        let largest = block.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
        let (scale, inverse) = if largest < 1e-30 { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) };
        out.extend(block.iter().map(|v| (v * inverse).round_ties_even() * scale));
    }
    out
}

/// Each row of `weight.len()` elements divided by its root mean square, then scaled by `weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
        for i in 0..x.len() {
            out[i] = (f64::from(x[i]) * scale * f64::from(weight[i])) as f32;
        }
    }
}

/// Rotates pairs `(i, i + rotary_dim / 2)` of each head by the angle whose cosine and sine are given per token.
pub fn rope(x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
    let tokens = x.len() / (heads * head_dim);
    let half = cos.len() / tokens.max(1);
    for (t, token) in x.chunks_exact_mut(heads * head_dim).enumerate() {
        for head in token.chunks_exact_mut(head_dim) {
            for i in 0..half {
                let (c, s) = (cos[t * half + i], sin[t * half + i]);
                let (a, b) = (head[i], head[half + i]);
                head[i] = a * c - b * s;
                head[half + i] = b * c + a * s;
            }
        }
    }
}

/// In place: exponentials divided by their sum.
pub fn softmax(x: &mut [f32]) {
    let max = x.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
    let exps: Vec<f64> = x.iter().map(|&v| f64::from(v - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    for (x, e) in x.iter_mut().zip(exps) {
        *x = (e / sum) as f32;
    }
}

/// `gate = gate / (1 + e^-gate) * up`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    for (g, &u) in gate.iter_mut().zip(up) {
        let x = f64::from(*g);
        *g = (x / (1.0 + (-x).exp()) * f64::from(u)) as f32;
    }
}

/// `gate = gelu(gate) * up` with the tanh approximation of gelu.
pub fn gelu_tanh_mul(gate: &mut [f32], up: &[f32]) {
    for (g, &u) in gate.iter_mut().zip(up) {
        let x = f64::from(*g);
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        *g = (0.5 * x * (1.0 + inner.tanh()) * f64::from(u)) as f32;
    }
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Row `ids[i]` of the table, decoded, into row `i` of `out`.
pub fn embed(table: &Matrix<'_>, ids: &[u32], out: &mut [f32]) {
    for (&id, out) in ids.iter().zip(out.chunks_exact_mut(table.cols())) {
        dequantize_row(table.dtype(), table.row(id as usize), out);
    }
}

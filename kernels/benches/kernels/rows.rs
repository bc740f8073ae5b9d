//! Operations on rows of activations, of a decode step's and of a prompt's size. They stream: their roof is memory, although small
//! ones live in caches and may be above it.

use crate::roof::{Operations, Roof, Work, random};
use criterion::Criterion;
use ridge_kernels::reference;
use std::hint::black_box;

const WIDTH: usize = 8192;

/// All of them.
pub fn all(criterion: &mut Criterion, roof: &Roof) {
    let mut group = criterion.benchmark_group("rows");
    for rows in [1, 512] {
        let mut seed = 5;
        let x: Vec<f32> = (0..rows * WIDTH).map(|_| random(&mut seed)).collect();
        let other: Vec<f32> = (0..rows * WIDTH).map(|_| random(&mut seed)).collect();
        let weight = other[..WIDTH].to_vec();
        let floats = |times: usize| Work {
            operations: 0.0,
            kind: Operations::Floats,
            bytes: (times * rows * WIDTH * size_of::<f32>()) as f64,
        };
        let (mut got, mut want) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        roof.cpu.rms_norm(&x, &weight, 1e-5, &mut got);
        reference::rms_norm(&x, &weight, 1e-5, &mut want);
        close(&got, &want);
        roof.bench(&mut group, &format!("rms_norm {rows}x{WIDTH}"), floats(2), || {
            roof.cpu.rms_norm(black_box(&x), &weight, 1e-5, black_box(&mut got));
        });

        let (mut gate, mut want) = (x.clone(), x.clone());
        roof.cpu.silu_mul(&mut gate, &other);
        reference::silu_mul(&mut want, &other);
        close(&gate, &want);
        roof.bench(&mut group, &format!("silu_mul {rows}x{WIDTH}"), floats(3), || {
            // What it works on shrinks from call to call; its time does not depend on values.
            roof.cpu.silu_mul(black_box(&mut gate), &other);
        });

        let (heads, dim) = (WIDTH / 128, 128);
        let angles: Vec<f32> = (0..rows * dim / 2).map(|_| random(&mut seed)).collect();
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
        let (mut rotated, mut want) = (x.clone(), x.clone());
        roof.cpu.rope(&mut rotated, heads, dim, &cos, &sin);
        reference::rope(&mut want, heads, dim, &cos, &sin);
        close(&rotated, &want);
        roof.bench(&mut group, &format!("rope {rows}x{WIDTH}"), floats(2), || {
            roof.cpu.rope(black_box(&mut rotated), heads, dim, &cos, &sin);
        });
    }
    group.finish();
}

fn close(got: &[f32], want: &[f32]) {
    assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-4));
}

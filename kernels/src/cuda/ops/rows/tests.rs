//! Every kernel of `rows.cu` against the reference, over fresh shapes.

use super::*;
use crate::cuda::ops::testing::{TYPES, decode, encode, in_every_order, on, poisoned, precision, read};
use crate::cuda::{Buffer, Device};
use crate::reference;
use crate::testing::{Random, assert_close, assert_same};
use std::sync::Arc;

#[test]
fn rms_norm_is_the_reference_and_a_row_is_itself_in_any_company() {
    in_every_order(|device, order| {
        let mut random = Random::new(11);
        for (rows, width) in [(1, 1), (3, 33), (5, 512), (2, 1000)] {
            let (x, weight) = (random.vector(rows * width), random.vector(width));
            let mut want = vec![0.0; rows * width];
            reference::rms_norm(&x, &weight, 1e-5, &mut want);
            let dw = on(device, &weight);
            let norm = |x: &[f32], to| {
                let (dx, out) = (on(device, x), poisoned(device, to, x.len()));
                // SAFETY: the buffers have these shapes.
                unsafe {
                    let shape = (x.len() / width, width);
                    rms_norm(&**device, shape, 1e-5, dx.address(), dw.address(), to, out.address()).unwrap();
                }
                read(&out, to)
            };
            for to in TYPES {
                let got = norm(&x, to);
                assert_close(&got, &want, precision(to), 1e-6, &format!("{to:?} {rows} x {width} {order:?}"));
                assert_same(&norm(&x[..width], to), &got[..width], "alone");
            }
        }
    });
}

#[test]
fn heads_are_normed_and_rotated() {
    in_every_order(|device, order| {
        let mut random = Random::new(12);
        for (rows, heads, head_dim, pairs) in [(3, 5, 8, 4), (2, 3, 128, 64), (1, 1, 80, 16), (4, 2, 48, 0)] {
            let n = rows * heads * head_dim;
            let (x, weight) = (random.vector(n), random.vector(head_dim));
            let (cos, sin) = (random.vector(rows * pairs), random.vector(rows * pairs));
            let angles = (on(device, &cos), on(device, &sin));
            let dw = on(device, &weight);
            for with_norm in [false, true] {
                let mut want = x.clone();
                if with_norm {
                    reference::rms_norm(&x, &weight, 1e-6, &mut want);
                }
                reference::rope(&mut want, heads, head_dim, &cos, &sin);
                let shape = Heads { rows, heads, head_dim, pairs, eps: 1e-6 };
                let run = |x: &Buffer, to, out: &Buffer| {
                    let weight = if with_norm { dw.address() } else { 0 };
                    let angles = (angles.0.address(), angles.1.address());
                    // SAFETY: the buffers have these shapes.
                    unsafe { rotate_heads(&**device, &shape, x.address(), weight, angles, to, out.address()).unwrap() };
                };
                for to in TYPES {
                    let out = poisoned(device, to, n);
                    run(&on(device, &x), to, &out);
                    let got = read(&out, to);
                    assert_close(
                        &got,
                        &want,
                        precision(to),
                        2.0 * precision(to),
                        &format!("{to:?} {shape:?} {order:?}"),
                    );
                    if !with_norm {
                        assert_same(&got, &decode(to, &encode(to, &want)), "without a norm, the CPU's bits");
                    }
                    if to == DType::F32 {
                        let in_place = on(device, &x);
                        run(&in_place, to, &in_place);
                        assert_same(&read(&in_place, to), &got, "in place");
                    }
                }
            }
        }
    });
}

#[test]
fn gates_and_sums() {
    in_every_order(|device, order| {
        let mut random = Random::new(13);
        let n = random.within(500, 3000);
        let gate: Vec<f32> = random.vector(n).iter().map(|v| 4.0 * v).collect();
        let up = random.vector(n);
        let (dg, du) = (on(device, &gate), on(device, &up));
        type Op = unsafe fn(&dyn Device, usize, u64, u64, DType, u64) -> Result<(), CudaError>;
        type Reference = fn(&mut [f32], &[f32]);
        let ops: [(Op, Reference); 2] = [(silu_mul, reference::silu_mul), (gelu_tanh_mul, reference::gelu_tanh_mul)];
        for (op, reference) in ops {
            let mut want = gate.clone();
            reference(&mut want, &up);
            for to in TYPES {
                let out = poisoned(device, to, n);
                // SAFETY: all have n elements.
                unsafe { op(&**device, n, dg.address(), du.address(), to, out.address()).unwrap() };
                // 1 + tanh loses digits for negative gates, whose results are small.
                assert_close(&read(&out, to), &want, 2.0 * precision(to), 1e-6, &format!("{to:?} {order:?}"));
            }
        }
        // SAFETY: both have n elements.
        unsafe { add(&**device, n, dg.address(), du.address()).unwrap() };
        let want: Vec<f32> = gate.iter().zip(&up).map(|(a, b)| a + b).collect();
        assert_same(&read(&dg, DType::F32), &want, "add");
    });
}

#[test]
fn rows_are_picked() {
    in_every_order(|device, _| {
        let mut random = Random::new(14);
        let (vocab, width) = (37, random.within(1, 150) * 2);
        let table = random.vector(vocab * width);
        let ids: Vec<u32> = (0..9).map(|_| random.within(0, vocab - 1) as u32).collect();
        let dids = Buffer::of(device, &ids).unwrap();
        for of in TYPES {
            let bytes = encode(of, &table);
            let coded = decode(of, &bytes);
            let want: Vec<f32> = ids.iter().flat_map(|id| &coded[*id as usize * width..][..width]).copied().collect();
            let (dt, out) = (Buffer::of(device, &bytes).unwrap(), poisoned(device, DType::F32, 9 * width));
            // SAFETY: the buffers have these shapes, the ids are below `vocab`.
            unsafe { embed(&**device, (9, width), dids.address(), of, dt.address(), out.address()).unwrap() };
            assert_same(&read(&out, DType::F32), &want, &format!("embed {of:?}"));
            let out: Buffer = poisoned(device, of, 9 * width);
            let row_bytes = width * of.block_bytes();
            // SAFETY: as above.
            unsafe { gather(&**device, (9, row_bytes), dids.address(), dt.address(), out.address()).unwrap() };
            assert_same(&read(&out, of), &want, &format!("gather {of:?}"));
        }
    });
}

#[test]
fn nothing_is_nothing() {
    in_every_order(|device: &Arc<dyn Device>, _| {
        let shape = Heads { rows: 0, heads: 1, head_dim: 8, pairs: 4, eps: 0.0 };
        // SAFETY: no rows.
        unsafe {
            rms_norm(&**device, (0, 8), 1e-5, 0, 0, DType::F32, 0).unwrap();
            rotate_heads(&**device, &shape, 0, 0, (0, 0), DType::F16, 0).unwrap();
            silu_mul(&**device, 0, 0, 0, DType::F32, 0).unwrap();
        }
    });
}

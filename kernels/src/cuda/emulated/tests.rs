//! The emulator runs kernels, and says what is wrong with those that are wrong.

use super::*;
use crate::cuda::device::{Buffer, Graph};
use crate::testing::Random;

fn kernel(name: &'static str) -> Kernel {
    Kernel { source: "selftest.cu", name }
}

fn device() -> Option<(Arc<Emulated>, Arc<dyn Device>)> {
    let emulated = Emulated::for_tests()?;
    Some((emulated.clone(), emulated))
}

fn launch(device: &Arc<dyn Device>, name: &'static str, launch: Launch, args: &[Arg]) -> Result<(), CudaError> {
    // SAFETY: the tests below pass addresses of buffers that live and have the sizes that `selftest.cu` asks for; where
    // they break the rules on purpose, the emulator stops the kernel first.
    unsafe { device.launch(kernel(name), &launch, args) }
}

fn line(blocks: usize, threads: u32, shared_bytes: u32) -> Launch {
    Launch { grid: [blocks as u32, 1, 1], block: [threads, 1, 1], shared_bytes }
}

#[test]
fn threads_without_barriers_run() {
    let Some((_, device)) = device() else { return };
    let mut random = Random::new(1);
    let (x, y) = (random.vector(1000), random.vector(1000));
    let (dx, dy) = (Buffer::of(&device, &x).unwrap(), Buffer::of(&device, &y).unwrap());
    let args = [Arg::U32(1000), Arg::F32(3.0), Arg::Ptr(dx.address()), Arg::Ptr(dy.address())];
    launch(&device, "selftest_axpy", line(4, 256, 0), &args).unwrap();
    let want: Vec<f32> = x.iter().zip(&y).map(|(x, y)| 3.0 * x + y).collect();
    assert_eq!(dy.to_vec::<f32>(1000).unwrap(), want);
    device.synchronize().unwrap();
}

#[test]
fn shuffles_barriers_and_shared_memory_work_in_every_order() {
    let Some((emulated, device)) = device() else { return };
    let x = Random::new(2).vector(700);
    let dx = Buffer::of(&device, &x).unwrap();
    let sums = Buffer::new(&device, 6 * 4).unwrap();
    for order in Order::ALL {
        emulated.set_order(order);
        sums.fill(0xff).unwrap();
        let args = [Arg::U32(700), Arg::Ptr(dx.address()), Arg::Ptr(sums.address())];
        launch(&device, "selftest_sum", line(6, 128, 16), &args).unwrap();
        for (got, x) in sums.to_vec::<f32>(6).unwrap().iter().zip(x.chunks(128)) {
            let want: f64 = x.iter().map(|v| f64::from(*v)).sum();
            assert!((f64::from(*got) - want).abs() < 1e-4, "{order:?}: {got} is not {want}");
        }
    }
}

#[test]
fn blocks_of_two_dimensions_turn_a_matrix_over() {
    let Some((emulated, device)) = device() else { return };
    let (rows, cols) = (45, 70);
    let x = Random::new(3).vector(rows * cols);
    let (dx, dy) = (Buffer::of(&device, &x).unwrap(), Buffer::new(&device, rows * cols * 4).unwrap());
    for order in Order::ALL {
        emulated.set_order(order);
        dy.fill(0xff).unwrap();
        let args = [Arg::U32(rows as u32), Arg::U32(cols as u32), Arg::Ptr(dx.address()), Arg::Ptr(dy.address())];
        let shape = Launch { grid: [3, 2, 1], block: [32, 8, 1], shared_bytes: 0 };
        launch(&device, "selftest_transpose", shape, &args).unwrap();
        let y = dy.to_vec::<f32>(rows * cols).unwrap();
        assert!((0..rows * cols).all(|i| y[i % cols * rows + i / cols] == x[i]), "{order:?}");
    }
}

/// The message of a launch of a kernel that is wrong on purpose.
#[track_caller]
fn complaint(name: &'static str, shape: Launch, args: &[Arg]) -> Option<String> {
    let (_, device) = device()?;
    // SAFETY: these kernels touch the memory that a test gives them, or none.
    let error = unsafe { device.launch(Kernel { source: "emulate/wrong.cu", name }, &shape, args) };
    Some(error.expect_err("the kernel is wrong").to_string())
}

#[test]
fn diverged_barriers_are_reported() {
    let Some(text) = complaint("wrong_half_a_barrier", line(1, 64, 0), &[]) else { return };
    assert!(text.contains("nobody can go on: of 64 threads 32 wait at a barrier"), "{text}");
    assert!(text.contains("32 have ended"), "{text}");
    let Some(text) = complaint("wrong_two_barriers", line(2, 64, 0), &[]) else { return };
    assert!(text.contains("__syncthreads() in line"), "{text}");
}

#[test]
fn lanes_that_do_not_come_together_are_reported() {
    let Some(text) = complaint("wrong_lane_ended", line(1, 32, 0), &[]) else { return };
    assert!(text.contains("__shfl_sync waits for lane 3, which has ended"), "{text}");
    let Some(text) = complaint("wrong_masks", line(1, 32, 0), &[]) else { return };
    assert!(text.contains("for lanes"), "{text}");
    let Some(text) = complaint("wrong_meeting", line(1, 32, 0), &[]) else { return };
    assert!(text.contains("while lane"), "{text}");
}

#[test]
fn what_runs_over_shared_or_device_memory_is_reported() {
    let Some(text) = complaint("wrong_shared", line(1, 32, 128), &[]) else { return };
    assert!(text.contains("beyond its shared memory"), "{text}");
    let Some((_, device)) = device() else { return };
    let out = std::mem::ManuallyDrop::new(Buffer::new(&device, 400).unwrap());
    // SAFETY: the kernel writes the word after the buffer, which is the emulator's guard zone.
    unsafe {
        let wrong = Kernel { source: "emulate/wrong.cu", name: "wrong_overrun" };
        device.launch(wrong, &line(1, 1, 0), &[Arg::Ptr(out.address()), Arg::U32(100)]).unwrap();
    }
    let want = CudaError::Overrun { address: out.address(), bytes: 400, side: "end" };
    assert_eq!(device.synchronize(), Err(want));
}

/// A missing barrier is a result that depends on the order of the threads.
#[test]
fn a_race_shows_as_a_difference() {
    let Some((emulated, device)) = device() else { return };
    let out = Buffer::new(&device, 64 * 4).unwrap();
    let mut seen = Vec::new();
    for order in Order::ALL {
        emulated.set_order(order);
        // SAFETY: the kernel writes one word per thread.
        unsafe {
            let wrong = Kernel { source: "emulate/wrong.cu", name: "wrong_race" };
            device.launch(wrong, &line(1, 64, 0), &[Arg::Ptr(out.address())]).unwrap();
        }
        seen.push(out.to_vec::<u32>(64).unwrap());
    }
    assert!(seen[0] != seen[1] && seen[0] != seen[2]);
}

/// A copy that nobody waited for has not happened.
#[test]
fn asynchronous_copies_are_late() {
    let Some((_, device)) = device() else { return };
    let (x, y) = (Buffer::of(&device, &[5u32; 4]).unwrap(), Buffer::new(&device, 12).unwrap());
    // SAFETY: the kernel reads 16 bytes of x and writes three words of y.
    unsafe {
        let copies = Kernel { source: "emulate/wrong.cu", name: "wrong_copies" };
        let args = [Arg::Ptr(x.address()), Arg::Ptr(y.address())];
        device.launch(copies, &line(1, 1, 0), &args).unwrap();
    }
    assert_eq!(y.to_vec::<u32>(3).unwrap(), [1, 5, 0], "before the wait, after it, and what was to be zeroed");
}

#[test]
fn impossible_launches_are_refused() {
    let Some((_, device)) = device() else { return };
    let out = Buffer::new(&device, 4).unwrap();
    let refused = |name, shape, args: &[Arg]| launch(&device, name, shape, args).expect_err("impossible").to_string();
    let text = refused("selftest_axpy", line(1, 32, 0), &[Arg::U32(0)]);
    assert!(text.contains("arguments of kinds u for parameters ufpp"), "{text}");
    let args = [Arg::U32(0), Arg::Ptr(out.address()), Arg::Ptr(out.address())];
    let text = refused("selftest_sum", line(1, 2048, 0), &args);
    assert!(text.contains("blocks of 2048"), "{text}");
    let text = refused("selftest_sum", line(1, 32, 1 << 20), &args);
    assert!(text.contains("bytes of shared memory"), "{text}");
    let text = refused("selftest_nothing", line(1, 32, 0), &[]);
    assert!(text.contains("no kernel of this name"), "{text}");
}

#[test]
fn copies_stay_within_an_allocation() {
    let Some((_, device)) = device() else { return };
    let buffer = Buffer::new(&device, 100).unwrap();
    let end = buffer.address() + 90;
    // SAFETY: the emulator refuses what does not fit, which is what this test is about.
    unsafe {
        let refused = CudaError::OutOfBounds { address: end, bytes: 11 };
        assert_eq!(device.upload(end, &[0; 11]), Err(refused.clone()));
        assert_eq!(device.download(end, &mut [0; 11]), Err(refused.clone()));
        assert_eq!(device.fill(end, 0, 11), Err(refused.clone()));
        assert_eq!(device.copy(end, buffer.address(), 11), Err(refused));
        device.upload(end, &[0; 10]).unwrap();
    }
    assert!(matches!(device.alloc(1 << 40), Err(CudaError::OutOfMemory { .. })));
    assert!(Buffer::new(&device, 64).unwrap().to_vec::<f32>(16).unwrap().iter().all(|v| v.is_nan()));
}

#[test]
fn names_are_found_in_preprocessed_text() {
    let text = "extern \"C\" ridge_global_marker void one(int a) {} ridge_global_marker void\n two (float) {}";
    assert_eq!(kernel_names(text), ["one", "two"]);
}

/// Every value of the small types, and the neighbours of every boundary between them, against the codecs of the CPU's pages.
#[test]
fn conversions_are_those_of_the_pages() {
    use crate::kv::{KvDtype, KvFormat};
    let Some((_, device)) = device() else { return };
    let mut values: Vec<f32> = vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MAX, f32::MIN_POSITIVE];
    let mut random = Random::new(4);
    for _ in 0..4000 {
        values.push(f32::from_bits(random.bits() as u32));
        // Exponents where the small types have their subnormals and their largest numbers.
        values.push(random.normal() * 2f32.powi(random.within(0, 40) as i32 - 26));
    }
    for half in 0..=u16::MAX {
        // Bf16 values and midpoints between them.
        values.push(f32::from_bits((u32::from(half) << 16) | (0x8000 * u32::from(half & 1))));
    }
    let n = values.len();
    let x = Buffer::of(&device, &values).unwrap();
    let out = Buffer::new(&device, n * 4 * 6).unwrap();
    // SAFETY: the kernel reads n floats and writes 6 n words.
    unsafe {
        let convert = Kernel { source: "emulate/wrong.cu", name: "numbers" };
        let args = [Arg::U32(n as u32), Arg::Ptr(x.address()), Arg::Ptr(out.address())];
        device.launch(convert, &line(n.div_ceil(256), 256, 0), &args).unwrap();
    }
    let got = out.to_vec::<u32>(6 * n).unwrap();
    for (i, dtype) in [KvDtype::BF16, KvDtype::F16, KvDtype::Fp8].into_iter().enumerate() {
        let format = KvFormat { dtype, kv_heads: 1, head_dim: 1, block_size: n };
        let mut page = vec![0; format.page_bytes()];
        format.write(&mut page, 0, &values, &values);
        for (j, code) in page[..n * dtype.bytes()].chunks(dtype.bytes()).enumerate() {
            let code = code.iter().rev().fold(0u32, |code, byte| (code << 8) | u32::from(*byte));
            let (ours, back) = (got[(2 * i) * n + j], f32::from_bits(got[(2 * i + 1) * n + j]));
            let nan = values[j].is_nan();
            assert!(nan || ours == code, "{dtype:?} of {:e} is {ours:#x}, the pages have {code:#x}", values[j]);
            assert_eq!(nan, back.is_nan(), "{dtype:?} of {:e} reads as {back:e}", values[j]);
            if let (KvDtype::BF16, false) = (dtype, nan) {
                assert_eq!(back.to_bits(), code << 16);
            } else if let (KvDtype::F16, false) = (dtype, nan) {
                assert_eq!(back, half::f16::from_bits(code as u16).to_f32());
            } else if !nan {
                assert_eq!(back, crate::kv::e4m3_to_f32(code as u8));
            }
        }
    }
}

/// A graph makes its launches when it is replayed, with what its memory holds then; recording makes none, and takes no copies.
#[test]
fn launches_are_recorded_and_replayed() {
    let Some((_, device)) = device() else { return };
    let (dx, dy) = (Buffer::of(&device, &[1f32; 8]).unwrap(), Buffer::of(&device, &[0f32; 8]).unwrap());
    let args = [Arg::U32(8), Arg::F32(2.0), Arg::Ptr(dx.address()), Arg::Ptr(dy.address())];
    let twice = || {
        launch(&device, "selftest_axpy", line(1, 32, 0), &args)?;
        launch(&device, "selftest_axpy", line(1, 32, 0), &args)
    };
    let graph = Graph::record(&device, twice).unwrap();
    assert_eq!(dy.to_vec::<f32>(8).unwrap(), [0.0; 8]);
    // SAFETY: both buffers are alive.
    unsafe { graph.replay().unwrap() };
    assert_eq!(dy.to_vec::<f32>(8).unwrap(), [4.0; 8]);
    dx.upload(0, &[10f32; 8]).unwrap();
    // SAFETY: as above.
    unsafe { graph.replay().unwrap() };
    assert_eq!(dy.to_vec::<f32>(8).unwrap(), [44.0; 8]);

    let error = Graph::record(&device, || dx.upload(0, &[0f32; 8])).unwrap_err();
    assert!(error.to_string().contains("launches are being recorded"), "{error}");
    // Another thread's copies and launches are its own affair.
    let other = Graph::record(&device, || {
        std::thread::scope(|scope| scope.spawn(|| dx.upload(0, &[1f32; 8])).join().expect("no panic"))?;
        twice()
    });
    // SAFETY: as above.
    unsafe { other.unwrap().replay().unwrap() };
    assert_eq!(dy.to_vec::<f32>(8).unwrap(), [48.0; 8]);
    device.synchronize().unwrap();
}

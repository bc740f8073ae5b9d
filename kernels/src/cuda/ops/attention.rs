//! Attention over paged caches: single queries (`attention_decode.cu`) and chunks of prompts (`attention_prefill.cu`).
//!
//! A query's bits depend on its own vector, its position and the keys and values it sees, in each of the two: not on the other
//! items, nor on how a prompt was cut into chunks, nor on the page size.
//!
//! # Safety
//!
//! of every function here: as in [`super::rows`]; block tables name pages in the memory of `pages` for every position up to
//! an item's last query, and the lists are those that [`crate::cuda::plan::attention`] made. Every address is a multiple of 16.

#![allow(clippy::missing_safety_doc, reason = "the module says it once")]

use super::pages::Pages;
use super::{assert_aligned, by_type, pages};
use crate::cuda::plan::attention::{DECODE_THREADS, ITEM_WORDS, PrefillKernel, decode_shape, page_maps};
use crate::cuda::{Arg, CudaError, Device, Kernel, Launch};
use crate::{DType, KvDtype};

/// What a layer attends with.
#[derive(Clone, Copy, Debug)]
pub struct Layer {
    /// The cache. Strides are multiples of 16.
    pub pages: Pages,
    /// Address of all block tables, u32 block numbers.
    pub tables: u64,
    /// Query heads; head `h` reads key/value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Factor of the scores.
    pub scale: f32,
}

/// A plan's lists on the device.
#[derive(Clone, Copy, Debug)]
pub struct Lists {
    /// Address of the items' words.
    pub items: u64,
    /// How many items there are.
    pub item_count: usize,
    /// Address of the work's words.
    pub work: u64,
    /// How many entries that has.
    pub work_count: usize,
}

/// The type that queries of a cache are given in.
pub fn query_dtype(cache: KvDtype) -> DType {
    match cache {
        KvDtype::F16 => DType::F16,
        KvDtype::BF16 => DType::BF16,
        KvDtype::F32 | KvDtype::Fp8 | KvDtype::Int8 => DType::F32,
    }
}

/// Attention of single queries: rows of `q` `[rows, heads, head_dim]` in [`query_dtype`], to the same rows of `out` in type
/// `to`. `workspace` is the address of `Decode::workspace_bytes`; if that is 0, `is_direct` holds and it may be 0.
pub unsafe fn decode(
    device: &dyn Device,
    layer: &Layer,
    lists: &Lists,
    (workspace, is_direct): (u64, bool),
    q: u64,
    (to, out): (DType, u64),
) -> Result<(), CudaError> {
    if lists.work_count == 0 {
        return Ok(());
    }
    let format = layer.pages.format;
    let group = group(layer);
    let shape = decode_shape(&format, group, device.properties().shared_per_block as usize).chosen;
    let name = decode_name(format.dtype, shape.group);
    let to = Arg::U32(by_type(to, [0, 1, 2]));
    let launch = Launch {
        grid: [lists.work_count as u32, (format.kv_heads * shape.chunks) as u32, 1],
        block: [DECODE_THREADS as u32, 1, 1],
        shared_bytes: shape.shared_bytes as u32,
    };
    assert_aligned(&[q, out, workspace]);
    let mut args = inputs(layer, lists, group);
    args.extend([Arg::Ptr(q), Arg::Ptr(workspace), Arg::U32(u32::from(is_direct)), to, Arg::Ptr(out)]);
    let source = "attention_decode.cu";
    // SAFETY: passed on.
    unsafe { device.launch(Kernel { source, name }, &launch, &args)? };
    if is_direct {
        return Ok(());
    }
    let launch = Launch {
        grid: [lists.item_count as u32, layer.heads as u32, 1],
        block: [format.head_dim.next_multiple_of(32) as u32, 1, 1],
        shared_bytes: 0,
    };
    let args = [Arg::Ptr(lists.items), Arg::U32(format.head_dim as u32), Arg::Ptr(workspace), to, Arg::Ptr(out)];
    // SAFETY: passed on; the partial results were written by the launch before.
    unsafe { device.launch(Kernel { source, name: "attention_combine" }, &launch, &args) }
}

/// Attention of chunks of prompts, as [`decode`] otherwise. `lists` were made for `kernel`'s tile, and `kernel` is one that
/// [`crate::cuda::plan::attention::prefill_kernel`] does not reject.
pub unsafe fn prefill(
    device: &dyn Device,
    layer: &Layer,
    lists: &Lists,
    kernel: PrefillKernel,
    q: u64,
    (to, out): (DType, u64),
) -> Result<(), CudaError> {
    if lists.work_count == 0 {
        return Ok(());
    }
    let format = layer.pages.format;
    let (source, name, threads) = prefill_name(kernel, format.dtype, format.head_dim);
    let launch = Launch {
        grid: [lists.work_count as u32, layer.heads as u32, 1],
        block: [threads, 1, 1],
        shared_bytes: kernel.shared_bytes(&format) as u32,
    };
    assert_aligned(&[q, out]);
    let mut args = inputs(layer, lists, group(layer));
    if kernel == PrefillKernel::Wgmma {
        // Maps take the place of the pages' address and stride.
        let maps = page_maps(&format, layer.pages.base, layer.pages.block_stride);
        for (arg, map) in args[3..5].iter_mut().zip(maps) {
            *arg = Arg::Bytes128(device.tensor_map(&map)?);
        }
    }
    args.extend([Arg::Ptr(q), Arg::U32(by_type(to, [0, 1, 2])), Arg::Ptr(out)]);
    // SAFETY: passed on; maps are of the pages.
    unsafe { device.launch(Kernel { source, name }, &launch, &args) }
}

fn group(layer: &Layer) -> usize {
    let kv_heads = layer.pages.format.kv_heads;
    assert!(layer.heads.is_multiple_of(kv_heads), "{} heads, {kv_heads} of keys", layer.heads);
    assert!(layer.scale > 0.0, "scores are scaled by {}", layer.scale);
    layer.heads / kv_heads
}

/// The arguments that all kernels begin with.
fn inputs(layer: &Layer, lists: &Lists, group: usize) -> Vec<Arg> {
    let format = layer.pages.format;
    assert_aligned(&[lists.items, lists.work, layer.tables, layer.pages.base, layer.pages.block_stride]);
    let addresses = [lists.items, lists.work, layer.tables, layer.pages.base].map(Arg::Ptr);
    let sizes = [format.kv_heads, group, format.head_dim, format.block_size].map(|n| Arg::U32(n as u32));
    let stride = Arg::U64(layer.pages.block_stride);
    addresses.into_iter().chain([stride]).chain(sizes).chain([Arg::F32(layer.scale)]).collect()
}

fn decode_name(dtype: KvDtype, group: usize) -> &'static str {
    macro_rules! names {
        ($($dtype:literal),*) => {
            [$([
                concat!("attention_decode_", $dtype, "_1"),
                concat!("attention_decode_", $dtype, "_2"),
                concat!("attention_decode_", $dtype, "_4"),
                concat!("attention_decode_", $dtype, "_8"),
            ]),*]
        };
    }
    names!["f32", "f16", "bf16", "fp8", "int8"][pages::number(dtype)][group.ilog2() as usize]
}

/// The source, the kernel and its threads.
fn prefill_name(kernel: PrefillKernel, dtype: KvDtype, head_dim: usize) -> (&'static str, &'static str, u32) {
    macro_rules! mma {
        ($dtype:literal, $stages:literal) => {
            match head_dim {
                64 => concat!("attention_prefill_", $dtype, "_64_", $stages),
                80 => concat!("attention_prefill_", $dtype, "_80_", $stages),
                96 => concat!("attention_prefill_", $dtype, "_96_", $stages),
                128 => concat!("attention_prefill_", $dtype, "_128_", $stages),
                256 => concat!("attention_prefill_", $dtype, "_256_", $stages),
                _ => panic!("no tensor-core kernel for heads of {head_dim} elements"),
            }
        };
    }
    let name = match (kernel, dtype) {
        (PrefillKernel::Simt, _) => {
            let names = [
                "attention_simt_f32",
                "attention_simt_f16",
                "attention_simt_bf16",
                "attention_simt_fp8",
                "attention_simt_int8",
            ];
            return ("attention_simt.cu", names[pages::number(dtype)], 128);
        }
        (PrefillKernel::Wgmma, _) => {
            let name = match (dtype, head_dim) {
                (KvDtype::F16, 64) => "attention_wgmma_f16_64",
                (KvDtype::F16, 128) => "attention_wgmma_f16_128",
                (KvDtype::BF16, 64) => "attention_wgmma_bf16_64",
                (KvDtype::BF16, 128) => "attention_wgmma_bf16_128",
                _ => panic!("no Hopper kernel for a cache of {} and heads of {head_dim} elements", dtype.name()),
            };
            return ("attention_wgmma.cu", name, 288);
        }
        (PrefillKernel::Mma { stages: 2 }, KvDtype::F16) => mma!("f16", "2"),
        (PrefillKernel::Mma { stages: 2 }, KvDtype::BF16) => mma!("bf16", "2"),
        (PrefillKernel::Mma { .. }, KvDtype::F16) => mma!("f16", "1"),
        (PrefillKernel::Mma { .. }, KvDtype::BF16) => mma!("bf16", "1"),
        (PrefillKernel::Mma { stages: 1 }, KvDtype::Fp8) => mma!("fp8", "1"),
        (PrefillKernel::Mma { stages: 1 }, KvDtype::Int8) => mma!("int8", "1"),
        _ => panic!("no tensor-core kernel for a cache of {}", dtype.name()),
    };
    ("attention_prefill.cu", name, 128)
}

const _: () = assert!(ITEM_WORDS == 8, "`Item` in attention.cuh");

#[cfg(test)]
mod tests;

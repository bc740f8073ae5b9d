//! Brings quantised matrices to a device: a file's blocks go to staging memory there, and a kernel takes them apart into planes
//! ([`crate::cuda::planes`]). So the host copies bytes and nothing else.

use super::assert_aligned;
use crate::DType;
use crate::cuda::device::{Arg, Buffer, CudaError, Device, Kernel, Launch};
use crate::cuda::planes::Blocks;
use std::sync::Arc;

/// Staging memory that is enough for full speed.
const STAGING_BYTES: usize = 64 << 20;

/// Uploads matrices one after the other.
#[derive(Debug)]
pub struct Packer {
    device: Arc<dyn Device>,
    staging: Buffer,
}

impl Packer {
    /// Allocates staging memory for matrices of up to `largest` bytes in a file: all of that, or what full speed takes.
    pub fn new(device: &Arc<dyn Device>, largest: usize) -> Result<Self, CudaError> {
        Ok(Self { device: device.clone(), staging: Buffer::new(device, largest.min(STAGING_BYTES))? })
    }

    /// Brings a matrix `[n, k]` to byte `at` of `arena`, a multiple of 16, where it takes [`Blocks::device_bytes`]. It is there in the
    /// order of the device's stream.
    ///
    /// # Panics
    ///
    /// If `bytes` are not of this shape, or the matrix reaches beyond the arena's end.
    pub fn upload(
        &mut self,
        blocks: Blocks,
        (n, k): (usize, usize),
        bytes: &[u8],
        (arena, at): (&Buffer, usize),
    ) -> Result<(), CudaError> {
        let to = arena.at(at, blocks.device_bytes(n, k));
        let row_bytes = blocks.row_bytes(k);
        assert_eq!(bytes.len(), n * row_bytes, "[{n}, {k}] of {blocks:?}");
        if self.staging.bytes() < row_bytes {
            self.staging = Buffer::new(&self.device, row_bytes)?;
        }
        let rows = self.staging.bytes().checked_div(row_bytes).unwrap_or(n).max(1);
        for (index, piece) in bytes.chunks(rows * row_bytes.max(1)).enumerate() {
            // The stream's order keeps these bytes apart from the piece before.
            self.staging.upload(0, piece)?;
            let part = (rows * index, piece.len() / row_bytes);
            // SAFETY: the staging memory has these rows, and the arena the matrix.
            unsafe { pack(&*self.device, blocks, (n, k), part, self.staging.address(), to)? };
        }
        Ok(())
    }
}

/// Takes `rows` rows from `first` on of a matrix `[n, k]` apart; `from` is where the first of them lies, `to` the whole matrix.
///
/// # Safety
///
/// Both are memory of the device, as large as that.
pub unsafe fn pack(
    device: &dyn Device,
    blocks: Blocks,
    (n, k): (usize, usize),
    (first, rows): (usize, usize),
    from: u64,
    to: u64,
) -> Result<(), CudaError> {
    assert!(first + rows <= n && k.is_multiple_of(blocks.block_len()), "rows {first}.. of [{n}, {k}]");
    assert_aligned(&[to]);
    if rows == 0 || k == 0 {
        return Ok(());
    }
    let name = match blocks {
        Blocks::NvFp4 => "pack_nvfp4",
        Blocks::Ggml(dtype) => match dtype {
            DType::Q4_0 => "pack_q4_0",
            DType::Q4_1 => "pack_q4_1",
            DType::Q5_0 => "pack_q5_0",
            DType::Q5_1 => "pack_q5_1",
            DType::Q8_0 => "pack_q8_0",
            DType::Q2K => "pack_q2_k",
            DType::Q3K => "pack_q3_k",
            DType::Q4K => "pack_q4_k",
            DType::Q5K => "pack_q5_k",
            DType::Q6K => "pack_q6_k",
            DType::IQ4NL => "pack_iq4_nl",
            DType::MXFP4 => "pack_mxfp4",
            DType::F32 | DType::F16 | DType::BF16 => panic!("{} has no blocks", dtype.name()),
        },
    };
    let launch = Launch { grid: [rows as u32, 1, 1], block: [256, 1, 1], shared_bytes: 0 };
    let args = [Arg::Ptr(from), Arg::U32(first as u32), Arg::U32(n as u32), Arg::U32(k as u32), Arg::Ptr(to)];
    // SAFETY: passed on; a block per row, and the kernel's parameters.
    unsafe { device.launch(Kernel { source: "pack.cu", name }, &launch, &args) }
}

/// A matrix `[n, k]` as files have it, on a device as its kernels take it.
pub fn on_device(
    device: &Arc<dyn Device>,
    dtype: DType,
    shape: (usize, usize),
    bytes: &[u8],
) -> Result<Buffer, CudaError> {
    match Blocks::of(dtype) {
        Some(blocks) => blocks_on_device(device, blocks, shape, bytes),
        None => Buffer::of(device, bytes),
    }
}

/// As [`on_device`], of blocks.
pub fn blocks_on_device(
    device: &Arc<dyn Device>,
    blocks: Blocks,
    (n, k): (usize, usize),
    bytes: &[u8],
) -> Result<Buffer, CudaError> {
    let buffer = Buffer::new(device, blocks.device_bytes(n, k))?;
    Packer::new(device, bytes.len())?.upload(blocks, (n, k), bytes, (&buffer, 0))?;
    device.synchronize()?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::ops::testing::in_every_order;
    use crate::testing::Random;

    /// The kernel makes what the reference makes, of bytes that nobody chose, in one piece or row by row.
    #[test]
    fn planes_are_the_references() {
        in_every_order(|device, order| {
            let mut random = Random::new(31);
            for blocks in Blocks::all() {
                let (n, k) = (random.within(1, 5), blocks.block_len() * random.within(1, 9));
                let bytes: Vec<u8> = (0..n * blocks.row_bytes(k)).map(|_| random.within(0, 255) as u8).collect();
                let want = blocks.pack((n, k), &bytes);
                for staging in [0, bytes.len()] {
                    let to = Buffer::new(device, want.len()).unwrap();
                    let mut packer = Packer::new(device, staging).unwrap();
                    packer.upload(blocks, (n, k), &bytes, (&to, 0)).unwrap();
                    assert!(to.to_vec::<u8>(want.len()).unwrap() == want, "{blocks:?} [{n}, {k}] {order:?} {staging}");
                }
            }
        });
    }
}

//! Quantised matrices as they lie on a device: a file's blocks taken apart into planes, so that kernels read codes and scales in
//! aligned accesses of up to 16 bytes whatever a block's length is. `kernels/cuda/planes.cuh` describes the layout; this is the same
//! in Rust: how many bytes it takes, and what a matrix becomes, which `pack.cu` is tested against.
//!
//! Read [`Blocks`].

use crate::DType;

/// Elements whose codes four lanes share.
const UNIT: usize = 128;
const LANES: usize = 4;

/// A quantised type, as files have it in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Blocks {
    /// One of GGML's.
    Ggml(DType),
    /// 64 elements in 36 bytes: four e4m3 scales, then fp4 (e2m1) elements, two in a byte.
    NvFp4,
}

/// Where a block's scales lie in a file, and what they take in a step of a plane.
#[derive(Clone, Copy, Default)]
struct Scales {
    first: usize,
    each: usize,
    per_step: usize,
}

/// What `planes.cuh` says of a type.
struct Layout {
    block: usize,
    block_bytes: usize,
    low: usize,
    high: usize,
    scales: [Scales; 2],
}

impl Blocks {
    /// The blocks of a type, if it is quantised.
    pub fn of(dtype: DType) -> Option<Self> {
        (dtype.block_len() > 1).then_some(Self::Ggml(dtype))
    }

    /// Every type, for tests.
    pub fn all() -> impl Iterator<Item = Self> {
        DType::ALL.into_iter().filter_map(Self::of).chain([Self::NvFp4])
    }

    /// Elements of a block: rows are whole numbers of them.
    pub fn block_len(self) -> usize {
        self.layout().block
    }

    /// Bytes of a row of `k` elements in a file.
    ///
    /// # Panics
    ///
    /// If `k` is not whole blocks.
    pub fn row_bytes(self, k: usize) -> usize {
        let Layout { block, block_bytes, .. } = self.layout();
        assert!(k.is_multiple_of(block), "rows of {k} elements in blocks of {block}");
        k / block * block_bytes
    }

    /// Bytes of a matrix `[n, k]` on a device: as many as in a file, but for Q3_K's scales, and rows that are filled up to whole steps.
    pub fn device_bytes(self, n: usize, k: usize) -> usize {
        let layout = self.layout();
        let steps = n * k.div_ceil(layout.step());
        let codes = layout.step() * (layout.low + layout.high) / 8;
        steps * (codes + layout.scales[0].per_step + layout.scales[1].per_step)
    }

    /// The planes of a matrix `[n, k]` that a file has as `bytes`: what the device's kernel makes of it.
    ///
    /// # Panics
    ///
    /// If `bytes` are not of this shape.
    pub fn pack(self, (n, k): (usize, usize), bytes: &[u8]) -> Vec<u8> {
        let layout = self.layout();
        let (row_bytes, step) = (self.row_bytes(k), layout.step());
        assert_eq!(bytes.len(), n * row_bytes, "[{n}, {k}] of {self:?}");
        let (rows, steps) = (|| bytes.chunks_exact(row_bytes.max(1)), k.div_ceil(step));
        let mut out = Vec::with_capacity(self.device_bytes(n, k));
        for (bits, shift) in [(layout.low, 0), (layout.high, layout.low)] {
            for row in rows() {
                for unit in 0..steps * step / UNIT {
                    self.pack_unit(&layout, row, (k, unit), (bits, shift), &mut out);
                }
            }
        }
        for Scales { first, each, per_step } in layout.scales {
            for row in rows() {
                let mut blocks = row.chunks_exact(layout.block_bytes);
                for _ in 0..steps {
                    let end = out.len() + per_step;
                    for block in blocks.by_ref().take(step / layout.block) {
                        out.extend(&block[first..first + each]);
                    }
                    out.resize(end, 0);
                }
            }
        }
        out
    }

    /// `bits` bits of each code of a unit, from bit `shift` on.
    fn pack_unit(
        self,
        layout: &Layout,
        row: &[u8],
        (k, unit): (usize, usize),
        (bits, shift): (usize, usize),
        out: &mut Vec<u8>,
    ) {
        let together = bits.min(4);
        for chunk in 0..bits.div_ceil(4) {
            for (lane, word) in (0..LANES).flat_map(|lane| (0..together).map(move |word| (lane, word))) {
                let word = chunk * together + word;
                for byte in 0..4 {
                    let mut packed = 0;
                    for field in 0..8 / bits {
                        let element = unit * UNIT + 16 * (8 / bits * word + field) + 4 * lane + byte;
                        if element < k {
                            let block = &row[element / layout.block * layout.block_bytes..][..layout.block_bytes];
                            let mask = ((1u16 << bits) - 1) as u8;
                            packed |= (self.code(block, element % layout.block) >> shift & mask) << (field * bits);
                        }
                    }
                    out.push(packed);
                }
            }
        }
    }

    /// Element `i` of a block, as it is coded. `ggml-quants.h` has the places of its bits.
    fn code(self, block: &[u8], i: usize) -> u8 {
        // In blocks of 256: which half, and where in it.
        let (half, at) = (i / 128, i % 128);
        // In blocks of 32: the first 16 elements are in low halves of bytes, the others in high ones.
        let nibble = |from: usize| block[from + i % 16] >> (4 * (i / 16)) & 15;
        let fifth = |from: usize| (block[from + i / 8] >> (i % 8) & 1) << 4;
        // Q4_K and Q5_K: 32 elements in low halves, the next 32 in high ones.
        let of_64 = |from: usize| block[from + i / 64 * 32 + i % 32] >> (4 * (i / 32 % 2)) & 15;
        match self {
            Self::NvFp4 => block[4 + i / 2] >> (4 * (i % 2)) & 15,
            Self::Ggml(dtype) => match dtype {
                DType::Q4_0 | DType::IQ4NL => nibble(2),
                DType::Q4_1 => nibble(4),
                DType::Q5_0 => nibble(6) | fifth(2),
                DType::Q5_1 => nibble(8) | fifth(4),
                DType::Q8_0 => block[2 + i] ^ 0x80,
                DType::MXFP4 => nibble(1),
                DType::Q2K => block[16 + 32 * half + at % 32] >> (2 * (at / 32)) & 3,
                DType::Q3K => {
                    let low = block[32 + 32 * half + at % 32] >> (2 * (at / 32)) & 3;
                    low | (block[i % 32] >> (i / 32) & 1) << 2
                }
                DType::Q4K => of_64(16),
                DType::Q5K => of_64(48) | (block[16 + i % 32] >> (i / 32) & 1) << 4,
                DType::Q6K => {
                    let low = block[64 * half + at % 64] >> (4 * (at / 64)) & 15;
                    low | (block[128 + 32 * half + at % 32] >> (2 * (at / 32)) & 3) << 4
                }
                DType::F32 | DType::F16 | DType::BF16 => unreachable!("{} has no blocks", dtype.name()),
            },
        }
    }

    fn layout(self) -> Layout {
        let of = |block, block_bytes, (low, high), scales| Layout { block, block_bytes, low, high, scales };
        let scales = |first, each, per_step| Scales { first, each, per_step };
        let none = Scales::default();
        match self {
            Self::NvFp4 => of(64, 36, (4, 0), [scales(0, 4, 8), none]),
            Self::Ggml(dtype) => match dtype {
                DType::Q4_0 | DType::IQ4NL => of(32, 18, (4, 0), [scales(0, 2, 8), none]),
                DType::Q4_1 => of(32, 20, (4, 0), [scales(0, 4, 16), none]),
                DType::Q5_0 => of(32, 22, (4, 1), [scales(0, 2, 8), none]),
                DType::Q5_1 => of(32, 24, (4, 1), [scales(0, 4, 16), none]),
                DType::Q8_0 => of(32, 34, (8, 0), [scales(0, 2, 8), none]),
                DType::MXFP4 => of(32, 17, (4, 0), [scales(0, 1, 4), none]),
                DType::Q2K => of(256, 84, (2, 0), [scales(0, 16, 16), scales(80, 4, 4)]),
                // The file's 14 bytes, filled up so that they are one access.
                DType::Q3K => of(256, 110, (2, 1), [scales(96, 14, 16), none]),
                DType::Q4K => of(256, 144, (4, 0), [scales(0, 16, 16), none]),
                DType::Q5K => of(256, 176, (4, 1), [scales(0, 16, 16), none]),
                DType::Q6K => of(256, 210, (4, 2), [scales(192, 16, 16), scales(208, 2, 2)]),
                DType::F32 | DType::F16 | DType::BF16 => unreachable!("{} has no blocks", dtype.name()),
            },
        }
    }
}

impl Layout {
    fn step(&self) -> usize {
        self.block.max(UNIT)
    }
}

/// Bytes of a matrix `[n, k]` on a device, plain or in planes.
///
/// # Panics
///
/// If `k` is not whole blocks.
pub fn matrix_bytes(dtype: DType, n: usize, k: usize) -> usize {
    match Blocks::of(dtype) {
        Some(blocks) => blocks.device_bytes(n, k),
        None => n * k * dtype.block_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn sizes_are_those_of_files_where_rows_are_whole_steps() {
        for blocks in Blocks::all() {
            let file = 3 * blocks.row_bytes(512);
            let more = if blocks == Blocks::Ggml(DType::Q3K) { 3 * 2 * 2 } else { 0 };
            assert_eq!(blocks.device_bytes(3, 512), file + more, "{blocks:?}");
        }
        let q4 = Blocks::Ggml(DType::Q4_0);
        assert_eq!(q4.device_bytes(2, 160), 2 * 2 * 72, "160 elements are filled up to 256");
        assert_eq!(matrix_bytes(DType::F16, 3, 40), 240);
    }

    /// Every byte of a file is somewhere: as many distinct matrices go in as come out.
    #[test]
    fn nothing_is_lost() {
        let mut random = Random::new(3);
        for blocks in Blocks::all() {
            let (n, k) = (2, 256);
            let bytes: Vec<u8> = (0..n * blocks.row_bytes(k)).map(|_| random.within(0, 255) as u8).collect();
            let packed = blocks.pack((n, k), &bytes);
            assert_eq!(packed.len(), blocks.device_bytes(n, k), "{blocks:?}");
            for at in 0..bytes.len() {
                let mut other = bytes.clone();
                other[at] ^= 1 << random.within(0, 7);
                assert!(blocks.pack((n, k), &other) != packed, "{blocks:?}: byte {at}");
            }
        }
    }

    /// A unit of four-bit codes as the kernel's lanes read it: word w of lane t has sixteens 2w and 2w + 1 in its halves of bytes.
    #[test]
    fn lanes_have_their_elements_together() {
        let blocks = Blocks::Ggml(DType::Q4_0);
        let mut bytes = Vec::new();
        for block in 0..4u8 {
            bytes.extend([0xaa, block]);
            bytes.extend((0..16).map(|i| ((i + block) % 16) | (((i * 3 + block) % 16) << 4)));
        }
        let packed = blocks.pack((1, 128), &bytes);
        for (lane, word, byte) in [(0, 0, 0), (3, 2, 1), (1, 3, 3)] {
            let (got, i) = (packed[16 * lane + 4 * word + byte], 4 * lane as u8 + byte as u8);
            let block = word as u8;
            assert_eq!((got & 15, got >> 4), ((i + block) % 16, (i * 3 + block) % 16));
        }
        assert_eq!(packed[64..], [0xaa, 0, 0xaa, 1, 0xaa, 2, 0xaa, 3]);
    }
}

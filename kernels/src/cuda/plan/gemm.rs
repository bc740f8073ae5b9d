//! The plan of a product of many rows: which kernel and tile, how many blocks, and why not the others.
//!
//! The largest tile wins that leaves no multiprocessor without work, because a tile of `bm x bn` reads `1 / bm + 1 / bn` bytes
//! per multiplication; if every tile leaves some idle, the smallest. All tiles sum over k in the same order, so that a
//! choice by m does not show in the result.

use crate::DType;
use crate::cuda::device::{Kernel, Launch, Properties};
use std::fmt;

/// The shape of a product: `y[m, n] = x[m, k] · w[n, k]ᵀ`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Shape {
    /// Rows of x.
    pub m: usize,
    /// Rows of w, columns of y.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
}

/// A tile that a kernel was compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tile {
    /// Rows of x that a block takes.
    pub bm: usize,
    /// Rows of w that a block takes (of both matrices together, if gated).
    pub bn: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Steps of k under way at once; 0 for the kernels without asynchronous copies.
    pub stages: usize,
    /// Kernels for bf16, gated bf16, f16, gated f16.
    names: [&'static str; 4],
}

macro_rules! tile {
    ($bm:literal, $bn:literal, $threads:literal, $stages:literal) => {
        Tile {
            bm: $bm,
            bn: $bn,
            threads: $threads,
            stages: $stages,
            names: [
                concat!("gemm_mma_bf16_", $bm, "x", $bn),
                concat!("gemm_mma_bf16_", $bm, "x", $bn, "_gated"),
                concat!("gemm_mma_f16_", $bm, "x", $bn),
                concat!("gemm_mma_f16_", $bm, "x", $bn, "_gated"),
            ],
        }
    };
}

/// The tiles of `gemm_mma.cu`, largest first.
pub const TILES: [Tile; 3] = [tile!(128, 256, 256, 3), tile!(128, 128, 128, 3), tile!(64, 64, 128, 4)];

/// The tiles of `gemm_fp8.cu`, which has no kernels for other types.
const FP8_TILES: [Tile; 2] = [
    Tile { bm: 128, bn: 128, threads: 128, stages: 3, names: ["gemm_fp8_128x128", "gemm_fp8_128x128_gated", "", ""] },
    Tile { bm: 64, bn: 64, threads: 128, stages: 4, names: ["gemm_fp8_64x64", "gemm_fp8_64x64_gated", "", ""] },
];

/// Those of them for weights with a factor per block.
const FP8_BLOCK_TILES: [Tile; 2] = [
    Tile {
        bm: 128,
        bn: 128,
        threads: 256,
        stages: 3,
        names: ["gemm_fp8_blocks_128x128", "gemm_fp8_blocks_128x128_gated", "", ""],
    },
    Tile {
        bm: 64,
        bn: 64,
        threads: 128,
        stages: 4,
        names: ["gemm_fp8_blocks_64x64", "gemm_fp8_blocks_64x64_gated", "", ""],
    },
];

impl Tile {
    /// Bytes of k per step and row.
    const ROW_BYTES: usize = 128;

    /// Dynamic shared memory of a block.
    pub fn shared_bytes(&self) -> usize {
        self.stages * (self.bm + self.bn) * Self::ROW_BYTES
    }

    /// Columns of y per block.
    fn columns(&self, gated: bool) -> usize {
        if gated { self.bn / 2 } else { self.bn }
    }

    fn grid(&self, shape: Shape, gated: bool) -> [usize; 2] {
        [shape.m.div_ceil(self.bm), shape.n.div_ceil(self.columns(gated))]
    }
}

/// Why a tile was not taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    /// A block's stages do not fit.
    Shared {
        /// Bytes a block needs.
        needed: usize,
        /// Bytes the device has for one.
        available: usize,
    },
    /// Some multiprocessors would have nothing to do.
    Idle {
        /// Blocks of the launch.
        blocks: usize,
        /// Multiprocessors of the device.
        multiprocessors: usize,
    },
    /// A larger tile keeps all multiprocessors busy too, and reads less.
    LargerSuffices,
    /// Rows are not whole numbers of 16 bytes.
    Alignment {
        /// Bytes of a row.
        row_bytes: usize,
    },
    /// The device has no instructions for it.
    Architecture {
        /// Its compute capability times ten.
        sm: u32,
    },
    /// More rows than the kernel takes.
    Rows {
        /// Rows of x.
        rows: usize,
        /// Most that it takes.
        most: usize,
    },
    /// f32 is not multiplied on tensor cores, which would round it.
    Precision,
    /// The kernel has no place for a factor per block.
    Factors,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared { needed, available } => write!(f, "needs {needed} bytes of shared memory of {available}"),
            Self::Idle { blocks, multiprocessors } => {
                write!(f, "{blocks} blocks for {multiprocessors} multiprocessors")
            }
            Self::LargerSuffices => f.write_str("a larger tile keeps all multiprocessors busy and reads less"),
            Self::Alignment { row_bytes } => write!(f, "rows of {row_bytes} bytes are not whole numbers of 16"),
            Self::Architecture { sm } => write!(f, "devices of compute capability {}.{} cannot", sm / 10, sm % 10),
            Self::Rows { rows, most } => write!(f, "{rows} rows of at most {most}"),
            Self::Precision => f.write_str("tensor cores would round f32"),
            Self::Factors => f.write_str("factors per block are not taken"),
        }
    }
}

/// A launch, and why it is this one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The kernel.
    pub kernel: Kernel,
    /// Its blocks.
    pub launch: Launch,
    /// What else there was.
    pub rejected: Vec<(&'static str, Reason)>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { grid, block, shared_bytes } = self.launch;
        write!(f, "{} on {} x {} blocks of {}, {shared_bytes} bytes", self.kernel.name, grid[0], grid[1], block[0])?;
        self.rejected.iter().try_for_each(|(name, reason)| write!(f, "; not {name}: {reason}"))
    }
}

/// Plans a product of plain weights: `dtype` (F32, F16 or BF16) is the type of x and of w.
///
/// # Panics
///
/// For another type, an empty shape, or more blocks than a grid has (65535 in n).
pub fn plan(device: &Properties, dtype: DType, shape: Shape, gated: bool) -> Plan {
    assert!(shape.m > 0 && shape.n > 0 && shape.k > 0, "{shape:?} has nothing to multiply");
    let (names, bytes) = match dtype {
        DType::BF16 => (0, 2),
        DType::F16 => (2, 2),
        DType::F32 => return simt(dtype, shape, gated, Reason::Precision),
        other => panic!("{} is not multiplied as it is stored", other.name()),
    };
    let row_bytes = shape.k * bytes;
    if !row_bytes.is_multiple_of(16) {
        return simt(dtype, shape, gated, Reason::Alignment { row_bytes });
    }
    tiled(device, "gemm_mma.cu", &TILES, names + usize::from(gated), shape, gated).unwrap_or_else(|rejected| {
        let needed = TILES[TILES.len() - 1].shared_bytes();
        let available = device.shared_per_block as usize;
        Plan { rejected, ..simt(dtype, shape, gated, Reason::Shared { needed, available }) }
    })
}

/// Plans a product of fp8 rows, as [`plan`] does for 16 bits; `blocks` says whether weights have a factor per block and not per row. k
/// is a multiple of 16.
///
/// # Errors
///
/// Why every tile was rejected.
pub fn plan_fp8(
    device: &Properties,
    shape: Shape,
    gated: bool,
    blocks: bool,
) -> Result<Plan, Vec<(&'static str, Reason)>> {
    assert!(shape.m > 0 && shape.n > 0 && shape.k > 0, "{shape:?} has nothing to multiply");
    if device.sm < 89 {
        return Err(vec![("gemm_fp8", Reason::Architecture { sm: device.sm })]);
    }
    if !shape.k.is_multiple_of(16) {
        return Err(vec![("gemm_fp8", Reason::Alignment { row_bytes: shape.k })]);
    }
    let tiles = if blocks { &FP8_BLOCK_TILES } else { &FP8_TILES };
    tiled(device, "gemm_fp8.cu", tiles, usize::from(gated), shape, gated)
}

/// Chooses among tiles, largest first, by the rule that the module states; `name` is which of a tile's kernels.
fn tiled(
    device: &Properties,
    source: &'static str,
    tiles: &[Tile],
    name: usize,
    shape: Shape,
    gated: bool,
) -> Result<Plan, Vec<(&'static str, Reason)>> {
    let (multiprocessors, available) = (device.multiprocessors as usize, device.shared_per_block as usize);
    let mut rejected = Vec::new();
    let mut chosen: Option<(&Tile, usize)> = None;
    for tile in tiles {
        let [across, down] = tile.grid(shape, gated);
        let (needed, blocks) = (tile.shared_bytes(), across * down);
        match chosen {
            _ if needed > available => rejected.push((tile.names[name], Reason::Shared { needed, available })),
            Some((larger, fewer)) if fewer < multiprocessors && blocks > fewer => {
                rejected.push((larger.names[name], Reason::Idle { blocks: fewer, multiprocessors }));
                chosen = Some((tile, blocks));
            }
            Some(_) => rejected.push((tile.names[name], Reason::LargerSuffices)),
            None => chosen = Some((tile, blocks)),
        }
    }
    let Some((tile, _)) = chosen else { return Err(rejected) };
    let [across, down] = tile.grid(shape, gated);
    Ok(Plan {
        kernel: Kernel { source, name: tile.names[name] },
        launch: launch(across, down, tile.threads, tile.shared_bytes()),
        rejected,
    })
}

fn launch(across: usize, down: usize, threads: u32, shared_bytes: usize) -> Launch {
    assert!(down <= 65_535, "{down} tiles in n");
    Launch { grid: [across as u32, down as u32, 1], block: [threads, 1, 1], shared_bytes: shared_bytes as u32 }
}

/// The kernel without tensor cores.
fn simt(dtype: DType, shape: Shape, gated: bool, reason: Reason) -> Plan {
    let name = match (dtype, gated) {
        (DType::F32, false) => "gemm_simt_f32",
        (DType::F32, true) => "gemm_simt_f32_gated",
        (DType::F16, false) => "gemm_simt_f16",
        (DType::F16, true) => "gemm_simt_f16_gated",
        (_, false) => "gemm_simt_bf16",
        (_, true) => "gemm_simt_bf16_gated",
    };
    Plan {
        kernel: Kernel { source: "gemm_simt.cu", name },
        launch: launch(shape.m.div_ceil(64), shape.n.div_ceil(64), 256, 0),
        rejected: vec![("gemm_mma", reason)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(sm: u32, multiprocessors: u32, shared_per_block: u32) -> Properties {
        Properties {
            name: "test".into(),
            sm,
            multiprocessors,
            shared_per_block,
            memory_bytes: 1 << 34,
            l2_bytes: 1 << 25,
        }
    }

    fn named(device: &Properties, dtype: DType, m: usize, n: usize, k: usize, gated: bool) -> Plan {
        plan(device, dtype, Shape { m, n, k }, gated)
    }

    #[test]
    fn large_products_take_large_tiles() {
        let h100 = device(90, 132, 227 << 10);
        let plan = named(&h100, DType::BF16, 4096, 4096, 4096, false);
        assert_eq!(plan.kernel.name, "gemm_mma_bf16_128x256");
        assert_eq!(plan.launch, Launch { grid: [32, 16, 1], block: [256, 1, 1], shared_bytes: 147_456 });
        assert!(plan.rejected.iter().all(|(_, reason)| *reason == Reason::LargerSuffices), "{plan}");
        // 4 x 8 tiles of the largest leave a hundred multiprocessors idle.
        let plan = named(&h100, DType::BF16, 512, 1024, 4096, false);
        assert_eq!(plan.kernel.name, "gemm_mma_bf16_64x64");
        assert_eq!(plan.rejected[0], ("gemm_mma_bf16_128x256", Reason::Idle { blocks: 16, multiprocessors: 132 }));
        // A gated product has half as many columns per tile.
        let plan = named(&h100, DType::F16, 512, 14336, 4096, true);
        assert_eq!((plan.kernel.name, plan.launch.grid), ("gemm_mma_f16_128x256_gated", [4, 112, 1]));
    }

    #[test]
    fn shared_memory_decides_on_smaller_devices() {
        let l4 = device(89, 58, 99 << 10);
        let plan = named(&l4, DType::BF16, 4096, 4096, 4096, false);
        assert_eq!(plan.kernel.name, "gemm_mma_bf16_128x128");
        assert_eq!(plan.rejected[0].1, Reason::Shared { needed: 147_456, available: 101_376 });
        assert!(plan.to_string().contains("not gemm_mma_bf16_128x256: needs 147456 bytes"), "{plan}");
        let tiny = named(&device(80, 10, 32 << 10), DType::BF16, 4096, 4096, 4096, false);
        assert_eq!((tiny.kernel.name, tiny.rejected.len()), ("gemm_simt_bf16", 3));
    }

    #[test]
    fn what_tensor_cores_cannot_take_goes_without_them() {
        let h100 = device(90, 132, 227 << 10);
        let odd = named(&h100, DType::BF16, 100, 100, 100, true);
        assert_eq!(odd.kernel.name, "gemm_simt_bf16_gated");
        assert_eq!(odd.rejected, [("gemm_mma", Reason::Alignment { row_bytes: 200 })]);
        let exact = named(&h100, DType::F32, 65, 64, 64, false);
        assert_eq!((exact.kernel.name, exact.launch.grid), ("gemm_simt_f32", [2, 1, 1]));
    }

    #[test]
    fn fp8_needs_its_instructions_and_whole_rows() {
        let shape = Shape { m: 4096, n: 4096, k: 4096 };
        let a100 = plan_fp8(&device(80, 108, 163 << 10), shape, false, false).unwrap_err();
        assert_eq!(a100, [("gemm_fp8", Reason::Architecture { sm: 80 })]);
        let l4 = device(89, 58, 99 << 10);
        assert_eq!(plan_fp8(&l4, shape, true, false).unwrap().kernel.name, "gemm_fp8_128x128_gated");
        assert_eq!(plan_fp8(&l4, shape, true, true).unwrap().kernel.name, "gemm_fp8_blocks_128x128_gated");
        assert_eq!(plan_fp8(&l4, Shape { m: 64, n: 640, k: 64 }, false, false).unwrap().kernel.name, "gemm_fp8_64x64");
        let odd = plan_fp8(&l4, Shape { k: 24, ..shape }, false, false).unwrap_err();
        assert_eq!(odd, [("gemm_fp8", Reason::Alignment { row_bytes: 24 })]);
    }

    /// Every tile covers the product, and every plan fits the device.
    #[test]
    fn plans_cover_every_shape() {
        for gated in [false, true] {
            for (m, n) in [(1, 1), (63, 129), (64, 256), (129, 4097), (8192, 128_256)] {
                for device in [device(80, 108, 163 << 10), device(89, 58, 99 << 10), device(100, 148, 227 << 10)] {
                    let plan = named(&device, DType::BF16, m, n, 64, gated);
                    let tile = TILES.iter().find(|tile| tile.names.contains(&plan.kernel.name)).expect("a tile");
                    let [across, down, _] = plan.launch.grid.map(|g| g as usize);
                    assert!(across * tile.bm >= m && down * tile.columns(gated) >= n, "{plan}");
                    assert!((across - 1) * tile.bm < m && (down - 1) * tile.columns(gated) < n, "{plan}");
                    assert!(plan.launch.shared_bytes <= device.shared_per_block);
                    assert_eq!(plan.rejected.len(), TILES.len() - 1, "{plan}");
                }
            }
        }
    }
}

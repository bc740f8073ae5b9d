//! How this process's memory is mapped: `PAGEMAP_SCAN` of linux/fs.h (Linux 6.7 and later), an ioctl that rustix does not have.

use crate::mapping::HUGE_PAGE_BYTES;
use rustix::ioctl::{Updater, ioctl, opcode};
use std::fs::File;
use std::io;

const PRESENT: u64 = 1 << 3;
const HUGE: u64 = 1 << 6;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// Which of so many pieces of 2 MiB from `base` on have pages that are there and not huge, in rising order.
#[allow(unsafe_code, reason = "the ioctl writes a list through an address")]
pub fn small_pieces(base: usize, pieces: usize) -> io::Result<Vec<usize>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let (mut start, end) = (base as u64, (base + pieces * HUGE_PAGE_BYTES) as u64);
    let mut small = Vec::new();
    while start < end {
        let mut regions = [Region::default(); 512];
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: 0,
            start,
            end,
            walk_end: 0,
            // Exposed: the kernel writes through the number, which the compiler must know of.
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: HUGE,
            category_mask: PRESENT | HUGE,
            category_anyof_mask: 0,
            return_mask: PRESENT,
        };
        const SCAN: rustix::ioctl::Opcode = opcode::read_write::<Scan>(b'f', 16);
        // SAFETY: the argument is what the call takes, and `vec` is valid for `vec_len` regions until it returns.
        unsafe { ioctl(&pagemap, Updater::<SCAN, Scan>::new(&mut scan))? };
        // Regions that were not written are empty.
        for region in regions.iter().filter(|region| region.start < region.end) {
            let piece = |address: u64| (address as usize - base) / HUGE_PAGE_BYTES;
            small.extend(piece(region.start)..=piece(region.end - 1));
        }
        if scan.walk_end <= start {
            break;
        }
        start = scan.walk_end;
    }
    small.dedup();
    Ok(small)
}

//! Anonymous memory in bulk: zeroed by the system, resident from the first write on, in huge pages where that helps.
//!
//! A huge page saves address translations in passes over gigabytes, but one byte written costs 2 MiB. So they are
//! asked for only where the part of the mapping that is in use is dense, and large against one of them. Read [`map`].

use memmap2::MmapMut;
use std::fmt::{self, Display};

/// Bytes of a transparent huge page on x86-64, and on aarch64 with pages of 4 KiB.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;
/// Smallest mapping that huge pages are asked for: the one at the edge of what is in use is then at most 1/32 of it.
const HUGE_FROM_BYTES: usize = 32 * HUGE_PAGE_BYTES;

/// Whether to ask for huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// For mappings of 64 MiB or more, if the system has them.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HugePagesGot {
    /// The system will use huge pages as it finds them.
    Advised,
    /// Not asked for: switched off.
    Off,
    /// Not asked for: the mapping is too small.
    Small,
    /// The system has none to give, for this reason.
    Refused(String),
}

impl Display for HugePagesGot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Advised => f.write_str("advised"),
            Self::Off => f.write_str("off"),
            Self::Small => f.write_str("not for mappings under 64 MiB"),
            Self::Refused(reason) => write!(f, "unavailable: {reason}"),
        }
    }
}

/// Maps at least `bytes` bytes, which must be used from the start on for huge pages not to be wasted.
///
/// # Errors
///
/// What the system said when it had no address space to give.
pub fn map(bytes: usize, huge: HugePages) -> std::io::Result<(MmapMut, HugePagesGot)> {
    if huge == HugePages::Off || bytes < HUGE_FROM_BYTES {
        let got = if huge == HugePages::Off { HugePagesGot::Off } else { HugePagesGot::Small };
        return Ok((MmapMut::map_anon(bytes)?, got));
    }
    // Whole huge pages, so that the last one can be one; address space costs nothing.
    let map = MmapMut::map_anon(bytes.checked_next_multiple_of(HUGE_PAGE_BYTES).unwrap_or(bytes))?;
    let got = advise(&map);
    Ok((map, got))
}

#[cfg(target_os = "linux")]
fn advise(map: &MmapMut) -> HugePagesGot {
    const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    // `madvise` succeeds even when the system's switch makes it mean nothing.
    match std::fs::read_to_string(SWITCH) {
        Ok(text) if text.contains("[never]") => return HugePagesGot::Refused(format!("{SWITCH} says never")),
        _ => {}
    }
    match map.advise(memmap2::Advice::HugePage) {
        Ok(()) => HugePagesGot::Advised,
        Err(error) => HugePagesGot::Refused(error.to_string()),
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &MmapMut) -> HugePagesGot {
    HugePagesGot::Refused("this system has no transparent huge pages".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_mappings_and_switched_off_ones_are_left_alone() {
        let got = |bytes, huge| map(bytes, huge).expect("address space").1;
        assert_eq!(got(4096, HugePages::Auto), HugePagesGot::Small);
        assert_eq!(got(HUGE_FROM_BYTES, HugePages::Off), HugePagesGot::Off);
        assert!(!matches!(got(HUGE_FROM_BYTES + 1, HugePages::Auto), HugePagesGot::Off | HugePagesGot::Small));
    }
}

//! Launch plans: which tile, grid and shared memory an operation takes for a shape, and why not another. Pure functions.

pub mod attention;
pub mod gemm;
pub mod gemv;
pub mod wgmma;

/// What was chosen, and why each candidate before it was not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice<T> {
    /// The first candidate that nothing speaks against.
    pub chosen: T,
    /// Those before it, with the reason.
    pub rejected: Vec<(T, String)>,
}

impl<T> Choice<T> {
    /// The first of `candidates` to which `objection` has none.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn first(candidates: impl IntoIterator<Item = T>, objection: impl Fn(&T) -> Option<String>) -> Self {
        let mut rejected = Vec::new();
        for candidate in candidates {
            match objection(&candidate) {
                None => return Self { chosen: candidate, rejected },
                Some(reason) => rejected.push((candidate, reason)),
            }
        }
        let reasons: Vec<&String> = rejected.iter().map(|(_, reason)| reason).collect();
        panic!("no candidate is possible: {reasons:?}");
    }
}

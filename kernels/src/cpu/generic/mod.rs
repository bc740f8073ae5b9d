//! The vector algorithms, written once over [`super::vector::Vector`] and compiled per ISA by `instantiate!`.

pub(crate) mod attention;
pub(crate) mod bytes;
pub(crate) mod digest;
pub(crate) mod matmul;
pub(crate) mod rows;
mod unpack;

//! Compiles the generic algorithms for one ISA: thin functions that switch the target features on, and their table.

/// `instantiate!("features", Vector, BytesDot)`: a table `KERNELS` of the generic algorithms under these target features (none if empty).
macro_rules! instantiate {
    ($features:literal, $vector:ty, $bytes:ty) => {
        $crate::cpu::instantiate!(@table [target_feature(enable = $features)] $vector, $bytes);
    };
    ($vector:ty, $bytes:ty) => {
        $crate::cpu::instantiate!(@table [inline] $vector, $bytes);
    };
    (@table [$($attribute:tt)*] $vector:ty, $bytes:ty) => {
        mod compiled {
            //! The generic algorithms under this ISA's target features. Safety: as the generic function, and the CPU has
            //! the features.
            use $crate::cpu::generic::attention::products;
            use $crate::cpu::generic::attention::tile::{Element, Keys};
            use $crate::cpu::generic::{attention, bytes, digest, matmul, rows};
            use $crate::{DType, KvFormat, KvMove};
            use $crate::cpu::vector::Vector;

            pub(super) const FLOAT_ROWS: usize = <$vector>::FLOAT_ROWS;
            pub(super) const BYTE_ROWS: usize = <$vector>::BYTE_ROWS;

            // SAFETY (all of these): the contract is passed on unchanged.
            #[$($attribute)*]
            pub(super) unsafe fn strip(job: &matmul::Job<'_>, scratch: &mut matmul::Scratch) {
                // SAFETY: passed on.
                unsafe { matmul::strip::<$vector, matmul::NoPairs, $bytes>(job, scratch) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn prepare(part: &mut $crate::cpu::operand::Part<'_>) {
                part.fill();
            }
            #[$($attribute)*]
            pub(super) unsafe fn dequantize(dtype: DType, src: &[u8], dst: &mut [f32]) {
                $crate::quant::decode_row(dtype, src, dst);
            }
            #[$($attribute)*]
            pub(super) unsafe fn rms_norm(x: *const f32, out: *mut f32, n: usize, weight: &[f32], eps: f32) {
                // SAFETY: passed on.
                unsafe { rows::rms_norm::<$vector>(x, out, n, weight, eps) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn rope(token: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32]) {
                // SAFETY: passed on.
                unsafe { rows::rope::<$vector>(token, head_dim, cos, sin) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn silu_mul(gate: &mut [f32], up: &[f32]) {
                // SAFETY: passed on.
                unsafe { rows::combine::<$vector, rows::SiluMul>(gate, up) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn gelu_tanh_mul(gate: &mut [f32], up: &[f32]) {
                // SAFETY: passed on.
                unsafe { rows::combine::<$vector, rows::GeluTanhMul>(gate, up) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn add(x: &mut [f32], y: &[f32]) {
                // SAFETY: passed on.
                unsafe { rows::combine::<$vector, rows::Add>(x, y) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn attention(piece: &attention::Piece<'_>, scratch: &mut attention::Scratch) {
                // SAFETY: passed on.
                unsafe { attention::attention::<$vector>(piece, scratch) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn join_splits(
                run: &attention::Run<'_>,
                states: *mut f32,
                scratch: &mut attention::Scratch,
            ) {
                // SAFETY: passed on.
                unsafe { attention::join::<$vector>(run, states, scratch) }
            }
            #[$($attribute)*]
            pub(super) unsafe fn write_kv(fmt: &KvFormat, page: &mut [u8], slot: usize, k: &[f32], v: &[f32]) {
                fmt.fill(page, slot, k, v);
            }
            #[$($attribute)*]
            pub(super) unsafe fn convert_kv(
                from: &KvFormat,
                page: &[u8],
                to: &KvFormat,
                out: &mut [u8],
                moved: KvMove,
            ) {
                from.recast(page, to, out, moved);
            }

            #[$($attribute)*]
            pub(super) unsafe fn copy_digested(
                state: &mut digest::Lanes,
                from: *const u8,
                to: *mut u8,
                stripes: usize,
                around_caches: bool,
            ) {
                // SAFETY: passed on.
                unsafe { digest::copy_digested::<$vector>(state, from, to, stripes, around_caches) }
            }

            impl bytes::ByteTiles<$vector> for $bytes {
                #[$($attribute)*]
                unsafe fn tile<Q: bytes::Kind, const M: usize, const R: usize>(t: &bytes::ByteTile<'_>) {
                    // SAFETY: passed on.
                    unsafe { bytes::byte_tile::<$vector, $bytes, Q, M, R>(t) }
                }
            }

            impl products::Strips for $vector {
                #[$($attribute)*]
                unsafe fn score_strip<E: Element, const N: usize>(
                    q: &[*const f32; 6],
                    dim: usize,
                    keys: &Keys,
                    ahead: &Keys,
                    count: usize,
                    out: *mut f32,
                ) {
                    // SAFETY: passed on.
                    unsafe { products::score_strip::<$vector, E, N>(q, dim, keys, ahead, count, out) }
                }
                #[$($attribute)*]
                unsafe fn weigh_strip<E: Element, const N: usize>(
                    strip: &products::Strip<'_>,
                    weights: *const f32,
                    keys: std::ops::Range<usize>,
                    out: *mut f32,
                ) {
                    // SAFETY: passed on.
                    unsafe { products::weigh_strip::<$vector, E, N>(strip, weights, keys, out) }
                }
            }
        }

        /// This ISA's row of the dispatch table.
        pub(crate) const KERNELS: $crate::cpu::dispatch::Kernels = $crate::cpu::dispatch::Kernels {
            strip: compiled::strip,
            prepare: compiled::prepare,
            pairs: false,
            float_rows: compiled::FLOAT_ROWS,
            byte_rows: compiled::BYTE_ROWS,
            dequantize: compiled::dequantize,
            rms_norm: compiled::rms_norm,
            rope: compiled::rope,
            silu_mul: compiled::silu_mul,
            gelu_tanh_mul: compiled::gelu_tanh_mul,
            add: compiled::add,
            attention: compiled::attention,
            join_splits: compiled::join_splits,
            write_kv: compiled::write_kv,
            convert_kv: compiled::convert_kv,
            copy_digested: compiled::copy_digested,
        };
    };
}
pub(crate) use instantiate;

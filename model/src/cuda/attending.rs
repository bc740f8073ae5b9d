//! Attention's lists of work for one set of rows: made once per pass for each window that the model's layers have.

#![allow(unsafe_code, reason = "the device's memory is addressed by numbers")]

use super::scratch::Numbers;
use crate::spec::ModelSpec;
use ridge_kernels::DType;
use ridge_kernels::cuda::ops::attention::{self, Layer, Lists};
use ridge_kernels::cuda::plan::attention::{Decode, ITEM_WORDS, NOTHING, Prefill, PrefillKernel, Span};
use ridge_kernels::cuda::{CudaError, Device};

/// The lists of one pass.
pub struct Attending {
    windows: Vec<Window>,
    kernel: PrefillKernel,
}

/// The lists for layers with one window; addresses are relative to the pass's numbers.
struct Window {
    window: Option<usize>,
    decode: Lists,
    is_direct: bool,
    workspace_bytes: usize,
    prefill: Lists,
}

impl Attending {
    /// Lists for single queries and for chunks, added to the pass's numbers. The work of single queries is filled up with nothing to a
    /// power of two, so that a graph of it serves many steps.
    pub fn new(
        spec: &ModelSpec,
        kernel: PrefillKernel,
        steps: &[Span],
        chunks: &[Span],
        numbers: &mut Numbers,
    ) -> Self {
        let mut windows: Vec<Window> = Vec::new();
        for window in spec.layer_specs.iter().map(|layer| layer.attention.window) {
            if windows.iter().any(|known| known.window == window) {
                continue;
            }
            let mut decode = Decode::new(steps, window);
            let entries = decode.work.len() / NOTHING.len();
            if entries > 0 {
                let padding = entries.next_power_of_two() - entries;
                decode.work.extend(std::iter::repeat_n(NOTHING, padding).flatten());
            }
            let prefill = Prefill::new(chunks, window, kernel.tile());
            let mut lists = |items: &[u32], work: &[u32]| Lists {
                items: numbers.push(items),
                item_count: items.len() / ITEM_WORDS,
                work: numbers.push(work),
                work_count: work.len() / 2,
            };
            windows.push(Window {
                window,
                decode: lists(&decode.items, &decode.work),
                is_direct: decode.is_direct(),
                workspace_bytes: decode.workspace_bytes(spec.heads, spec.head_dim),
                prefill: lists(&prefill.items, &prefill.work),
            });
        }
        Self { windows, kernel }
    }

    /// Bytes of partial results that any layer needs.
    pub fn workspace_bytes(&self) -> usize {
        self.windows.iter().map(|window| window.workspace_bytes).max().unwrap_or(0)
    }

    /// What its launches for single queries depend on: for each window the entries of work, and whether there is something to combine.
    pub fn shape(&self) -> impl Iterator<Item = (usize, bool)> {
        self.windows.iter().map(|window| (window.decode.work_count, !window.is_direct))
    }

    /// Attends from `q` to `out`, in the compute type.
    ///
    /// # Safety
    ///
    /// `numbers` is where the pass's numbers lie; `q` and `out` have a row for each of the spans' rows, `workspace` has
    /// [`Attending::workspace_bytes`]; the spans' block tables are those at `layer.tables` and cover their positions.
    pub unsafe fn run(
        &self,
        device: &dyn Device,
        layer: &Layer,
        window: Option<usize>,
        (numbers, workspace): (u64, u64),
        q: u64,
        out: (DType, u64),
    ) -> Result<(), CudaError> {
        let lists = self.windows.iter().find(|known| known.window == window).expect("every layer's window has lists");
        let placed = |lists: Lists| Lists { items: numbers + lists.items, work: numbers + lists.work, ..lists };
        let (decode, prefill) = (placed(lists.decode), placed(lists.prefill));
        // SAFETY: the lists are the plan's; the rest is passed on.
        unsafe {
            attention::decode(device, layer, &decode, (workspace, lists.is_direct), q, out)?;
            attention::prefill(device, layer, &prefill, self.kernel, q, out)
        }
    }
}

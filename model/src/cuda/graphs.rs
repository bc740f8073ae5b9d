//! Decode steps as graphs: a step's launches are recorded once and made again with one call, instead of some ten per layer.
//!
//! A launch's arguments are part of its graph, so a graph serves steps whose launches are the same: as many sequences, as many of
//! them sampled, as much work for attention (in powers of two), the same buffers. [`Shape`] is all of that. What differs from step
//! to step, tokens, positions, block tables and attention's lists, lies in memory that is filled before. A shape is computed directly
//! the first time, which compiles and loads what it needs, and recorded the second.
//!
//! Read [`Graphs::run`].

#![allow(unsafe_code, reason = "a graph's launches read memory that is addressed by numbers")]

use ridge_kernels::cuda::{CudaError, Device, Graph};
use std::collections::HashMap;
use std::sync::Arc;

/// Shapes that are remembered: those used longest ago go first. A graph takes some kilobytes for each launch.
const SHAPES_MAX: usize = 64;

/// What decides a step's launches.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Shape {
    /// Sequences.
    pub steps: usize,
    /// Those that sample.
    pub sampled: usize,
    /// Entries of attention's lists of work, and whether its results are combined afterwards: for each window, of all rows and of the
    /// sampled ones.
    pub attending: Vec<(usize, bool)>,
    /// Counts changes of the buffers.
    pub generation: u64,
}

#[derive(Debug)]
struct Known {
    graph: Option<Graph>,
    used: u64,
}

/// Graphs of the shapes that occurred.
#[derive(Debug)]
pub struct Graphs {
    on: bool,
    known: HashMap<Shape, Known>,
    generation: u64,
    runs: u64,
    replays: u64,
}

impl Graphs {
    /// None yet; if not `on`, never any.
    pub fn new(on: bool) -> Self {
        Self { on, known: HashMap::new(), generation: 0, runs: 0, replays: 0 }
    }

    /// How often a graph stood for launches.
    pub fn replays(&self) -> u64 {
        self.replays
    }

    /// Makes the launches of a step of this shape, which `launches` makes one by one.
    ///
    /// # Safety
    ///
    /// Steps of one shape make the same launches with the same arguments, and what those promise holds now.
    pub unsafe fn run(
        &mut self,
        device: &Arc<dyn Device>,
        shape: Shape,
        launches: impl Fn() -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        if !self.on {
            return launches();
        }
        if self.generation != shape.generation {
            // Their launches name buffers that are gone.
            self.known.clear();
            self.generation = shape.generation;
        }
        self.runs += 1;
        let Some(known) = self.known.get_mut(&shape) else {
            launches()?;
            self.remember(shape);
            return Ok(());
        };
        known.used = self.runs;
        let graph = match &mut known.graph {
            Some(graph) => graph,
            none => match Graph::record(device, &launches) {
                Ok(graph) => none.insert(graph),
                Err(error) => {
                    tracing::warn!("decode steps are launched one kernel at a time: {error}");
                    self.on = false;
                    self.known.clear();
                    return launches();
                }
            },
        };
        self.replays += 1;
        // SAFETY: the launches are this step's too, by the caller's promise.
        unsafe { graph.replay() }
    }

    fn remember(&mut self, shape: Shape) {
        if self.known.len() >= SHAPES_MAX {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.used).map(|(shape, _)| shape.clone());
            oldest.and_then(|oldest| self.known.remove(&oldest));
        }
        self.known.insert(shape, Known { graph: None, used: self.runs });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ridge_kernels::cuda::emulated::Emulated;
    use std::cell::Cell;

    fn shape(steps: usize, generation: u64) -> Shape {
        Shape { steps, sampled: steps, attending: vec![(steps, true)], generation }
    }

    /// The first step of a shape is launched, the second recorded; new buffers forget everything, and so does the oldest shape when
    /// there are too many.
    #[test]
    fn shapes_are_recorded_when_they_come_again() {
        let Some(emulated) = Emulated::for_tests() else { return };
        let device: Arc<dyn Device> = emulated;
        let calls = Cell::new(0);
        let run = |graphs: &mut Graphs, shape| {
            // SAFETY: no launches are made.
            unsafe {
                graphs.run(&device, shape, || {
                    calls.set(calls.get() + 1);
                    Ok(())
                })
            }
            .expect("nothing is asked of the device");
            (calls.replace(0), graphs.replays())
        };
        let mut graphs = Graphs::new(true);
        assert_eq!(run(&mut graphs, shape(1, 0)), (1, 0), "launched");
        assert_eq!(run(&mut graphs, shape(1, 0)), (1, 1), "recorded and replayed");
        assert_eq!(run(&mut graphs, shape(1, 0)), (0, 2), "replayed");
        assert_eq!(run(&mut graphs, shape(2, 0)), (1, 2), "another shape");
        assert_eq!(run(&mut graphs, shape(1, 1)), (1, 2), "other buffers");
        for steps in 2..2 + SHAPES_MAX {
            run(&mut graphs, shape(steps, 1));
        }
        assert_eq!(graphs.known.len(), SHAPES_MAX);
        assert_eq!(run(&mut graphs, shape(1, 1)), (1, 2), "forgotten");
        let mut off = Graphs::new(false);
        for _ in 0..3 {
            assert_eq!(run(&mut off, shape(1, 0)), (1, 0));
        }
    }
}

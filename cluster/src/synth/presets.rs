//! The shapes of well-known models, and four tiny ones for tests.
//!
//! Read [`Shape`] and [`Preset`]. Nothing here knows a file format; the numbers are those of the published
//! `config.json` files.

use clap::ValueEnum;

/// A model whose shape `cluster synth` can imitate.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Preset {
    /// 1.24 B parameters, tied head, llama3 rope scaling.
    #[value(name = "llama-3.2-1b")]
    Llama32_1b,
    /// 8.0 B parameters, llama3 rope scaling.
    #[value(name = "llama-3.1-8b")]
    Llama31_8b,
    /// 0.49 B parameters, QKV biases, tied head.
    #[value(name = "qwen2.5-0.5b")]
    Qwen25_05b,
    /// 0.60 B parameters, QK norm, tied head.
    #[value(name = "qwen3-0.6b")]
    Qwen3_06b,
    /// 7.2 B parameters, sliding window of 4096.
    #[value(name = "mistral-7b")]
    Mistral7b,
    /// A Llama of under 3 M parameters for tests.
    #[value(name = "tiny-llama")]
    TinyLlama,
    /// A Qwen2 of under 3 M parameters for tests.
    #[value(name = "tiny-qwen2")]
    TinyQwen2,
    /// A Qwen3 of under 3 M parameters for tests.
    #[value(name = "tiny-qwen3")]
    TinyQwen3,
    /// A Mistral of under 3 M parameters with a sliding window of 96 positions, for tests.
    #[value(name = "tiny-mistral")]
    TinyMistral,
}

/// Families differ in biases, norms, templates and names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// Llama 3.
    Llama,
    /// Mistral: a Llama with a window.
    Mistral,
    /// Qwen2: biases on q, k and v.
    Qwen2,
    /// Qwen3: RMS norms over each head of q and k.
    Qwen3,
}

/// Llama 3's stretching of low frequencies.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Llama3Rope {
    /// How much the slowest rotations are slowed further.
    pub factor: f64,
    /// Context the model was first trained for.
    pub original_context: usize,
}

/// Everything that decides tensor names and sizes.
#[derive(Clone, PartialEq, Debug)]
pub struct Shape {
    /// The preset's name, or what the user made of it.
    pub name: String,
    /// Names, biases and templates.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Rope scaling, if any.
    pub rope: Option<Llama3Rope>,
    /// Attention window, if any.
    pub window: Option<usize>,
    /// The output head is the embedding.
    pub tied: bool,
}

impl Preset {
    /// Its name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no preset is skipped").get_name().to_owned()
    }

    /// The numbers behind the name.
    pub fn shape(self) -> Shape {
        let name = self.name();
        match self {
            Preset::Llama32_1b => Shape {
                name,
                family: Family::Llama,
                hidden: 2048,
                layers: 16,
                heads: 32,
                kv_heads: 8,
                head_dim: 64,
                ffn: 8192,
                vocab: 128_256,
                context: 131_072,
                norm_eps: 1e-5,
                rope_theta: 500_000.0,
                rope: Some(Llama3Rope { factor: 32.0, original_context: 8192 }),
                window: None,
                tied: true,
            },
            Preset::Llama31_8b => Shape {
                hidden: 4096,
                layers: 32,
                head_dim: 128,
                ffn: 14_336,
                rope: Some(Llama3Rope { factor: 8.0, original_context: 8192 }),
                tied: false,
                name,
                ..Preset::Llama32_1b.shape()
            },
            Preset::Qwen25_05b => Shape {
                name,
                family: Family::Qwen2,
                hidden: 896,
                layers: 24,
                heads: 14,
                kv_heads: 2,
                head_dim: 64,
                ffn: 4864,
                vocab: 151_936,
                context: 32_768,
                norm_eps: 1e-6,
                rope_theta: 1e6,
                rope: None,
                window: None,
                tied: true,
            },
            Preset::Qwen3_06b => Shape {
                name,
                family: Family::Qwen3,
                hidden: 1024,
                layers: 28,
                heads: 16,
                kv_heads: 8,
                head_dim: 128,
                ffn: 3072,
                context: 40_960,
                ..Preset::Qwen25_05b.shape()
            },
            Preset::Mistral7b => Shape {
                family: Family::Mistral,
                vocab: 32_000,
                context: 32_768,
                rope_theta: 10_000.0,
                rope: None,
                window: Some(4096),
                name,
                ..Preset::Llama31_8b.shape()
            },
            // Tiny models keep every feature of their family. The hidden size is a whole number of 256-element
            // blocks, so that they can be written in the K quantisations too.
            Preset::TinyLlama => Shape {
                name,
                family: Family::Llama,
                hidden: 256,
                layers: 3,
                heads: 4,
                kv_heads: 2,
                head_dim: 64,
                ffn: 512,
                vocab: 1024,
                context: 512,
                norm_eps: 1e-5,
                rope_theta: 10_000.0,
                rope: Some(Llama3Rope { factor: 8.0, original_context: 64 }),
                window: None,
                tied: true,
            },
            Preset::TinyQwen2 => Shape {
                name,
                family: Family::Qwen2,
                norm_eps: 1e-6,
                rope_theta: 1e6,
                rope: None,
                ..Preset::TinyLlama.shape()
            },
            Preset::TinyQwen3 => Shape { name, family: Family::Qwen3, head_dim: 128, ..Preset::TinyQwen2.shape() },
            Preset::TinyMistral => Shape {
                name,
                family: Family::Mistral,
                rope: None,
                window: Some(96),
                tied: false,
                ..Preset::TinyLlama.shape()
            },
        }
    }
}

impl Llama3Rope {
    /// Wavelengths longer than this share of the original context are slowed by `factor`.
    pub const LOW_FREQ_FACTOR: f64 = 1.0;
    /// Wavelengths shorter than this share of the original context are left alone.
    pub const HIGH_FREQ_FACTOR: f64 = 4.0;

    /// The divisor of each rotary frequency, as `rope_freqs.weight` of a GGUF file holds it.
    pub fn factors(&self, theta: f64, head_dim: usize) -> Vec<f32> {
        let original = self.original_context as f64;
        (0..head_dim / 2)
            .map(|i| {
                let frequency = theta.powf(-((2 * i) as f64) / head_dim as f64);
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < original / Self::HIGH_FREQ_FACTOR {
                    return 1.0;
                }
                if wavelength > original / Self::LOW_FREQ_FACTOR {
                    return self.factor as f32;
                }
                let smooth =
                    (original / wavelength - Self::LOW_FREQ_FACTOR) / (Self::HIGH_FREQ_FACTOR - Self::LOW_FREQ_FACTOR);
                (1.0 / ((1.0 - smooth) / self.factor + smooth)) as f32
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::tensors::tensors;

    fn parameters(preset: Preset) -> usize {
        tensors(&preset.shape()).iter().map(|t| t.rows * t.cols).sum()
    }

    /// The published parameter counts, to the last weight.
    #[test]
    fn presets_have_the_published_sizes() {
        assert_eq!(parameters(Preset::Llama32_1b), 1_235_814_400);
        assert_eq!(parameters(Preset::Llama31_8b), 8_030_261_248);
        assert_eq!(parameters(Preset::Qwen25_05b), 494_032_768);
        assert_eq!(parameters(Preset::Qwen3_06b), 596_049_920);
        assert_eq!(parameters(Preset::Mistral7b), 7_241_732_096);
        for tiny in [Preset::TinyLlama, Preset::TinyQwen2, Preset::TinyQwen3, Preset::TinyMistral] {
            assert!(parameters(tiny) < 3_000_000);
        }
    }

    #[test]
    fn rope_factors_run_from_one_to_the_factor() {
        let rope = Llama3Rope { factor: 32.0, original_context: 8192 };
        let factors = rope.factors(500_000.0, 64);
        assert_eq!(factors.len(), 32);
        assert_eq!(factors[0], 1.0);
        assert_eq!(factors[31], 32.0);
        assert!(factors.is_sorted());
    }
}

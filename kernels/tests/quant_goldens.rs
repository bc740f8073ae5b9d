//! The decoders against gguf-py, bit for bit, on `goldens/quant_goldens.bin` (written by `goldens/make_quant_goldens.py`,
//! which describes the layout); and the encoders that gguf-py has too.

use ridge_kernels::{DType, dequantize_row, quantize_row};

static GOLDENS: &[u8] = include_bytes!("../goldens/quant_goldens.bin");
const ENCODER: u32 = 1 << 31;

#[test]
fn every_type_agrees_with_gguf_py() {
    let mut rest = GOLDENS;
    let (mut decoded, mut encoded) = (Vec::new(), Vec::new());
    while !rest.is_empty() {
        let (kind, count) = (number(take(&mut rest, 4)), number(take(&mut rest, 4)) as usize);
        let dtype = DType::from_ggml(kind & !ENCODER).expect("a known type");
        if kind & ENCODER == 0 {
            let blocks = take(&mut rest, count * dtype.block_bytes());
            let want = floats(take(&mut rest, count * dtype.block_len() * 4));
            check_decoder(dtype, blocks, &want);
            decoded.push(dtype);
        } else {
            let values = floats(take(&mut rest, count * 4));
            let want = take(&mut rest, dtype.row_bytes(count).expect("whole blocks"));
            let mut got = Vec::new();
            quantize_row(dtype, &values, &mut got).expect("finite values");
            assert_eq!(got, want, "encoding {dtype:?}");
            encoded.push(dtype);
        }
    }
    for dtype in DType::ALL {
        assert!(decoded.contains(&dtype), "{dtype:?} has no golden");
    }
    assert_eq!(encoded.len(), 8);
}

fn check_decoder(dtype: DType, blocks: &[u8], want: &[f32]) {
    let mut got = vec![f32::NAN; want.len()];
    dequantize_row(dtype, blocks, &mut got);
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{dtype:?} element {i}: {got:e}, gguf-py has {want:e}");
    }
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, tail) = rest.split_at(n);
    *rest = tail;
    head
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_bits(number(b))).collect()
}

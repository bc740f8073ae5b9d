//! Numbers as people write them: `32k` tokens (vLLM: small letters are decimal, capitals binary), `2GiB` of memory, `500ms`.

use std::time::Duration;

/// A count such as `512`, `32k` (32 000) or `32K` (32 768).
pub fn parse_count(text: &str) -> Result<usize, String> {
    let (digits, suffix) = split(text);
    let scale = match suffix {
        "" => 1,
        "k" => 1000,
        "K" => 1 << 10,
        "m" => 1_000_000,
        "M" => 1 << 20,
        _ => return Err(format!("{suffix:?} is not a unit; use k, K, m or M")),
    };
    let count = scaled(digits, scale)?;
    usize::try_from(count).ok().filter(|count| *count > 0).ok_or_else(|| "must be at least 1".into())
}

/// A size such as `1073741824`, `512MiB`, `512M` (both binary) or `2GB` (decimal).
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, suffix) = split(text);
    let scale = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("{suffix:?} is not a unit; use KiB, MiB, GiB, KB, MB or GB")),
    };
    let bytes = scaled(digits, scale)?;
    if bytes == 0 { Err("must be at least 1 byte".into()) } else { Ok(bytes) }
}

/// A time such as `500ms`, `1.5s` or `2` (seconds).
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (digits, suffix) = split(text);
    let microseconds = match suffix {
        "us" => 1,
        "ms" => 1000,
        "" | "s" => 1_000_000,
        "min" => 60_000_000,
        _ => return Err(format!("{suffix:?} is not a unit; use us, ms, s or min")),
    };
    Ok(Duration::from_micros(scaled(digits, microseconds)?))
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

fn scaled(digits: &str, scale: u64) -> Result<u64, String> {
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(|| "is too large".into());
    }
    let number: f64 = digits.parse().map_err(|_| format!("{digits:?} is not a number"))?;
    let product = number * scale as f64;
    if product < u64::MAX as f64 { Ok(product as u64) } else { Err("is too large".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        let check = |text, want: Option<usize>| assert_eq!(parse_count(text).ok(), want, "{text}");
        check("512", Some(512));
        check("32k", Some(32_000));
        check("32K", Some(32_768));
        check("1.5k", Some(1500));
        check("0", None);
        check("-1", None);
        check("8 apples", None);
        check("", None);
        check("99999999999999999999", None);
    }

    #[test]
    fn sizes() {
        let check = |text, want: Option<u64>| assert_eq!(parse_bytes(text).ok(), want, "{text}");
        check("4096", Some(4096));
        check("2GiB", Some(2 << 30));
        check("2g", Some(2 << 30));
        check("2 GB", Some(2_000_000_000));
        check("0.5GiB", Some(1 << 29));
        check("0", None);
        check("2 furlongs", None);
        check("18446744073709551615k", None);
    }

    #[test]
    fn durations() {
        let check = |text, want: Option<u64>| {
            assert_eq!(parse_duration(text).ok(), want.map(Duration::from_micros), "{text}");
        };
        check("500ms", Some(500_000));
        check("1.5 s", Some(1_500_000));
        check("2", Some(2_000_000));
        check("0.5min", Some(30_000_000));
        check("2h", None);
        check("", None);
    }
}

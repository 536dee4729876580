//! MessagePack, byte for byte as msgspec writes it.

use num_bigint::{BigInt, Sign};
use num_traits::ToPrimitive;

/// The extension type of ints beyond 64 bits: signed, big endian.
pub const LONG_INT: u8 = 1;
/// The extension type of states, or parts of them, that are bytes in a form of their kind.
pub const PACKED: u8 = 2;

pub fn write_int(out: &mut Vec<u8>, i: i64) {
    if i >= 0 {
        write_uint(out, i as u64)
    } else if i >= -32 {
        out.push(i as i8 as u8)
    } else if i >= i8::MIN as i64 {
        out.extend_from_slice(&[0xd0, i as i8 as u8])
    } else if i >= i16::MIN as i64 {
        out.push(0xd1);
        out.extend_from_slice(&(i as i16).to_be_bytes())
    } else if i >= i32::MIN as i64 {
        out.push(0xd2);
        out.extend_from_slice(&(i as i32).to_be_bytes())
    } else {
        out.push(0xd3);
        out.extend_from_slice(&i.to_be_bytes())
    }
}

pub fn write_uint(out: &mut Vec<u8>, u: u64) {
    if u < 128 {
        out.push(u as u8)
    } else if u <= u8::MAX as u64 {
        out.extend_from_slice(&[0xcc, u as u8])
    } else if u <= u16::MAX as u64 {
        out.push(0xcd);
        out.extend_from_slice(&(u as u16).to_be_bytes())
    } else if u <= u32::MAX as u64 {
        out.push(0xce);
        out.extend_from_slice(&(u as u32).to_be_bytes())
    } else {
        out.push(0xcf);
        out.extend_from_slice(&u.to_be_bytes())
    }
}

#[inline]
pub fn write_float(out: &mut Vec<u8>, f: f64) {
    let mut bytes = [0xcb, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes[1..].copy_from_slice(&f.to_be_bytes());
    out.extend_from_slice(&bytes);
}

/// Write an int of any size; beyond 64 bits as `pipeline.core.kinds.to_wire` has it.
pub fn write_big(out: &mut Vec<u8>, b: &BigInt) {
    if let Some(u) = b.to_u64() {
        return write_uint(out, u);
    }
    if let Some(i) = b.to_i64() {
        return write_int(out, i);
    }
    let mut bytes = b.to_signed_bytes_be();
    let size = b.bits() as usize / 8 + 1; // what Python's `bit_length() // 8 + 1` gives
    while bytes.len() < size {
        bytes.insert(0, if b.sign() == Sign::Minus { 0xff } else { 0 });
    }
    write_ext(out, LONG_INT, &bytes);
}

pub fn write_count(out: &mut Vec<u8>, count: u128) {
    match u64::try_from(count) {
        Ok(count) => write_uint(out, count),
        Err(_) => write_big(out, &BigInt::from(count)),
    }
}

pub fn count_bytes(count: u128) -> usize {
    (128 - count.leading_zeros() as usize).div_ceil(8)
}

pub fn write_ext(out: &mut Vec<u8>, code: u8, bytes: &[u8]) {
    match bytes.len() {
        1 => out.push(0xd4),
        2 => out.push(0xd5),
        4 => out.push(0xd6),
        8 => out.push(0xd7),
        16 => out.push(0xd8),
        n => write_head(out, [0xc7, 0xc8, 0xc9], n),
    }
    out.push(code);
    out.extend_from_slice(bytes);
}

pub fn write_str(out: &mut Vec<u8>, s: &str) {
    let n = s.len();
    if n < 32 {
        out.push(0xa0 | n as u8)
    } else {
        write_head(out, [0xd9, 0xda, 0xdb], n)
    }
    out.extend_from_slice(s.as_bytes());
}

pub fn write_bin(out: &mut Vec<u8>, bytes: &[u8]) {
    write_head(out, [0xc4, 0xc5, 0xc6], bytes.len());
    out.extend_from_slice(bytes);
}

pub fn write_array_head(out: &mut Vec<u8>, n: usize) {
    if n < 16 {
        out.push(0x90 | n as u8)
    } else if n < 65_536 {
        out.push(0xdc);
        out.extend_from_slice(&(n as u16).to_be_bytes())
    } else {
        out.push(0xdd);
        out.extend_from_slice(&(n as u32).to_be_bytes())
    }
}

fn write_head(out: &mut Vec<u8>, tags: [u8; 3], n: usize) {
    if n < 256 {
        out.extend_from_slice(&[tags[0], n as u8])
    } else if n < 65_536 {
        out.push(tags[1]);
        out.extend_from_slice(&(n as u16).to_be_bytes())
    } else {
        out.push(tags[2]);
        out.extend_from_slice(&(n as u32).to_be_bytes())
    }
}

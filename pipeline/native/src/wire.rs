//! MessagePack, byte for byte as msgspec writes it.

use num_bigint::BigInt;
use num_traits::ToPrimitive;

/// The extension type of ints beyond 64 bits: signed, big endian.
const LONG_INT: u8 = 1;

/// Write a type byte, and a number in big endian.
#[inline]
fn tagged<const N: usize>(out: &mut Vec<u8>, tag: u8, number: [u8; N]) {
    out.push(tag);
    out.extend_from_slice(&number);
}

/// Write a length, in the shortest form of those that the type bytes are for.
fn write_head(out: &mut Vec<u8>, tags: [u8; 3], n: usize) {
    match n {
        0..0x100 => tagged(out, tags[0], [n as u8]),
        0x100..0x1_0000 => tagged(out, tags[1], (n as u16).to_be_bytes()),
        _ => tagged(out, tags[2], (n as u32).to_be_bytes()),
    }
}

pub fn write_int(out: &mut Vec<u8>, i: i64) {
    match i {
        0.. => write_uint(out, i as u64),
        -0x20..0 => out.push(i as u8),
        -0x80..-0x20 => tagged(out, 0xd0, [i as u8]),
        -0x8000..-0x80 => tagged(out, 0xd1, (i as i16).to_be_bytes()),
        -0x8000_0000..-0x8000 => tagged(out, 0xd2, (i as i32).to_be_bytes()),
        _ => tagged(out, 0xd3, i.to_be_bytes()),
    }
}

pub fn write_uint(out: &mut Vec<u8>, u: u64) {
    match u {
        0..0x80 => out.push(u as u8),
        0x80..0x1_0000_0000 => write_head(out, [0xcc, 0xcd, 0xce], u as usize),
        _ => tagged(out, 0xcf, u.to_be_bytes()),
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
    if bytes.len() < b.bits() as usize / 8 + 1 {
        bytes.insert(0, 0xff); // Python's `bit_length() // 8 + 1` has one more for some negative ints
    }
    match bytes.len() {
        16 => out.push(0xd8),
        n => write_head(out, [0xc7, 0xc8, 0xc9], n),
    }
    out.push(LONG_INT);
    out.extend_from_slice(&bytes);
}

pub fn write_str(out: &mut Vec<u8>, s: &str) {
    match s.len() {
        n @ 0..32 => out.push(0xa0 | n as u8),
        n => write_head(out, [0xd9, 0xda, 0xdb], n),
    }
    out.extend_from_slice(s.as_bytes());
}

pub fn write_bin(out: &mut Vec<u8>, bytes: &[u8]) {
    write_head(out, [0xc4, 0xc5, 0xc6], bytes.len());
    out.extend_from_slice(bytes);
}

pub fn write_array_head(out: &mut Vec<u8>, n: usize) {
    match n {
        0..16 => out.push(0x90 | n as u8),
        16..0x1_0000 => tagged(out, 0xdc, (n as u16).to_be_bytes()),
        _ => tagged(out, 0xdd, (n as u32).to_be_bytes()),
    }
}

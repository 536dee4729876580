//! MessagePack of what is common, from bytes that nobody has checked.

use crate::state::{int_state, State};
use crate::wire::LONG_INT;
use num_bigint::BigInt;

/// What a reader of MessagePack has not read yet. Every method returns None for anything but what it is for.
pub struct Rest<'a>(pub &'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn byte(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    pub fn uint(&mut self, bytes: usize) -> Option<u64> {
        Some(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | *byte as u64))
    }

    pub fn array(&mut self) -> Option<usize> {
        match self.byte()? {
            head @ 0x90..=0x9f => Some((head & 0x0f) as usize),
            0xdc => Some(self.uint(2)? as usize),
            _ => None,
        }
    }

    /// The head of an array of any length.
    pub fn long_array(&mut self) -> Option<usize> {
        match self.0.first()? {
            0xdd => {
                self.byte()?;
                Some(self.uint(4)? as usize)
            }
            _ => self.array(),
        }
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let size = match self.byte()? {
            0xc4 => self.uint(1)?,
            0xc5 => self.uint(2)?,
            0xc6 => self.uint(4)?,
            _ => return None,
        };
        self.take(size as usize)
    }

    pub fn text(&mut self) -> Option<&'a str> {
        let size = match self.byte()? {
            head @ 0xa0..=0xbf => (head & 0x1f) as usize,
            0xd9 => self.uint(1)? as usize,
            0xda => self.uint(2)? as usize,
            _ => return None,
        };
        std::str::from_utf8(self.take(size)?).ok()
    }

    fn float(&mut self) -> Option<f64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(f64::from_be_bytes(*bytes)).filter(|f| f.is_finite())
    }

    /// An int or a float; with `pairs` also a float with its error term.
    pub fn number(&mut self, pairs: bool) -> Option<State> {
        Some(State::I(match self.byte()? {
            head @ 0x00..=0x7f => head as i64,
            head @ 0xe0..=0xff => head as i8 as i64,
            0xcc => self.uint(1)? as i64,
            0xcd => self.uint(2)? as i64,
            0xce => self.uint(4)? as i64,
            0xcf => i64::try_from(self.uint(8)?).ok()?,
            0xd0 => self.uint(1)? as i8 as i64,
            0xd1 => self.uint(2)? as i16 as i64,
            0xd2 => self.uint(4)? as i32 as i64,
            0xd3 => self.uint(8)? as i64,
            0xcb => return Some(State::F(self.float()?)),
            0x92 if pairs => {
                let (high, low) = (self.pair_float()?, self.pair_float()?);
                return (low != 0.0 && high + low == high).then_some(State::P(high, low));
            }
            _ => return None,
        }))
    }

    /// An int of up to so many bytes, or a float; with `pairs` also a float with its error term.
    #[inline]
    pub fn long_number(&mut self, pairs: bool, int_bytes_max: usize) -> Option<State> {
        match self.0.first()? {
            0xc7 | 0xc8 | 0xcf | 0xd4..=0xd8 => self.long_int(int_bytes_max),
            _ => self.number(pairs),
        }
    }

    #[cold]
    fn long_int(&mut self, int_bytes_max: usize) -> Option<State> {
        let size = match self.byte()? {
            0xcf => return Some(int_state(BigInt::from(self.uint(8)?))),
            0xc7 => self.uint(1)? as usize,
            0xc8 => self.uint(2)? as usize,
            head => 1 << (head - 0xd4),
        };
        if self.byte()? != LONG_INT || size > int_bytes_max {
            return None;
        }
        Some(int_state(BigInt::from_signed_bytes_be(self.take(size)?)))
    }

    fn pair_float(&mut self) -> Option<f64> {
        (self.byte()? == 0xcb).then(|| self.float())?
    }
}

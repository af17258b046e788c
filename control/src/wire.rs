//! QMP's wire: where a request ends, and what a line of output looks like.
//!
//! Requests are JSON values, one after another, with nothing promised between them: `qemu.qmp`
//! sends no newline, `socat` users send several, a slow sender sends a byte at a time.
//! [`Framer`] finds the end of each value by following strings, escapes and nesting, and
//! looks at every byte once; what the bytes mean is decided by `serde_json` on the whole value.
//!
//! What always holds: at most [`MAX_REQUEST_BYTES`] are kept per client, whatever it sends, and
//! a value that is handed out nests at most [`MAX_DEPTH`] deep. After an error the framer is
//! in step again at the next value; a control character or a byte 0xFF brings it in step from
//! anywhere, as QEMU's qmp-spec, "Forcing the JSON parser into known-good state", promises.
//!
//! Absent: QEMU's extension of JSON by strings in single quotes.

use serde::Serialize;

/// The longest request, in bytes. Longer ones are answered with an error and skipped.
pub const MAX_REQUEST_BYTES: usize = 1 << 20;

/// The deepest nesting of objects and arrays in a request. `serde_json` itself stops at 128.
pub const MAX_DEPTH: usize = 64;

/// The longest answer the server sends, in bytes. `qemu.qmp` and libvirt read lines of 10 MiB
/// at most; an `id` comes on top, and is the client's own doing.
pub const MAX_ANSWER_BYTES: usize = 8 << 20;

/// Input in which no value could be found. The texts are QEMU's where QEMU has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A closing bracket, comma or colon outside of any value.
    #[error("JSON parse error, expecting value")]
    ExpectingValue,
    /// A byte that no JSON text contains at this place. The value it was in is dropped.
    #[error("JSON parse error, stray byte 0x{0:02x}")]
    Stray(u8),
    /// A value nested deeper than [`MAX_DEPTH`]. It is skipped up to its end.
    #[error("JSON nesting depth limit exceeded: at most {MAX_DEPTH} levels")]
    TooDeep,
    /// A value longer than [`MAX_REQUEST_BYTES`]. It is skipped up to its end.
    #[error("JSON token size limit exceeded: a request has at most {MAX_REQUEST_BYTES} bytes")]
    TooLong,
}

/// Where in the grammar the next byte falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// Outside of any value; errors at this place are reported.
    #[default]
    Between,
    /// Outside of any value, after an error: more of the same is dropped without a word, so
    /// that a flood of stray bytes costs one error and not one each.
    Astray,
    /// In a number or keyword that no container holds.
    Scalar,
    /// In an object or array, outside of strings.
    Container,
    /// In a string.
    String,
    /// In a string, behind a backslash.
    Escape,
}

/// Cuts a stream of bytes into JSON values.
#[derive(Debug, Default)]
pub struct Framer {
    place: Place,
    depth: usize,
    value: Vec<u8>,
    /// The value at hand was refused; only its end is of interest.
    skipping: bool,
}

/// What a byte did to the value at hand.
enum Step {
    More,
    /// The value ends with this byte.
    Ends,
    /// The value ended before this byte, which is yet to be looked at.
    Ended,
}

impl Framer {
    /// A framer at the beginning of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` up to the end of the next value, and returns it.
    ///
    /// `None` means that `input` is used up and the value, if one began, is not yet complete:
    /// call again with more. The value is complete in its brackets and quotes, not yet checked
    /// to be JSON.
    ///
    /// # Errors
    /// See [`FrameError`]. The framer goes on after any of them.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Vec<u8>, FrameError>> {
        while let Some((&byte, rest)) = input.split_first() {
            let step = match self.step(byte) {
                Ok(step) => step,
                Err(error) => {
                    *input = rest;
                    return Some(Err(error));
                }
            };
            if !matches!(step, Step::Ended) {
                *input = rest;
            }
            if matches!(step, Step::More) {
                continue;
            }
            let skipped = self.skipping;
            let value = self.restart(Place::Between);
            if !skipped {
                return Some(Ok(value));
            }
        }
        None
    }

    fn step(&mut self, byte: u8) -> Result<Step, FrameError> {
        let blank = matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
        let within_string = matches!(self.place, Place::String | Place::Escape);
        if byte == 0xff || (byte < 0x20 && (within_string || !blank)) {
            return self.stray(FrameError::Stray(byte));
        }
        match self.place {
            Place::Between | Place::Astray => match byte {
                _ if blank => return Ok(Step::More),
                b'}' | b']' | b',' | b':' => return self.stray(FrameError::ExpectingValue),
                0x80.. => return self.stray(FrameError::Stray(byte)),
                b'{' | b'[' => {
                    self.place = Place::Container;
                    self.depth = 1;
                }
                b'"' => self.place = Place::String,
                _ => self.place = Place::Scalar,
            },
            Place::Scalar => match byte {
                _ if blank => return Ok(Step::Ends),
                b'{' | b'}' | b'[' | b']' | b'"' | b',' | b':' => return Ok(Step::Ended),
                _ => {}
            },
            Place::Container => match byte {
                b'"' => self.place = Place::String,
                b'{' | b'[' => {
                    self.depth += 1;
                    if self.depth > MAX_DEPTH {
                        self.refuse(FrameError::TooDeep)?;
                    }
                }
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return self.end(byte);
                    }
                }
                _ => {}
            },
            Place::String => match byte {
                b'\\' => self.place = Place::Escape,
                b'"' if self.depth == 0 => return self.end(byte),
                b'"' => self.place = Place::Container,
                _ => {}
            },
            Place::Escape => self.place = Place::String,
        }
        self.keep(byte)?;
        Ok(Step::More)
    }

    fn keep(&mut self, byte: u8) -> Result<(), FrameError> {
        if self.skipping {
            return Ok(());
        }
        if self.value.len() == MAX_REQUEST_BYTES {
            return self.refuse(FrameError::TooLong);
        }
        self.value.push(byte);
        Ok(())
    }

    /// Keeps the last byte of a value. If that is the one too many, the end is past all the same.
    fn end(&mut self, byte: u8) -> Result<Step, FrameError> {
        let kept = self.keep(byte);
        if kept.is_err() {
            self.restart(Place::Between);
        }
        kept.map(|()| Step::Ends)
    }

    /// Gives up the value at hand, reports why once, and goes on to look for its end.
    fn refuse(&mut self, error: FrameError) -> Result<(), FrameError> {
        self.value = Vec::new();
        if std::mem::replace(&mut self.skipping, true) {
            return Ok(());
        }
        Err(error)
    }

    /// Gives up the value at hand and starts over behind this byte.
    fn stray(&mut self, error: FrameError) -> Result<Step, FrameError> {
        let reported = self.place == Place::Astray;
        self.restart(Place::Astray);
        if reported { Ok(Step::More) } else { Err(error) }
    }

    fn restart(&mut self, place: Place) -> Vec<u8> {
        self.place = place;
        self.depth = 0;
        self.skipping = false;
        std::mem::take(&mut self.value)
    }
}

/// One line of output: `value` as JSON in ASCII, ended by CR LF.
///
/// # Errors
/// Those of the value's own `Serialize`; the types of this crate have none.
pub fn line(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let text = serde_json::to_string(value)?;
    let mut line = Vec::with_capacity(text.len() + 2);
    for c in text.chars() {
        match c {
            // Blanks between tokens, which a client's `id` may carry. In strings they are escaped.
            '\t' | '\r' | '\n' => line.push(b' '),
            ascii if ascii.is_ascii() => line.push(ascii as u8),
            // Only strings hold these, so an escape is right wherever they stand.
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    line.extend_from_slice(format!("\\u{unit:04x}").as_bytes());
                }
            }
        }
    }
    line.extend_from_slice(b"\r\n");
    Ok(line)
}

#[cfg(test)]
mod tests;

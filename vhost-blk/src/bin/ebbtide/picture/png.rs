//! The picture as a PNG: a grid of squares, offsets at its side, a legend below.

use ::png::{BitDepth, ColorType, Encoder, EncodingError};
use control::commands::ChangeMap;
use control::render::size;

use super::{AGES, PNG_CELLS, bytes_by_age, font, join, title, words};

type Colour = [u8; 3];

/// The newest age first: from glowing to cold.
const COLOURS: [Colour; AGES.len()] =
    [[252, 243, 158], [250, 168, 44], [232, 96, 48], [186, 54, 100], [126, 50, 134], [76, 66, 150]];
const NEVER: Colour = [38, 42, 50];
const GROUND: Colour = [18, 20, 24];
const TEXT: Colour = [210, 214, 220];

/// Pixels of the grid's width.
const GRID: usize = 1024;
/// Pixels around everything, and of a line of text.
const EDGE: usize = 24;
const LINE: usize = 26;
/// Pixels of the offsets at the side.
const SIDE: usize = 130;

struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self { width, height, pixels: GROUND.repeat(width * height) }
    }

    /// Fills a rectangle; what is outside is not drawn.
    fn fill(&mut self, x: usize, y: usize, width: usize, height: usize, colour: Colour) {
        for row in y..(y + height).min(self.height) {
            for column in x..(x + width).min(self.width) {
                let at = (row * self.width + column) * 3;
                self.pixels[at..at + 3].copy_from_slice(&colour);
            }
        }
    }

    /// Writes a text, of which each dot is two pixels wide and high.
    fn text(&mut self, x: usize, y: usize, text: &str, colour: Colour) {
        for (nth, c) in text.chars().enumerate() {
            for (column, bits) in font::glyph(c).into_iter().enumerate() {
                for row in (0..8).filter(|row| bits >> row & 1 == 1) {
                    self.fill(x + nth * font::ADVANCE + column * 2, y + row * 2, 2, 2, colour);
                }
            }
        }
    }
}

/// The PNG's bytes.
pub(super) fn draw(map: &ChangeMap) -> Result<Vec<u8>, EncodingError> {
    let joined = join(map, PNG_CELLS);
    let count = joined.cells.len();
    // Squares, and not too small ones.
    let columns = [128, 64].into_iter().find(|columns| count >= columns * columns / 4).unwrap_or(32);
    let side = GRID / columns;
    let rows = count.div_ceil(columns);
    let ages: Vec<usize> = (0..AGES.len()).filter(|age| bytes_by_age(map)[*age] > 0).collect();
    let top = EDGE + LINE + 10;
    let below = top + rows * side + 16;
    let height = below + (ages.len() + 2).div_ceil(2) * LINE + EDGE;
    let mut canvas = Canvas::new(EDGE + SIDE + GRID + EDGE, height);
    canvas.text(EDGE + SIDE, EDGE, &title(map), TEXT);
    for (nth, cell) in joined.cells.iter().enumerate() {
        let (x, y) = (EDGE + SIDE + nth % columns * side, top + nth / columns * side);
        let colour = cell.map_or(NEVER, |(age, share)| blend(NEVER, COLOURS[age], 0.5 + 0.5 * share.sqrt()));
        canvas.fill(x, y, side - 1, side - 1, colour);
    }
    // An offset every so many rows that they do not touch.
    let every = LINE.div_ceil(side).next_power_of_two();
    for row in (0..rows).step_by(every) {
        let offset = size((row * columns) as u64 * joined.bytes.min(1 << 50));
        let x = EDGE + SIDE - 12 - offset.chars().count() * font::ADVANCE;
        canvas.text(x, top + row * side + side.saturating_sub(14) / 2, &offset, TEXT);
    }
    legend(&mut canvas, map, &ages, below, joined.bytes);
    encode(&canvas, map)
}

fn legend(canvas: &mut Canvas, map: &ChangeMap, ages: &[usize], top: usize, cell: u64) {
    let bytes = bytes_by_age(map);
    let never = map.size.saturating_sub(bytes.iter().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes)));
    let entries =
        ages.iter().map(|age| (COLOURS[*age], format!("{} {}", size(bytes[*age]), words(map, *age))));
    let never = [(NEVER, format!("{} never", size(never)))];
    let note = [(GROUND, format!("each square: {}", size(cell)))];
    let entries: Vec<_> = entries.chain(never).chain(note).collect();
    let lines = entries.len().div_ceil(2);
    for (nth, (colour, text)) in entries.into_iter().enumerate() {
        let (x, y) = (EDGE + SIDE + nth / lines * (GRID / 2), top + nth % lines * LINE);
        canvas.fill(x, y, 15, 15, colour);
        canvas.text(x + 26, y, &text, TEXT);
    }
}

fn blend(from: Colour, to: Colour, share: f64) -> Colour {
    let mix = |at: usize| (f64::from(from[at]) + (f64::from(to[at]) - f64::from(from[at])) * share).round();
    // Between two bytes, so it is one.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    [0, 1, 2].map(|at| mix(at).clamp(0.0, 255.0) as u8)
}

fn encode(canvas: &Canvas, map: &ChangeMap) -> Result<Vec<u8>, EncodingError> {
    let edge = |pixels: usize| u32::try_from(pixels).unwrap_or(u32::MAX);
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, edge(canvas.width), edge(canvas.height));
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    encoder.add_itxt_chunk("Title".to_owned(), title(map))?;
    encoder.add_itxt_chunk("Change ID".to_owned(), map.change_id.clone())?;
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&canvas.pixels)?;
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn a_decoder_finds_the_colours() {
        for cells in [1, 40, 3000, 12_288, 16_384] {
            let bytes = draw(&example(cells)).unwrap();
            let mut reader = ::png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            let info = reader.next_frame(&mut pixels).unwrap();
            assert_eq!(info.width as usize, 2 * EDGE + SIDE + GRID);
            let has = |colour: Colour| pixels.as_chunks::<3>().0.contains(&colour);
            assert!(has(NEVER) && has(GROUND) && has(TEXT), "{cells}");
            assert!(cells < 10 || COLOURS.into_iter().all(has), "{cells}");
        }
    }
}

//! The picture in the terminal: in colour where there is one, in plain characters elsewhere.

use std::fmt::Write as _;
use std::io::IsTerminal as _;

use control::commands::ChangeMap;
use control::render::size;

use super::{AGES, bytes_by_age, join, printable, title, words};

/// Columns before the picture: an offset and a border.
const MARGIN: usize = 12;
/// Lines of the picture.
const LINES: usize = 16;
/// Widest picture in columns.
const WIDEST: usize = 320;

/// Of the palette of 256 colours, the newest age first.
const COLOURS: [u8; AGES.len()] = [229, 214, 202, 161, 91, 61];
const NEVER_COLOUR: u8 = 236;
/// The same in plain characters: the more ink, the newer.
const INK: [char; AGES.len()] = ['#', '*', '+', '=', '-', '.'];

/// What is drawn on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    /// Columns.
    pub(super) width: usize,
    pub(super) colour: bool,
}

impl Screen {
    /// The standard output.
    pub(super) fn of_stdout() -> Self {
        let stdout = std::io::stdout();
        let said = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
        let found = rustix::termios::tcgetwinsize(&stdout).ok().map(|size| usize::from(size.ws_col));
        let width = found.filter(|columns| *columns > 0).or(said).unwrap_or(80);
        let plain = std::env::var_os("NO_COLOR").is_some_and(|text| !text.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self { width, colour: stdout.is_terminal() && !plain }
    }

    fn columns(self) -> usize {
        self.width.clamp(MARGIN + 20, WIDEST) - MARGIN - 1
    }

    /// Cells that fit: two in a character where there are colours.
    pub(super) fn cells(self) -> usize {
        self.columns() * LINES * if self.colour { 2 } else { 1 }
    }
}

/// The picture and its legend.
pub(super) fn draw(map: &ChangeMap, screen: Screen) -> String {
    let joined = join(map, screen.cells());
    let columns = screen.columns();
    let ages: Vec<Option<usize>> = joined.cells.iter().map(|cell| cell.map(|(age, _)| age)).collect();
    let mut text = title(map) + "\n";
    let rows: Vec<&[Option<usize>]> = ages.chunks(columns).collect();
    for (line, pair) in rows.chunks(if screen.colour { 2 } else { 1 }).enumerate() {
        let first = line * columns * if screen.colour { 2 } else { 1 };
        let _ = write!(text, "{:>10} ", size((first as u64).saturating_mul(joined.bytes)));
        match (screen.colour, pair) {
            (true, [above, below @ ..]) => halves(&mut text, above, below.first().copied().unwrap_or(&[])),
            (_, rows) => {
                rows.iter().copied().flatten().for_each(|age| text.push(age.map_or(' ', |age| INK[age])))
            }
        }
        // Spaces at the end say nothing.
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    }
    legend(&mut text, map, screen, joined.bytes);
    text
}

/// One line of characters whose upper half is one cell and whose lower half is another.
fn halves(text: &mut String, above: &[Option<usize>], below: &[Option<usize>]) {
    let colour = |age: Option<usize>| age.map_or(NEVER_COLOUR, |age| COLOURS[age]);
    let mut last = None;
    for (at, upper) in above.iter().enumerate() {
        let pair = (colour(*upper), below.get(at).map(|lower| colour(*lower)));
        if last != Some(pair) {
            let ground = pair.1.map_or("49".to_owned(), |colour| format!("48;5;{colour}"));
            let _ = write!(text, "\u{1b}[38;5;{};{ground}m", pair.0);
            last = Some(pair);
        }
        text.push('▀');
    }
    text.push_str("\u{1b}[0m");
}

fn legend(text: &mut String, map: &ChangeMap, screen: Screen, cell: u64) {
    let bytes = bytes_by_age(map);
    let sign = |colour: u8, ink: char| match screen.colour {
        true => format!("\u{1b}[38;5;{colour}m██\u{1b}[0m"),
        false => format!("{ink} "),
    };
    let _ = writeln!(
        text,
        "\n           each {} of {} by its newest change:",
        if screen.colour { "square" } else { "character" },
        size(cell)
    );
    for (age, bytes) in bytes.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
        let _ = writeln!(
            text,
            "{:>10} {} {}",
            size(*bytes),
            sign(COLOURS[age], INK[age]),
            printable(&words(map, age))
        );
    }
    let never = map.size.saturating_sub(bytes.iter().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes)));
    if never > 0 {
        let _ = writeln!(text, "{:>10} {} never since tracking began", size(never), sign(NEVER_COLOUR, ' '));
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::example;
    use super::*;

    #[test]
    fn plain_pictures_fit_the_width_and_steer_nothing() {
        for width in [0, 40, 80, 200, 10_000] {
            let screen = Screen { width, colour: false };
            let text = draw(&example(1000), screen);
            assert!(text.lines().all(|line| line.chars().count() < width.clamp(64, WIDEST)), "{text}");
            assert!(!text.contains('\u{1b}'));
            assert!(text.contains("since tuesday") && text.contains('#'));
        }
    }

    #[test]
    fn colours_are_put_back() {
        let text = draw(&example(5000), Screen { width: 100, colour: true });
        assert!(text.contains("\u{1b}[38;5;229"));
        for line in text.lines().filter(|line| line.contains('▀')) {
            assert!(line.ends_with("\u{1b}[0m"));
            assert!(line.chars().filter(|c| *c == '▀').count() <= 87);
        }
    }
}

//! Columns of text, each as wide as its widest cell, and safe to print.

/// The text with control characters, and those that reorder text, as escapes.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let reorders =
            matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || reorders {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[derive(Clone, Copy)]
pub(super) enum Align {
    Left,
    Right,
}

/// Rows of cells, each column as wide as its widest.
pub(super) struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: &[(&str, Align)]) -> Self {
        Self {
            columns: columns.iter().map(|&(name, align)| (name.to_owned(), align)).collect(),
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        self.rows.push(cells.iter().map(|cell| printable(cell)).collect());
    }

    pub(super) fn finish(self) -> String {
        let header: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let titled = header.iter().any(|name| !name.is_empty());
        let lines: Vec<&Vec<String>> = titled.then_some(&header).into_iter().chain(&self.rows).collect();
        let width = |column: usize| {
            let widths = lines.iter().map(|line| line[column].chars().count());
            widths.max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut out = String::new();
        for line in lines {
            let mut text = String::new();
            for ((cell, width), (_, align)) in line.iter().zip(&widths).zip(&self.columns) {
                match align {
                    Align::Left => text += &format!("{cell:<width$}  "),
                    Align::Right => text += &format!("{cell:>width$}  "),
                }
            }
            out += text.trim_end();
            out.push('\n');
        }
        out
    }
}

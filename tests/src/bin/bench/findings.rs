//! Figures with goals: what was measured, what was to be reached, and whether it was.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// What a figure has to reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn is_met_by(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

/// What a figure counts.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unit {
    Ratio,
    Milliseconds,
    Bytes,
    Count,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Ratio => format!("{value:.2}"),
            Self::Milliseconds => format!("{value:.1} ms"),
            Self::Bytes => format!("{value:.1} B"),
            Self::Count => format!("{value:.0}"),
        }
    }
}

/// One figure of one row, measured one or more times.
#[derive(Debug)]
struct Finding {
    row: String,
    figure: &'static str,
    unit: Unit,
    goal: Option<Goal>,
    values: Vec<f64>,
}

impl Finding {
    /// The value that a quarter, a half or three quarters do not exceed; halves are means of two.
    fn quartile(&self, quarter: usize) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        if quarter == 2 && count.is_multiple_of(2) {
            return f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]);
        }
        sorted[(count * quarter / 4).min(count - 1)]
    }

    fn median(&self) -> f64 {
        self.quartile(2)
    }

    fn verdict(&self) -> Option<&'static str> {
        self.goal.map(|goal| if goal.is_met_by(self.median()) { "met" } else { "not met" })
    }
}

/// All figures, in the order in which they were first measured.
#[derive(Debug, Default)]
pub(crate) struct Findings(Vec<Finding>);

impl Findings {
    /// Adds one more value of a figure.
    pub(crate) fn note(
        &mut self,
        row: &str,
        figure: &'static str,
        unit: Unit,
        goal: impl Into<Option<Goal>>,
        value: f64,
    ) {
        if let Some(known) = self.0.iter_mut().find(|each| each.row == row && each.figure == figure) {
            known.values.push(value);
        } else {
            let goal = goal.into();
            self.0.push(Finding { row: row.into(), figure, unit, goal, values: vec![value] });
        }
    }

    /// Adds one more value of a ratio, if both sides of it were measured.
    pub(crate) fn ratio(
        &mut self,
        row: &str,
        figure: &'static str,
        goal: impl Into<Option<Goal>>,
        above: Option<f64>,
        below: Option<f64>,
    ) {
        if let (Some(above), Some(below)) = (above, below) {
            self.note(row, figure, Unit::Ratio, goal, above / below);
        }
    }

    /// The table, by row.
    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        if self.0.is_empty() {
            return text;
        }
        text.push_str("\n| row | figure | median (middle half) | goal | |\n|---|---|---|---|---|\n");
        for finding in self.by_row() {
            let show = |value| finding.unit.show(value);
            let mut measured = show(finding.median());
            if finding.values.len() > 1 {
                let _ = write!(measured, " ({} to {})", show(finding.quartile(1)), show(finding.quartile(3)));
            }
            let goal = match finding.goal {
                Some(Goal::AtLeast(bound)) => format!("≥ {}", show(bound)),
                Some(Goal::AtMost(bound)) => format!("≤ {}", show(bound)),
                None => String::new(),
            };
            let verdict = finding.verdict().unwrap_or_default();
            let _ =
                writeln!(text, "| {} | {} | {measured} | {goal} | {verdict} |", finding.row, finding.figure);
        }
        text
    }

    /// Everything, with all values.
    pub(crate) fn json(&self) -> Value {
        let one = |finding: &Finding| {
            let (at_least, at_most) = match finding.goal {
                Some(Goal::AtLeast(bound)) => (Some(bound), None),
                Some(Goal::AtMost(bound)) => (None, Some(bound)),
                None => (None, None),
            };
            json!({
                "row": finding.row, "figure": finding.figure, "unit": format!("{:?}", finding.unit),
                "values": finding.values, "median": finding.median(),
                "at-least": at_least, "at-most": at_most, "verdict": finding.verdict(),
            })
        };
        self.by_row().into_iter().map(one).collect()
    }

    /// Rows together, each at the place of its first figure.
    fn by_row(&self) -> Vec<&Finding> {
        let first = |row: &str| self.0.iter().position(|each| each.row == row);
        let mut all: Vec<_> = self.0.iter().collect();
        all.sort_by_key(|each| first(&each.row));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_judged() {
        let mut findings = Findings::default();
        for value in [1.0, 9.0, 3.0, 2.0] {
            findings.note("r", "up", Unit::Ratio, Goal::AtLeast(2.5), value);
            findings.note("r", "down", Unit::Milliseconds, Goal::AtMost(2.4), value);
        }
        findings.note("r", "free", Unit::Bytes, None, 1.0);
        let text = findings.markdown();
        assert!(text.contains("| r | up | 2.50 (2.00 to 9.00) | ≥ 2.50 | met |"), "{text}");
        assert!(text.contains("| r | down | 2.5 ms (2.0 ms to 9.0 ms) | ≤ 2.4 ms | not met |"), "{text}");
        assert!(text.contains("| r | free | 1.0 B |  |  |"), "{text}");
    }
}

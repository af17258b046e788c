//! The report as Markdown.

use std::fmt::Write as _;

use ebbtide_tests::load::Outcome;

use crate::contender::Contender;
use crate::machine::Report;
use crate::memory::Memory;
use crate::snapshots::touch;
use crate::tracking::{self, Costs};
use crate::{Cells, Options, Results};

/// Rounds of one cell that differ by more than this share of their median make it doubtful.
const DOUBTFUL_SPREAD: f64 = 0.3;

/// Everything, ready for a README.
pub(crate) fn markdown(
    report: &Report,
    rows: &[&str],
    results: &Results,
    costs: &[(String, Costs)],
    memory: Option<&Memory>,
    options: &Options,
) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = write(&mut text, report, rows, &results.cells, options);
    let _ = write_touches(&mut text, &results.cells);
    text.push_str(&results.findings.markdown());
    text.push_str(&tracking::markdown(costs));
    if let Some(memory) = memory {
        let _ = write_memory(&mut text, memory);
    }
    text
}

fn write(
    text: &mut String,
    report: &Report,
    rows: &[&str],
    cells: &Cells,
    options: &Options,
) -> std::fmt::Result {
    for line in &report.machine {
        writeln!(text, "- {line}")?;
    }
    writeln!(text, "- Programs: {}", report.programs.join("; "))?;
    writeln!(
        text,
        "- Medians of {} interleaved rounds of {} s; client on CPU 0, server (and fio) on CPU 1, \
         one queue.",
        options.rounds(),
        options.seconds(),
    )?;
    for warning in &report.warnings {
        writeln!(text, "- **Warning:** {warning}.")?;
    }
    writeln!(
        text,
        "\nCell: IOPS · CPU µs per I/O of the server · p50/p99 µs; `~`: rounds differ by more than \
         {:.0} %.",
        DOUBTFUL_SPREAD * 100.0
    )?;
    if rows.is_empty() {
        return Ok(());
    }
    let columns: Vec<_> = Contender::ALL.into_iter().filter(|each| options.wants(*each)).collect();
    write!(text, "\n| load |")?;
    for column in &columns {
        write!(text, " {} |", column.name())?;
    }
    writeln!(text, " ebbtide ÷ qsd: IOPS, CPU |")?;
    writeln!(text, "|---|{}---|", "---|".repeat(columns.len()))?;
    let median_of = |row: &str, column: &str| cells.get(row)?.get(column).map(|all| median(all));
    for row in rows {
        write!(text, "| {row} |")?;
        for column in &columns {
            write!(text, " {} |", cell(cells, row, column.name()))?;
        }
        let ours = median_of(row, Contender::Ebbtide.name());
        let theirs = median_of(row, Contender::Qsd.name());
        match (&ours, &theirs) {
            (Some(ours), Some(theirs)) => {
                let cpu = ours.server_cpu_us.zip(theirs.server_cpu_us).map(|(a, b)| a / b);
                writeln!(text, " {:.2}, {:.2} |", ours.iops / theirs.iops, cpu.unwrap_or(f64::NAN))?;
            }
            _ => writeln!(text, " |")?,
        }
    }
    Ok(())
}

/// A guest's writes in each state of a snapshot, a line for each server.
fn write_touches(text: &mut String, cells: &Cells) -> std::fmt::Result {
    let rows: Vec<_> = touch::rows().into_iter().filter(|row| cells.contains_key(row)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n| load | server | {} |", touch::STATES.join(" | "))?;
    writeln!(text, "|---|---|{}", "---|".repeat(touch::STATES.len()))?;
    for row in &rows {
        for server in touch::SERVERS {
            write!(text, "| {row} | {} |", server.name())?;
            for state in touch::STATES {
                write!(text, " {} |", cell(cells, row, &touch::column(server, state)))?;
            }
            writeln!(text)?;
        }
    }
    Ok(())
}

fn write_memory(text: &mut String, memory: &Memory) -> std::fmt::Result {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    writeln!(
        text,
        "\nMemory, 100 GiB sparse disk, depth 128: {:.1} MiB own, {:.1} MiB mapped files \
         (program and change map), {:.1} MiB of the guest's.",
        mib(memory.anonymous),
        mib(memory.file),
        mib(memory.shared),
    )
}

fn cell(cells: &Cells, row: &str, column: &str) -> String {
    let Some(all) = cells.get(row).and_then(|columns| columns.get(column)) else {
        return "–".into();
    };
    let middle = median(all);
    let most = all.iter().map(|each| each.iops).fold(0.0, f64::max);
    let least = all.iter().map(|each| each.iops).fold(f64::MAX, f64::min);
    let doubt = if most - least > DOUBTFUL_SPREAD * middle.iops { "~" } else { "" };
    let cpu = middle.server_cpu_us.map_or("?".into(), |us| format!("{us:.1}"));
    format!("{doubt}{} · {cpu} · {:.0}/{:.0}", thousands(middle.iops), middle.p50_us, middle.p99_us)
}

fn thousands(number: f64) -> String {
    match number {
        ..1000.0 => format!("{number:.0}"),
        1000.0..20_000.0 => format!("{:.1}k", number / 1000.0),
        _ => format!("{:.0}k", number / 1000.0),
    }
}

/// The median of each figure by itself.
fn median(all: &[Outcome]) -> Outcome {
    let middle = |figure: &dyn Fn(&Outcome) -> f64| {
        let mut figures: Vec<_> = all.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        let half = figures.len() / 2;
        if figures.len() % 2 == 1 { figures[half] } else { f64::midpoint(figures[half - 1], figures[half]) }
    };
    Outcome {
        iops: middle(&|each| each.iops),
        p50_us: middle(&|each| each.p50_us),
        p99_us: middle(&|each| each.p99_us),
        max_us: middle(&|each| each.max_us),
        server_cpu_us: Some(middle(&|each| each.server_cpu_us.unwrap_or(f64::NAN)))
            .filter(|us| us.is_finite()),
        ..all[0].clone()
    }
}

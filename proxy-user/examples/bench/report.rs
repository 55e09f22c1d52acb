//! A table, JSON and charts of what was measured.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;
use serde_json::json;

use crate::columns::Door;
use crate::load::{Figure, Load};

type Row = (Door, Load);

/// All figures, by row and column; the first column is what the others are ratios to.
pub struct Report {
    columns: Vec<&'static str>,
    services: u16,
    rows: BTreeMap<Row, Vec<Vec<Figure>>>,
}

/// The middle one of some numbers, the least and the most.
fn spread(mut numbers: Vec<f64>) -> [f64; 3] {
    numbers.sort_by(f64::total_cmp);
    [numbers[numbers.len() / 2], numbers[0], numbers[numbers.len() - 1]]
}

fn rates(figures: &[Figure]) -> [f64; 3] {
    spread(figures.iter().map(|figure| figure.rate).collect())
}

/// The ratios of each round's figure to the straight one of the same round.
fn ratios(row: &[Vec<Figure>], column: usize) -> [f64; 3] {
    let pairs = row[column].iter().zip(&row[0]);
    spread(pairs.map(|(figure, straight)| figure.rate / straight.rate).collect())
}

impl Report {
    /// Nothing measured yet.
    pub const fn new(columns: Vec<&'static str>, services: u16) -> Self {
        Self { columns, services, rows: BTreeMap::new() }
    }

    /// Takes in a figure of a row and a column.
    pub fn add(&mut self, row: Row, column: usize, figure: Figure) {
        let empty = || vec![Vec::new(); self.columns.len()];
        self.rows.entry(row).or_insert_with(empty)[column].push(figure);
    }

    /// Writes all figures as JSON, and a chart for each door, into a folder.
    ///
    /// # Errors
    /// If that can't be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let figures = |figures: &[Figure]| {
            let of = |f: &Figure| json!({"rate": f.rate, "p50_us": f.latencies[0], "p99_us": f.latencies[1]});
            figures.iter().map(of).collect::<Vec<_>>()
        };
        let rows = self.rows.iter().map(|((door, load), row)| {
            let columns = self.columns.iter().enumerate().map(|(number, name)| {
                let [median, least, most] = ratios(row, number);
                json!({"column": name, "ratio": median, "least": least, "most": most, "rounds": figures(&row[number])})
            });
            json!({"door": door.label(), "load": load.label(), "columns": columns.collect::<Vec<_>>()})
        });
        let all = json!({"other_services": self.services, "rows": rows.collect::<Vec<_>>()});
        fs::write(folder.join("bench.json"), serde_json::to_string_pretty(&all)?)?;
        for door in Door::ALL {
            self.chart(door, &folder.join(format!("{door:?}.svg")))?;
        }
        Ok(())
    }

    /// Ratios by load, a bar for each column.
    fn chart(&self, door: Door, file: &Path) -> Result<()> {
        let area = SVGBackend::new(file, (900, 420)).into_drawing_area();
        area.fill(&WHITE)?;
        let width = self.columns.len() + 1;
        let mut chart = ChartBuilder::on(&area)
            .caption(door.label(), ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(30)
            .y_label_area_size(40)
            .build_cartesian_2d(0..Load::ALL.len() * width, 0.0..1.3)?;
        let label = |x: &usize| {
            let is_middle = x % width == self.columns.len() / 2;
            if is_middle { Load::ALL[x / width].label().to_owned() } else { String::new() }
        };
        let labels = Load::ALL.len() * width;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(labels)
            .x_label_formatter(&label)
            .draw()?;
        for (number, name) in self.columns.iter().enumerate() {
            let colour = Palette99::pick(number).to_rgba();
            let bars = Load::ALL.iter().enumerate().filter_map(|(place, load)| {
                let [ratio, ..] = ratios(self.rows.get(&(door, *load))?, number);
                let left = place * width + number;
                Some(Rectangle::new([(left, 0.0), (left + 1, ratio.min(1.3))], colour.filled()))
            });
            chart.draw_series(bars)?.label(*name).legend(move |(x, y)| {
                Rectangle::new([(x, y - 5), (x + 10, y + 5)], colour.filled())
            });
        }
        chart.configure_series_labels().border_style(BLACK).background_style(WHITE).draw()?;
        area.present()?;
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Ratios to the straight way: the median of the rounds (least to most)\n")?;
        write!(f, "| door | load | {} |\n|---|---|", self.columns.join(" | "))?;
        writeln!(f, "{}", "---|".repeat(self.columns.len()))?;
        for ((door, load), row) in &self.rows {
            let [straight, ..] = rates(&row[0]);
            write!(f, "| {} | {} | {straight:.0} |", door.label(), load.label())?;
            for number in 1..self.columns.len() {
                let [median, least, most] = ratios(row, number);
                write!(f, " {median:.2} ({least:.2} to {most:.2}) |")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

//! Rows, printed as kubectl prints them.

use std::io::{self, Write};

use anyhow::Result;
use comfy_table::presets::NOTHING;
use serde_json::{Map, Value};

/// How to print.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Output {
    /// Columns
    Table,
    /// More columns
    Wide,
    /// A list of objects, as JSON
    Json,
    /// A list of objects, as YAML
    Yaml,
}

/// A column's heading, and whether it needs `-o wide`.
#[derive(Clone, Copy)]
pub struct Column {
    name: &'static str,
    wide: bool,
}

impl Column {
    /// A column that is always shown.
    pub const fn always(name: &'static str) -> Self {
        Self { name, wide: false }
    }

    /// A column that `-o wide` shows.
    pub const fn wide(name: &'static str) -> Self {
        Self { name, wide: true }
    }

    /// The heading as a field's name: `PORT-NAME` is `portName`.
    fn field(self) -> String {
        let mut words = self.name.split('-').map(str::to_lowercase);
        let first = words.next().unwrap_or_default();
        words.fold(first, |field, word| {
            let (initial, rest) = word.split_at(1);
            field + &initial.to_uppercase() + rest
        })
    }
}

/// Rows under headings.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(columns: &[Column]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, a cell for each column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Prints the table.
    ///
    /// # Errors
    /// If standard output can't be written.
    pub fn print(&self, output: Output) -> Result<()> {
        let text = match output {
            Output::Table => self.columns(false),
            Output::Wide => self.columns(true),
            Output::Json => serde_json::to_string_pretty(&self.objects())?,
            Output::Yaml => serde_saphyr::to_string(&self.objects())?,
        };
        match writeln!(io::stdout(), "{}", text.trim_end()) {
            // As when piped into head.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => Ok(result?),
        }
    }

    fn columns(&self, wide: bool) -> String {
        if self.rows.is_empty() {
            return "No resources found.".to_owned();
        }
        let shown = |cells: &[String]| -> Vec<String> {
            let columns = self.columns.iter().zip(cells);
            columns
                .filter(|(column, _)| wide || !column.wide)
                .map(|(_, cell)| cell.clone())
                .collect()
        };
        let headings: Vec<String> = self.columns.iter().map(|c| c.name.to_owned()).collect();
        let mut table = comfy_table::Table::new();
        table.load_style(NOTHING).set_header(shown(&headings));
        table.add_rows(self.rows.iter().map(|row| shown(row)));
        for column in table.column_iter_mut() {
            column.set_padding((0, 3));
        }
        table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
    }

    fn objects(&self) -> Value {
        let object = |row: &Vec<String>| {
            let fields = self.columns.iter().zip(row);
            let fields = fields.map(|(column, cell)| (column.field(), Value::String(cell.clone())));
            Value::Object(fields.collect::<Map<_, _>>())
        };
        Value::Array(self.rows.iter().map(object).collect())
    }
}

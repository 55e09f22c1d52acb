//! What the size of a cluster costs: an agent that starts, first packets, and changes until they are served. Run it with
//! `cargo xtask bench sizes`.
//!
//! The API server stand-in is in this process, and shares the processors with the agent.

mod scene;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use serde_json::json;

use scene::Scene;

/// Measures an agent beside clusters of several sizes.
#[derive(Parser)]
struct Args {
    /// How many Services of ten endpoints there are
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1_000, 10_000, 30_000])]
    services: Vec<u32>,

    /// The program `portal`
    #[arg(long)]
    portal: PathBuf,

    /// Where the results are put
    #[arg(long)]
    results: PathBuf,
}

/// How many changes are timed.
const CHANGES: usize = 200;
/// How many other changes there are in a second.
const OTHERS: u32 = 100;

/// What was measured of one size.
struct Measured {
    services: u32,
    /// From the start of the process until the first connection by a VIP.
    start: Duration,
    /// The processor time that the agent took for it.
    start_cpu: Duration,
    /// Bytes.
    resident: u64,
    /// Bytes.
    tables: u64,
    /// The first connection by a VIP to one without: medians.
    first: [Duration; 2],
    /// A change until it is served: half of them, and 99 of 100.
    changes: [Duration; 2],
    /// The same beside others.
    beside: [Duration; 2],
    /// The agent's share of a processor then.
    busy: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut measured = Vec::new();
    for services in args.services {
        eprintln!("  {services} Services of ten endpoints ...");
        measured.push(measure(&args.portal, services));
    }
    fs::create_dir_all(&args.results)?;
    let path = args.results.join("sizes.json");
    let rows: Vec<_> = measured.iter().map(Measured::as_json).collect();
    fs::write(&path, serde_json::to_vec_pretty(&rows)?)?;
    println!("{}\n{} has this as JSON", table(&measured), path.display());
    Ok(())
}

fn measure(portal: &std::path::Path, services: u32) -> Measured {
    let mut scene = Scene::new(services);
    let start = scene.start(portal);
    let agent = scene.agent();
    let (start_cpu, resident, tables) =
        (agent.processor_time(), agent.memory("VmRSS"), agent.table_memory());
    let first = scene.first_connections().map(|times| quantile(times, 50));
    let both = |times: Vec<Duration>| [quantile(times.clone(), 50), quantile(times, 99)];
    let changes = both(scene.changes(CHANGES));
    let (times, busy) = scene.changes_beside(CHANGES, OTHERS);
    Measured {
        services,
        start,
        start_cpu,
        resident,
        tables,
        first,
        changes,
        beside: both(times),
        busy,
    }
}

/// What so many of a hundred took at most.
fn quantile(mut times: Vec<Duration>, of_hundred: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * of_hundred / 100).min(times.len() - 1)]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Measured {
    fn as_json(&self) -> serde_json::Value {
        json!({
            "services": self.services,
            "cold_start_ms": milliseconds(self.start),
            "cold_start_cpu_ms": milliseconds(self.start_cpu),
            "resident_bytes": self.resident,
            "table_bytes": self.tables,
            "first_connection_ms": self.first.map(milliseconds),
            "change_ms": self.changes.map(milliseconds),
            "change_beside_others_ms": self.beside.map(milliseconds),
            "busy_beside_others": self.busy,
        })
    }

    fn cells(&self) -> Vec<String> {
        let of = |[half, most]: [Duration; 2]| {
            format!("{:.2} / {:.2}", milliseconds(half), milliseconds(most))
        };
        let [first, straight] = self.first;
        vec![
            self.services.to_string(),
            format!("{:.0}", milliseconds(self.start)),
            format!("{:.0}", milliseconds(self.start_cpu)),
            (self.resident / 1_000_000).to_string(),
            (self.tables / 1_000_000).to_string(),
            format!("{:.2}", first.as_secs_f64() / straight.as_secs_f64()),
            of(self.changes),
            of(self.beside),
            format!("{:.0} %", 100.0 * self.busy),
        ]
    }
}

fn table(measured: &[Measured]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "Services",
        "cold start, ms",
        "its CPU, ms",
        "RSS, MB",
        "tables, MB",
        "first connection, to straight",
        "change, ms (p50 / p99)",
        "beside 100 others a second",
        "agent's CPU then",
    ]);
    table.add_rows(measured.iter().map(Measured::cells));
    table.column_iter_mut().for_each(|c| c.set_cell_alignment(CellAlignment::Right));
    table
}

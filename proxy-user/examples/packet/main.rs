//! What a packet costs in each program: nanoseconds over a program that does nothing, beside the floor, which is the least that a
//! program has to do to translate a packet. Run it with `cargo xtask bench packet`.
//!
//! `BPF_PROG_TEST_RUN` does not give a packet its bytes back between two runs, so that a program that translates would see its own
//! output. A small program in front does, and goes on with the one that is measured.

mod paths;
mod runs;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use portal::kernel::Sizes;
use portal::testing::installed::{Installed, options};
use portal::testing::namespace::Mounts;
use serde_json::json;

use paths::Row;
use runs::Runs;

const BPFFS: &str = "/mnt/bpf";

/// Measures what a packet costs, by path.
#[derive(Parser)]
struct Args {
    /// The datapath's object
    #[arg(long)]
    object: PathBuf,

    /// The object with the bench's own programs
    #[arg(long)]
    bench: PathBuf,

    /// Only paths whose names hold this
    #[arg(long, default_value = "")]
    only: String,

    /// Where the results are put
    #[arg(long)]
    results: PathBuf,
}

/// Nanoseconds of a path, and of the floor on the same packets.
struct Measured {
    name: String,
    ns: f64,
    floor: Option<f64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (object, bench) = (read(&args.object)?, read(&args.bench)?);
    let mounts = Mounts::new();
    mounts.bpffs(BPFFS);
    let measured = mounts.run(|| measure(&object, &bench, &args.only))?;
    fs::create_dir_all(&args.results)?;
    let path = args.results.join("packet.json");
    let of = |m: &Measured| json!({"path": m.name, "ns": m.ns, "floor_ns": m.floor});
    let rows: Vec<_> = measured.iter().map(of).collect();
    fs::write(&path, serde_json::to_vec_pretty(&rows)?)?;
    println!("{}", table(&measured));
    println!("ns over a program that does nothing; {} has this as JSON", path.display());
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn measure(object: &[u8], bench: &[u8], only: &str) -> Result<Vec<Measured>> {
    let mut options = options(Path::new(BPFFS));
    options.sizes = Sizes { flows: 2_400_000, embryos: 262_144, ..Sizes::DEFAULT };
    let mut installed = Installed::new(&options, object);
    installed.serve(&paths::services());
    let mut runs = Runs::new(bench, &installed.programs)?;
    let wanted = paths::rows().into_iter().filter(|row| row.name.contains(only));
    wanted.map(|row| of_row(&mut runs, &row)).collect()
}

fn of_row(runs: &mut Runs, row: &Row) -> Result<Measured> {
    runs.walk(&row.before, row.flows)?;
    let name = row.name.clone();
    runs.check(&row.seen).with_context(|| name.clone())?;
    let ns = runs.over_nothing(&row.seen, row.flows)?;
    let floor = row.has_floor.then(|| runs.of_floor(&row.seen, row.flows)).transpose()?;
    Ok(Measured { name, ns, floor })
}

fn table(measured: &[Measured]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["packet", "ns", "floor", "ratio"]);
    for Measured { name, ns, floor } in measured {
        let floor_text = floor.map_or_else(String::new, |floor| format!("{floor:.0}"));
        let ratio = floor.map_or_else(String::new, |floor| format!("{:.2}", ns / floor));
        table.add_row([name.clone(), format!("{ns:.0}"), floor_text, ratio]);
    }
    table.column_iter_mut().skip(1).for_each(|c| c.set_cell_alignment(CellAlignment::Right));
    table
}

//! The bench: the same load straight to a pod, through Portal and through rules as kube-proxy writes them, in turn. Run it with
//! `cargo xtask bench`.
//!
//! Each column is a world of its own, all of them up at once; of each row the columns are measured one after the other, round after
//! round, so that what else happens on the machine meets all of them. Only ratios to the straight way tell.

mod columns;
mod load;
mod report;
mod rules;
mod web;

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use columns::{Column, Door};
use load::{Load, Tools};
use report::Report;

/// Measures new connections, requests, datagrams and bulk by each door, beside the straight way and rules of the kernel's NAT.
#[derive(Parser)]
struct Args {
    /// How many rounds there are
    #[arg(long)]
    rounds: usize,

    /// How long each measurement takes
    #[arg(long)]
    seconds: u64,

    /// Only doors and loads whose names hold this
    #[arg(long, default_value = "")]
    only: String,

    /// Only columns whose names hold one of these
    #[arg(long, value_delimiter = ',')]
    columns: Vec<String>,

    /// How many other Services there are
    #[arg(long, default_value_t = 100)]
    services: u16,

    /// Measure although something else keeps this machine busy
    #[arg(long)]
    busy: bool,

    /// Another build of `portal`, which gets a column
    #[arg(long)]
    other: Option<PathBuf>,

    /// The folder with the programs `portal` and `portal-probe`
    #[arg(long)]
    programs: PathBuf,

    /// The folder that Debian's wrk, iperf3 and iptables were unpacked into
    #[arg(long)]
    tools: PathBuf,

    /// Where the results are put
    #[arg(long)]
    results: PathBuf,
}

/// Above this share of the processors' time the machine is busy.
const BUSY: f64 = 0.1;
/// For how long the machine is watched.
const WATCHED: Duration = Duration::from_secs(2);
/// How often it is, before it is given up.
const LOOKS: u32 = 15;

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(
        args.busy || becomes_idle()?,
        "something else keeps this machine busy, and what is measured would not tell much: wait, or measure \
         all the same with --busy"
    );
    let is_wanted = |name: &str| {
        args.columns.is_empty() || args.columns.iter().any(|text| name.contains(text.as_str()))
    };
    let columns =
        Column::all(&args.programs, &args.tools, args.other.as_deref(), args.services, is_wanted);
    ensure!(columns.len() > 1, "no column has a name with {}", args.columns.join(" or "));
    let tools = Tools::new(args.tools, Duration::from_secs(args.seconds));
    columns.iter().for_each(|column| tools.wait(column));
    let rows = Door::ALL.iter().flat_map(|door| Load::ALL.map(|load| (*door, load)));
    let is_wanted = |(door, load): &(Door, Load)| {
        format!("{}, {}", door.label(), load.label()).contains(&args.only)
    };
    let rows: Vec<(Door, Load)> = rows.filter(is_wanted).collect();
    let steps = rows.len() * columns.len() * args.rounds;
    let bar = ProgressBar::new(steps as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {eta} left: {msg}")?);
    let mut report = Report::new(columns.iter().map(|column| column.name).collect(), args.services);
    for (door, load) in rows {
        for _ in 0..args.rounds {
            for (index, column) in columns.iter().enumerate() {
                bar.set_message(format!("{}, {}, {}", door.label(), load.label(), column.name));
                let figure = tools.measure(column, door, load).with_context(|| {
                    format!("{} by {}: {}", load.label(), door.label(), column.name)
                })?;
                report.add((door, load), index, figure);
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    fs::create_dir_all(&args.results)?;
    report.write(&args.results)?;
    print!("{report}");
    println!("\n{} has this as JSON, and charts as SVG", args.results.display());
    Ok(())
}

/// Whether nothing else takes the processors' time, now or in some seconds: what was built before this has to be written.
fn becomes_idle() -> Result<bool> {
    for _ in 0..LOOKS {
        let [idle, all] = processor_time()?;
        thread::sleep(WATCHED);
        let [idle_then, all_then] = processor_time()?;
        if 1.0 - (idle_then - idle) / (all_then - all) < BUSY {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The time of all processors since the machine started, in the kernel's ticks: what they were idle, and all of it.
fn processor_time() -> Result<[f64; 2]> {
    // user nice system idle iowait irq softirq steal
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let times: Vec<f64> =
        line.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<_, _>>()?;
    let idle = times.get(3).context("/proc/stat has no idle time")? + times.get(4).unwrap_or(&0.0);
    Ok([idle, times.iter().sum()])
}

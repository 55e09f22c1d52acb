//! The bench: builds and fetches all it needs, then runs proxy-user's example `bench`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Suite;
use crate::build::{self, OBJECT_VARIABLE};
use crate::steps::{cargo, openly, quietly, target};

/// Who makes the load, and who writes one kind of rules: packages and their programs.
const TOOLS: [(&str, &str); 3] = [
    ("wrk", "usr/bin/wrk"),
    ("iperf3", "usr/bin/iperf3"),
    ("iptables", "usr/sbin/xtables-nft-multi"),
];
/// The columns of a quick bench.
const QUICK: [&str; 5] = ["Portal tc", "Portal sockets", "nftables", "iptables", "other Portal"];
/// What every system has of its own, which must fit its loader.
const SYSTEM: [&str; 3] = ["libc6", "libgcc-s1", "gcc-12-base"];

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,

    /// Fewer and shorter rounds, without the columns of idle programs and of XDP: some minutes
    #[arg(long)]
    quick: bool,

    /// How long each measurement takes, in seconds
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,

    /// Only doors and loads whose names hold this, as in `--only "NodePort → remote pod, kept-alive"`
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Only columns whose names hold one of these, as in `--columns "Portal tc,nftables"`; the straight one is always there
    #[arg(long, value_name = "TEXT,…", value_delimiter = ',')]
    columns: Vec<String>,

    /// How many other Services there are
    #[arg(long, default_value_t = 100)]
    services: u16,

    /// Measure although something else keeps this machine busy
    #[arg(long)]
    busy: bool,

    /// Another build of `portal`, which gets a column
    #[arg(long, value_name = "PROGRAM")]
    other: Option<PathBuf>,
}

#[derive(clap::Subcommand)]
enum What {
    /// What the size of a cluster costs: an agent that starts, its memory, first connections, changes until they are served
    Sizes {
        /// How many Services of ten endpoints there are
        #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [10, 1_000, 10_000, 30_000])]
        services: Vec<u32>,
    },

    /// What a packet costs in each program, in nanoseconds, beside the least that it has to
    Packet {
        /// Only paths whose names hold this, as in `--only IPv4`
        #[arg(long, value_name = "TEXT", default_value = "")]
        only: String,
    },
}

pub fn run(args: &Args) -> Result<()> {
    match &args.what {
        Some(What::Packet { only }) => packets(only),
        Some(What::Sizes { services }) => sizes(services),
        None => worlds(args),
    }
}

/// Runs proxy-user's example `packet`.
fn packets(only: &str) -> Result<()> {
    let (object, own) = (build::ebpf_object()?, build::ebpf_bench()?);
    let mut build = cargo();
    build.args(["build", "--quiet", "--release", "--package", "proxy-user"]);
    build.args(["--features", "testing", "--example", "packet"]);
    build.env(OBJECT_VARIABLE, &object);
    quietly("building the bench", "3 min at the first time", &mut build)?;
    let mut bench = Command::new(target().join("release/examples/packet"));
    bench.arg("--object").arg(object).arg("--bench").arg(own).args(["--only", only]);
    bench.arg("--results").arg(target().join("bench"));
    openly(&mut bench)
}

/// Runs proxy-user's example `sizes`.
fn sizes(services: &[u32]) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--quiet", "--release", "--package", "proxy-user"]);
    build.args(["--features", "testing", "--bin", "portal", "--example", "sizes"]);
    build.env(OBJECT_VARIABLE, build::ebpf_object()?);
    quietly("building portal and the bench", "4 min at the first time", &mut build)?;
    let folder = target().join("release");
    let services: Vec<String> = services.iter().map(u32::to_string).collect();
    let mut bench = Command::new(folder.join("examples/sizes"));
    bench.args(["--services", &services.join(",")]).arg("--portal").arg(folder.join("portal"));
    bench.arg("--results").arg(target().join("bench"));
    openly(&mut bench)
}

/// Runs proxy-user's example `bench`.
fn worlds(args: &Args) -> Result<()> {
    let object = build::ebpf_object()?;
    let tools = tools()?;
    let mut build = cargo();
    build.args(["build", "--quiet", "--release", "--package", "proxy-user"]);
    build.args(["--features", "testing", "--bin", "portal", "--example", "bench"]);
    build.env(OBJECT_VARIABLE, object);
    quietly("building portal and the bench", "4 min at the first time", &mut build)?;
    let programs = target().join("release");
    let mut bench = Command::new(programs.join("examples/bench"));
    bench.arg("--programs").arg(&programs).arg("--tools").arg(tools);
    bench.arg("--results").arg(target().join("bench"));
    bench.args(["--services", &args.services.to_string()]);
    let (rounds, seconds) = if args.quick { ("3", 1) } else { ("7", 3) };
    bench.args(["--rounds", rounds, "--seconds", &args.seconds.unwrap_or(seconds).to_string()]);
    if args.busy {
        bench.arg("--busy");
    }
    if let Some(only) = &args.only {
        bench.args(["--only", only]);
    }
    let columns = match &*args.columns {
        [] if args.quick => QUICK.join(","),
        columns => columns.join(","),
    };
    if !columns.is_empty() {
        bench.args(["--columns", &columns]);
    }
    if let Some(other) = &args.other {
        bench.arg("--other").arg(other);
    }
    openly(&mut bench)
}

/// Debian's packages, unpacked beside the system.
fn tools() -> Result<PathBuf> {
    let folder = target().join("tools/bench");
    if TOOLS.iter().all(|(_, program)| folder.join(program).exists()) {
        return Ok(folder);
    }
    let suite =
        Suite::open("bookworm", &target().join("tools")).context("no wrk, iperf3 and iptables")?;
    let mut packages = suite.closure(&TOOLS.map(|(package, _)| package))?;
    packages.retain(|package| !SYSTEM.contains(&package.as_str()));
    suite.unpack("wrk, iperf3 and iptables", &packages, &folder)?;
    Ok(folder)
}

//! The search for packets that do not become what a model of a NAT says they should.

use anyhow::Result;

use crate::steps::{cargo, openly};

#[derive(clap::Args)]
pub struct Args {
    /// How many packets of each family
    #[arg(long, default_value_t = 10_000_000)]
    packets: u64,

    /// Which random packets they are; the same number, the same packets
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Runs the search on the datapath's host build.
pub fn run(args: &Args) -> Result<()> {
    let mut search = cargo();
    search.args(["test", "--release", "--package", "proxy-ebpf", "--test", "datapath", "--quiet"]);
    search.args(["--", "random_"]);
    search.env("PORTAL_FUZZ_PACKETS", args.packets.to_string());
    search.env("PORTAL_FUZZ_SEED", args.seed.to_string());
    openly(&mut search)
}

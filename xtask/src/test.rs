//! The tiers of tests.

use anyhow::Result;
use clap::ValueEnum;

use crate::build::{self, OBJECT_VARIABLE};
use crate::steps::{cargo, openly};
use crate::{toolchain, vm};

#[derive(clap::Args)]
pub struct Args {
    /// Which tier; all of them if not given
    tier: Option<Tier>,

    /// Only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Tier {
    /// Everything that needs neither root nor an eBPF toolchain
    Pure,
    /// The datapath in the kernel, by test runs (root)
    Kernel,
    /// Agents as processes, with an API server stand-in that may misbehave (root)
    Control,
    /// Real sockets across network namespaces (root)
    Network,
    /// The kernel tier and a network scene on one kernel that is not this machine's, in qemu
    Kernels,
}

pub fn run(args: &Args) -> Result<()> {
    if args.tier.is_none_or(|tier| tier == Tier::Pure) {
        let mut pure = cargo();
        pure.args(["test", "--workspace", "--quiet"]);
        openly(filtered(&mut pure, args))?;
    }
    let with_root: &[Tier] = match args.tier {
        None => &[Tier::Kernel, Tier::Control, Tier::Network],
        Some(Tier::Pure) => return Ok(()),
        Some(Tier::Kernels) => return vm::run_one(args.filter.as_deref()),
        Some(_) => args.tier.as_slice(),
    };
    toolchain::need("bpftool", "bpftool")?;
    toolchain::need("nft", "nftables")?;
    // The agent that the tests start, and the object that they load.
    build::binary(false)?;
    let object = build::ebpf_object()?;
    let mut tests = cargo();
    tests.args(["test", "--package", "proxy-user", "--features", "testing", "--quiet"]);
    for tier in with_root {
        for file in files_of(*tier) {
            tests.args(["--test", file]);
        }
    }
    openly(filtered(tests.env(OBJECT_VARIABLE, object), args))?;
    if args.tier.is_none() && args.filter.is_none() { vm::run_one(None) } else { Ok(()) }
}

fn files_of(tier: Tier) -> &'static [&'static str] {
    match tier {
        Tier::Pure | Tier::Kernels => &[],
        Tier::Kernel => &["kernel"],
        Tier::Control => &["control"],
        Tier::Network => {
            &["network", "doors", "scenarios", "worlds", "matrix", "firewalls", "load", "kernels"]
        }
    }
}

fn filtered<'a>(
    command: &'a mut std::process::Command,
    args: &Args,
) -> &'a mut std::process::Command {
    match &args.filter {
        Some(filter) => command.arg(filter),
        None => command,
    }
}
